"""The research log's numbers on Pythia, all at the middle layers, beside what a run measured of the same."""

from collections.abc import Iterator
from dataclasses import dataclass

from transport_geometry.records.condition import hook_of
from transport_geometry.records.tables import grouped, markdown, readable_count
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics.curves import KStar

import numpy as np


@dataclass(frozen=True)
class Delta:
    delta_ce_rec: float
    delta_r2: float
    mismatch_published: float
    ratio: float | None = None


@dataclass(frozen=True)
class Sae:
    r2: float
    ce_rec: float
    cosine: float
    alive: float


MIDDLE = "0.50"  # depth
TOKENS = 10**7  # where none are named
S, M, L = "EleutherAI/pythia-70m", "EleutherAI/pythia-160m", "EleutherAI/pythia-410m"

DELTAS = {  # of (small, large, k, tokens)
    (S, L, 8, 10**7): Delta(-0.099, 0.150, 1.0),
    (S, L, 16, 10**7): Delta(-0.028, 0.111, 0.5),
    (S, L, 8, 5 * 10**7): Delta(0.018, 0.108, 0.0),
    (S, L, 16, 5 * 10**7): Delta(0.018, 0.072, 0.0),
    (S, L, 8, 10**8): Delta(0.009, 0.096, 0.0, 10.7),
    (S, L, 16, 10**8): Delta(0.020, 0.067, 0.0, 3.3),
}
SAES = {  # of (model, k)
    (S, 8): Sae(0.810, 0.372, 0.856, 0.152),
    (M, 8): Sae(0.907, 0.331, 0.869, 0.129),
    (L, 8): Sae(0.961, 0.269, 0.809, 0.119),
    (S, 16): Sae(0.855, 0.580, 0.893, 0.371),
    (M, 16): Sae(0.924, 0.538, 0.908, 0.285),
    (L, 16): Sae(0.968, 0.530, 0.883, 0.254),
    (S, 32): Sae(0.891, 0.729, 0.920, 0.632),
    (M, 32): Sae(0.938, 0.696, 0.932, 0.511),
    (L, 32): Sae(0.974, 0.723, 0.919, 0.514),
    (S, 64): Sae(0.922, 0.836, 0.944, 0.838),
    (M, 64): Sae(0.951, 0.809, 0.934, 0.712),
    (L, 64): Sae(0.979, 0.814, 0.901, 0.650),
}
K_STARS = {(S, 0.85): 71.2, (L, 0.85): 98.0}  # of (model, CE_rec)
CORRELATION = -0.943  # of R^2 with CE_rec within k, over S and L at six k

TEXT = blocks("expa")


def section(deltas: list[dict], saes: list[dict], stars: list[KStar], hooks: dict[str, str]) -> str:
    """published | measured | difference, for whatever of the published grids a run holds; else empty.

    Rows of deltas.csv and conditions.csv; hooks {model@layer: depth}.
    """
    rows = []
    for what, published, measured in comparisons(deltas, saes, stars, hooks):
        row: dict = {"": what, "published": published, "measured": "undefined", "difference": "undefined"}
        if np.isfinite(measured):
            row |= {"measured": float(measured), "difference": float(measured) - published}
        rows.append(row)
    return TEXT["published"].format(table=markdown(rows)) if rows else ""


def comparisons(
    deltas: list[dict], saes: list[dict], stars: list[KStar], hooks: dict[str, str]
) -> Iterator[tuple[str, float, float]]:
    """(what, published, measured)."""
    for row in deltas:
        theirs = DELTAS.get((row["small"], row["large"], row["k"], row["tokens"]))
        if theirs and row["depth"] == MIDDLE:
            cell = f"k={row['k']}, {readable_count(row['tokens'])}, {row['recipe']}, sinks {row['sinks']}"
            for name, value in vars(theirs).items():
                if value is not None:
                    yield f"{name} ({cell})", value, row[name]

    middle = [row for row in saes if row["tokens"] == TOKENS and hooks[hook_of(row)] == MIDDLE]
    for (model, k, recipe, sae), here in grouped(middle, ["model", "k", "recipe", "sae"]).items():
        if (model, k) in SAES:
            for name, value in vars(SAES[model, k]).items():
                mean = float(np.mean([row[name] for row in here]))
                yield f"{name} ({model}, k={k}, {recipe}, {sae})", value, mean

    for star in stars:
        published = K_STARS.get((star.model, star.target))
        if published and star.tokens == TOKENS and star.depth == MIDDLE:
            cell = f"{star.model}, {star.recipe}, sinks {star.sinks}"
            yield f"k* at {star.target} ({cell})", published, star.estimate

    two = [row for row in middle if row["model"] in (S, L)]
    for (recipe, sae), here in grouped(two, ["recipe", "sae"]).items():
        within = []
        for cell_rows in grouped(here, ["k"]).values():
            points = np.array([(row["r2"], row["ce_rec"]) for row in cell_rows])
            within.append(points - points.mean(0))
        if len(within) > 1 and len({row["model"] for row in here}) == 2:
            correlation = np.corrcoef(np.vstack(within).T)[0, 1]
            yield f"correlation of R² with CE_rec within k ({recipe}, {sae})", CORRELATION, correlation
