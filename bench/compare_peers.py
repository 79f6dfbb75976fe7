"""TopK SAEs trained, evaluated and read by this project, SAELens and sparsify, on the same activations. Run
by hand:

    python3 -m venv /tmp/peers && . /tmp/peers/bin/activate
    pip install -e '.[parity]' -c constraints.txt && pip uninstall -y torchvision
    python bench/compare_peers.py            # 200k tokens, k = 8 and 32, one seed: about 6 CPU-minutes
    python bench/compare_peers.py --seeds 0,1,2
    python bench/compare_peers.py --tokens 1M
    python bench/compare_peers.py --step 1024,32768,32,4096   # nothing but a step's time: d, F, k, tokens

Prints Markdown tables: (1) quality at equal tokens, (2) this project's metrics beside those of SAELens' own
evaluation functions, (3) a saved SAE read back by sparsify. Exit status 1, with the reasons, if (2) or (3)
disagree by more than 1e-4 or if recipe `base` explains less held-out variance than a peer. No network. On a
busy machine OMP_NUM_THREADS=1 is faster.

Shapes: N tokens, d = d_model, F = d_sae.
"""

import contextlib
import functools
import importlib.metadata
import io
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # with triton installed it fails on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"

import bench
from common import parse_count, run_script
from transport_geometry import kernels
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records.tables import markdown, readable_count
from transport_geometry.running.run import CPU
from transport_geometry.saes.recipes import CHUNK, SAELensTraining, Statistics, Training
from transport_geometry.saes.sae import TopKSAE, save_sae
from transport_geometry.saes.sinks import sink_positions
from transport_geometry.saes.train import activation_chunks
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
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
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig
from sparsify import Trainer as SparsifyTrainer
from tqdm import tqdm

LAYER, EXPANSION = 3, 8
BATCH = 8  # sequences
TOLERANCE = 1e-4
LENS_STEP = 4096  # tokens per step: LanguageModelSAERunnerConfig.train_batch_size_tokens
SPARSIFY_STEP = 32 * 256  # TrainConfig.batch_size is 32 sequences
BASE = "**this project, `base`**"

# h [n,d] -> (h_hat [n,d], active [n,F] bool)
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# (h [N,d], order [N], d_sae, k, seed) -> Forward. `order` is the order in which recipe `base` draws its
# tokens, so that all see the same tokens in the same order.
Trainer = Callable[[torch.Tensor, torch.Tensor, int, int, int], Forward]

HEAD = """{versions}; {kernels}

{model} layer {layer}, F = {d_sae}, {tokens} training tokens, the same in the same order.
Held out: {positions} positions of {seqs} sequences, {sinks} sinks. Seeds {seeds}; ± half the range.
Time: CPU time of the process, base = 1.
"""
SAME = """
Where definitions coincide: our metrics, and SAELens' get_sparsity_and_variance_metrics (r2, mse, cosine, l0)
and get_downstream_reconstruction_metrics (CE, KL), positions 0..T-2 of {seqs} sequences.
Difference: absolute, relative above 1.
"""
APART = """
Where they do not: run_evals as it comes (h and KL at T positions, no end-of-text; second r2: legacy).
"""
READ = """
A saved SAE read by sparsify's SparseCoder.load_from_disk: largest |difference of h_hat| / |h|, and
how many tokens have other latents.
"""


STEP = """{versions}; {kernels}

A training step at d = {d}, F = {F}, k = {k}, {n} tokens, threads: {threads}, CPU time: what {more} steps
more take of each library's own trainer with its optimiser, AuxK idle, same activations; median of {rounds}
interleaved. Bare encode GEMM {gemm:.0f} ms.
"""


