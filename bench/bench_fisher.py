"""What the exact Fisher form of one SAE costs beside its patched forward: CPU time, one thread, interleaved.

OMP_NUM_THREADS=1 python bench/bench_fisher.py [stdlib-l]
OMP_NUM_THREADS=1 python bench/bench_fisher.py EleutherAI/pythia-70m      # its shape, random weights
"""

import bench
from common import run_script
from transport_geometry.measuring import fisher
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.running.cost import PYTHIA, shape_of
from transport_geometry.running.run import CPU, eval_batch
from transport_geometry.text.heldout import heldout_rows

import torch

LINE = "{name} layer {layer}, {shape}: {job:16} {ms:7.1f} ms, {ratio:.2f} x the patched forward"


def hook_and_text(name: str, ctx: int) -> tuple[Hook, torch.Tensor]:
    """The middle hook, and input_ids [B,T] of an evaluation batch; random ids for random weights."""
    generator = torch.Generator().manual_seed(0)
    if name in PYTHIA:
        model = shape_of(name, None).to_empty(device="cpu").eval().requires_grad_(False)
        model.init_weights()
        hook = Hook(model, model.config.num_hidden_layers // 2)
        return hook, torch.randint(model.config.vocab_size, (2, ctx), generator=generator)
    model, tokenizer = load_model(name, CPU)
    hook = Hook(model, model.config.num_hidden_layers // 2)
    return hook, heldout_rows("stdlib", tokenizer, ctx=ctx, n=eval_batch(hook, ctx)).input_ids


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("model", nargs="?", default="stdlib-l")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--n", type=int, default=15, help="rounds")
    args = parser.parse_args()
    hook, x = hook_and_text(args.model, args.ctx)
    h = hook.head(x)
    delta = 0.3 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = hook.log_probs(x, h).exp()
        jobs = {
            "patched forward": lambda: hook.log_probs(x, h + delta),
            "sequence form": lambda: fisher.sequence_form(hook, x, h, delta, p),
            "same form": lambda: fisher.same_form(hook, x, h, delta, p),
        }
        seconds = bench.take_turns(jobs, args.n)
    for job, median in seconds.items():
        ratio = median / seconds["patched forward"]
        shape = tuple(h.shape)
        print(
            LINE.format(name=args.model, layer=hook.layer, shape=shape, job=job, ms=1e3 * median, ratio=ratio)
        )


if __name__ == "__main__":
    run_script(main)
