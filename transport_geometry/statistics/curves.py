"""Curves of CE_rec over k and over token budgets: k*, the smallest k that reaches a value (its ratio across
models is the sparsity tax), and the limit at infinitely many tokens.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from transport_geometry.statistics.hook_pair import Conditions, mean_over
from transport_geometry.statistics.intervals import interval
from transport_geometry.statistics.resampling import ESTIMATE, RESAMPLES, bootstrap_weights

import numpy as np

TARGETS = (0.85, 0.90)  # of k*
MIN_BUDGETS = 5  # for a power law


@dataclass(frozen=True, eq=False)
class Curves:
    """CE_rec, mean over seeds, of every (model, depth): [3 + n, k, budgets], all documents and two halves of
    them, then n resamples of seeds and documents.
    """

    k: np.ndarray
    budgets: np.ndarray
    ce: dict[tuple[str, str], np.ndarray]

    @classmethod
    def of(cls, conditions: Conditions, n_resamples: int) -> "Curves":
        """Resamples seeds within models, and documents with them; nan where a model has one seed."""
        meta, units = conditions.meta, ("model", "seed")
        w = bootstrap_weights(meta, n_resamples, 0, clusters=units, least=2)
        # resample r of the documents with resample r of the seeds
        values = conditions.values["ce_rec"][: len(w)]
        k, budgets = np.unique(meta["k"]), np.unique(meta["tokens"])
        curves = {}
        for model, depth in sorted(set(zip(meta["model"].tolist(), meta["depth"].tolist()))):
            ce = np.empty((len(w), len(k), len(budgets)))
            for i, j in np.ndindex(ce.shape[1:]):
                here = conditions.mask(model=model, depth=depth, k=k[i], tokens=budgets[j])
                ce[:, i, j] = mean_over(values, w, here)
            curves[model, depth] = ce
        return cls(k, budgets, curves)


# --------------------------------------------------------------------------------------------------------- k*
def k_star(k: np.ndarray, ce: np.ndarray, target: float) -> np.ndarray:
    """k* [R]: the smallest k at which CE_rec reaches the target, linear between grid points.

    k [n] or [R,n] ascending (or another cost: bits), ce [R,n]. -inf where the first k already reaches it, inf
    where none does, nan where a point of the row is nan.
    """
    reached = ce >= target
    at = reached.argmax(1)  # the first grid point that reaches it
    before, row = np.maximum(at - 1, 0), np.arange(len(ce))
    k = np.broadcast_to(k, ce.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (target - ce[row, before]) / (ce[row, at] - ce[row, before])
        between = k[row, before] + part * (k[row, at] - k[row, before])
    found = np.where(at == 0, -np.inf, between)
    found = np.where(reached.any(1), found, np.inf)
    return np.where(np.isnan(ce).any(1), np.nan, found)


@dataclass(frozen=True, eq=False)
class KStar:
    """k* of a model at a depth, in an arm (recipe, sinks) and at a budget."""

    model: str
    depth: str
    recipe: str
    sinks: str
    tokens: int
    target: float
    k_min: int
    k_max: int
    draws: np.ndarray  # as in Curves

    @property
    def cell(self) -> tuple:
        """Models are compared within one."""
        return self.depth, self.recipe, self.sinks, self.tokens, self.target

    @property
    def estimate(self) -> float:
        return float(self.draws[ESTIMATE])

    def word(self, k: float) -> float | str:
        """A number, nan, or text where it lies beyond the grid."""
        if k == -np.inf:
            return f"< {self.k_min}"
        return f"> {self.k_max}" if k == np.inf else float(k)

    def words(self) -> tuple[float | str, float | str, float | str]:
        """(value, lo, hi), with a 95% percentile interval of draws that may be infinite."""
        resampled = self.draws[RESAMPLES]
        known, lo, hi = resampled[~np.isnan(resampled)], np.nan, np.nan
        if len(known):
            lo, hi = np.quantile(known, [0.025, 0.975], method="inverted_cdf")
        return self.word(self.estimate), self.word(lo), self.word(hi)

    def row(self) -> dict[str, Any]:
        """As verdict.json has it."""
        own = {name: value for name, value in vars(self).items() if name != "draws"}
        return own | dict(zip(("value", "lo", "hi"), self.words()))


def k_stars(curves: Curves, recipe: str, sinks: str) -> list[KStar]:
    """k* of every model, depth, budget and target."""
    ends = int(curves.k[0]), int(curves.k[-1])
    stars = []
    for (model, depth), ce in curves.ce.items():
        for (j, tokens), target in itertools.product(enumerate(curves.budgets), TARGETS):
            draws = k_star(curves.k, ce[:, :, j], target)
            stars.append(KStar(model, depth, recipe, sinks, int(tokens), target, *ends, draws))
    return stars


# -------------------------------------------------------------------------------------------------- power law
def power_law(tokens: np.ndarray, ce: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CE_rec = limit - a tokens^-b by least squares: tokens [n], ce [R,n] -> (limit [R], b [R]).

    For a given b it is a line, so only b is searched, on a grid (variable projection: Golub & Pereyra 1973).
    nan where the best b is at the grid's end: the curve then has no bend from which a limit could be read.
    """
    exponents = np.geomspace(0.05, 3, 60)
    errors, limits = np.empty((2, len(exponents), len(ce)))
    for i, b in enumerate(exponents):
        x = tokens.astype(float) ** -b
        x = x / x.max()
        slope = ((ce - ce.mean(1, keepdims=True)) @ (x - x.mean())) / ((x - x.mean()) ** 2).sum()
        limits[i] = ce.mean(1) - slope * x.mean()
        errors[i] = ((ce - limits[i][:, None] - slope[:, None] * x) ** 2).sum(1)
    best = errors.argmin(0)
    bends = (best > 0) & (best < len(exponents) - 1)
    limit = np.where(bends, limits[best, np.arange(len(best))], np.nan)
    return limit, np.where(bends, exponents[best], np.nan)


def laws(curves: Curves, recipe: str, sinks: str, decay: bool) -> list[dict]:
    """Rows: the power law over budgets of every model, depth and k.

    decay: whether the learning rate decays at the end of every budget; else budgets are checkpoints of one
    run, and nothing is fitted.
    """
    rows = []
    for (model, depth), ce in curves.ce.items():
        for i, k in enumerate(curves.k):
            limit, exponent, lo, hi = np.nan, np.nan, np.nan, np.nan
            if decay and len(curves.budgets) >= MIN_BUDGETS:
                limits, exponents = power_law(curves.budgets, ce[:, i])
                limit, exponent = limits[ESTIMATE], exponents[ESTIMATE]
                if np.isfinite(limit):
                    lo, hi = interval(limits[RESAMPLES])
            row = dict(model=model, depth=depth, recipe=recipe, sinks=sinks, k=int(k))
            rows.append(row | dict(limit=limit, limit_lo=lo, limit_hi=hi, exponent=exponent))
    return rows