# ------------------------------------------------------------------------------------------- three trainers
def quiet() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def train_order(n: int, seed: int) -> torch.Tensor:
    """The order of Training.feed over all its chunks."""
    order = []
    for i, start in enumerate(range(0, n, CHUNK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        order.append(start + torch.randperm(min(CHUNK, n - start), generator=generator))
    return torch.cat(order)


def run_topk_sae(sae: TopKSAE) -> Forward:
    def forward(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices, h_hat = sae.reconstruct(h)
        active = torch.zeros(len(h), len(sae.W_enc), dtype=torch.bool)
        return h_hat, active.scatter_(1, indices, values > 0)

    return forward


def base(h: torch.Tensor, sink: torch.Tensor, d_sae: int, k: int, seed: int) -> TopKSAE:
    n = len(h)
    training = Training(Statistics.of(h[:CHUNK], sink[:CHUNK]), d_sae, k, seed, [n])
    for start in range(0, n, CHUNK):
        training.feed(h[start : start + CHUNK], start, tqdm(disable=True), "base")
    return training.finished()


def saelens(
    h: torch.Tensor, order: torch.Tensor, d_sae: int, k: int, seed: int, step: int, helped: bool = False
) -> Forward:
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
    scaling = "expected_average_only_in" if helped else "none"
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=h.shape[1], d_sae=d_sae, k=k, normalize_activations=scaling)
    )
    with quiet():
        sae = SAETrainer(config, sae, (h[i] for i in (*first, *batches))).fit().requires_grad_(False)

    def forward(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def sparsify(
    h: torch.Tensor, order: torch.Tensor, d_sae: int, k: int, seed: int, step: int, **settings: Any
) -> Forward:
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
        SparsifyTrainer(config, [{"input_ids": i} for i in order.split(step)], StreamAsModel(h)).fit()
        torch.set_float32_matmul_precision("highest")  # fit() lowers it for the whole process
        return run_sparsify(SparseCoder.load_from_disk(f"{folder}/unnamed/stream").requires_grad_(False))


def dictionary_learning(
    h: torch.Tensor, order: torch.Tensor, d_sae: int, k: int, seed: int, step: int
) -> None:
    """trainSAE, which has no defaults for a short run."""
    batches = order.split(step)
    config = dict(
        trainer=TopKTrainer,
        dict_class=AutoEncoderTopK,
        activation_dim=h.shape[1],
        dict_size=d_sae,
        k=k,
        steps=len(batches) + 1,
        warmup_steps=0,
        seed=seed,
        layer=0,
        lm_name="none",
        device="cpu",
    )
    with quiet():
        trainSAE((h[i] for i in batches), [config], len(batches), device="cpu", use_wandb=False)


def run_sparsify(sae: SparseCoder) -> Forward:
    def forward(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = sae.encode(h)
        active = torch.zeros(len(h), sae.num_latents, dtype=torch.bool)
        active.scatter_(1, code.top_indices, code.top_acts > 0)
        return sae.decode(code.top_acts, code.top_indices), active

    return forward


def step_times(d: int, d_sae: int, k: int, n: int, more: int, rounds: int) -> tuple[list[dict], float]:
    """(rows of the table, seconds of a bare encode GEMM). A step: what `more` of them take longer."""
    h = torch.randn((1 + more) * n, d, generator=torch.Generator().manual_seed(0))
    order, W = torch.arange(len(h)), torch.randn(d_sae, d)
    statistics = Statistics.of(h[:n], torch.zeros(n, dtype=torch.bool))

    def ours(recipe: type[Training]) -> Callable[[torch.Tensor], object]:
        def train(order: torch.Tensor) -> None:
            training = recipe(statistics, d_sae, k, 0, [10**8])
            for batch in order.split(n):
                training.one_step(h[batch])

        return train

    def theirs(train: Callable, **how: Any) -> Callable[[torch.Tensor], object]:
        return lambda order: train(h[: len(order)], order, d_sae, k, 0, n, **how)

    everyone = {
        BASE: ours(Training),
        "this project, `saelens`": ours(SAELensTraining),
        "sparsify, its defaults (signum)": theirs(sparsify),
        "sparsify adam": theirs(sparsify, optimizer="adam"),
        "SAELens": theirs(saelens),
        "dictionary_learning": theirs(dictionary_learning),
    }
    jobs: dict[str, Callable[[], object]] = {"gemm": lambda: h[:n] @ W.T}
    for name, train in everyone.items():
        jobs[name + " 1"] = functools.partial(train, order[:n])
        jobs[name] = functools.partial(train, order)
    seconds = bench.take_turns(jobs, rounds, warm_up=1)
    step = {name: (seconds[name] - seconds[name + " 1"]) / more for name in everyone}
    rows = []
    for name, s in step.items():
        by_gemm, by_base = s / seconds["gemm"], s / step[BASE]
        rows.append(
            {
                "trainer": name,
                "ms": f"{1e3 * s:.1f}",
                "by GEMM": f"{by_gemm:.2f}",
                "by base": f"{by_base:.2f}",
            }
        )
    return rows, seconds["gemm"]


def trainers(tokens: int) -> dict[str, Trainer]:
    """Peers at their defaults, and with what a short run needs: more steps, and schedules that fit into the
    run.
    """
    ours = min(max(tokens // 1000, 256), 4096)
    steps, by = tokens // ours, functools.partial
    adam = by(sparsify, step=ours, optimizer="adam")
    return {
        f"SAELens, its defaults ({LENS_STEP} tokens a step)": by(saelens, step=LENS_STEP),
        f"SAELens, {ours} a step": by(saelens, step=ours),
        f"SAELens, {ours} a step, normalised, AuxK after {steps // 10} steps": by(
            saelens, step=ours, helped=True
        ),
        f"sparsify, its defaults (signum, {SPARSIFY_STEP} tokens a step)": by(sparsify, step=SPARSIFY_STEP),
        f"sparsify signum, {8 * ours} a step": by(sparsify, step=8 * ours),
        f"sparsify signum, {ours} a step": by(sparsify, step=ours),
        f"sparsify adam, {ours} a step": adam,
        f"sparsify adam, {ours} a step, warm-up {steps // 20} steps": by(adam, lr_warmup_steps=steps // 20),
    }


@dataclass(frozen=True, eq=False)
class Data:
    """What all train on, and what all are measured on."""

    hook: Hook
    h: torch.Tensor  # [N,d]
    sink: torch.Tensor  # [N] bool
    input_ids: torch.Tensor  # [S,T], held out
    held: torch.Tensor  # [n,d]
    held_sink: torch.Tensor  # [n] bool

    @property
    def d_sae(self) -> int:
        return EXPANSION * self.h.shape[1]


def r2(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - SSE/SST of y for x [n,d], with one mean for the set."""
    return 1 - ((y - x).square().sum() / (x - x.mean(0)).square().sum()).item()


def quality(forward: Forward, data: Data) -> dict[str, float]:
    """R^2 in float64, over all positions and without sinks; alive share; L0."""
    h_hat, active = (torch.cat(parts) for parts in zip(*(forward(part) for part in data.held.split(4096))))
    x, y, calm = data.held.double(), h_hat.double(), ~data.held_sink
    return {
        "R²": r2(x, y),
        "R² no sinks": r2(x[calm], y[calm]),
        "alive": active.any(0).double().mean().item(),
        "L0": active.sum(1).double().mean().item(),
    }


def spread(values: list[float], form: str) -> str:
    """Mean, and half the range over seeds."""
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):{form}}" + (f" ± {half:{form}}" if len(values) > 1 else "")


def compare_trainers(data: Data, k: int, seeds: list[int]) -> tuple[list[dict], list[str], TopKSAE]:
    """(rows of the table, who explains more than recipe `base`, the first seed's SAE of it)."""
    results: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    mine: list[TopKSAE] = []

    def train_base(h: torch.Tensor, order: torch.Tensor, d_sae: int, k: int, seed: int) -> Forward:
        mine.append(base(h, data.sink, d_sae, k, seed))
        return run_topk_sae(mine[-1])

    everyone = {BASE: train_base, **trainers(len(data.h))}
    with tqdm(total=len(seeds) * len(everyone), desc=f"k={k}", leave=False) as bar:
        for seed in seeds:
            order = train_order(len(data.h), seed)
            for name, train in everyone.items():
                start = time.process_time()
                forward = train(data.h, order, data.d_sae, k, seed)
                seconds[name] = seconds.get(name, 0) + time.process_time() - start
                results.setdefault(name, []).append(quality(forward, data))
                bar.update()
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"k": k, "trainer": name}
        for metric, form in (("R²", ".4f"), ("R² no sinks", ".4f"), ("alive", ".3f"), ("L0", ".2f")):
            row[metric] = spread([run[metric] for run in runs], form)
        rows.append(row | {"time": f"{seconds[name] / seconds[BASE]:.1f}"})
    mean = {name: np.mean([run["R²"] for run in runs]) for name, runs in results.items()}
    better = [name for name in mean if mean[name] > mean[BASE]]
    return rows, [f"k={k}: {name} has a higher R² than base" for name in better], mine[0]


# --------------------------------------------------------------------------------------- SAELens' evaluation
class Rows:
    """All that SAELens' evaluation asks of its ActivationsStore: the next batch of token rows."""

    def __init__(self, input_ids: torch.Tensor):
        self.input_ids, self.context_size, self.store_batch_size_prompts = (
            input_ids,
            input_ids.shape[1],
            BATCH,
        )
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.batches = iter(self.input_ids.split(BATCH))

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        return next(self.batches)


def as_saelens(sae: TopKSAE, hook_name: str) -> LensSAE:
    d_sae, d = sae.W_dec.shape
    theirs = LensSAE(TopKSAEConfig(d_in=d, d_sae=d_sae, k=sae.k, metadata=SAEMetadata(hook_name=hook_name)))
    theirs.load_state_dict({"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec})
    return theirs.requires_grad_(False)


Triples = list[tuple[str, float, float]]  # (metric, ours, SAELens')


def parity(hook: Hook, lens: HookedProxyLM, x: torch.Tensor, sae: TopKSAE) -> tuple[Triples, Triples]:
    """Metrics on input_ids x [B,T] where the definitions coincide, and where run_evals' own choice of
    positions differs.

    Our mask is the positions that have a target, 0..T-2. SAELens' CE has the same; its h-side metrics and KL
    take every position, so they get rows without the last token: under a causal model that leaves positions
    0..T-2 as they were.
    """
    d = sae.W_dec.shape[1]
    sums = evaluate(hook, x, {"sae": sae}, BATCH)["sae"].sums
    found = computed(Sums({q: v[None] for q, v in sums.items()}, np.ones((1, len(x))), d))
    ours = {name: v.item() for name, v in found.items()}
    theirs, scaler, n = as_saelens(sae, hook_name(hook)), ActivationScaler(), len(x) // BATCH

    def downstream(x: torch.Tensor, **which: bool) -> dict[str, float]:
        return get_downstream_reconstruction_metrics(
            theirs,
            lens,
            Rows(x),
            scaler,
            **{"compute_kl": False, "compute_ce_loss": False, **which},
            n_batches=n,
            eval_batch_size_prompts=BATCH,
        )

    ce, kl = downstream(x, compute_ce_loss=True), downstream(x[:, :-1], compute_kl=True)
    h_side, _ = get_sparsity_and_variance_metrics(
        theirs,
        lens,
        Rows(x[:, :-1]),
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
    groups, _ = run_evals(theirs, Rows(x), lens, scaler, config)
    whole = {name: v for group in groups.values() for name, v in group.items()}
    apart = [
        ("r2", whole["explained_variance"]),
        ("r2", whole["explained_variance_legacy"]),
        ("frac_zero", whole["ce_loss_score"]),
        ("kl", whole["kl_div_with_sae"]),
    ]
    return [(m, ours[m], value) for m, value in same.items()], [(m, ours[m], value) for m, value in apart]


def hook_name(hook: Hook) -> str:
    return f"gpt_neox.layers.{hook.layer}"


# ---------------------------------------------------------------------------------------------------- report
def read_by_sparsify(sae: TopKSAE, held: torch.Tensor) -> tuple[float, int]:
    """(largest |difference of h_hat| / |h|, tokens with other latents) of an SAE saved here, read there."""
    with tempfile.TemporaryDirectory() as folder:
        save_sae(pathlib.Path(folder), sae, {})
        theirs, active = run_sparsify(SparseCoder.load_from_disk(folder).requires_grad_(False))(held)
    ours, my_active = run_topk_sae(sae)(held)
    difference = ((theirs - ours).norm(dim=1) / held.norm(dim=1)).max().item()
    return difference, int((active != my_active).any(1).sum())


def show(rows: list[dict]) -> None:
    print(markdown(rows, list(rows[0])), flush=True)


def loaded(model: str, tokens: int, ctx: int, seqs: int) -> tuple[Data, Any]:
    """(data, tokenizer)."""
    language_model, tokenizer = load_model(model, CPU)
    hook = Hook(language_model, LAYER)
    chunks = activation_chunks(hook, "stdlib", tokenizer, ctx, tokens, "keep")
    h, sink = (torch.cat(parts) for parts in zip(*chunks))
    input_ids = heldout_rows("stdlib", tokenizer, ctx=ctx, n=seqs).input_ids
    held = torch.cat([hook.head(part) for part in input_ids.split(BATCH)])[:, :-1]
    norms = held.norm(dim=-1)
    held_sink = sink_positions(norms, norms[:, 1:].median().item()).flatten()
    return Data(hook, h, sink, input_ids, held.flatten(0, 1), held_sink), tokenizer


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--model", default="stdlib-l")
    parser.add_argument("--tokens", default="200k", type=parse_count)
    parser.add_argument("--k", default="8,32", type=bench.ints)
    parser.add_argument("--seeds", default="0", type=bench.ints)
    parser.add_argument("--ctx", default=256, type=int)
    parser.add_argument("--eval-seqs", default=48, type=int, help="held out, for R²")
    parser.add_argument("--parity-seqs", default=16, type=int, help="of them, for SAELens' evaluation")
    parser.add_argument("--step", type=bench.ints, metavar="d,F,k,tokens")
    parser.add_argument("--more", default=3, type=int, help="steps timed, with --step")
    parser.add_argument("--rounds", default=3, type=int, help="with --step")
    args = parser.parse_args()
    if args.step:
        d, F, k, n = args.step
        rows, gemm = step_times(d, F, k, n, args.more, args.rounds)
        libraries = ("torch", "sae-lens", "eai-sparsify", "dictionary-learning")
        print(
            STEP.format(
                versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries),
                kernels=kernels.describe(),
                threads=torch.get_num_threads(),
                gemm=1e3 * gemm,
                **dict(d=d, F=F, k=k, n=n, more=args.more, rounds=args.rounds),
            )
        )
        show(rows)
        return
    data, tokenizer = loaded(args.model, args.tokens, args.ctx, args.eval_seqs)
    libraries = ("torch", "sae-lens", "eai-sparsify", "transformer-lens", "transformers")
    print(
        HEAD.format(
            versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries),
            kernels=kernels.describe(),
            model=args.model,
            layer=LAYER,
            d_sae=data.d_sae,
            tokens=readable_count(args.tokens),
            positions=len(data.held),
            seqs=args.eval_seqs,
            sinks=int(data.held_sink.sum()),
            seeds=",".join(map(str, args.seeds)),
        )
    )
    quality_rows: list[dict] = []
    failures: list[str] = []
    saes = {}
    for k in args.k:
        rows, better, saes[k] = compare_trainers(data, k, args.seeds)
        quality_rows += rows
        failures += better
    show(quality_rows)

    lens = HookedProxyLM(load_model(args.model, CPU)[0], tokenizer, hook_names=[hook_name(data.hook)])
    same_rows, apart_rows, read_rows = [], [], []
    for k, sae in saes.items():
        same, apart = parity(data.hook, lens, data.input_ids[: args.parity_seqs], sae)
        for metric, ours, theirs in same:
            difference = abs(ours - theirs) / max(1.0, abs(ours))
            if not difference <= TOLERANCE:
                failures.append(f"k={k}: {metric} differs from SAELens'")
            same_rows.append(
                {
                    "k": k,
                    "metric": metric,
                    "ours": f"{ours:.7f}",
                    "SAELens": f"{theirs:.7f}",
                    "difference": f"{difference:.1e}",
                }
            )
        for metric, ours, theirs in apart:
            apart_rows.append({"k": k, "metric": metric, "ours": f"{ours:.4f}", "run_evals": f"{theirs:.4f}"})
        difference, tokens = read_by_sparsify(sae, data.held)
        if not difference <= TOLERANCE:
            failures.append(f"k={k}: sparsify reads another SAE")
        read_rows.append({"k": k, "difference": f"{difference:.1e}", "tokens": tokens})
    print(SAME.format(seqs=args.parity_seqs))
    show(same_rows)
    print(APART)
    show(apart_rows)
    print(READ)
    show(read_rows)
    print("\n" + ("\n".join(f"FAILED {why}" for why in failures) or "passed"))
    sys.exit(bool(failures))


if __name__ == "__main__":
    run_script(main)
