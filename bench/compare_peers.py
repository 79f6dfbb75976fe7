"""TopK SAEs trained, evaluated and read by this project, SAELens and sparsify, on the same activations. Run
by hand:

    python3 -m venv /tmp/peers && . /tmp/peers/bin/activate
    pip install -e . -c constraints.txt
    pip install sae-lens==6.54.12 eai-sparsify==1.3.3 -c constraints.txt
    python bench/compare_peers.py                     # 200k tokens, k = 8 and 32, one seed: about 6 CPU-minutes
    python bench/compare_peers.py --seeds 0,1,2
    python bench/compare_peers.py --tokens 1M

Prints Markdown tables: (1) quality at equal tokens, (2) this project's metrics beside those of SAELens' own
evaluation functions, (3) a saved SAE read back by sparsify. Exit status 1, with the reasons, if (2) or (3)
disagree by more than 1e-4 or if recipe `base` explains less held-out variance than a peer. No network. On a
busy machine OMP_NUM_THREADS=1 is faster.

Shapes: N tokens, d = d_model, F = d_sae.
"""

import argparse
import contextlib
import importlib.metadata
import io
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # with triton installed it fails on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from common import parse_count, parse_ints
from transport_geometry import kernels
from transport_geometry.evaluate import evaluate
from transport_geometry.lm import head
from transport_geometry.metrics import metrics
from transport_geometry.models import load_model
from transport_geometry.sae import TopKSAE, save_sae, sink_positions
from transport_geometry.tables import readable_count
from transport_geometry.text import heldout_rows
from transport_geometry.train import CHUNK, Training, activation_chunks

import numpy as np
import torch
from sae_lens import TopKSAE as LensSAE
from sae_lens import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import (
    EvalConfig,
    get_downstream_reconstruction_metrics,
    get_sparsity_and_variance_metrics,
    run_evals,
)
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from tqdm import tqdm

MODEL, LAYER, CTX, EXPANSION = "stdlib-l", 3, 256, 8
EVAL_SEQS, PARITY_SEQS, BATCH = 48, 16, 8  # sequences
TOLERANCE = 1e-4
LENS_STEP = 4096  # tokens per step: LanguageModelSAERunnerConfig.train_batch_size_tokens
SPARSIFY_STEP = 32 * CTX  # TrainConfig.batch_size is 32 sequences


# ------------------------------------------------------------------------------------------- three trainers
# Each takes h [N,d], order [N], d_sae, k, seed, and gives a function h [n,d] -> (h_hat [n,d], active [n,F] bool).
# `order` is the order in which recipe `base` draws its tokens, so that all see the same tokens in the same order.


def quiet() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def train_order(n: int, seed: int) -> torch.Tensor:
    """The order of Training.feed over all its chunks."""
    shuffle = lambda size, i: torch.randperm(
        size, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)
    )
    return torch.cat(
        [start + shuffle(min(CHUNK, n - start), i) for i, start in enumerate(range(0, n, CHUNK))]
    )


def run_topk_sae(sae: TopKSAE) -> Callable:
    def forward(h):
        values, indices = sae.encode(h)
        active = torch.zeros(len(h), len(sae.W_enc), dtype=torch.bool)
        return sae.decode(values, indices), active.scatter_(1, indices.long(), values > 0)

    return forward


def base(h, sink, d_sae, k, seed) -> TopKSAE:
    n = len(h)
    training = Training(Training.describe(h[:CHUNK], sink[:CHUNK]), d_sae, k, seed, [n])
    for start in range(0, n, CHUNK):
        training.feed(h[start : start + CHUNK], start, tqdm(disable=True), "base")
    return training.finished()


def saelens(h, order, d_sae, k, seed, step, helped=False) -> Callable:
    """SAETrainer, whose data_provider is any iterator of activation batches. Its defaults suit neither raw
    activations of this norm nor a run under 1000 steps; `helped` turns on its own normalisation, and AuxK
    after a tenth of the run.
    """
    torch.manual_seed(seed)
    # its rate is constant: lr_end unused
    config = SAETrainerConfig(len(h), train_batch_size_samples=step, lr_end=0.0)
    batches, first = order.split(step), ()
    if helped:
        config.dead_feature_window = len(batches) // 10
        config.n_batches_for_norm_estimate = min(100, len(batches))
        first = batches[: config.n_batches_for_norm_estimate]  # it draws these before it trains
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=h.shape[1],
            d_sae=d_sae,
            k=k,
            normalize_activations="expected_average_only_in" if helped else "none",
        )
    )
    with quiet():
        sae = SAETrainer(config, sae, (h[i] for i in (*first, *batches))).fit().requires_grad_(False)

    def forward(h):
        code = sae.encode(h)
        return sae.decode(code), code != 0

    return forward


