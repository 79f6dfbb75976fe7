"""A planted sink in other libraries' own scores: SAELens, sparsify and dictionary_learning train TopK SAEs on
the same model before and after `demo/plant.py`, each from its own tokens and activations. Run by hand:

    pip install -e '.[parity]' -c constraints.txt && pip uninstall -y torchvision
    python bench/planted_peers.py            # 300k tokens, k = 8, two seeds: 15 CPU-minutes
    python bench/planted_peers.py --saved runs.json     # the same, and goes on where it was interrupted

The model computes the same function in both folders; only the activations of one token (here beginning and
end of text) grow by a constant vector. Every library gets the same passages of the standard library and
decides where that token stands; its defaults, but for a step of 256 tokens, sparsify's of 8 rows (their
thousands would be under a hundred steps), and a warm-up that fits into the run. Three ways of feeding each:
its defaults, the token at position 0 of every row, and its own way to leave that token out; sparsify's
default optimiser takes signs of gradients, so it is seen at more steps and with Adam too.

Prints Markdown tables: (1) where the token stood, and how much of the variance it is; (2) each library's own
scores on held-out passages, by its own code, under its own names; (3) this project's, for the same SAEs on
the same rows. Two numbers in a cell are without and with the planted sink. No network.

Shapes: S rows, T positions, N tokens, d = d_model, F = d_sae.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import operator
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import bench
import peers
from common import parse_count, run_script
from transport_geometry.measuring.evaluate import activations, evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import EMBEDDED, load_model
from transport_geometry.records import store
from transport_geometry.records.tables import as_json, markdown, readable_count
from transport_geometry.running.run import CPU
from transport_geometry.text.heldout import stdlib_documents

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.evaluation import evaluate as dictionary_learning_evaluate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
from sae_lens import logger as lens_logger
from sae_lens.config import LoggingConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model as load_lens
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig
from sparsify import Trainer as SparsifyTrainer
from sparsify.data import chunk_and_tokenize
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

MODEL, LAYER, TOKEN = "stdlib-s", 3, 0  # the token that begins and ends texts
PASSAGE, FEWEST = 2000, 300  # characters, and tokens at least: more than a row, so that nothing is padded
BATCH = 8  # rows
SPARSIFY_ROWS = 8  # a step, unless said
OURS = ("r2", "r2_nosink", "nmse_tok", "cosine", "ce_rec")
HEAD = """{versions}

{model} layer {layer}, F = {d_sae}, k = {k}, {tokens} training tokens in rows of {ctx}, {step} a step
(sparsify: {rows} rows), on the model and on the same with a planted norm of {norm:g}.
Held out: {seqs} rows of each library's own making. Seeds {seeds}; ± half the range.
"""
STOOD = """
Where the token stood in training: how many of a thousand tokens it was, and the share of rows that it began.
SST: of the held-out rows, with the planted sink over without. PR: participation ratio of their covariance.
"""
THEIRS = """
Their own scores.
"""
SAME_SAES = """
This project's, without and with the planted sink; CE_rec by patching every position.
"""

Forward = Callable[[torch.Tensor], torch.Tensor]  # h [N,d] -> h_hat [N,d]


@dataclasses.dataclass(frozen=True)
class Task:
    """What all are given."""

    folder: str  # of the language model
    blocks: str  # their name in it, as "gpt_neox.layers"
    layer: int
    token: int  # that begins texts
    train: list[str]  # passages
    held: list[str]
    tokens: int
    ctx: int
    step: int
    seqs: int
    d: int
    d_sae: int
    k: int
    seed: int
    out: str = ""  # folder where the library saves the SAE


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a library made of it."""

    forward: Forward
    scores: dict[str, float]  # its own, under its own names
    seen: torch.Tensor  # [S,T] token ids of its training rows
    used: torch.Tensor  # [S,T] bool: which of them were trained on
    held: torch.Tensor  # [S,T] token ids of its held-out rows


