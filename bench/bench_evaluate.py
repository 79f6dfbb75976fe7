"""Exp-B's evaluation of many SAEs of one hook, against the same numbers one SAE at a time. Run by hand:

    OMP_NUM_THREADS=1 python bench/bench_evaluate.py            # 24 SAEs, a model of Pythia-70m's shape
    python bench/bench_evaluate.py --small                      # a toy, to see whether it runs

The model has Pythia-70m's shape and random weights, the SAEs (F = 32 d, k from 8 to 256) random rows: what
is measured is time, not quality. `one at a time` is what a user would write: for each SAE a hooked forward of
the whole model, a backward of its own for every set of labels, a dense SAE (relu, topk, dense decode), and
the model run again for the patch, the patch with clean sinks, and both ablations. Both give the same numbers,
to rounding. In CPU seconds.
"""

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import bench
from transport_geometry.measuring.evaluate import Activations, activations, evaluate, label_uniforms
from transport_geometry.models.lm import Hook
from transport_geometry.running.run import eval_batch
from transport_geometry.saes.sae import TopKSAE, tied_init

import numpy as np
import torch
import transformers

KS = (8, 16, 32, 64, 128, 256)
LINE = "{what:34s} {seconds:8.2f} s  {share:6.1%}"


def make_model(d: int, blocks: int, heads: int, vocab: int) -> Any:
    """GPT-NeoX of random weights."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=d,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        vocab_size=vocab,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        initializer_range=0.06,
    )
    return transformers.GPTNeoXForCausalLM(config).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ one at a time
def hooked(model: Any, layer: int, x: torch.Tensor, replace: Callable) -> torch.Tensor:
    """Logits [B,T,V] of the whole model with replace(h) in the place of block `layer`'s output."""
    block = model.gpt_neox.layers[layer]
    with block.register_forward_hook(lambda module, inputs, output: replace(output)):
        return model(x, use_cache=False).logits


