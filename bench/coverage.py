"""Do intervals over evaluation text cover? Real text that nothing was trained on, the units that are
resampled, 95% nominal.

    python bench/coverage.py outputs/cache/stdlib-s-L3-F256-k4-100k-s0-* \\
        outputs/cache/stdlib-s-L3-F256-k32-100k-s0-*

The text: Python files of the packages installed beside this one (the embedded models and the SAEs know the
standard library only). SAEs of one hook are measured once on `--pool` documents of it, a few rows of each;
their values over all of them are the truth. Then, again and again, rows are taken and their intervals formed:
as the program does (`--documents` 24, 32 or 40, as Exp-C, B and A take by default, a row of each; the first
of these numbers with two rows of each; documents resampled), and as it did (documents in a row until twice
that number of rows are full, rows resampled).

Shapes: S rows of the pool, n rows taken, W = 1000 re-weightings of them.
"""

import json
import pathlib
import site
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bench
from common import run_script
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records.tables import markdown
from transport_geometry.running.run import CPU, eval_batch
from transport_geometry.saes.sae import load_sae
from transport_geometry.statistics import resampling
from transport_geometry.statistics.resampling import document_weights
from transport_geometry.text import heldout

import numpy as np
import torch
from tqdm import tqdm

PER_DOCUMENT, STRANGE, RESAMPLES = 6, 8, 1000
SHOWN = ("r2", "cosine", "nmse_tok", "swd_tok", "dce", "ce_rec", "fed_nosink", "fed_excess")
COMPARED = ("r2", "ce_rec")
NAMES = (*SHOWN, *(f"difference in {name}" for name in COMPARED))
HEAD = "{model} block {layer}: {saes}; {pool} documents, {rows} rows of {ctx}; {draws} draws"
STRANGERS = "With the {n} documents that have a row of clean CE above {bound} nats (tables of data):"
Take = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]  # -> (rows [n], weights [W,n])


# ------------------------------------------------------------------------------------------------- the pool
def package_documents(tokenizer: Any, ctx: int) -> Iterator[list[int]]:
    """Token ids of installed Python files of at least ctx tokens, in one random order."""
    paths = [
        path
        for folder in site.getsitepackages()
        for path in sorted(pathlib.Path(folder).rglob("*.py"))
        if path.stat().st_size > 4000
    ]
    for path in np.random.default_rng(0).permutation(np.array(paths, dtype=object)):
        ids = heldout.as_ids(path.read_text(errors="replace"), tokenizer, "packages")
        if len(ids) >= ctx:
            yield ids


