"""Tests over hooks: does one proxy rank, predict or add more than another? The unit is the hook, whatever k
and seeds it has: a test over conditions rejected a true null in a third of simulated grids (bench/levels.py).
"""

from typing import Any

from transport_geometry.statistics.correlations import (
    correlation,
    k_dummies,
    rank_residual,
    weighted_design,
)
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.intervals import ALPHA, interval
from transport_geometry.statistics.resampling import RESAMPLES, bootstrap_weights, cluster_ids

import numpy as np
import scipy

MAX_EXACT = 14  # all 2^G sign patterns up to here, Monte Carlo above


def sign_patterns(G: int, n_draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """[R, G] of +1 and -1, the first row all +1 (the observed pattern, so that p is never 0): all 2^G up to G
    = MAX_EXACT, above that `n_draws` random ones.
    """
    if G <= MAX_EXACT:
        return 1.0 - 2.0 * (np.arange(2**G)[:, None] >> np.arange(G) & 1)
    signs = np.random.default_rng(seed).choice([1.0, -1.0], (n_draws, G))
    signs[0] = 1.0
    return signs


def p_value(stat: np.ndarray, stretch: float = 1.0) -> float:
    """Share of patterns [R] at least as extreme as the first, two-sided; an undefined pattern counts as
    extreme. All but the first are multiplied by `stretch` before.
    """
    others = np.where(np.arange(len(stat)) > 0, stretch, 1.0) * np.abs(stat)
    return float(np.mean(~(others < abs(stat[0]) - 1e-9)))


def cr1_correction(G: int) -> float:
    """sqrt(G / (G - 1)) for G hooks, as in CR1 (Cameron, Gelbach & Miller 2008): putting each proxy on its
    own scale first, by ranks or by a fit, costs one degree of freedom, and patterns of what is left vary too
    little. Without it 9 hooks reject a true null in 8 to 12% of data sets rather than 4 to 6%
    (bench/RESULTS.md).
    """
    return (G / (G - 1)) ** 0.5


# ------------------------------------------------------------------------------------- does it rank better?
def swap_test(a: np.ndarray, b: np.ndarray, y: np.ndarray, meta: dict, **options: Any) -> tuple[float, float]:
    """`swap_tests` of one proxy a [C]: (difference, p)."""
    diff, p = swap_tests(np.atleast_2d(a), b, y, meta, **options)
    return float(diff[0]), float(p[0])


def swap_tests(
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    meta: dict,
    *,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    stretch: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Does each proxy in a [P, C] predict y [C] better than proxy b [C]? Differences of partial Spearman [P],
    p [P].

    Under the null the two proxies can trade places in whole clusters (default: hooks). They are ranked,
    swapped by `sign_patterns` and ranked again: without that the test rejects twice too often where proxies
    correlate at .95. Two-sided, with `cr1_correction`; p is nan below 6 clusters. stretch, one or [P]: of the
    null distribution, as `Dependence.stretch`; nan gives no p.
    """
    stretches = np.broadcast_to(stretch, len(a))
    ids = cluster_ids(meta) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    diff, p = np.full(len(a), np.nan), np.full(len(a), np.nan)
    if not np.isfinite(b).all():
        return diff, p
    G, Z = int(ids.max()) + 1, k_dummies(meta)
    observed = np.zeros((1, len(ids)), bool)
    swapped = sign_patterns(G, seed=seed)[:, ids] < 0 if G >= MIN_EFFECTIVE_HOOKS else observed
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    unit_y = rank_residual(np.atleast_2d(y), weighted_design(np.ones((1, len(ids))), Z))[0]

    def with_y(doubled: np.ndarray) -> np.ndarray:
        e = _rank_again(doubled) @ residual
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((e * e).sum(1) > 1e-9, e @ unit_y / np.sqrt((e * e).sum(1)), np.nan)

    ranks_b = _doubled_ranks(b)
    for i, values in enumerate(a):
        if not np.isfinite(values).all():
            continue
        ranks_a = _doubled_ranks(values)
        stat = with_y(np.where(swapped, ranks_b, ranks_a)) - with_y(np.where(swapped, ranks_a, ranks_b))
        diff[i] = stat[0]
        if np.isfinite(stat[0]) and G >= MIN_EFFECTIVE_HOOKS and np.isfinite(stretches[i]):
            p[i] = p_value(stat, cr1_correction(G) * stretches[i])
    return diff, p


def _doubled_ranks(x: np.ndarray) -> np.ndarray:
    """Twice the midrank [C], a whole number."""
    return np.rint(2 * scipy.stats.rankdata(x)).astype(np.intp)


def _rank_again(doubled: np.ndarray) -> np.ndarray:
    """Midranks, up to a constant, of whole numbers [R, C] between 0 and 2 C, by counting: sorting every row
    would take most of the test's time.
    """
    R, C = doubled.shape
    bins = 2 * C + 1
    flat = doubled + bins * np.arange(R)[:, None]
    count = np.bincount(flat.ravel(), minlength=R * bins).reshape(R, bins)
    return np.take_along_axis(np.cumsum(count, 1) - count / 2, doubled, axis=1)


def smallest_detectable(
    x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict, *, n_resamples: int = 2000, seed: int = 0
) -> float:
    """Smallest difference in partial Spearman with y between proxies x and base, all [C], that this grid
    shows with a power of 80%, two-sided 5%: (z.975 + z.80) times the bootstrap standard error of the
    difference.
    """
    design = weighted_design(bootstrap_weights(meta, n_resamples, seed)[RESAMPLES], k_dummies(meta))
    of_x, of_base, of_y = (rank_residual(v[None], design) for v in (x, base, y))
    diff = correlation(of_x, of_y) - correlation(of_base, of_y)
    diff = diff[~np.isnan(diff)]
    z = scipy.stats.norm.ppf(1 - ALPHA / 2) + scipy.stats.norm.ppf(0.8)
    return float(z * diff.std(ddof=1)) if 2 * len(diff) > n_resamples else np.nan


# ------------------------------------------------------------------------- does it predict the size better?
def loho_errors(x: np.ndarray, magnitude: np.ndarray, meta: dict) -> np.ndarray:
    """Leave-one-hook-out errors [C]: log10 of a distortion (dCE, KL) predicted from a proxy's score x [C],
    minus its true value.

    A quadratic in x, fitted on all hooks but one, predicts that one's conditions: does the proxy say *how
    much* is lost, in a model and a layer that it was not calibrated on? nan (all) where a distortion is not
    positive, a score not finite, or leaving a hook out leaves fewer than three values of x.
    """
    ids = cluster_ids(meta)
    with np.errstate(invalid="ignore", divide="ignore"):
        y, x = np.log10(magnitude), np.asarray(x, float)
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        return np.full(len(y), np.nan)
    x = (x - x.mean()) / (x.std() or 1.0)
    if any(len(np.unique(x[ids != hook])) < 3 for hook in range(ids.max() + 1)):
        return np.full(len(y), np.nan)
    return _left_out_errors(np.stack([np.ones_like(x), x, x * x], 1), y, ids)


def _left_out_errors(design: np.ndarray, y: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Predicted minus true y [C], each hook predicted by a linear model of the others on design [C, q]."""
    errors = np.empty(len(y))
    for hook in range(ids.max() + 1):
        out = ids == hook
        errors[out] = design[out] @ np.linalg.lstsq(design[~out], y[~out], rcond=None)[0] - y[out]
    return errors


def flip_test(d: np.ndarray, seed: int = 0, stretch: float = 1.0) -> float:
    """p that the mean of d [G], a difference of errors in each hook, is 0: signs flipped, two-sided, with
    `cr1_correction`. nan below 6 hooks, or where one is undefined. stretch: as of `swap_tests`.
    """
    if len(d) < MIN_EFFECTIVE_HOOKS or not np.isfinite(d).all() or np.isnan(stretch):
        return np.nan
    stat = sign_patterns(len(d), seed=seed) @ d / max(np.abs(d).sum(), 1e-300)
    return p_value(stat, cr1_correction(len(d)) * stretch)


# ------------------------------------------------------------------------------ does it add to another one?
def added_value(x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict) -> tuple[float, float]:
    """Does x predict of y what base does not? Partial Spearman of x with y given base, k and budget, and its
    p by sign flips over hooks. x, base, y [C].

    The residual of y changes its sign in whole hooks (Freedman and Lane 1983, with the wild bootstrap's signs
    instead of a permutation, since SAEs of a hook move together). Two-sided. nan below 6 hooks.
    """
    if not np.isfinite([x, base, y]).all():
        return np.nan, np.nan
    ids, (x, base, y) = cluster_ids(meta), map(scipy.stats.rankdata, (x, base, y))
    Z = np.column_stack([k_dummies(meta), base])
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    rx, ry = residual @ x, residual @ y
    if (
        ids.max() + 1 < MIN_EFFECTIVE_HOOKS
        or min(rx @ rx, ry @ ry) < 1e-9
        or len(Z) - np.linalg.matrix_rank(Z) < 2
    ):
        return np.nan, np.nan
    e = (sign_patterns(ids.max() + 1)[:, ids] * ry) @ residual
    r = e @ rx / np.sqrt((e * e).sum(1) * (rx @ rx))
    return float(r[0]), p_value(r)


def out_of_hook_gain(
    x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict, n_resamples: int = 2000
) -> tuple[float, float, float]:
    """How much less of y's variance is left when x joins base, k and budget in a linear model, each hook
    predicted by the others: (share, lo, hi), hooks resampled. nan below 6 hooks, or where leaving one out
    leaves the larger model without a degree of freedom.
    """
    smaller, ids = np.column_stack([k_dummies(meta), base]), cluster_ids(meta)
    larger, G = np.column_stack([smaller, x]), int(ids.max()) + 1
    rest = [larger[ids != hook] for hook in range(G)]
    q = larger.shape[1]
    if G < MIN_EFFECTIVE_HOOKS or any(len(z) <= q or np.linalg.matrix_rank(z) < q for z in rest):
        return np.nan, np.nan, np.nan
    squares = [np.bincount(ids, _left_out_errors(z, y, ids) ** 2) for z in (smaller, larger)]
    w = np.vstack([np.ones(G), np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), n_resamples)])
    gain = 1 - (w @ squares[1]) / (w @ squares[0])
    return float(gain[0]), *interval(gain[1:])
