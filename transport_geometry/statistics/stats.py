"""Estimators, intervals and tests: which cheap proxy of SAE quality predicts patched CE? Rank correlations
given k that know what is independent of what.

Arrays. C conditions. A proxy, larger = better, and the target are both [W, C] under W weightings of the
evaluation documents: 0 all of them, 1 half A, 2 half B, 3.. bootstrap resamples, each shared by all
conditions. R draws: what a statistic is computed on, each with its weights of the conditions and its
weighting of the documents; draw 0 is the estimate. `meta` maps model, depth, layer, k, tokens (budget), seed
and cell (the condition without seed) to arrays over C.

Two claims. *Here*: about these SAEs; the units are evaluation documents (and seeds): `document_interval`. *In
general*: about hooks, a (model, layer), that were not measured. What SAEs of one hook have in common moves
all of them (what a proxy has beyond k and CE_rec correlates by up to .9 within a hook), so the unit is the
hook, whatever k and seeds it carries; a test over cells rejected a true null in a third of simulated grids
(bench/levels.py). Neighbouring hooks of one model resemble each other too: `dependence`. A stratum is a model
(2 or 3 models are fixed effects; nothing here generalises over models). Undefined is nan.
"""

import functools
from dataclasses import dataclass

import numpy as np
import scipy

ALPHA = 0.05
HOOK = ("model", "layer")
MIN_CLUSTERS = 6  # hooks: below, 2^G swap patterns cannot reach p < .05 two-sided
MIN_HOOKS = 3  # of a model: fewer do not say how much its hooks differ
MAX_EXACT = 14  # all 2^G swap patterns up to here, Monte Carlo above
MIN_IN_RANGE = 0.5  # a transfer gap mostly outside the fitted range is not judged


# ----------------------------------------------------------------------------------------------- correlations
@dataclass(frozen=True)
class Design:
    """What every weighted regression on Z shares, under R weightings of C conditions."""

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
    """Weighted residual of v [R or 1, C] on Z, at unit length: [R, C]. nan where undefined, or nothing is
    left of v.
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


def given(meta: dict) -> np.ndarray:
    """Design matrix [C, q] of what the primary statistic holds fixed: a dummy per k, and per budget but the
    first.
    """
    k, tokens = (np.asarray(meta[name])[:, None] == np.unique(meta[name]) for name in ("k", "tokens"))
    return np.hstack([k, tokens[:, 1:]]).astype(float)


def partial_spearman(x: np.ndarray, y: np.ndarray, meta: dict) -> float:
    """Spearman of x and y [C] given k: both ranked over all conditions, residualised on k (and budget)
    dummies, and correlated.

    Every proxy is monotone in k, so the plain Spearman flatters all of them; what one model has over another
    stays in.
    """
    design = weighted_design(np.ones((1, len(x))), given(meta))
    u, v = (unit_residual(weighted_ranks(np.atleast_2d(z), design.weights), design) for z in (x, y))
    return float(correlation(u, v)[0])


# ------------------------------------------------------------------------------------------------- resampling
def document_weights(n_documents: int, n_resamples: int, seed: int) -> np.ndarray:
    """[3 + n_resamples, D]: all documents, the even ones, the odd ones, and bootstrap resamples (how often
    each is drawn).

    What the sequences of a document have in common is drawn with it: rows taken as independent gave nominal
    95% intervals that covered 40 to 80% (bench/RESULTS.md). Column `document[s]` weighs sequence s.
    """
    even = np.arange(n_documents) % 2 == 0
    draws = np.random.default_rng(seed).multinomial(
        n_documents, np.full(n_documents, 1 / n_documents), size=n_resamples
    )
    return np.vstack([np.ones(n_documents), even, ~even, draws]).astype(float)


def resample_index(W: int, n_resamples: int) -> np.ndarray:
    """[3 + n_resamples]: the weighting of the documents, of W, that belongs to each draw. Draw 3 + r takes
    resample r, from the first again when they run out; all documents when there is none.
    """
    return np.r_[0, 1, 2, 3 + np.arange(n_resamples) % (W - 3) if W > 3 else np.zeros(n_resamples, int)]


def cluster_ids(meta: dict, by: tuple[str, ...] = HOOK) -> np.ndarray:
    """[C] integers, one per distinct combination of the named columns; the default is the hook."""
    labels = ["\t".join(map(str, values)) for values in zip(*(meta[name] for name in by))]
    return np.unique(labels, return_inverse=True)[1]


def mean_by_hook(v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mean of v [C] within each hook present, [G]: every hook counts once, however many SAEs it has. ids [C]
    as `cluster_ids` gives them.
    """
    _, inside = np.unique(ids, return_inverse=True)
    return np.bincount(inside, v) / np.bincount(inside)