@dataclass(frozen=True, eq=False)
class Pool:
    """Two SAEs on every row."""

    sums: dict[str, np.ndarray]  # {quantity: [2,S]}
    document: np.ndarray  # [S], the number of each row's
    d: int  # d_model

    def values(self, weights: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics [W] of the first SAE, and the differences of the two in R² and CE_rec; weights [W,n] of
        rows [n].
        """
        taken = {q: v[:, rows] for q, v in self.sums.items()}
        metrics = computed(Sums(taken, weights, self.d))
        first = {name: metrics[name][:, 0] for name in SHOWN}
        return first | {f"difference in {m}": metrics[m][:, 1] - metrics[m][:, 0] for m in COMPARED}

    def truth(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.values(np.ones((1, rows.size)), rows)


def measured(folders: list[pathlib.Path], n: int, ctx: int) -> tuple[Pool, dict]:
    """(the pool, provenance of the first SAE)."""
    made_by = json.loads((folders[0] / "provenance.json").read_text())
    model, tokenizer = load_model(made_by["model"], CPU)
    rows, document = [], []
    for number, ids in zip(range(n), package_documents(tokenizer, ctx)):
        for start in range(0, min(len(ids) // ctx, PER_DOCUMENT) * ctx, ctx):
            rows.append(ids[start : start + ctx])
            document.append(number)
    hook, numbers = Hook(model, made_by["layer"]), np.array(document)
    saes = {folder.name: load_sae(folder, CPU) for folder in folders}
    found = evaluate(hook, torch.tensor(rows), saes, eval_batch(hook, ctx), document=numbers)
    one, other = (found[name].sums for name in saes)
    sums = {q: np.stack([one[q], other[q]]) for q in one}
    return Pool(sums, numbers, model.config.hidden_size), made_by


# --------------------------------------------------------------------------------------- ways of taking rows
def weights_of(n: int, rng: np.random.Generator) -> np.ndarray:
    """[W,n] of a bootstrap over n units."""
    return document_weights(n, RESAMPLES, int(rng.integers(2**31)))[resampling.RESAMPLES]


def by_document(n: int, places: np.ndarray) -> Take:
    """n documents, all rows of every one in places [documents, rows of each]."""

    def take(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = places[rng.choice(len(places), n, replace=False)]
        return chosen.ravel(), weights_of(n, rng).repeat(places.shape[1], axis=1)

    return take


def in_a_row(n: int, rows: np.ndarray) -> Take:
    def take(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start = rng.integers(len(rows) - n)
        return rows[start : start + n], weights_of(n, rng)

    return take


def coverage(pool: Pool, kept: np.ndarray, numbers: list[int], draws: int) -> str:
    """The table over the documents of the rows kept [S] (bool), in Markdown."""
    documents = np.unique(pool.document[kept])
    rng = np.random.default_rng(1)
    # two of each, at random
    places = [rng.permutation(np.flatnonzero(pool.document == number))[:2] for number in documents]
    single = np.array([p[:1] for p in places])
    double = np.array([p for p in places if len(p) == 2])
    in_order = np.flatnonzero(np.isin(pool.document, documents))
    few = numbers[0]
    ways = {f"{n} documents": (by_document(n, single), single) for n in numbers}
    ways[f"{few} documents, two rows of each"] = by_document(few, double), double
    ways[f"{2 * few} rows in a row, rows resampled"] = in_a_row(2 * few, in_order), in_order
    table = {name: {"": name} for name in NAMES}
    for way, (take, population) in tqdm(ways.items(), leave=False):
        truth = pool.truth(population.ravel())
        rng, inside = np.random.default_rng(2), dict.fromkeys(NAMES, 0)
        for _ in range(draws):
            chosen, weights = take(rng)
            for name, v in pool.values(weights, chosen).items():
                lo, hi = np.quantile(v, [0.025, 0.975])
                inside[name] += lo <= truth[name][0] <= hi
        for name, hits in inside.items():
            table[name][way] = f"{hits / draws:.1%}"
    return markdown(list(table.values()), ["", *ways])


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument(
        "saes", nargs=2, type=pathlib.Path, help="two SAEs of one hook, as a run leaves them in its cache"
    )
    parser.add_argument("--pool", type=int, default=400, help="documents")
    parser.add_argument("--documents", type=bench.ints, default="24,32,40", help="in a sample")
    parser.add_argument("--ctx", type=int, default=256, help="tokens of a row")
    parser.add_argument("--draws", type=int, default=1000, help="samples, for each way of taking them")
    args = parser.parse_args()
    pool, made_by = measured(args.saes, args.pool, args.ctx)
    said = {
        "saes": ", ".join(folder.name for folder in args.saes),
        "rows": len(pool.document),
        "model": made_by["model"],
        "layer": made_by["layer"],
    }
    print(HEAD.format(**{**vars(args), **said}))
    clean = pool.sums["ce_orig"][0] / pool.sums["n"][0]
    strange = np.isin(pool.document, pool.document[clean > STRANGE])
    print(coverage(pool, ~strange, args.documents, args.draws))
    print("\n" + STRANGERS.format(n=len(np.unique(pool.document[strange])), bound=STRANGE) + "\n")
    print(coverage(pool, clean > 0, args.documents, args.draws))


if __name__ == "__main__":
    run_script(main)