class StreamAsModel(torch.nn.Module):
    """Stands for the language model that sparsify's Trainer insists on: "token" i is row i of h."""

    def __init__(self, h: torch.Tensor):
        super().__init__()
        self.stream = torch.nn.Embedding.from_pretrained(h)

    base_model = property(lambda self: self)
    device = property(lambda self: self.stream.weight.device)
    dummy_inputs = property(lambda self: {"input_ids": torch.zeros(1, 1, dtype=torch.long)})

    def forward(self, input_ids):
        return self.stream(input_ids)


def sparsify(h, order, d_sae, k, seed, step, **settings) -> Callable:
    """Its own Trainer.fit, one "sequence" per step; what it saves (ScheduleFree's average) is what counts."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = TrainConfig(
            SparseCoderConfig(num_latents=d_sae, k=k),
            batch_size=1,
            hookpoints=["stream"],
            init_seeds=[seed],
            save_every=10**9,
            save_dir=folder,
            log_to_wandb=False,
            **settings,
        )
        Trainer(config, [{"input_ids": i} for i in order.split(step)], StreamAsModel(h)).fit()
        torch.set_float32_matmul_precision("highest")  # fit() lowers it for the whole process
        return run_sparsify(SparseCoder.load_from_disk(f"{folder}/unnamed/stream").requires_grad_(False))


def run_sparsify(sae: SparseCoder) -> Callable:
    def forward(h):
        code = sae.encode(h)
        active = torch.zeros(len(h), sae.num_latents, dtype=torch.bool)
        return sae.decode(code.top_acts, code.top_indices), active.scatter_(
            1, code.top_indices, code.top_acts > 0
        )

    return forward


def quality(forward: Callable, h: torch.Tensor, sink: torch.Tensor) -> dict:
    """R^2 = 1 - SSE/SST in float64 with one mean for the set, over all positions and without sinks; alive
    share; L0.
    """
    h_hat, active = (torch.cat(parts) for parts in zip(*(forward(part) for part in h.split(4096))))
    r2 = lambda x, y: 1 - ((y - x).square().sum() / (x - x.mean(0)).square().sum()).item()
    x, y = h.double(), h_hat.double()
    return {
        "r2": r2(x, y),
        "r2_nosink": r2(x[~sink], y[~sink]),
        "alive": active.any(0).double().mean().item(),
        "l0": active.sum(1).double().mean().item(),
    }


def trainers(tokens: int) -> dict[str, Callable]:
    """Peers at their defaults, and with what a short run needs: more steps, and schedules that fit into the
    run.
    """
    ours = min(max(tokens // 1000, 256), 4096)
    steps = tokens // ours
    return {
        f"SAELens, its defaults ({LENS_STEP} tokens a step)": lambda *a: saelens(*a, LENS_STEP),
        f"SAELens, {ours} a step": lambda *a: saelens(*a, ours),
        f"SAELens, {ours} a step, normalised, AuxK after {steps // 10} steps": lambda *a: saelens(
            *a, ours, helped=True
        ),
        f"sparsify, its defaults (signum, {SPARSIFY_STEP} tokens a step)": lambda *a: sparsify(
            *a, SPARSIFY_STEP
        ),
        f"sparsify signum, {8 * ours} a step": lambda *a: sparsify(*a, 8 * ours),
        f"sparsify signum, {ours} a step": lambda *a: sparsify(*a, ours),
        f"sparsify adam, {ours} a step": lambda *a: sparsify(*a, ours, optimizer="adam"),
        f"sparsify adam, {ours} a step, warm-up {steps // 20} steps": lambda *a: sparsify(
            *a, ours, optimizer="adam", lr_warmup_steps=steps // 20
        ),
    }


# --------------------------------------------------------------------------------------- SAELens' evaluation
class Rows:
    """All that SAELens' evaluation asks of its ActivationsStore: the next batch of token rows."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.context_size, self.store_batch_size_prompts = rows, rows.shape[1], BATCH
        self.reset_input_dataset()

    def reset_input_dataset(self):
        self.batches = iter(self.rows.split(BATCH))

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        return next(self.batches)


