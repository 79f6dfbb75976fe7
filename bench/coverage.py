"""Do intervals over evaluation text cover? Real text that nothing was trained on, the units that are resampled, 95% nominal.

    python bench/coverage.py outputs/cache/stdlib-s-L3-F256-k4-100k-s0-* outputs/cache/stdlib-s-L3-F256-k32-100k-s0-*

The text: Python files of the packages installed beside this one (the embedded models and the SAEs know the standard library only).
SAEs of one hook are measured once on `--pool` documents of it, a few rows of each; their values over all of them are the truth. Then, again and
again, 48 rows are taken and their intervals formed: as the program does (48 documents, a row of each, documents resampled; 24 documents,
two rows of each, documents resampled), and as it did (documents in a row until 48 rows are full, rows resampled).
"""
import argparse
import json
import pathlib
import site

import numpy as np
import torch

import text
from common import load_model, markdown
from conditions import eval_batch
from proxies import document_weights, evaluate, metrics
from sae import load_sae

CPU, CTX, ROWS, PER_DOCUMENT = torch.device("cpu"), 256, 48, 16
SHOWN = ("r2", "cosine", "nmse_tok", "swd_tok", "dce", "ce_rec", "fed_nosink", "fed_excess")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("saes", nargs=2, type=pathlib.Path, help="two SAEs of one hook, as a run leaves them in its cache")
parser.add_argument("--pool", type=int, default=800, help="documents")
parser.add_argument("--draws", type=int, default=1000, help="samples of 48 rows, for each way of taking them")
args = parser.parse_args()
made_by = json.loads((args.saes[0] / "provenance.json").read_text())
model, tokenizer = load_model(made_by["model"], CPU)

paths = [path for folder in site.getsitepackages() for path in sorted(pathlib.Path(folder).rglob("*.py")) if path.stat().st_size > 4000]
documents = []
for path in np.random.default_rng(0).permutation(paths):
    ids = text.as_ids(path.read_text(errors="replace"), tokenizer, "packages")
    if len(ids) >= CTX:
        documents.append(ids)
    if len(documents) == args.pool:
        break
rows, document = [], []
for number, ids in enumerate(documents):
    for start in range(0, min(len(ids) // CTX, PER_DOCUMENT) * CTX, CTX):
        rows.append(ids[start:start + CTX])
        document.append(number)
rows, document = torch.tensor(rows), np.array(document)
saes = {folder.name: load_sae(folder, CPU) for folder in args.saes}
found = evaluate(model, made_by["layer"], rows, saes, eval_batch(model, CTX, CPU), document=document)
sums = {q: np.stack([found[name]["sums"][q] for name in saes]) for q in found[next(iter(saes))]["sums"]}
d = np.full(2, model.config.hidden_size)


def values(weights: np.ndarray, chosen: np.ndarray) -> dict:
    """Metrics [W] of the first SAE, and the differences of the two in R² and CE_rec."""
    m = metrics({q: v[:, chosen] for q, v in sums.items()}, weights, d)
    return {name: m[name][:, 0] for name in SHOWN} | {f"difference in {name}": m[name][:, 1] - m[name][:, 0] for name in ("r2", "ce_rec")}


first = np.searchsorted(document, np.arange(args.pool))
length = np.bincount(document)
every = np.arange(len(rows))
# the population of each way: documents count once, or as long as they are (16 rows at most)
once = values(np.ones((1, args.pool)), first)
whole = values(np.ones((1, len(rows))), every)
long = np.flatnonzero(length >= 2)
twice = np.concatenate([first[long], first[long] + 1])
pair = values(np.ones((1, len(twice))), twice)


def one_of_each(rng):
    chosen = rng.choice(args.pool, ROWS, replace=False)
    return first[chosen], document_weights(ROWS, 1000, int(rng.integers(2 ** 31)))[3:], once


def two_of_each(rng):
    chosen = rng.choice(long, ROWS // 2, replace=False)
    w = document_weights(ROWS // 2, 1000, int(rng.integers(2 ** 31)))[3:]
    return np.concatenate([first[chosen], first[chosen] + 1]), np.hstack([w, w]), pair


def in_a_row(rng):
    start = rng.integers(len(rows) - ROWS)
    return every[start:start + ROWS], document_weights(ROWS, 1000, int(rng.integers(2 ** 31)))[3:], whole


WAYS = {"48 documents, a row of each": one_of_each, "24 documents, two rows of each": two_of_each, "48 rows in a row, rows resampled": in_a_row}
table = {name: {"": name} for name in once}
for way, take in WAYS.items():
    rng, inside = np.random.default_rng(1), {name: 0 for name in once}
    for _ in range(args.draws):
        chosen, weights, truth = take(rng)
        for name, v in values(weights, chosen).items():
            lo, hi = np.quantile(v, [0.025, 0.975])
            inside[name] += lo <= truth[name][0] <= hi
    for name, hits in inside.items():
        table[name][way] = f"{hits / args.draws:.1%}"
print(f"{made_by['model']} block {made_by['layer']}: {', '.join(saes)}; {args.pool} documents, {len(rows)} rows of {CTX}; {args.draws} draws")
print(markdown(list(table.values()), ["", *WAYS]))
