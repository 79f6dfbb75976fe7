"""Rank correlations of a proxy with a target at equal k, with weighted conditions; the noise ceiling."""

from dataclasses import dataclass

from transport_geometry.statistics.resampling import (
    ALL,
    HALF_A,
    HALF_B,
    N_FIXED,
    RESAMPLES,
    bootstrap_weights,
    resample_index,
)

import numpy as np
import scipy


@dataclass(frozen=True)
class Design:
    """What all weighted regressions on Z share, under R weightings of C conditions."""

    weights: np.ndarray  # [R, C]
    Z: np.ndarray  # [C, q]
    inverse: np.ndarray  # [R, q, q]: (Z'WZ)^+
    defined: np.ndarray  # [R] bool: at least 1 residual degree of freedom


def weighted_design(weights: np.ndarray, Z: np.ndarray) -> Design:
    """weights [R, C], Z [C, q]. Degrees of freedom: conditions with weight - rank Z - 1."""
    known = ~np.isnan(weights).any(1)
    w = np.where(known[:, None], weights, 1.0)
    q = Z.shape[1]
    gram = (w @ (Z[:, :, None] * Z[:, None, :]).reshape(len(Z), q * q)).reshape(-1, q, q)
    inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
    rank = np.rint(np.einsum("rpq,rqp->r", gram, inverse))
    return Design(w, Z, inverse, known & ((w > 0).sum(1) - rank - 1 >= 1))


def unit_residual(v: np.ndarray, design: Design) -> np.ndarray:
    """Weighted residual of v [R or 1, C] on Z, scaled to unit length: [R, C]. nan where it is undefined, or
    nothing is left of v.
    """
    w, Z = design.weights, design.Z
    with np.errstate(invalid="ignore", divide="ignore"):
        beta = (design.inverse @ ((w * v) @ Z)[:, :, None])[:, :, 0]
        e = np.sqrt(w) * (v - beta @ Z.T)
        length2 = (e * e).sum(1)
        defined = design.defined & (length2 > 1e-20 * (w * v * v).sum(1))  # else constant, up to rounding
        return np.where(defined[:, None], e / np.sqrt(length2)[:, None], np.nan)


def correlation(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Partial correlation [R] given Z, of two `unit_residual` [R, C]."""
    return np.clip((u * v).sum(1), -1.0, 1.0)


def weighted_ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of x [R or 1, C], up to a constant, where condition c counts weights [R, C] times; ties share
    their mean rank.
    """
    dense = scipy.stats.rankdata(np.nan_to_num(x), method="dense", axis=1).astype(np.intp) - 1
    dense = np.broadcast_to(dense, weights.shape)
    R, C = weights.shape
    mass = np.bincount((dense + C * np.arange(R)[:, None]).ravel(), weights.ravel(), R * C).reshape(R, C)
    rank = np.take_along_axis(np.cumsum(mass, axis=1) - mass / 2, dense, axis=1)
    return np.where(np.isnan(x).any(1, keepdims=True), np.nan, rank)


def rank_residual(x: np.ndarray, design: Design) -> np.ndarray:
    """`unit_residual` of the ranks of x [R or 1, C]."""
    return unit_residual(weighted_ranks(x, design.weights), design)


def k_dummies(meta: dict) -> np.ndarray:
    """Design matrix [C, q] of what a partial Spearman holds fixed: a dummy per k, and per budget but the
    first.
    """
    k, tokens = (np.asarray(meta[name])[:, None] == np.unique(meta[name]) for name in ("k", "tokens"))
    return np.hstack([k, tokens[:, 1:]]).astype(float)


def partial_spearman(x: np.ndarray, y: np.ndarray, meta: dict) -> float:
    """Spearman of x and y [C] given k: both are ranked over all conditions, residualised on dummies of k (and
    budget), and correlated.

    Every proxy is monotone in k, so the plain Spearman flatters all of them. Differences between models stay
    in.
    """
    design = weighted_design(np.ones((1, len(x))), k_dummies(meta))
    u, v = (rank_residual(np.atleast_2d(z), design) for z in (x, y))
    return float(correlation(u, v)[0])


def partial_draws(x: np.ndarray, y: np.ndarray, meta: dict, n_resamples: int, seed: int = 0) -> np.ndarray:
    """Partial Spearman [3 + n_resamples] of x with y, both [W, C], under the leaderboard's bootstrap: hooks
    within models, nested with the documents' resamples. The draws before RESAMPLES all repeat the estimate.
    """
    documents = np.r_[[ALL] * N_FIXED, resample_index(len(x), n_resamples)[RESAMPLES]]
    design = weighted_design(bootstrap_weights(meta, n_resamples, seed), k_dummies(meta))
    u, v = (rank_residual(z[documents], design) for z in (x, y))
    return correlation(u, v)


def noise_ceiling(target: np.ndarray, meta: dict) -> dict[str, float]:
    """How well the evaluation documents determine the target [W, C]: `split_half` = partial Spearman of half
    A with half B, `reliability` of both together (Spearman-Brown), `rho_max` = sqrt(reliability), the most
    that a noise-free proxy can reach (Spearman 1904). A proxy measured on the same documents shares their
    noise and may exceed it.
    """
    split = partial_spearman(target[HALF_A], target[HALF_B], meta)
    reliability = 2 * split / (1 + split) if split > -1 else np.nan
    rho_max = float(np.sqrt(reliability)) if reliability >= 0 else np.nan
    return dict(split_half=split, reliability=reliability, rho_max=rho_max)