def as_saelens(sae: TopKSAE, hook: str) -> LensSAE:
    d_sae, d = sae.W_dec.shape
    theirs = LensSAE(TopKSAEConfig(d_in=d, d_sae=d_sae, k=sae.k, metadata=SAEMetadata(hook_name=hook)))
    theirs.load_state_dict({"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec})
    return theirs.requires_grad_(False)


def parity(model, lens, rows: torch.Tensor, sae: TopKSAE, hook: str) -> list[list[tuple]]:
    """[(metric, ours, SAELens')] where the definitions coincide, and where run_evals' own choice of positions
    differs.

    Our mask is the positions that have a target, 0..T-2. SAELens' CE has the same; its h-side metrics and KL
    take every position, so they get rows without the last token: under a causal model that leaves positions
    0..T-2 as they were.
    """
    d = sae.W_dec.shape[1]
    sums = evaluate(model, LAYER, rows, {"sae": sae}, BATCH)["sae"]["sums"]
    ours = metrics({q: v[None] for q, v in sums.items()}, np.ones((1, len(rows))), d)
    ours = {name: v.item() for name, v in ours.items()}
    theirs, scaler, n = as_saelens(sae, hook), ActivationScaler(), len(rows) // BATCH
    downstream = lambda rows, **which: get_downstream_reconstruction_metrics(
        theirs,
        lens,
        Rows(rows),
        scaler,
        **{"compute_kl": False, "compute_ce_loss": False, **which},
        n_batches=n,
        eval_batch_size_prompts=BATCH,
    )
    ce, kl = downstream(rows, compute_ce_loss=True), downstream(rows[:, :-1], compute_kl=True)
    h_side, _ = get_sparsity_and_variance_metrics(
        theirs,
        lens,
        Rows(rows[:, :-1]),
        scaler,
        n_batches=n,
        eval_batch_size_prompts=BATCH,
        model_kwargs={},
        compute_l2_norms=False,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=False,
    )
    same = {
        "r2": h_side["explained_variance"],
        "mse": h_side["mse"] / d,
        "cosine": h_side["cossim"],
        "l0": h_side["l0"],
        "ce_orig": ce["ce_loss_without_sae"],
        "ce_recon": ce["ce_loss_with_sae"],
        "ce_zero": ce["ce_loss_with_ablation"],
        "frac_zero": ce["ce_loss_score"],
        "kl": kl["kl_div_with_sae"],
    }
    config = EvalConfig(
        n_eval_reconstruction_batches=n,
        n_eval_sparsity_variance_batches=n,
        compute_kl=True,
        compute_ce_loss=True,
        compute_variance_metrics=True,
    )
    # its defaults: every position, special tokens (here: end of text) left unpatched and out of the means
    groups, _ = run_evals(theirs, Rows(rows), lens, scaler, config)
    whole = {name: v for group in groups.values() for name, v in group.items()}
    apart = [
        ("r2", whole["explained_variance"]),
        ("r2", whole["explained_variance_legacy"]),
        ("frac_zero", whole["ce_loss_score"]),
        ("kl", whole["kl_div_with_sae"]),
    ]
    return [[(name, ours[name], value) for name, value in part] for part in (same.items(), apart)]


# ---------------------------------------------------------------------------------------------------- report
def table(columns: list[str], rows: list[list]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def spread(values: list[float], form: str) -> str:
    """Mean, and half the range over seeds."""
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):{form}}" + (f" ± {half:{form}}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="200k", type=parse_count)
    parser.add_argument("--k", default="8,32")
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    ks, seeds = parse_ints(args.k, "--k", 1), parse_ints(args.seeds, "--seeds", 0)
    model, tokenizer = load_model(MODEL, torch.device("cpu"))
    chunks = activation_chunks(model, LAYER, "stdlib", tokenizer, CTX, args.tokens, "keep")
    h, sink = (torch.cat(parts) for parts in zip(*chunks))
    rows = heldout_rows("stdlib", tokenizer, CTX, EVAL_SEQS).rows
    held = torch.cat([head(model, LAYER, part) for part in rows.split(BATCH)])[:, :-1]
    norms = held.norm(dim=-1)
    held_sink = sink_positions(norms, norms[:, 1:].median().item()).flatten()
    held, d_sae, failures = held.flatten(0, 1), EXPANSION * held.shape[-1], []

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "sae-lens", "eai-sparsify", "transformer-lens", "transformers")
    )
    print(f"{versions}; {kernels.describe()}\n")
    print(
        f"{MODEL} layer {LAYER}, F = {d_sae}, {readable_count(args.tokens)} training tokens, the same in the same "
        f"order.\nHeld out: {len(held)} positions of {EVAL_SEQS} sequences, {int(held_sink.sum())} sinks. Seeds "
        f"{args.seeds}; ± half the range.\nTime: CPU time of the process, base = 1.\n"
    )
    saes, lines = {}, []
    for k in ks:
        results, seconds = {}, {}
        everyone = {"**this project, `base`**": None, **trainers(args.tokens)}
        bar = tqdm(total=len(seeds) * len(everyone), desc=f"k={k}", leave=False)
        for seed in seeds:
            order = train_order(len(h), seed)
            for name, train in everyone.items():
                start = time.process_time()
                if train is None:
                    saes[k, seed] = base(h, sink, d_sae, k, seed)
                    forward = run_topk_sae(saes[k, seed])
                else:
                    forward = train(h, order, d_sae, k, seed)
                seconds[name] = seconds.get(name, 0) + time.process_time() - start
                results.setdefault(name, []).append(quality(forward, held, held_sink))
                bar.update()
        bar.close()
        mine, *others = results
        for name, runs in results.items():
            column = lambda metric, form: spread([run[metric] for run in runs], form)
            lines.append(
                [
                    k,
                    name,
                    column("r2", ".4f"),
                    column("r2_nosink", ".4f"),
                    column("alive", ".3f"),
                    column("l0", ".2f"),
                    f"{seconds[name] / seconds[mine]:.1f}",
                ]
            )
        mean_r2 = lambda name: np.mean([run["r2"] for run in results[name]])
        failures += [
            f"k={k}: {name} has a higher R² than base" for name in others if mean_r2(name) > mean_r2(mine)
        ]
    table(["k", "trainer", "R²", "R² no sinks", "alive", "L0", "time"], lines)

    hook = f"gpt_neox.layers.{LAYER}"
    lens = HookedProxyLM(load_model(MODEL, torch.device("cpu"))[0], tokenizer, hook_names=[hook])
    same_lines, apart_lines, read_lines = [], [], []
    for k in ks:
        sae = saes[k, seeds[0]]
        same, apart = parity(model, lens, rows[:PARITY_SEQS], sae, hook)
        for metric, ours, theirs in same:
            difference = abs(ours - theirs) / max(1.0, abs(ours))
            failures += [f"k={k}: {metric} differs from SAELens'"] * (not difference <= TOLERANCE)
            same_lines.append([k, metric, f"{ours:.7f}", f"{theirs:.7f}", f"{difference:.1e}"])
        apart_lines += [[k, metric, f"{ours:.4f}", f"{theirs:.4f}"] for metric, ours, theirs in apart]
        with tempfile.TemporaryDirectory() as folder:
            save_sae(pathlib.Path(folder), sae, {})
            theirs, active = run_sparsify(SparseCoder.load_from_disk(folder).requires_grad_(False))(held)
        ours, my_active = run_topk_sae(sae)(held)
        difference = ((theirs - ours).norm(dim=1) / held.norm(dim=1)).max().item()
        failures += [f"k={k}: sparsify reads another SAE"] * (not difference <= TOLERANCE)
        read_lines.append([k, f"{difference:.1e}", int((active != my_active).any(1).sum())])
    print(
        "Where definitions coincide: proxies.metrics, and SAELens' get_sparsity_and_variance_metrics (r2, mse,\n"
        "cosine, l0) and get_downstream_reconstruction_metrics (CE, KL), positions 0..T-2 of "
        f"{PARITY_SEQS} sequences.\nDifference: absolute, relative above 1.\n"
    )
    table(["k", "metric", "ours", "SAELens", "difference"], same_lines)
    print(
        "Where they do not: run_evals as it comes (h and KL at T positions, no end-of-text; second r2: legacy).\n"
    )
    table(["k", "metric", "ours", "run_evals"], apart_lines)
    print(
        "A saved SAE read by sparsify's SparseCoder.load_from_disk: largest |difference of h_hat| / |h|, and\n"
        "how many tokens have other latents.\n"
    )
    table(["k", "difference", "tokens"], read_lines)
    print("\n".join(f"FAILED {why}" for why in failures) or "passed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