def _rao_wu(rng: np.random.Generator, n: int, n_resamples: int, least: int) -> np.ndarray:
    """[n_resamples, n] weights: n - 1 of n units drawn with replacement, times n / (n - 1) (Rao & Wu 1988),
    since plain resampling understates the standard error by sqrt((n - 1) / n). Fewer than `least` say too
    little about their variance: nan, and so are the intervals they enter.
    """
    if n < least:
        return np.full((n_resamples, n), np.nan)
    return rng.multinomial(n - 1, np.full(n, 1 / n), n_resamples) * (n / (n - 1))


def bootstrap_weights(
    meta: dict,
    n_resamples: int,
    seed: int,
    clusters: tuple[str, ...] = HOOK,
    stratum: str = "model",
    least: int = MIN_HOOKS,
) -> np.ndarray:
    """[3 + n_resamples, C] weights of the conditions: ones for the estimates (all documents and the two
    halves), then the clusters of each stratum resampled.
    """
    rng, ids, strata = np.random.default_rng(seed), cluster_ids(meta, clusters), np.asarray(meta[stratum])
    w = np.ones((3 + n_resamples, len(ids)))
    for name in np.unique(strata):
        _, inside = np.unique(ids[strata == name], return_inverse=True)
        w[3:, strata == name] = _rao_wu(rng, inside.max() + 1, n_resamples, least)[:, inside]
    return w


def shared_depths(meta: dict, models: list[str]) -> list:
    """The depths that the smallest and the largest model both have; none where they are one model."""
    if models[0] == models[-1]:
        return []
    model, depth = np.asarray(meta["model"]), np.asarray(meta["depth"])
    return sorted(set(depth[model == models[0]]) & set(depth[model == models[-1]]))


def depth_weights(meta: dict, models: list[str], n_resamples: int, seed: int) -> np.ndarray:
    """[3 + n_resamples, D] weights of the depths that `transfer_gap` averages over: a depth is a pair of
    hooks, and drawn whole. Drawing hooks model by model would leave most of them without a partner.
    """
    D = len(shared_depths(meta, models))
    return np.vstack([np.ones((3, D)), _rao_wu(np.random.default_rng(seed), D, n_resamples, MIN_HOOKS)])


def partial_draws(x: np.ndarray, y: np.ndarray, meta: dict, n_resamples: int, seed: int = 0) -> np.ndarray:
    """Partial Spearman [3 + n_resamples] of x with y, both [W, C], under the leaderboard's bootstrap: hooks
    within models, nested with the documents' resamples. Draws 1 and 2 are not the halves but repeat the
    estimate.
    """
    resample = np.r_[0, 0, 0, resample_index(len(x), n_resamples)[3:]]
    design = weighted_design(bootstrap_weights(meta, n_resamples, seed), given(meta))
    u, v = (unit_residual(weighted_ranks(z[resample], design.weights), design) for z in (x, y))
    return correlation(u, v)


# -------------------------------------------------------------------------------------------------- intervals
def percentiles(draws: np.ndarray) -> np.ndarray:
    """[2, ...]: ends of the 95% percentile interval of draws [R, ...]; nan wherever one of them is."""
    return np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], axis=0)