def passages(side: str) -> list[str]:
    """Whole pieces of PASSAGE characters of every document, in an order of its own."""
    pieces = [
        text[start : start + PASSAGE]
        for _, text in stdlib_documents(side)
        for start in range(0, len(text) - PASSAGE + 1, PASSAGE)
    ]
    return [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]


def task_of(args: argparse.Namespace, d: int, **of_model: Any) -> Task:
    """What the flags ask of everyone, on a model of width d. of_model: folder, blocks, layer, token."""
    return Task(
        **of_model,
        train=passages("train"),
        held=passages("heldout"),
        tokens=args.tokens,
        ctx=args.ctx,
        step=args.ctx,
        seqs=args.seqs,
        d=d,
        d_sae=args.expansion * d,
        k=args.k,
        seed=0,
    )


def versions() -> str:
    libraries = ("torch", "transformers", "sae-lens", "eai-sparsify", "dictionary-learning", "nnsight")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)


# ---------------------------------------------------------------------------------------------- the libraries
def saelens(task: Task, prepend_bos: bool = True, exclude_special_tokens: bool = False) -> Trained:
    """Its runner on text: it tokenises, puts the beginning-of-sequence token between passages, and, by
    default, at the front of every row.
    """
    lens = load_lens("AutoModelForCausalLM", task.folder, "cpu", hook_names=[f"{task.blocks}.{task.layer}"])
    data = Dataset.from_dict({"text": task.train})
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=task.d, d_sae=task.d_sae, k=task.k),
        model_name=task.folder,
        model_class_name="AutoModelForCausalLM",
        hook_name=f"{task.blocks}.{task.layer}",
        dataset_path="passages",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=task.ctx,
        training_tokens=task.tokens,
        train_batch_size_tokens=task.step,
        prepend_bos=prepend_bos,
        exclude_special_tokens=exclude_special_tokens,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=task.out,
        verbose=False,
    )
    torch.manual_seed(task.seed)  # it reads no seed of its configuration
    LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=lens).run()
    sae = SAE.load_from_disk(task.out).requires_grad_(False)

    def rows(texts: list[str], n: int) -> ActivationsStore:
        store = ActivationsStore.from_sae(
            lens, sae, Dataset.from_dict({"text": texts}), streaming=False, store_batch_size_prompts=BATCH
        )
        return store.get_batch_tokens(n) if n else store

    batches = task.seqs // BATCH
    wanted = EvalConfig(
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_ce_loss=True,
        compute_variance_metrics=True,
    )
    scores = {}
    for special, where in ((False, "every token"), (True, "special tokens left out")):
        groups, _ = run_evals(
            sae, rows(task.held, 0), lens, ActivationScaler(), wanted, exclude_special_tokens=special
        )
        found = {name: value for group in groups.values() for name, value in group.items()}
        for name in ("explained_variance", "ce_loss_score"):
            scores[f"{name}, {where}"] = found[name]
    seen = rows(task.train, task.tokens // task.ctx)
    used = (seen != task.token) if exclude_special_tokens else torch.ones_like(seen, dtype=torch.bool)
    return Trained(lambda h: sae.decode(sae.encode(h)), scores, seen, used, rows(task.held, task.seqs))


def sparsify(
    task: Task, first: bool = False, exclude: bool = False, a_step: int = SPARSIFY_ROWS, **optimiser: Any
) -> Trained:
    """Its trainer on rows of its own making: passages joined by the end-of-text token and cut. `first`: rows
    that begin with the token, as a data set that comes tokenised may have them.
    """
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    model = AutoModel.from_pretrained(task.folder)

    def rows(texts: list[str], n: int) -> torch.Tensor:
        enough = texts[: n * task.ctx // FEWEST + 2]
        data = chunk_and_tokenize(
            Dataset.from_dict({"text": enough}), tokenizer, max_seq_len=task.ctx, num_proc=None
        )
        input_ids = torch.stack([data[i]["input_ids"] for i in range(n)])
        if first:
            input_ids = torch.cat([torch.full((n, 1), task.token), input_ids[:, :-1]], 1)
        return input_ids

    seen, held = rows(task.train, task.tokens // task.ctx), rows(task.held, task.seqs)
    logged: list[float] = []
    config = TrainConfig(
        SparseCoderConfig(num_latents=task.d_sae, k=task.k),
        batch_size=a_step,
        lr_warmup_steps=len(seen) // a_step // 20,  # read by adam only
        **optimiser,
        layers=[task.layer],
        init_seeds=[task.seed],
        exclude_tokens=[task.token] if exclude else [],
        save_every=10**9,
        save_dir=task.out,
        log_to_wandb=False,
    )
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(task.seed))
    trainer = SparsifyTrainer(config, [{"input_ids": row} for row in seen[order]], model)
    (name,) = trainer.saes
    # what it logs of every step
    trainer.saes[name].register_forward_hook(lambda sae, inputs, out: logged.append(out.fvu.item()))
    trainer.fit()
    torch.set_float32_matmul_precision("highest")  # fit() lowers it for the whole process
    sae = SparseCoder.load_from_disk(f"{task.out}/unnamed/{name}").requires_grad_(False)
    h = torch.cat([block_output(model, part, task.layer) for part in held.split(BATCH)])
    kept = h[held != task.token] if exclude else h.flatten(0, 1)
    scores = {
        "fvu, as logged (mean of the last tenth of the steps)": np.mean(logged[-len(logged) // 10 :]),
        "fvu of held-out rows": sae(kept).fvu.item(),
    }
    used = (seen != task.token) if exclude else torch.ones_like(seen, dtype=torch.bool)
    return Trained(lambda x: sae(x).sae_out, scores, seen, used, held)


@torch.no_grad()
def block_output(model: Any, input_ids: torch.Tensor, layer: int) -> torch.Tensor:
    """h [B,T,d] of a model without its unembedding."""
    return model(input_ids, output_hidden_states=True).hidden_states[layer + 1]


def dictionary_learning(task: Task, first: bool = False, remove_bos: bool = False) -> Trained:
    """trainSAE from its buffer, which tokenises passages and cuts each to one row: no token is put anywhere.
    `first`: passages that begin with the token, as tokenizers that add it by themselves (Llama's, Gemma's)
    would have it.
    """
    # the last: nnsight 0.3 would take every Llama's rotary embedding for Llama 3's
    model = LanguageModel(task.folder, device_map="cpu", dispatch=True, patch_llama_scan=False)
    front = model.tokenizer.decode([task.token]) if first else ""

    def buffer(texts: list[str], rows: int, step: int, endless: bool) -> ActivationBuffer:
        def stream() -> Iterator[str]:
            while True:
                yield from (front + text for text in texts)
                if not endless:
                    return

        return ActivationBuffer(
            stream(),
            model,
            operator.attrgetter(task.blocks)(model)[task.layer],
            d_submodule=task.d,
            n_ctxs=rows,
            ctx_len=task.ctx,
            refresh_batch_size=BATCH,
            out_batch_size=step,
            remove_bos=remove_bos,
        )

    def rows(texts: list[str], n: int) -> torch.Tensor:
        return buffer(texts[:n], n, 1, False).tokenized_batch(n).input_ids

    steps = task.tokens // task.step
    order = np.random.default_rng(task.seed).permutation(len(task.train))
    torch.manual_seed(task.seed)
    config = dict(
        trainer=TopKTrainer,
        activation_dim=task.d,
        dict_size=task.d_sae,
        k=task.k,
        steps=steps,
        layer=task.layer,
        lm_name=task.folder,
        warmup_steps=steps // 20,
        seed=task.seed,
        device="cpu",
    )
    shuffled = [task.train[i] for i in order]
    trainSAE(
        buffer(shuffled, min(200, task.tokens // task.ctx), task.step, True),
        [config],
        steps,
        save_dir=task.out,
        device="cpu",
    )
    sae = AutoEncoderTopK.from_pretrained(f"{task.out}/trainer_0/ae.pt").requires_grad_(False)
    held = buffer(task.held, task.seqs // 2, BATCH * task.ctx, True)
    found = dictionary_learning_evaluate(
        sae, held, max_len=task.ctx, batch_size=BATCH, n_batches=task.seqs // BATCH
    )
    seen = rows(task.train, task.tokens // task.ctx)
    used = torch.ones_like(seen, dtype=torch.bool)
    used[:, 0] = not remove_bos
    scores = {name: found[name] for name in ("frac_variance_explained", "frac_recovered", "cossim")}
    return Trained(lambda h: sae(h), scores, seen, used, rows(task.held, task.seqs))


Feed = tuple[str, str]  # (library, how it is fed)
FEEDS: dict[Feed, tuple[Callable[..., Trained], dict]] = {
    ("SAELens", "its defaults: token first, and between passages"): (saelens, {}),
    ("SAELens", "prepend_bos=False: between passages"): (saelens, dict(prepend_bos=False)),
    ("SAELens", "exclude_special_tokens=True"): (saelens, dict(exclude_special_tokens=True)),
    ("sparsify", "its defaults: between passages"): (sparsify, {}),
    ("sparsify", "rows that begin with it"): (sparsify, dict(first=True)),
    ("sparsify", "rows that begin with it, exclude_tokens"): (sparsify, dict(first=True, exclude=True)),
    ("sparsify", "rows that begin with it, one a step"): (sparsify, dict(first=True, a_step=1)),
    ("sparsify", "rows that begin with it, one a step, adam"): (
        sparsify,
        dict(first=True, a_step=1, optimizer="adam"),
    ),
    ("dictionary_learning", "its defaults: nowhere"): (dictionary_learning, {}),
    ("dictionary_learning", "passages that begin with it"): (dictionary_learning, dict(first=True)),
    ("dictionary_learning", "passages that begin with it, remove_bos"): (
        dictionary_learning,
        dict(first=True, remove_bos=True),
    ),
}


# ------------------------------------------------------------------------------------------ what is measured
Numbers = dict[str, float]


def one(train: Callable[..., Trained], task: Task, settings: dict, hook: Hook) -> dict[str, Numbers]:
    """Of one SAE: `theirs` and `ours`, and `stood`, where the token was and what it did to the rows."""
    with peers.quiet(), tempfile.TemporaryDirectory() as folder:
        made = train(dataclasses.replace(task, out=folder), **settings)
    shared = activations(hook, made.held, BATCH)
    of_sae = {"sae": lambda h, mean: made.forward(h)}
    found = evaluate(hook, made.held, of_sae, BATCH, shared=shared)["sae"].sums
    sums = Sums({q: v[None] for q, v in found.items()}, np.ones((1, len(made.held))), task.d)
    values = computed(sums)
    here = (made.seen == TOKEN) & made.used
    eigenvalues = torch.linalg.eigvalsh(shared.h[:, :-1].flatten(0, 1).double().T.cov())
    return {
        "theirs": {name: float(value) for name, value in made.scores.items()},
        "ours": {name: values[name].item() for name in OURS},
        "stood": {
            "a thousand": 1000 * here.sum().item() / made.used.sum().item(),
            "first": here[:, 0].float().mean().item(),
            "sst": sums.per_token("sst").item(),
            "pr": (eigenvalues.sum().square() / eigenvalues.square().sum()).item(),
        },
    }


def every_run(
    args: argparse.Namespace, task: Task, folders: dict[str, str]
) -> Iterator[tuple[Feed, str, dict[str, Numbers]]]:
    """(how it is fed, plain or planted, its numbers) of every SAE; those of --saved are not made again."""
    asked = {name: value for name, value in vars(args).items() if name not in ("saved", "seeds")}
    saved = json.loads(args.saved.read_text()) if args.saved and args.saved.exists() else {}
    hooks = {model: Hook(load_model(at, CPU)[0], LAYER) for model, at in folders.items()}
    runs = list(itertools.product(FEEDS, hooks, args.seeds))
    for feed, model, seed in tqdm(runs, desc="SAEs"):
        key = json.dumps([*feed, model, seed, asked])
        if key not in saved:
            of_run = dataclasses.replace(task, folder=folders[model], seed=seed)
            train, settings = FEEDS[feed]
            saved[key] = one(train, of_run, settings, hooks[model])
            if args.saved:
                store.write(args.saved, as_json(saved))
        yield feed, model, saved[key]


# ---------------------------------------------------------------------------------------------------- report
def spread(values: Sequence[float]) -> str:
    """Mean, and half the range over seeds."""
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.4f}" + (f" ± {half:.4f}" if len(values) > 1 else "")


def report(runs: dict[tuple[Feed, str], list[dict[str, Numbers]]]) -> str:
    """The three tables."""
    stood, theirs, ours = [], [], []
    for feed in FEEDS:
        by_model = [runs[feed, model] for model in ("plain", "planted")]

        def pair(kind: str, name: str) -> tuple[list[float], ...]:
            return tuple([numbers[kind][name] for numbers in of_model] for of_model in by_model)

        of_feed = dict(zip(("library", "fed"), feed))
        share, first = (np.mean(pair("stood", name)) for name in ("a thousand", "first"))
        sst, pr = ([np.mean(values) for values in pair("stood", name)] for name in ("sst", "pr"))
        stood.append(
            of_feed
            | {
                "of a thousand trained on": f"{share:.2f}",
                "position 0": f"{first:.2f}",
                "SST": f"{sst[1] / sst[0]:.1f}",
                "PR": f"{pr[0]:.1f}, {pr[1]:.2f}",
            }
        )
        for name in sorted(by_model[0][0]["theirs"]):
            plain, planted = pair("theirs", name)
            difference = f"{np.mean(planted) - np.mean(plain):+.4f}"
            theirs.append(
                of_feed
                | {"its score": name, "plain": spread(plain), "planted": spread(planted)}
                | {"difference": difference}
            )
        ours.append(of_feed | {name: ", ".join(map(spread, pair("ours", name))) for name in OURS})
    parts = zip((STOOD, THEIRS, SAME_SAES), (stood, theirs, ours))
    return "\n".join(f"{title}\n{markdown(rows, list(rows[0]))}" for title, rows in parts)


def planted_folder(norm: float, folder: str) -> str:
    out = pathlib.Path(folder) / "planted"
    command = [sys.executable, bench.ROOT / "demo/plant.py", MODEL, "--norm", norm, "--token", TOKEN, out]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd=bench.ROOT)
    return str(out)


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--tokens", default="300k", type=parse_count)
    parser.add_argument("--norm", default=3700.0, type=float)
    parser.add_argument("--k", default=8, type=int)
    parser.add_argument("--expansion", default=4, type=int)
    parser.add_argument("--seeds", default="0,1", type=bench.ints)
    parser.add_argument("--ctx", default=256, type=int)
    parser.add_argument("--seqs", default=48, type=int, help="held-out rows, a multiple of 8")
    parser.add_argument("--saved", type=pathlib.Path, help="what runs give, kept: an interrupted one goes on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    lens_logger.setLevel("ERROR")
    d = load_model(MODEL, CPU)[0].config.hidden_size
    task = task_of(args, d, folder="", blocks="gpt_neox.layers", layer=LAYER, token=TOKEN)
    runs: dict[tuple[Feed, str], list[dict[str, Numbers]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = {"plain": str(EMBEDDED[MODEL]), "planted": planted_folder(args.norm, folder)}
        for feed, model, numbers in every_run(args, task, folders):
            runs.setdefault((feed, model), []).append(numbers)
    print(
        HEAD.format(
            versions=versions(),
            model=MODEL,
            layer=LAYER,
            d_sae=task.d_sae,
            k=task.k,
            tokens=readable_count(args.tokens),
            ctx=args.ctx,
            step=task.step,
            rows=SPARSIFY_ROWS,
            norm=args.norm,
            seqs=args.seqs,
            seeds=",".join(map(str, args.seeds)),
        )
    )
    print(report(runs))


if __name__ == "__main__":
    run_script(main)
