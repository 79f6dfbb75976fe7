"""How two models, or two hooks, differ in every cell: deltas.csv, and what Exp-A's tree reads of a budget."""

import itertools
from collections.abc import Sequence
from typing import Any

from transport_geometry.records.tables import grouped
from transport_geometry.statistics.hook_pair import Conditions, ModelPair, mismatch
from transport_geometry.statistics.resampling import ALL

import numpy as np

DELTAS = "r2 r2_nosink r2_defl1 cosine ce_rec dce frac_zero".split()
MORE_DELTAS = "ce_rec_sinkclean frac_mean".split()  # the file's last columns


def with_ends(*names: str) -> list[str]:
    """The columns of values and their intervals."""
    return [f"{name}{end}" for name in names for end in ("", "_lo", "_hi")]


COLUMNS = [
    *"small large depth recipe sinks k tokens n_seeds".split(),
    *with_ends(*(f"delta_{metric}" for metric in DELTAS), "mismatch"),
    "mismatch_published",
    *with_ends("ratio", *(f"delta_{metric}" for metric in MORE_DELTAS)),
]


def delta_rows(
    conditions: Conditions, recipe: str, sinks: str, pairs: Sequence[Sequence[str]] = ()
) -> list[dict[str, Any]]:
    """deltas.csv of one arm: the second of each pair minus the first, in every cell that both have. pairs:
    where none are named all models, larger minus smaller.

    95% intervals: Student over seeds and documents, Fieller for the ratio of Delta R^2 to Delta CE_rec, a
    bootstrap over seeds for their mismatch.
    """
    rows = []
    for small, large in pairs or itertools.combinations(conditions.models, 2):
        pair = conditions.pair(small, large)
        for cell in pair.grid("depth", "k", "tokens"):
            if not all(pair.mask(model=model, **cell).any() for model in pair.models):
                continue
            r2, ce = pair.by_seed("r2", **cell), pair.by_seed("ce_rec", **cell)
            row: dict[str, Any] = dict(
                small=small, large=large, depth=cell["depth"], recipe=recipe, sinks=sinks
            )
            row |= dict(k=int(cell["k"]), tokens=int(cell["tokens"]), n_seeds=min(map(len, r2)))
            delta = {metric: pair.delta(metric, **cell) for metric in DELTAS + MORE_DELTAS}
            for metric, draws in delta.items():
                row |= zip(with_ends(f"delta_{metric}"), (draws[0], *pair.interval(draws)))
            row |= zip(with_ends("mismatch"), mismatch(r2, ce))
            row["mismatch_published"] = (
                np.nan
            )  # the research log's: seeds of the same index, in one direction
            if len(r2[0]) == len(r2[1]):
                row["mismatch_published"] = float(np.mean((r2[1] > r2[0]) & (ce[1] < ce[0])))
            row |= zip(with_ends("ratio"), pair.ratio_interval(delta["r2"], delta["ce_rec"]))
            rows.append(row)
    return rows


def tree_cells(pair: ModelPair, last: int, before: int) -> list[dict[str, Any]]:
    """Rows of (depth, k) at the budget `last`: live latents in both models, how far CE_rec moved since the
    budget `before`, Delta CE_rec with its 90% interval, standard error over documents and variance over
    seeds, and the transfer gap of R^2.
    """
    rows = []
    for cell in pair.grid("depth", "k"):
        row: dict[str, Any] = dict(depth=str(cell["depth"]), k=int(cell["k"]))
        for side, model in zip(("small", "large"), pair.models):
            now, then = (pair.mean("ce_rec", model=model, tokens=b, **cell)[0] for b in (last, before))
            alive = pair.alive[pair.mask(model=model, tokens=last, **cell)].mean()
            row |= {f"alive_{side}": float(alive), f"moved_{side}": float(now - then)}
        delta = pair.delta("ce_rec", tokens=last, **cell)
        lo, hi = pair.interval(delta, level=0.90)
        gamma, _ = pair.transfer_gap("r2", judged=pair.mask(tokens=last, **cell))
        row |= dict(delta_ce_rec=float(delta[0]), lo90=lo, hi90=hi, gamma_r2=gamma)
        row |= dict(
            se=float(delta[pair.sources["documents"]].std(ddof=1)), seed_variance=pair.seed_variance(delta)
        )
        rows.append(row)
    return rows


def more_needed(cells: list[dict], margin: float, n: int) -> str:
    """What would show equality if the means of `tree_cells` stay: the seeds of each side, now n, at which
    every 90% interval fits the margin (normal approximation). Empty where a mean is outside, or they suffice.
    """
    seeds = []
    for row in cells:  # z^2 (seed variance n / N + document variance) = room^2
        room = ((margin - abs(row["delta_ce_rec"])) / 1.645) ** 2 - row["se"] ** 2
        if abs(row["delta_ce_rec"]) >= margin:
            return ""
        if room <= 0:
            return "; equality would take more evaluation documents, whatever the seeds"
        seeds.append(int(np.ceil(n * row["seed_variance"] / room)))
    return (
        f"; about {max(seeds)} seeds of each would show equality if the means stay" if max(seeds) > n else ""
    )


def seed_correlation(conditions: Conditions) -> float:
    """Correlation of what a seed does to CE_rec in the smallest and in the largest model, over cells: would
    pairing be justified? nan with fewer than three pairs.
    """
    names = ["model", "depth", "recipe", "sae", "k", "tokens"]
    columns = [*(conditions.meta[name] for name in names), conditions.values["ce_rec"][ALL]]
    cells = grouped([dict(zip([*names, "ce"], row)) for row in zip(*columns)], names)
    pairs: list[tuple[float, float]] = []
    for (model, *cell), here in cells.items():  # conditions come sorted by seed
        there = cells.get((conditions.models[-1], *cell), [])
        if model == conditions.models[0] != conditions.models[-1] and len(here) == len(there) > 1:
            ours, theirs = (np.array([row["ce"] for row in side]) for side in (here, there))
            pairs += zip(ours - ours.mean(), theirs - theirs.mean())
    return float(np.corrcoef(np.array(pairs).T)[0, 1]) if len(pairs) > 2 else np.nan
