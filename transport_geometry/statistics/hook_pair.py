"""Exp-A's comparison of the SAEs of a smaller and a larger model, or of two hooks.

Shapes: C conditions (trained SAEs), W weightings of the evaluation documents (`resampling.ALL`, ...), R draws
of seeds and documents, of which the first is the estimate.
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

from transport_geometry.measuring.metrics import as_score
from transport_geometry.statistics import intervals, transfer
from transport_geometry.statistics.intervals import percentiles, spread, t_interval
from transport_geometry.statistics.resampling import ALL, ESTIMATE, SeedDraws, seed_draws

import numpy as np

PAIRED = "paired"  # the depth of hooks that --pairs compares


def as_models(meta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """meta {name: [C]} with every hook as a model of its own, all at one depth, so that hooks are compared as
    models are.
    """
    hooks = np.array([f"{model}@{layer}" for model, layer in zip(meta["model"], meta["layer"])])
    return meta | {"model": hooks, "depth": np.full(len(hooks), PAIRED)}


def mean_over(values: np.ndarray, w: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Weighted mean [R] of values [R,C], weights w [R,C], over the conditions of a mask [C]."""
    with np.errstate(invalid="ignore"):
        return (w[:, here] * values[:, here]).sum(1) / w[:, here].sum(1)


@dataclass(frozen=True, eq=False)
class Conditions:
    """C conditions, in columns."""

    values: dict[str, np.ndarray]  # {metric: [W,C]}, as `results.load_measurements` has them
    meta: dict[str, np.ndarray]  # {name: [C]}
    alive: np.ndarray  # [C], fraction of latents
    models: list[str]  # from the smallest to the largest
    n_doc: int  # evaluation documents

    def mask(self, **cell: Any) -> np.ndarray:
        """[C]: which conditions have these values in these columns of meta."""
        return np.logical_and.reduce([self.meta[name] == value for name, value in cell.items()])

    def only(self, mask: np.ndarray) -> "Conditions":
        """The conditions of mask [C]."""
        values = {metric: v[:, mask] for metric, v in self.values.items()}
        meta = {name: column[mask] for name, column in self.meta.items()}
        return dataclasses.replace(self, values=values, meta=meta, alive=self.alive[mask])

    def of(self, models: list[str]) -> "Conditions":
        """The conditions of these models, which are from the smallest to the largest."""
        part = self.only(np.isin(self.meta["model"], models))
        return dataclasses.replace(part, models=models)

    def by_hook(self) -> "Conditions":
        """The same with hooks `as_models`."""
        meta = as_models(self.meta)
        return dataclasses.replace(self, meta=meta, models=list(dict.fromkeys(meta["model"].tolist())))

    def pair(self, small: str, large: str) -> "ModelPair":
        """The conditions of two models."""
        part = self.of([small, large])
        return ModelPair(part.values, part.meta, part.alive, part.models, part.n_doc)


class ModelPair(Conditions):
    """The conditions of a smaller and a larger model. Delta: larger minus smaller."""

    @functools.cached_property
    def draws(self) -> SeedDraws:
        return seed_draws(self.meta, len(self.values["ce_rec"]))

    @property
    def sources(self) -> dict[str, np.ndarray]:
        """{source of variation: its draws of R}: the seeds of each model, the documents."""
        return self.draws.sources

    def grid(self, *names: str) -> list[dict]:
        """Every combination of the values of these columns."""
        columns = [np.unique(self.meta[name]) for name in names]
        return [dict(zip(names, cell)) for cell in itertools.product(*columns)]

    def mean(self, metric: str, **cell: Any) -> np.ndarray:
        """Mean [R] of a metric over the conditions of a cell."""
        return mean_over(self.values[metric][self.draws.documents], self.draws.weights, self.mask(**cell))

    def delta(self, metric: str, **cell: Any) -> np.ndarray:
        """Delta [R] of a metric in a cell."""
        small, large = self.models
        return self.mean(metric, model=large, **cell) - self.mean(metric, model=small, **cell)

    def by_seed(self, metric: str, **cell: Any) -> list[np.ndarray]:
        """A metric on all documents, in the smaller and in the larger model: each [n], by seed."""
        masks = [self.mask(model=model, **cell) for model in self.models]
        return [self.values[metric][ALL, mask][np.argsort(self.meta["seed"][mask])] for mask in masks]

    def interval(self, draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
        """Student interval of a statistic [R] over seeds and documents (`intervals.t_interval`)."""
        return t_interval(draws, self.sources, self.n_doc, level)

    def ratio_interval(self, numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float, float]:
        """(ratio, lo, hi) of two statistics [R] (`intervals.ratio_interval`, Fieller)."""
        return intervals.ratio_interval(numerator, denominator, self.sources, self.n_doc)

    def seed_variance(self, draws: np.ndarray) -> float:
        """The part of a statistic's variance that comes from seeds (`intervals.spread`)."""
        of_seeds = {model: self.sources[model] for model in self.models}
        return float(spread(draws[None], of_seeds, self.n_doc)[0][0, 0])

    def transfer_gap(self, score: str, judged: np.ndarray, documents: int = ALL) -> tuple[float, float]:
        """(Gamma, in_range) of a score (`transfer.transfer_gap`), judged on the conditions of a mask [C].
        documents: ALL, HALF_A or HALF_B.
        """
        x, ce = as_score(score, self.values[score])[documents], self.values["ce_rec"][documents]
        gamma, in_range = transfer.transfer_gap(x, ce, self.meta, self.models, judged=judged)
        return float(gamma[0]), float(in_range[0])

    def transfer_gap_draws(self, score: str, judged: np.ndarray) -> tuple[np.ndarray, float]:
        """(Gamma [R], in_range) of a score, judged on the conditions of a mask [C]."""
        rows, w = self.draws.documents, self.draws.weights
        x, ce = as_score(score, self.values[score])[rows], self.values["ce_rec"][rows]
        gamma, in_range = transfer.transfer_gap(x, ce, self.meta, self.models, w, judged=judged)
        return gamma, float(in_range[ESTIMATE])


def mismatch(
    r2: list[np.ndarray], ce: list[np.ndarray], n_resamples: int = 2000
) -> tuple[float, float, float]:
    """(rate, lo, hi): how often Delta R^2 and Delta CE_rec differ in sign over all pairs of seeds, ties 1/2.

    r2, ce: of the smaller and of the larger model, each [n seeds]. 95% percentile bootstrap over the seeds of
    each model, n - 1 of n (Rao & Wu 1988). No interval (nan) with one seed, or where every pair says the
    same: resampling cannot doubt that.
    """
    signs = [np.sign(np.subtract.outer(large, small)) for small, large in (r2, ce)]
    apart = (1 - signs[0] * signs[1]) / 2
    rate = float(apart.mean())
    if min(apart.shape) < 2:
        return rate, np.nan, np.nan
    rng = np.random.default_rng(0)
    w = [rng.multinomial(n - 1, np.full(n, 1 / n), n_resamples) / (n - 1) for n in apart.shape]
    lo, hi = percentiles(np.einsum("rl,ls,rs->r", w[0], apart, w[1]))
    return (rate, float(lo), float(hi)) if lo < hi else (rate, np.nan, np.nan)