def interval(draws: np.ndarray, fisher: bool = False) -> tuple[float, float]:
    """95% percentile interval of draws [R], on the Fisher-z scale for correlations. Draws without a value are
    left out, and there is no interval when they are half or more.
    """
    kept = draws[~np.isnan(draws)]
    if 2 * len(kept) <= len(draws):
        return np.nan, np.nan
    if fisher:
        kept = np.arctanh(np.clip(kept, -1 + 1e-12, 1 - 1e-12))
    lo, hi = percentiles(kept)
    return (float(np.tanh(lo)), float(np.tanh(hi))) if fisher else (float(lo), float(hi))


def seed_draws(meta: dict, W: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Where seeds are replicates: the weighting of the documents of each draw [R], weights of the conditions
    [R, C], {source of variation: its draws}.

    A statistic evaluated on these R draws has, in order: its value; its value without each seed of each
    model; its value under each of the W - 3 document resamples. Models are seeded apart: a seed left out is
    left out of one model.
    """
    model, seed = np.asarray(meta["model"]), np.asarray(meta["seed"])
    left_out = [(m, s) for m in np.unique(model) for s in np.unique(seed[model == m])]
    first = 1 + len(left_out)  # of the documents' draws
    w = np.ones((first + W - 3, len(model)))
    for i, (m, s) in enumerate(left_out, 1):
        w[i, (model == m) & (seed == s)] = 0
    names = np.array(["", *(m for m, _ in left_out)])
    sources = {str(m): np.flatnonzero(names == m) for m in np.unique(model)}
    return np.r_[np.zeros(first, int), 3:W], w, sources | {"documents": np.arange(first, len(w))}


def spread(draws: np.ndarray, sources: dict[str, np.ndarray], n_doc: int) -> tuple[np.ndarray, float]:
    """Covariance [q, q] of q statistics [q, R], and the Satterthwaite degrees of freedom of the last one's
    variance. sources: as `seed_draws` gives them.

    Per model the jackknife over its seeds (exact for a mean: s^2 / n), plus the bootstrap over documents.
    Seeds enter the latter through the mean, so what seed and document do together is counted twice: on the
    safe side. nan with one seed.
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
    """Student interval around draws[0] over seeds and documents. With three seeds a percentile bootstrap,
    which knows no degrees of freedom, would cover 95% some 85% of the time. nan with one seed.
    """
    variance, df = spread(draws[None], sources, n_doc)
    half = scipy.stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance[0, 0])
    return float(draws[0] - half), float(draws[0] + half)


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
    t2, n, d = scipy.stats.t.ppf(1 - ALPHA / 2, df) ** 2, numerator[0], denominator[0]
    a, b, c = d * d - t2 * v[1, 1], n * d - t2 * v[0, 1], n * n - t2 * v[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))  # a > 0, since the denominator is not zero; b^2 - ac >= 0 follows
    return float(n / d), float((b - root) / a), float((b + root) / a)


def stretched_interval(
    estimate: float, draws: np.ndarray, stretch: float, fisher: bool = False
) -> tuple[float, float]:
    """`interval` of draws [R], its ends moved `stretch` times as far from the estimate; none where stretch is
    nan (`Dependence.stretch`).
    """
    lo, hi = interval(draws, fisher)
    if fisher:
        lo, hi, estimate = (float(np.arctanh(np.clip(v, -1 + 1e-12, 1 - 1e-12))) for v in (lo, hi, estimate))
    lo, hi = (estimate + stretch * (end - estimate) for end in (lo, hi))
    return (float(np.tanh(lo)), float(np.tanh(hi))) if fisher else (lo, hi)


