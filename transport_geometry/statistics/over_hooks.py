"""Means, correlations and differences over hooks, each with a 95% interval: {value, lo, hi, n}.

Shapes: W weightings of the documents (0 all, 1 and 2 halves, then resamples), C conditions, G hooks, given as
{"model": [G], "layer": [G]}. Hooks are resampled within models, and documents with them where W > 1. No
interval (nan) below 6 hooks, or 3 of a model.
"""

from transport_geometry.statistics.correlations import correlation, unit_residual, weighted_design
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.intervals import interval
from transport_geometry.statistics.resampling import (
    RESAMPLES,
    bootstrap_weights,
    depth_weights,
    resample_index,
    shared_depths,
)

import numpy as np


def with_interval(draws: np.ndarray, n: int, fisher: bool = False) -> dict[str, float]:
    """Of draws [3 + R]: the estimate thrice, then resamples. n: what they resample."""
    lo, hi = interval(draws[RESAMPLES], fisher)
    return {"value": float(draws[0]), "lo": lo, "hi": hi, "n": n}


def side_of_zero(found: dict[str, float], above: str, below: str) -> str:
    """The word for the side of 0 on which the whole interval lies."""
    if found["lo"] > 0:
        return above
    return below if found["hi"] < 0 else "undecided"


def resampled(hooks: dict[str, np.ndarray], W: int, n_resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights [3 + R, G] of the hooks, [3 + R] which weighting of the documents goes with each)."""
    weights = bootstrap_weights(hooks, n_resamples, 0)
    if len(weights[0]) < MIN_EFFECTIVE_HOOKS:
        weights[RESAMPLES] = np.nan
    return weights, resample_index(W, n_resamples) if W > 1 else np.zeros(len(weights), int)


def mean_over_hooks(v: np.ndarray, hooks: dict[str, np.ndarray], n_resamples: int) -> dict[str, float]:
    """v [W,G]."""
    weights, which = resampled(hooks, len(v), n_resamples)
    with np.errstate(invalid="ignore"):  # no hooks
        draws = (weights * v[which]).sum(1) / weights.sum(1)
    return with_interval(draws, v.shape[1])


def correlation_within_models(
    x: np.ndarray, y: np.ndarray, hooks: dict[str, np.ndarray], n_resamples: int
) -> dict[str, float]:
    """Pearson's, of x [G] and y [W,G], each less its model's mean."""
    weights, which = resampled(hooks, len(y), n_resamples)
    models = (hooks["model"][:, None] == np.unique(hooks["model"])).astype(float)
    design = weighted_design(weights, models)
    r = correlation(unit_residual(x[None], design), unit_residual(y[which], design))
    return with_interval(r, len(x), fisher=True)


def larger_minus_smaller(y: np.ndarray, meta: dict, models: list[str], n_resamples: int) -> dict[str, float]:
    """Of y [W,C]: the largest model minus the smallest at equal depth and k, mean over the k that both have,
    then over depths. Depths are resampled, as pairs of hooks.
    """
    gaps, kept = [], []
    for i, depth in enumerate(shared_depths(meta, models)):
        small, large = ((meta["depth"] == depth) & (meta["model"] == m) for m in (models[0], models[-1]))
        of_k = [
            y[:, large & (meta["k"] == k)].mean(1) - y[:, small & (meta["k"] == k)].mean(1)
            for k in sorted(set(meta["k"][small]) & set(meta["k"][large]))
        ]
        if of_k:
            gaps.append(np.mean(of_k, 0))
            kept.append(i)
    if not gaps:
        return with_interval(np.full(3 + n_resamples, np.nan), 0)
    weights = depth_weights(meta, models, n_resamples, 0)[:, kept]
    by_depth = np.transpose(gaps)[resample_index(len(y), n_resamples)]
    return with_interval((weights * by_depth).sum(1) / weights.sum(1), len(gaps))
