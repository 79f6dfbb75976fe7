"""Do intervals over evaluation text cover? Real text that nothing was trained on, the units that are
resampled, 95% nominal.

    python bench/coverage.py outputs/cache/stdlib-s-L3-F256-k4-100k-s0-*
    outputs/cache/stdlib-s-L3-F256-k32-100k-s0-*

The text: Python files of the packages installed beside this one (the embedded models and the SAEs know the
standard library only). SAEs of one hook are measured once on `--pool` documents of it, a few rows of each;
their values over all of them are the truth. Then, again and again, rows are taken and their intervals formed:
as the program does (24, 32 or 40 documents, as Exp-C, B and A take by default, a row of each; 24 documents,
two rows of each; documents resampled), and as it did (documents in a row until 48 rows are full, rows
resampled).
"""

import argparse
import json
import pathlib
import site

from transport_geometry import text
from transport_geometry.evaluate import evaluate
from transport_geometry.metrics import metrics
from transport_geometry.models import load_model
from transport_geometry.run import eval_batch
from transport_geometry.sae import load_sae
from transport_geometry.stats import document_weights
from transport_geometry.tables import markdown

import numpy as np
import torch
from tqdm import tqdm

CPU, CTX, PER_DOCUMENT, STRANGE = torch.device("cpu"), 256, 6, 8
SHOWN = ("r2", "cosine", "nmse_tok", "swd_tok", "dce", "ce_rec", "fed_nosink", "fed_excess")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "saes", nargs=2, type=pathlib.Path, help="two SAEs of one hook, as a run leaves them in its cache"
)
parser.add_argument("--pool", type=int, default=400, help="documents")
parser.add_argument("--draws", type=int, default=1000, help="samples, for each way of taking them")
args = parser.parse_args()
made_by = json.loads((args.saes[0] / "provenance.json").read_text())
model, tokenizer = load_model(made_by["model"], CPU)

paths = [
    path
    for folder in site.getsitepackages()
    for path in sorted(pathlib.Path(folder).rglob("*.py"))
    if path.stat().st_size > 4000
]
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
        rows.append(ids[start : start + CTX])
        document.append(number)
rows, document = torch.tensor(rows), np.array(document)
saes = {folder.name: load_sae(folder, CPU) for folder in args.saes}
found = evaluate(model, made_by["layer"], rows, saes, eval_batch(model, CTX, CPU), document=document)
sums = {q: np.stack([found[name]["sums"][q] for name in saes]) for q in found[next(iter(saes))]["sums"]}
d = np.full(2, model.config.hidden_size)


def values(weights: np.ndarray, chosen: np.ndarray) -> dict:
    """Metrics [W] of the first SAE, and the differences of the two in R² and CE_rec."""
    m = metrics({q: v[:, chosen] for q, v in sums.items()}, weights, d)
    return {name: m[name][:, 0] for name in SHOWN} | {
        f"difference in {name}": m[name][:, 1] - m[name][:, 0] for name in ("r2", "ce_rec")
    }


def coverage(kept: np.ndarray) -> str:
    """The table over the documents `kept`, in Markdown."""
    numbers = np.unique(document[kept])
    rng = np.random.default_rng(1)
    # two of each, at random
    places = [rng.permutation(np.flatnonzero(document == number))[:2] for number in numbers]
    everywhere = {1: np.array([p[0] for p in places]), 2: np.array([p for p in places if len(p) == 2])}
    in_order = np.flatnonzero(np.isin(document, numbers))

    def documents_of(n: int, each: int):
        """n documents, `each` rows of every one: a function that takes (rows, weights [1000, rows]), and the
        population's values.
        """
        there = everywhere[each].reshape(-1, each)

        def take(rng):
            chosen = there[rng.choice(len(there), n, replace=False)]
            return chosen.ravel(), document_weights(n, 1000, int(rng.integers(2**31)))[3:].repeat(
                each, axis=1
            )

        return take, values(np.ones((1, there.size)), there.ravel())

    def in_a_row(n: int):
        def take(rng):
            start = rng.integers(len(in_order) - n)
            return in_order[start : start + n], document_weights(n, 1000, int(rng.integers(2**31)))[3:]

        return take, values(np.ones((1, len(in_order))), in_order)

    ways = {
        "24 documents": documents_of(24, 1),
        "32 documents": documents_of(32, 1),
        "40 documents": documents_of(40, 1),
        "24 documents, two rows of each": documents_of(24, 2),
        "48 rows in a row, rows resampled": in_a_row(48),
    }
    names = (*SHOWN, "difference in r2", "difference in ce_rec")
    table = {name: {"": name} for name in names}
    for way, (take, truth) in tqdm(ways.items(), leave=False):
        rng, inside = np.random.default_rng(2), dict.fromkeys(names, 0)
        for _ in range(args.draws):
            chosen, weights = take(rng)
            for name, v in values(weights, chosen).items():
                lo, hi = np.quantile(v, [0.025, 0.975])
                inside[name] += lo <= truth[name][0] <= hi
        for name, hits in inside.items():
            table[name][way] = f"{hits / args.draws:.1%}"
    return markdown(list(table.values()), ["", *ways])


print(
    f"{made_by['model']} block {made_by['layer']}: {', '.join(saes)}; {args.pool} documents, {len(rows)} rows of {CTX}; {args.draws} draws"
)
clean = sums["ce_orig"][0] / sums["n"][0]
strange = np.isin(document, document[clean > STRANGE])
print(
    f"{coverage(~strange)}\n\nWith the {len(np.unique(document[strange]))} documents that have a row of clean CE above {STRANGE} nats (tables of data):\n\n{coverage(clean > 0)}"
)
