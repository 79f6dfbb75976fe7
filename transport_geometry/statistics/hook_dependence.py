"""How many independent hooks the hooks of a grid count as, from the autocorrelation of a proxy's errors along
depth.
"""

import functools
from dataclasses import dataclass

from transport_geometry.statistics.correlations import k_dummies
from transport_geometry.statistics.resampling import cluster_ids, mean_by_hook

import numpy as np
import scipy

MIN_EFFECTIVE_HOOKS = 6  # hooks: below, the 2^G patterns of a test over them cannot reach p < .05 two-sided
PHIS = np.r_[np.arange(-0.9, 0.95, 0.05), 0.95, 0.98, 0.99]  # that `median_correlations` knows
N_SERIES = 4000  # simulated for each


@dataclass(frozen=True)
class Dependence:
    """How many independent hooks the hooks of a grid count as, by the errors of one proxy."""

    phi: float  # correlation of neighbouring hooks' errors; nan where no model has two hooks
    n_hooks: int
    n_effective: float  # independent hooks whose mean would vary as much

    @property
    def stretch(self) -> float:
        """The factor by which intervals and null distributions over hooks are too narrow; nan below
        MIN_EFFECTIVE_HOOKS effective hooks, where no claim in general is made.
        """
        if self.n_effective < MIN_EFFECTIVE_HOOKS:
            return np.nan
        return float((self.n_hooks / self.n_effective) ** 0.5)


def proxy_errors(x: np.ndarray, y: np.ndarray, meta: dict) -> np.ndarray:
    """Residuals [C] of the ranks of a proxy x [C] on k, budget and the ranks of the target y [C]."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.full(len(y), np.nan)
    Z = np.column_stack([k_dummies(meta), scipy.stats.rankdata(y)])
    ranks = scipy.stats.rankdata(x)
    return ranks - Z @ np.linalg.lstsq(Z, ranks, rcond=None)[0]


def dependence(errors: np.ndarray, meta: dict) -> Dependence:
    """Of the hooks, from errors [C]: of each hook the mean, in the order of depth in each model.

    The assumed process is AR(1) along depth, models independent. phi is the lag-1 correlation whose median
    estimate is the observed one (Andrews 1993), since the observed one is too low by about (1 + 3 phi) /
    hooks (Marriott & Pope 1954): at 12 hooks .55 where .9 is true. Of several models phi is the larger of two
    estimates, about each model's mean and about one mean for all: the first detects drift along depth, the
    second what all hooks of a model share. Neighbours are neighbours in the grid, whatever lies between.
    """
    ids = cluster_ids(meta)
    _, first = np.unique(ids, return_index=True)
    model, layer = np.asarray(meta["model"])[first], np.asarray(meta["layer"])[first]
    order = np.lexsort((layer, model))
    hooks_of_model = tuple(int(n) for n in np.unique(model, return_counts=True)[1])
    e, found = mean_by_hook(errors, ids)[order], []
    for one_mean in (False, True):
        r = neighbour_correlation(e, hooks_of_model, one_mean)
        found.append(np.interp(r, median_correlations(hooks_of_model, one_mean), PHIS, left=PHIS[0]))
    phi = float(np.fmax(*found))
    if np.isnan(phi):
        return Dependence(np.nan, len(first), float(len(first)))
    return Dependence(phi, len(first), effective_hooks(phi, hooks_of_model))


def neighbour_correlation(
    e: np.ndarray, hooks_of_model: tuple[int, ...], one_mean: bool = False
) -> np.ndarray:
    """Mean product of neighbours over mean square, of e [..., G] less each model's mean, or less one mean for
    all: [...]. The hooks of a model follow each other. nan without neighbours, or without errors.
    """
    model = np.repeat(np.arange(len(hooks_of_model)), hooks_of_model)
    together = np.ones((len(model), len(model))) if one_mean else (model[:, None] == model).astype(float)
    e = e - e @ (together / together.sum(0))
    paired = model[1:] == model[:-1]
    square = (e * e).mean(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        product = (e[..., 1:] * e[..., :-1])[..., paired].sum(-1) / paired.sum()
        return np.where(square > 1e-12, product / square, np.nan)


def autoregressive(z: np.ndarray, phi: float, hooks_of_model: tuple[int, ...]) -> np.ndarray:
    """AR(1) of unit variance from normals z [..., G], starting anew with each model."""
    out, starts = z.copy(), {0, *np.cumsum(hooks_of_model).tolist()}
    for g in range(1, z.shape[-1]):
        if g not in starts:
            out[..., g] = phi * out[..., g - 1] + (1 - phi * phi) ** 0.5 * z[..., g]
    return out


@functools.lru_cache
def median_correlations(hooks_of_model: tuple[int, ...], one_mean: bool) -> np.ndarray:
    """Median `neighbour_correlation` for each of PHIS, simulated; increasing."""
    z = np.random.default_rng(0).standard_normal((N_SERIES, sum(hooks_of_model)))
    series = (autoregressive(z, phi, hooks_of_model) for phi in PHIS)
    medians = [np.median(neighbour_correlation(e, hooks_of_model, one_mean)) for e in series]
    return np.maximum.accumulate(medians)


def effective_hooks(phi: float, hooks_of_model: tuple[int, ...]) -> float:
    """Number of independent hooks whose mean would vary as much as the mean over these (Bayley & Hammersley
    1946); at most the number of hooks.
    """
    G, variance = sum(hooks_of_model), 0.0
    for n in hooks_of_model:
        lag = np.arange(1, n)
        variance += n + 2 * ((n - lag) * max(phi, 0.0) ** lag).sum()
    return float(G * G / variance)
