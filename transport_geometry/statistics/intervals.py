"""95% intervals from draws: percentiles of a bootstrap over hooks or documents; Student and Fieller intervals
over seeds and documents; intervals of rank statistics over documents.
"""

from transport_geometry.statistics.resampling import ESTIMATE

import numpy as np
import scipy

ALPHA = 0.05


def percentiles(draws: np.ndarray) -> np.ndarray:
    """[2, ...]: ends of the 95% percentile interval of draws [R, ...]; nan wherever one of them is."""
    return np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], axis=0)


def interval(draws: np.ndarray, fisher: bool = False) -> tuple[float, float]:
    """95% percentile interval of draws [R], on the Fisher-z scale for correlations. Undefined draws are left
    out; there is no interval when they are half or more.
    """
    kept = draws[~np.isnan(draws)]
    if 2 * len(kept) <= len(draws):
        return np.nan, np.nan
    lo, hi = percentiles(fisher_z(kept) if fisher else kept)
    return (float(np.tanh(lo)), float(np.tanh(hi))) if fisher else (float(lo), float(hi))


def fisher_z(r: np.ndarray | float, most: float = 1 - 1e-12) -> np.ndarray:
    return np.arctanh(np.clip(r, -most, most))


def stretched_interval(
    estimate: float, draws: np.ndarray, stretch: float, fisher: bool = False
) -> tuple[float, float]:
    """`interval` of draws [R], its ends moved `stretch` times as far from the estimate; none where stretch is
    nan (`Dependence.stretch`).
    """
    lo, hi = interval(draws, fisher)
    if fisher:
        lo, hi, estimate = (float(fisher_z(v)) for v in (lo, hi, estimate))
    lo, hi = (estimate + stretch * (end - estimate) for end in (lo, hi))
    return (float(np.tanh(lo)), float(np.tanh(hi))) if fisher else (lo, hi)


# ----------------------------------------------------------------------------------- over seeds and documents
def spread(draws: np.ndarray, sources: dict[str, np.ndarray], n_doc: int) -> tuple[np.ndarray, float]:
    """Covariance [q, q] of q statistics [q, R], and the Satterthwaite degrees of freedom of the last one's
    variance. sources: of `seed_draws`.

    Per model the jackknife over its seeds (exact for a mean: s^2 / n), plus the bootstrap over documents.
    Seeds enter the latter through the mean, so the interaction of seed and document is counted twice, which
    is conservative. nan with one seed.
    """
    total, weight = np.zeros((len(draws), len(draws))), 0.0
    for name, own in sources.items():
        n = len(own)
        if name == "documents":
            inflation, df = 1.0, n_doc - 1
        elif n < 2:
            return np.full_like(total, np.nan), np.nan
        else:
            inflation, df = (n - 1) ** 2 / n, n - 1
        part = np.atleast_2d(np.cov(draws[:, own])) * inflation
        total += part
        weight += part[-1, -1] ** 2 / df
    return total, total[-1, -1] ** 2 / weight if weight > 0 else np.nan


def t_interval(
    draws: np.ndarray, sources: dict[str, np.ndarray], n_doc: int, level: float = 1 - ALPHA
) -> tuple[float, float]:
    """Student interval of draws [R] over seeds and documents, nan with one seed. With three seeds a
    percentile bootstrap, which has no degrees of freedom, would cover 95% some 85% of the time.
    """
    variance, df = spread(draws[None], sources, n_doc)
    half = scipy.stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance[0, 0])
    return float(draws[ESTIMATE] - half), float(draws[ESTIMATE] + half)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, sources: dict[str, np.ndarray], n_doc: int
) -> tuple[float, float, float]:
    """(ratio, lo, hi) by Fieller 1954; all nan where the denominator's own interval holds zero, or has
    none.
    """
    lo, hi = t_interval(denominator, sources, n_doc)
    if not (lo > 0 or hi < 0):
        return np.nan, np.nan, np.nan
    v, df = spread(np.stack([numerator, denominator]), sources, n_doc)
    t2, n, d = scipy.stats.t.ppf(1 - ALPHA / 2, df) ** 2, numerator[ESTIMATE], denominator[ESTIMATE]
    a, b, c = d * d - t2 * v[1, 1], n * d - t2 * v[0, 1], n * n - t2 * v[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))  # a > 0, since the denominator is not zero; b^2 - ac >= 0 follows
    return float(n / d), float((b - root) / a), float((b + root) / a)


def document_interval(
    draws: np.ndarray, sources: dict[str, np.ndarray], n_doc: int, n_ranked: int = 0
) -> tuple[float, float]:
    """95% interval of a rank statistic over documents, and over seeds where a model has several. draws [R]
    and `sources`: of `seed_draws`. n_ranked: of a rank correlation, how many are ranked; it is then taken on
    the Fisher-z scale, where a correlation of 1 counts as if two neighbours were exchanged.

    Noise lowers a rank correlation, and a resample has it twice: its draws lie as far below the estimate as
    the estimate lies below the truth, and their percentiles covered a nominal 95% in as few as 45% of data
    sets. So the ends are the outermost ones of the percentiles and of Student intervals (n - 1 degrees of
    freedom, n / (n - 1) of the variance) about what the estimate would be without noise: the estimate less
    the bootstrap's bias (Efron & Tibshirani 1993, section 10.3) and, for a correlation, `without_noise`.
    Measured coverage: bench/RESULTS.md.
    """
    most, middles = 1 - 12 / max(n_ranked**3 - n_ranked, 24), []
    if n_ranked:
        middles = [fisher_z(without_noise(draws[ESTIMATE], draws[sources["documents"]]), most)]
        draws = fisher_z(draws, most)
    sources = {name: own for name, own in sources.items() if name == "documents" or len(own) > 1}
    sources = {name: own[~np.isnan(draws[own])] for name, own in sources.items()}
    of_documents, estimate = draws[sources["documents"]], draws[ESTIMATE]
    if np.isnan(estimate) or n_doc < 2 or len(of_documents) < 2:
        return np.nan, np.nan
    variance, df = spread(draws[None], sources, n_doc)
    t = scipy.stats.t.ppf(1 - ALPHA / 2, df) if variance[0, 0] > 0 else 0.0
    half = t * np.sqrt(variance[0, 0] * n_doc / (n_doc - 1))
    middles.append(2 * estimate - of_documents.mean())
    lo, hi = percentiles(of_documents)
    lo, hi = min(lo, estimate, min(middles) - half), max(hi, estimate, max(middles) + half)
    if n_ranked:
        lo, hi = (np.sign(end) if abs(end) >= np.arctanh(most) else np.tanh(end) for end in (lo, hi))
    return float(lo), float(hi)


def without_noise(estimate: float, draws: np.ndarray) -> float:
    """A correlation as it would be without noise: 1 / r is linear in the noise's variance (Spearman 1904),
    and bootstrap draws have twice that variance (SIMEX with the rational extrapolant, Cook & Stefanski 1994).
    The estimate itself where noise could explain all of it.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws) or not abs(estimate) > 2 * draws.std() or not draws.mean() / estimate > 0.5:
        return estimate
    return float(np.clip(1 / (2 / estimate - 1 / draws.mean()), -1, 1))