def document_interval(
    draws: np.ndarray, sources: dict[str, np.ndarray], n_doc: int, n_ranked: int = 0
) -> tuple[float, float]:
    """95% interval of a rank statistic over documents, and over seeds where a model has several. draws [R],
    draw 0 the estimate, and `sources`: as `seed_draws` gives them. n_ranked: of a rank correlation, how many
    are ranked; it is then taken on the Fisher-z scale, where 1 lies where one exchange of neighbours does.

    Noise lowers a rank correlation, and a resample has it twice: its draws lie as far below the estimate as
    the estimate lies below the truth, and their percentiles covered a nominal 95% in as few as 45% of data
    sets. So the ends are the furthest ones of the percentiles and of Student intervals, n - 1 degrees of
    freedom and n / (n - 1) of the variance, about what the estimate would be without noise: the estimate less
    the bootstrap's bias (Efron & Tibshirani 1993, section 10.3), and, of a correlation, `without_noise`. What
    they cover: bench/RESULTS.md.
    """
    most = 1 - 12 / max(n_ranked**3 - n_ranked, 24)
    middles = [without_noise(draws[0], draws[sources["documents"]])] if n_ranked else []
    if n_ranked:
        middles = [np.arctanh(np.clip(middle, -most, most)) for middle in middles]
        draws = np.arctanh(np.clip(draws, -most, most))
    sources = {name: own for name, own in sources.items() if name == "documents" or len(own) > 1}
    sources = {name: own[~np.isnan(draws[own])] for name, own in sources.items()}
    of_documents, estimate = draws[sources["documents"]], draws[0]
    if np.isnan(estimate) or n_doc < 2 or len(of_documents) < 2:
        return np.nan, np.nan
    variance, df = spread(draws[None], sources, n_doc)
    t = scipy.stats.t.ppf(1 - ALPHA / 2, df) if variance[0, 0] > 0 else 0.0
    half = t * np.sqrt(variance[0, 0] * n_doc / (n_doc - 1))
    middles += [2 * estimate - of_documents.mean()]
    lo, hi = percentiles(of_documents)
    lo, hi = min(lo, estimate, min(middles) - half), max(hi, estimate, max(middles) + half)
    if not n_ranked:
        return float(lo), float(hi)
    lo, hi = (np.sign(end) if abs(end) >= np.arctanh(most) else np.tanh(end) for end in (lo, hi))
    return float(lo), float(hi)


def without_noise(estimate: float, draws: np.ndarray) -> float:
    """A correlation as it would be without noise: 1 / r is linear in the noise's variance (Spearman 1904),
    which the draws of a bootstrap have twice (SIMEX with the rational extrapolant, Cook & Stefanski 1994).
    The estimate itself where noise could be all there is of it.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws) or not abs(estimate) > 2 * draws.std() or not draws.mean() / estimate > 0.5:
        return estimate
    return float(np.clip(1 / (2 / estimate - 1 / draws.mean()), -1, 1))


# -------------------------------------------------------------------- neighbouring hooks are not independent
PHIS = np.r_[np.arange(-0.9, 0.95, 0.05), 0.95, 0.98, 0.99]  # that `median_correlations` knows
N_SERIES = 4000  # simulated for each


@dataclass(frozen=True)
class Dependence:
    """How far the hooks of a grid stand in for independent ones, as the errors of a proxy say."""

    phi: float  # correlation of neighbouring hooks' errors; nan where no model has two hooks
    n_hooks: int
    n_effective: float  # independent hooks that would say as much

    @property
    def stretch(self) -> float:
        """By how much intervals and null distributions over hooks are too narrow; nan below MIN_CLUSTERS
        effective hooks, where nothing is said in general.
        """
        if self.n_effective < MIN_CLUSTERS:
            return np.nan
        return float((self.n_hooks / self.n_effective) ** 0.5)


def proxy_errors(x: np.ndarray, y: np.ndarray, meta: dict) -> np.ndarray:
    """What the ranks of a proxy x [C] have beyond k, budget and the ranks of the target y [C]: residuals
    [C].
    """
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.full(len(y), np.nan)
    Z = np.column_stack([given(meta), scipy.stats.rankdata(y)])
    ranks = scipy.stats.rankdata(x)
    return ranks - Z @ np.linalg.lstsq(Z, ranks, rcond=None)[0]


def dependence(errors: np.ndarray, meta: dict) -> Dependence:
    """Of the hooks, from errors [C]: each hook's mean, hooks in the order of depth in each model.

    phi is the correlation at lag 1 for which what is observed is the median (Andrews 1993), since the
    observed one is too low by about (1 + 3 phi) / hooks (Marriott & Pope 1954): at 12 hooks .55 where .9 is
    true. The model: AR(1) along depth, models independent. Of several models phi is the larger of two
    estimates, about each model's mean and about one mean for all: the first sees what drifts along depth,
    the second what all hooks of a model share. Neighbours are those of the grid, whatever lies between.
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
    """Independent hooks whose mean would vary as much as the mean over these (Bayley & Hammersley 1946); no
    more than there are.
    """
    G, variance = sum(hooks_of_model), 0.0
    for n in hooks_of_model:
        lag = np.arange(1, n)
        variance += n + 2 * ((n - lag) * max(phi, 0.0) ** lag).sum()
    return float(G * G / variance)