def one_at_a_time(
    hook: Hook, sae: TopKSAE, x: torch.Tensor, uniforms: torch.Tensor, shared: Activations, sink: torch.Tensor
) -> dict[str, torch.Tensor]:
    """{quantity: [B,T-1]} of one SAE on one batch x [B,T]; uniforms [m,B,T-1], sink [B,T-1]."""
    model, layer, kept = hook.model, hook.layer, []

    def watched(h: torch.Tensor) -> torch.Tensor:
        kept.append(h.detach().requires_grad_())
        return kept[0]

    with torch.enable_grad():
        log_p = torch.log_softmax(hooked(model, layer, x, watched)[:, :-1], -1)
    p, targets = log_p.detach().exp(), x[:, 1:, None]
    cdf = p.cumsum(-1)
    drawn = [torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True) for u in uniforms]
    gradients = []
    for y in (targets, *(one.clamp(max=p.shape[-1] - 1) for one in drawn)):
        with torch.enable_grad():
            loss = -log_p.gather(-1, y).sum()
        gradients.append(torch.autograd.grad(loss, kept[0], retain_graph=True)[0][:, :-1])
    log_p = log_p.detach()

    whole = kept[0].detach()
    h = whole[:, :-1]
    pre = torch.relu((h - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    top, index = pre.topk(sae.k, dim=-1)
    z = torch.zeros_like(pre).scatter_(-1, index, top)
    h_hat = z @ sae.W_dec + sae.b_dec
    delta, centred = h_hat - h, h - shared.mean

    def loss_with(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fed = torch.cat([at, whole[:, -1:]], 1)
        log_q = torch.log_softmax(hooked(model, layer, x, lambda h: fed)[:, :-1], -1)
        return -log_q.gather(-1, targets).squeeze(-1), log_q

    ce_recon, log_q = loss_with(h_hat)
    kl = (p * (log_p - log_q)).sum(-1)
    g, *sampled = gradients
    return {
        "sse": delta.square().sum(-1),
        "sst": centred.square().sum(-1),
        "h_sq": h.square().sum(-1),
        "cosine": torch.cosine_similarity(h, h_hat, -1),
        "relerr": delta.norm(dim=-1) / (h.norm(dim=-1) + 1e-10),
        "gd": (g * delta).sum(-1),
        "gd_sq": (g * delta).sum(-1).square(),
        "fisher": torch.stack([(one * delta).sum(-1).square() for one in sampled]).mean(0),
        "fisher_h": torch.stack([(one * centred).sum(-1).square() for one in sampled]).mean(0),
        "ce_orig": -log_p.gather(-1, targets).squeeze(-1),
        "ce_recon": ce_recon,
        "kl": kl,
        "ce_sinkclean": loss_with(torch.where(sink[..., None], h, h_hat))[0],
        "ce_zero": loss_with(torch.zeros_like(h))[0],
        "ce_mean": loss_with(shared.mean.expand_as(h))[0],
        "l0": (z > 0).sum(-1),
    }


# ------------------------------------------------------------------------------------------ where time goes
class Clock:
    """CPU seconds within functions; what one spends in another that is watched is the other's."""

    def __init__(self) -> None:
        self.spent: collections.Counter[str] = collections.Counter()
        self.inside: list[float] = [0.0]

    def watch(self, owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def around(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.spent[what] += took - self.inside.pop()  # type: ignore[assignment]
                self.inside[-1] += took

        setattr(owner, name, around)


def watch_evaluation(clock: Clock) -> None:
    from transport_geometry.measuring import evaluate as module
    from transport_geometry.models import lm

    clock.watch(Hook, "clean_pass", "clean run and gradients: blocks")
    clock.watch(Hook, "final", "patched runs: blocks after the hook")
    clock.watch(Hook, "logits", "unembedding")
    clock.watch(Hook, "_expected_row", "unembedding, of p")
    clock.watch(lm, "log_softmax", "log-softmax")
    clock.watch(module, "log_softmax", "log-softmax")
    clock.watch(module, "kl_divergence", "KL")
    clock.watch(TopKSAE, "encode", "encode")
    clock.watch(module, "patched", "decode and distortion")
    clock.watch(module, "patch_quantities", "per-token quantities")
    clock.watch(module, "outcomes", "losses, the rest")


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--small", action="store_true", help="a toy shape")
    parser.add_argument("--saes", type=int, default=24)
    parser.add_argument("--alone", type=int, default=6, help="of them one at a time, spread over k")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--ctx", type=int, default=256)
    args = parser.parse_args()
    shape = (32, 2, 2, 512) if args.small else (512, 6, 8, 50304)
    ctx, expansion = (16, 4) if args.small else (args.ctx, 32)
    model = make_model(*shape)
    hook, d = Hook(model, shape[1] // 2), shape[0]
    input_ids = torch.randint(0, shape[3], (args.sequences, ctx), generator=torch.Generator().manual_seed(0))
    batch = eval_batch(hook, ctx, vocabulary=False)
    with torch.no_grad():
        shared = activations(hook, input_ids, batch)
        saes = {}
        for i in range(args.saes):
            k = min(KS[i % len(KS)], expansion * d)
            saes[f"k={k} #{i}"] = tied_init(d, expansion * d, k, i, shared.mean).requires_grad_(False)
        picked = [list(saes)[i] for i in np.linspace(0, len(saes) - 1, args.alone).astype(int)]
        uniforms = label_uniforms(input_ids)
        # both once, so that neither pays for what is made once
        evaluate(hook, input_ids[:1], {picked[0]: saes[picked[0]]}, batch)
        one_at_a_time(
            hook, saes[picked[0]], input_ids[:1], uniforms[:1].transpose(0, 1), shared, shared.sink[:1]
        )
        alone: dict[str, list] = {name: [] for name in picked}
        spent_alone = 0.0
        for start in range(0, len(input_ids), 2):
            here = slice(start, start + 2)
            for name in picked:
                began = time.process_time()
                found = one_at_a_time(
                    hook,
                    saes[name],
                    input_ids[here],
                    uniforms[here].transpose(0, 1),
                    shared,
                    shared.sink[here],
                )
                spent_alone += time.process_time() - began
                alone[name].append(found)
    clock = Clock()
    watch_evaluation(clock)
    began = time.process_time()
    results = evaluate(hook, input_ids, saes, batch)
    spent = time.process_time() - began
    worst: dict[str, float] = {}
    for name, parts in alone.items():
        for q in parts[0]:
            truth = torch.cat([part[q] for part in parts]).double().sum(1).numpy()
            scale = np.abs(truth).max()
            worst[q] = max(worst.get(q, 0.0), float(np.abs(results[name].sums[q] - truth).max() / scale))
    n, each = args.sequences * ctx, spent_alone / len(picked)
    threads = torch.get_num_threads()
    print(f"{len(saes)} SAEs, {args.sequences} x {ctx} tokens, {threads} threads, batch {batch}")
    for what, seconds, note in (
        ("one at a time", each, f" ({len(picked)} of them measured)"),
        ("together", spent / len(saes), ""),
    ):
        print(f"{what}: {seconds:.2f} CPU-s an SAE, {seconds / n * 1e3:.2f} ms a token{note}")
    print(f"ratio: {each * len(saes) / spent:.2f}\n")
    for what, seconds in clock.spent.most_common():
        print(LINE.format(what=what, seconds=seconds, share=seconds / spent))
    print("\nlargest difference of a sequence's sum, over the largest sum:")
    print(", ".join(f"{q} {value:.0e}" for q, value in worst.items()))


if __name__ == "__main__":
    main()