# ------------------------------------------------------------------------------------------- tests over hooks
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
    """Share of patterns [R] at least as extreme as the first, two-sided; a pattern without a value counts as
    extreme. The others are stretched before: see `one_spent`.
    """
    others = np.where(np.arange(len(stat)) > 0, stretch, 1.0) * np.abs(stat)
    return float(np.mean(~(others < abs(stat[0]) - 1e-9)))


def one_spent(G: int) -> float:
    """sqrt(G / (G - 1)) for G hooks, as in CR1 (Cameron, Gelbach & Miller 2008): where each proxy was first
    put on its own scale, by ranks or by a fit, one of G is spent, and patterns of what is left vary too
    little. Without it 9 hooks reject a true null in 8 to 12% of data sets rather than 4 to 6%
    (bench/RESULTS.md).
    """
    return (G / (G - 1)) ** 0.5


def swap_test(
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    meta: dict,
    *,
    clusters: np.ndarray | None = None,
    n_draws: int = 10_000,
    seed: int = 0,
    stretch: float = 1.0,
) -> tuple[float, float]:
    """Does proxy a predict y better than proxy b? a, b, y [C] -> difference of partial Spearman, p.

    Both proxies are ranked, then trade places in whole clusters (default: hooks), and are ranked again:
    without that the test rejects twice too often where proxies correlate at .95. `sign_patterns`, two-sided,
    `one_spent`; p is nan below 6 clusters. stretch: of the null distribution, as `Dependence.stretch`; nan
    gives no p.
    """
    diff, p = swap_tests(
        np.atleast_2d(a), b, y, meta, clusters=clusters, n_draws=n_draws, seed=seed, stretch=stretch
    )
    return float(diff[0]), float(p[0])


def swap_tests(
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    meta: dict,
    *,
    clusters: np.ndarray | None = None,
    n_draws: int = 10_000,
    seed: int = 0,
    stretch: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`swap_test` of each proxy in a [P, C] against one and the same b [C]: differences [P], p [P].
    stretch: one, or [P].
    """
    stretches = np.broadcast_to(stretch, len(a))
    ids = cluster_ids(meta) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    diff, p = np.full(len(a), np.nan), np.full(len(a), np.nan)
    if not np.isfinite(b).all():
        return diff, p
    G, Z = int(ids.max()) + 1, given(meta)
    observed = np.zeros((1, len(ids)), bool)
    swapped = sign_patterns(G, n_draws, seed)[:, ids] < 0 if G >= MIN_CLUSTERS else observed
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    design = weighted_design(np.ones((1, len(ids))), Z)
    unit_y = unit_residual(weighted_ranks(np.atleast_2d(y), design.weights), design)[0]

    def with_y(places: np.ndarray) -> np.ndarray:
        e = _midranks_of_places(places) @ residual
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((e * e).sum(1) > 1e-9, e @ unit_y / np.sqrt((e * e).sum(1)), np.nan)

    places_b = _places(b)
    for i, values in enumerate(a):
        if not np.isfinite(values).all():
            continue
        places_a = _places(values)
        stat = with_y(np.where(swapped, places_b, places_a)) - with_y(np.where(swapped, places_a, places_b))
        diff[i] = stat[0]
        if np.isfinite(stat[0]) and G >= MIN_CLUSTERS and np.isfinite(stretches[i]):
            p[i] = p_value(stat, one_spent(G) * stretches[i])
    return diff, p


def _places(x: np.ndarray) -> np.ndarray:
    """Twice the midrank [C], a whole number."""
    return np.rint(2 * scipy.stats.rankdata(x)).astype(np.intp)


def _midranks_of_places(places: np.ndarray) -> np.ndarray:
    """Midranks, up to a constant, of whole numbers [R, C] between 0 and 2 C, by counting."""
    R, C = places.shape
    bins = 2 * C + 1
    flat = places + bins * np.arange(R)[:, None]
    count = np.bincount(flat.ravel(), minlength=R * bins).reshape(R, bins)
    return np.take_along_axis(np.cumsum(count, 1) - count / 2, places, axis=1)


def flip_test(d: np.ndarray, n_draws: int = 10_000, seed: int = 0, stretch: float = 1.0) -> float:
    """p that the mean of d [G], a difference of errors in each hook, is 0: signs flipped, two-sided,
    `one_spent`. nan below 6 hooks, or where one is undefined. stretch: as of `swap_test`.
    """
    if len(d) < MIN_CLUSTERS or not np.isfinite(d).all() or np.isnan(stretch):
        return np.nan
    stat = sign_patterns(len(d), n_draws, seed) @ d / max(np.abs(d).sum(), 1e-300)
    return p_value(stat, one_spent(len(d)) * stretch)


def loho_errors(x: np.ndarray, magnitude: np.ndarray, meta: dict) -> np.ndarray:
    """Leave-one-hook-out errors [C]: log10 of a distortion (dCE, KL) predicted from a proxy's score x [C],
    minus what it is.

    A quadratic in x, fitted on all hooks but one, predicts that one's conditions: does the proxy say *how
    much* is lost, in a model and a layer that it was not calibrated on? nan (all) where a distortion is not
    positive, a score not finite, or leaving a hook out leaves fewer than three values of x.
    """
    ids = cluster_ids(meta)
    with np.errstate(invalid="ignore", divide="ignore"):
        y, x = np.log10(magnitude), np.asarray(x, float)
    errors = np.full(len(y), np.nan)
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        return errors
    x = (x - x.mean()) / (x.std() or 1.0)
    quadratic = np.stack([np.ones_like(x), x, x * x], 1)
    for hook in range(ids.max() + 1):
        out, rest = ids == hook, ids != hook
        if len(np.unique(x[rest])) < 3:
            return np.full(len(y), np.nan)
        errors[out] = quadratic[out] @ np.linalg.lstsq(quadratic[rest], y[rest], rcond=None)[0] - y[out]
    return errors


def added_value(x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict) -> tuple[float, float]:
    """Does x know of y what base does not? Partial Spearman of x with y given base, k and budget, and its p
    by sign flips over hooks. x, base, y [C].

    What y has beyond the rest changes its sign in whole hooks (Freedman and Lane 1983, with the wild
    bootstrap's signs instead of a permutation, since SAEs of a hook move together). Two-sided. nan below 6
    hooks.
    """
    if not np.isfinite([x, base, y]).all():
        return np.nan, np.nan
    ids, (x, base, y) = cluster_ids(meta), map(scipy.stats.rankdata, (x, base, y))
    Z = np.column_stack([given(meta), base])
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    rx, ry = residual @ x, residual @ y
    if ids.max() + 1 < MIN_CLUSTERS or min(rx @ rx, ry @ ry) < 1e-9 or len(Z) - np.linalg.matrix_rank(Z) < 2:
        return np.nan, np.nan
    e = (sign_patterns(ids.max() + 1)[:, ids] * ry) @ residual
    r = e @ rx / np.sqrt((e * e).sum(1) * (rx @ rx))
    return float(r[0]), p_value(r)


def out_of_hook_gain(
    x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict, n_resamples: int = 2000
) -> tuple[float, float, float]:
    """How much less of y's variance is left when x joins base, k and budget in a linear model, each hook
    predicted by the others.

    (share, lo, hi), hooks resampled. nan below 6 hooks, or where leaving one out leaves the larger model
    without a degree of freedom.
    """
    Z, ids = np.column_stack([given(meta), base]), cluster_ids(meta)
    G, errors = ids.max() + 1, []
    for design in (Z, np.column_stack([Z, x])):
        e = np.empty(len(y))
        for hook in range(G):
            out = ids == hook
            if (
                G < MIN_CLUSTERS
                or np.linalg.matrix_rank(design[~out]) < design.shape[1]
                or (~out).sum() <= design.shape[1]
            ):
                return np.nan, np.nan, np.nan
            e[out] = y[out] - design[out] @ np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
        errors.append(np.bincount(ids, e**2))
    w = np.vstack([np.ones(G), np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), n_resamples)])
    gain = 1 - (w @ errors[1]) / (w @ errors[0])
    return float(gain[0]), *interval(gain[1:])


def smallest_detectable(
    x: np.ndarray,
    base: np.ndarray,
    y: np.ndarray,
    meta: dict,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    power: float = 0.8,
) -> float:
    """Smallest difference in partial Spearman with y between proxies x and base, all [C], that this grid
    shows with this power, two-sided 5%: (z.975 + z.power) times the bootstrap standard error of the
    difference.
    """
    design = weighted_design(bootstrap_weights(meta, n_resamples, seed)[3:], given(meta))
    of_x, of_base, of_y = (
        unit_residual(weighted_ranks(v[None], design.weights), design) for v in (x, base, y)
    )
    diff = correlation(of_x, of_y) - correlation(of_base, of_y)
    diff = diff[~np.isnan(diff)]
    z = scipy.stats.norm.ppf(1 - ALPHA / 2) + scipy.stats.norm.ppf(power)
    return float(z * diff.std(ddof=1)) if 2 * len(diff) > n_resamples else np.nan


# -------------------------------------------------------------------------------------- transfer across scale
def isotonic_predict(x: np.ndarray, y: np.ndarray, w: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Weighted increasing fit of y on x, evaluated at `new`: linear between the points, clamped outside.

    x, y, w [R, n], new [R, m] -> [R, m]. Points of weight 0 are not in the fit.

    The max-min formula (Barlow et al. 1972) fits all R at once, where scipy's isotonic_regression takes one.
    """
    x = np.where(w > 0, x, np.inf)  # weight 0: last in the order, never reached below
    # ties in x by falling y, since a falling run is always fitted by one value
    order = np.lexsort((-y, x), axis=1)
    x, y, w = (np.take_along_axis(v, order, axis=1) for v in (x, y, w))
    R, n = x.shape
    mass, total = (np.c_[np.zeros(R), np.cumsum(v, axis=1)] for v in (w, w * y))
    fit = np.full((R, n), -np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        for a in range(n):  # fit_i = max over a <= i of min over b >= i of mean(y_a..y_b)
            mean = (total[:, a + 1 :] - total[:, a : a + 1]) / (mass[:, a + 1 :] - mass[:, a : a + 1])
            fit[:, a:] = np.fmax(fit[:, a:], np.minimum.accumulate(mean[:, ::-1], axis=1)[:, ::-1])
        last = np.maximum((w > 0).sum(1, keepdims=True) - 1, 0)
        upper = (x[:, None, :] <= new[:, :, None]).sum(2)
        lo, hi = np.clip(upper - 1, 0, last), np.clip(upper, 0, last)
        x_lo, x_hi, fit_lo, fit_hi = (np.take_along_axis(v, i, axis=1) for v in (x, fit) for i in (lo, hi))
        t = np.where(x_hi > x_lo, (new - x_lo) / (x_hi - x_lo), 0.0)
        return np.where((w > 0).any(1, keepdims=True), fit_lo + t * (fit_hi - fit_lo), np.nan)


def transfer_gap(
    x: np.ndarray,
    y: np.ndarray,
    meta: dict,
    models: list[str],
    w: np.ndarray | None = None,
    judged: np.ndarray | None = None,
    depths: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gamma [R], in units of y, and in_range [R]: does a proxy calibrated on the smallest model hold on the
    largest?

    x, y [R, C]. At each depth both models have: fit y on x in the smaller one, mean of y - fit(x) over the
    larger one's conditions; minus the same with the models swapped, halved. Mean over depths, weighted by
    depths [R, D] (default: all once). Positive: the larger model's y is better than its x says. in_range:
    fraction of the larger model's x inside the smaller one's range. nan without two models. w [R, C] weighs
    the conditions; judged [C]: those that the means are over (default all); all of them calibrate.
    """
    x, y = np.atleast_2d(x, y)
    w = np.ones(x.shape) if w is None else w
    judged = np.ones(x.shape[1], bool) if judged is None else judged
    model, depth = np.asarray(meta["model"]), np.asarray(meta["depth"])

    def beyond(fitted: np.ndarray, on: np.ndarray) -> np.ndarray:
        """[R]: mean of y at the conditions `on`, less what the curve through those `fitted` says there."""
        expected = isotonic_predict(x[:, fitted], y[:, fitted], w[:, fitted], x[:, on])
        return (w[:, on] * (y[:, on] - expected)).sum(1) / w[:, on].sum(1)

    gaps, inside, defined, kept = [], [], np.ones(len(x), bool), []
    for i, here in enumerate(shared_depths(meta, models)):
        small, large = (np.flatnonzero((model == m) & (depth == here)) for m in (models[0], models[-1]))
        small_judged, large_judged = small[judged[small]], large[judged[large]]
        if not len(small_judged) or not len(large_judged):
            continue
        kept.append(i)
        with np.errstate(invalid="ignore", divide="ignore"):
            gaps.append((beyond(small, large_judged) - beyond(large, small_judged)) / 2)
        lo, hi = x[:, small].min(1, keepdims=True), x[:, small].max(1, keepdims=True)
        inside.append(((x[:, large_judged] >= lo) & (x[:, large_judged] <= hi)).mean(1))
        defined &= np.isfinite((x + y + w)[:, np.r_[small, large]]).all(1)
    if not gaps:
        return np.full(len(x), np.nan), np.full(len(x), np.nan)
    weights = np.ones((len(x), len(gaps))) if depths is None else depths[:, kept]

    def over_depths(parts: list[np.ndarray]) -> np.ndarray:
        return np.where(defined, (np.array(parts).T * weights).sum(1) / weights.sum(1), np.nan)

    return over_depths(gaps), over_depths(inside)


def noise_ceiling(target: np.ndarray, meta: dict) -> dict[str, float]:
    """How well the evaluation documents know the target [W, C]: `split_half` = partial Spearman of half A
    with half B, `reliability` of both together (Spearman-Brown), `rho_max` = sqrt(reliability), the most a
    noise-free proxy can reach (Spearman 1904). A proxy measured on the same documents shares their noise and
    may pass it.
    """
    split = partial_spearman(target[1], target[2], meta)
    reliability = 2 * split / (1 + split) if split > -1 else np.nan
    rho_max = float(np.sqrt(reliability)) if reliability >= 0 else np.nan
    return dict(split_half=split, reliability=reliability, rho_max=rho_max)
