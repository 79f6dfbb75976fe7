"""Which cheap proxy of SAE quality predicts patched CE? Rank correlations given k, with intervals and tests
that know what is independent of what.

Arrays. C conditions. A proxy, larger = better, and the target are both [W, C]: row 0 from all evaluation
documents, row 1 from half A of them, row 2 from half B, rows 3.. from bootstrap resamples of the documents,
each shared by all conditions. `meta` maps model, depth, layer, k, tokens (budget), seed and cell (the
condition without seed) to arrays over C.

Units. What SAEs of one hook, a (model, layer), have in common moves all of them: what a proxy has beyond k
and CE_rec correlates by up to .9 within a hook. So the cluster is the hook, whatever k and seeds it carries;
a test over cells rejected a true null in a third of simulated grids (bench/levels.py). A stratum is a model
(2 or 3 models are fixed effects; nothing here generalises over models). Undefined is nan, in verdicts None.
"""

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student


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


ALPHA = 0.05
MIN_CLUSTERS = 6  # hooks: below, 2^G swap patterns cannot reach p < .05 two-sided
MIN_HOOKS = 3  # of a model: fewer do not say how much its hooks differ
MAX_EXACT = 14  # all 2^G swap patterns up to here, Monte Carlo above
MIN_IN_RANGE = 0.5  # a transfer gap mostly outside the fitted range is not judged


# ---------------------------------------------------------------------------------------------- correlations
def given(meta: dict) -> np.ndarray:
    """Design matrix [C, q] of what the primary statistic holds fixed: a dummy per k, and per budget but the
    first.
    """
    k, tokens = (np.asarray(meta[name])[:, None] == np.unique(meta[name]) for name in ("k", "tokens"))
    return np.hstack([k, tokens[:, 1:]]).astype(float)


def _design(w: np.ndarray, Z: np.ndarray):
    """What every weighted regression on Z shares: weights w [R, C], Z [C, q], (Z'WZ)^+ [R, q, q], defined
    [R].

    Defined: residual degrees of freedom (conditions with weight - rank Z - 1) are at least 1.
    """
    known = ~np.isnan(w).any(1)
    w = np.where(known[:, None], w, 1.0)
    q = Z.shape[1]
    gram = (w @ (Z[:, :, None] * Z[:, None, :]).reshape(len(Z), q * q)).reshape(-1, q, q)
    inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
    rank = np.rint(np.einsum("rpq,rqp->r", gram, inverse))
    return w, Z, inverse, known & ((w > 0).sum(1) - rank - 1 >= 1)


def _unit(v: np.ndarray, design) -> np.ndarray:
    """Weighted residual of v [R or 1, C] on Z, at unit length: the dot product of two is their partial
    correlation.
    """
    w, Z, inverse, defined = design
    with np.errstate(invalid="ignore", divide="ignore"):
        beta = (inverse @ ((w * v) @ Z)[:, :, None])[:, :, 0]
        e = np.sqrt(w) * (v - beta @ Z.T)
        length2 = (e * e).sum(1)
        defined = defined & (length2 > 1e-20 * (w * v * v).sum(1))  # else constant, up to rounding
        return np.where(defined[:, None], e / np.sqrt(length2)[:, None], np.nan)


def _dot(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip((u * v).sum(1), -1.0, 1.0)


def _midrank(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Ranks of x [R or 1, C], up to a constant, where condition c counts w [R, C] times; ties share their
    mean rank.
    """
    dense = rankdata(np.nan_to_num(x), method="dense", axis=1).astype(np.intp) - 1
    dense = np.broadcast_to(dense, w.shape)
    R, C = w.shape
    mass = np.bincount((dense + C * np.arange(R)[:, None]).ravel(), w.ravel(), R * C).reshape(R, C)
    rank = np.take_along_axis(np.cumsum(mass, axis=1) - mass / 2, dense, axis=1)
    return np.where(np.isnan(x).any(1, keepdims=True), np.nan, rank)


def _correlate(x, y, Z, ranked: bool):
    x, y = np.broadcast_arrays(*np.atleast_2d(x, y))
    design = _design(np.ones(x.shape), Z)
    if ranked:
        x, y = _midrank(x, design[0]), _midrank(y, design[0])
    r = _dot(_unit(x, design), _unit(y, design))
    return r if len(r) > 1 else float(r[0])


def pearson(x, y):
    """Pearson correlation over the last axis of x, y [C] or [R, C]; nan when undefined."""
    return _correlate(x, y, np.ones((np.shape(x)[-1], 1)), ranked=False)


def spearman(x, y):
    """Spearman correlation over the last axis of x, y [C] or [R, C]; nan when undefined."""
    return _correlate(x, y, np.ones((np.shape(x)[-1], 1)), ranked=True)


def partial_spearman(x, y, meta):
    """Spearman given k: rank x and y over all conditions, residualise both on k (and budget) dummies,
    correlate.

    Every proxy is monotone in k, so the plain Spearman flatters all of them; what one model has over another
    stays in.
    """
    return _correlate(x, y, given(meta), ranked=True)


# ---------------------------------------------------------------------------------------------- cluster bootstrap
HOOK = ("model", "layer")


def cluster_ids(meta: dict, by=HOOK) -> np.ndarray:
    """[C] integers, one per distinct combination of the named columns; the default is the hook."""
    return np.unique(
        ["\t".join(map(str, row)) for row in zip(*(meta[name] for name in by))], return_inverse=True
    )[1]


def _rao_wu(rng, n: int, n_resamples: int, least: int) -> np.ndarray:
    """[n_resamples, n] weights: n - 1 of n units drawn with replacement, times n / (n - 1) (Rao & Wu 1988),
    since plain resampling understates the standard error by sqrt((n - 1) / n). Fewer than `least` say too
    little about their variance: nan, and so are the intervals they enter.
    """
    if n < least:
        return np.full((n_resamples, n), np.nan)
    return rng.multinomial(n - 1, np.full(n, 1 / n), n_resamples) * (n / (n - 1))


def bootstrap_weights(
    meta: dict, n_resamples: int, seed: int, clusters=HOOK, stratum="model", least: int = MIN_HOOKS
):
    """[3 + n_resamples, C] weights of the conditions: three rows of ones for the estimates, then the clusters
    of each stratum resampled.
    """
    rng, ids, strata = np.random.default_rng(seed), cluster_ids(meta, clusters), np.asarray(meta[stratum])
    w = np.ones((3 + n_resamples, len(ids)))
    for name in np.unique(strata):
        _, inside = np.unique(ids[strata == name], return_inverse=True)
        w[3:, strata == name] = _rao_wu(rng, inside.max() + 1, n_resamples, least)[:, inside]
    return w


def depth_weights(meta: dict, models: list, n_resamples: int, seed: int) -> np.ndarray:
    """[3 + n_resamples, D] weights of the depths that `transfer_gap` averages over: a depth is a pair of
    hooks, and drawn whole. Drawing hooks model by model would leave most of them without a partner.
    """
    D = len(shared_depths(meta, models))
    return np.vstack([np.ones((3, D)), _rao_wu(np.random.default_rng(seed), D, n_resamples, MIN_HOOKS)])


def shared_depths(meta: dict, models: list) -> list:
    """The depths that the smallest and the largest model both have; none where they are one model."""
    depths = [set(np.asarray(meta["depth"])[np.asarray(meta["model"]) == m]) for m in (models[0], models[-1])]
    return sorted(depths[0] & depths[1]) if models[0] != models[-1] else []


def _rows(W: int, n_resamples: int) -> np.ndarray:
    """The row of scores and target behind each row of weights: draw r takes sequence resample r (from the
    first again when they run out; all documents when there is none).
    """
    return np.r_[0, 1, 2, 3 + np.arange(n_resamples) % (W - 3) if W > 3 else np.zeros(n_resamples, int)]


def interval(draws: np.ndarray, fisher: bool = False) -> tuple[float, float]:
    """95% percentile interval, on the Fisher-z scale for correlations. Draws without a value are left out,
    and there is no interval when they are half or more.
    """
    kept = draws[~np.isnan(draws)]
    if 2 * len(kept) <= len(draws):
        return np.nan, np.nan
    if fisher:
        kept = np.arctanh(np.clip(kept, -1 + 1e-12, 1 - 1e-12))
    lo, hi = np.quantile(kept, [ALPHA / 2, 1 - ALPHA / 2])
    return (float(np.tanh(lo)), float(np.tanh(hi))) if fisher else (float(lo), float(hi))


def _with_interval(key: str, estimate, draws, fisher: bool = False) -> dict:
    lo, hi = (np.nan, np.nan) if np.isnan(estimate) else interval(draws, fisher)
    return {key: float(estimate), f"{key}_lo": lo, f"{key}_hi": hi}


def partial_draws(x, y, meta: dict, n_resamples: int, seed: int = 0) -> np.ndarray:
    """Partial Spearman [3 + n_resamples] of x with y, both [W, C], under the leaderboard's bootstrap: hooks
    within models, nested with the documents' resamples. Rows 1 and 2 are not the halves but repeat the
    estimate.
    """
    rows = np.r_[0, 0, 0, _rows(len(x), n_resamples)[3:]]
    design = _design(bootstrap_weights(meta, n_resamples, seed), given(meta))
    return _dot(*(_unit(_midrank(v[rows], design[0]), design) for v in (x, y)))


# ---------------------------------------------------------------------------------------------- seeds and documents
def seed_draws(meta: dict, W: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """Where seeds are replicates: rows [R] of scores, weights [R, C] of conditions, {source of variation: its
    rows}.

    A statistic evaluated on these R pairs has, in order: its value; its value without each seed of each
    model; its value under each of the W - 3 sequence resamples. Models are seeded apart: a seed left out is
    left out of one model.
    """
    model, seed = np.asarray(meta["model"]), np.asarray(meta["seed"])
    left_out = [(m, s) for m in np.unique(model) for s in np.unique(seed[model == m])]
    w = np.ones((1 + len(left_out) + W - 3, len(model)))
    for i, (m, s) in enumerate(left_out, 1):
        w[i, (model == m) & (seed == s)] = 0
    names = np.array(["", *(m for m, _ in left_out)])
    sources = {str(m): np.flatnonzero(names == m) for m in np.unique(model)}
    return (
        np.r_[np.zeros(1 + len(left_out), int), 3:W],
        w,
        sources | {"documents": np.arange(1 + len(left_out), len(w))},
    )


def spread(draws: np.ndarray, sources: dict, n_doc: int) -> tuple[np.ndarray, float]:
    """Covariance [q, q] of q statistics [q, R], and the Satterthwaite degrees of freedom of the last one's
    variance.

    Per model the jackknife over its seeds (exact for a mean: s^2 / n), plus the bootstrap over documents.
    Seeds enter the latter through the mean, so what seed and sequence do together is counted twice: on the
    safe side. nan with one seed.
    """
    total, weight = np.zeros((len(draws), len(draws))), 0.0
    for name, rows in sources.items():
        n = len(rows)
        if name != "documents" and n < 2:
            return np.full_like(total, np.nan), np.nan
        part = np.atleast_2d(np.cov(draws[:, rows])) * (1 if name == "documents" else (n - 1) ** 2 / n)
        total += part
        weight += part[-1, -1] ** 2 / (n_doc - 1 if name == "documents" else n - 1)
    return total, total[-1, -1] ** 2 / weight if weight > 0 else np.nan


def t_interval(draws: np.ndarray, sources: dict, n_doc: int, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Student interval around draws[0] over seeds and documents. With three seeds a percentile bootstrap,
    which knows no degrees of freedom, would cover 95% some 85% of the time. nan with one seed.
    """
    variance, df = spread(draws[None], sources, n_doc)
    half = student.ppf((1 + level) / 2, df) * np.sqrt(variance[0, 0])
    return float(draws[0] - half), float(draws[0] + half)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, sources: dict, n_doc: int
) -> tuple[float, float, float]:
    """(ratio, lo, hi) by Fieller 1954; all nan where the denominator's own interval holds zero, or has
    none.
    """
    lo, hi = t_interval(denominator, sources, n_doc)
    if not (lo > 0 or hi < 0):
        return np.nan, np.nan, np.nan
    v, df = spread(np.stack([numerator, denominator]), sources, n_doc)
    t2, n, d = student.ppf(1 - ALPHA / 2, df) ** 2, numerator[0], denominator[0]
    a, b, c = d * d - t2 * v[1, 1], n * d - t2 * v[0, 1], n * n - t2 * v[0, 0]
    root = np.sqrt(max(b * b - a * c, 0.0))  # a > 0, since the denominator is not zero; b^2 - ac >= 0 follows
    return float(n / d), float((b - root) / a), float((b + root) / a)


# ---------------------------------------------------------------------------------------------- tests over hooks
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
    """Share of patterns at least as extreme as the first, two-sided; a pattern without a value counts as
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


def swap_test(a, b, y, meta: dict, *, clusters=None, n_draws: int = 10_000, seed: int = 0):
    """Does proxy a predict y better than proxy b? a [C] or [P, C], b and y [C] -> difference of partial
    Spearman, p.

    Both proxies are ranked, then trade places in whole clusters (default: hooks), and are ranked again:
    without that the test rejects twice too often where proxies correlate at .95. `sign_patterns`, two-sided,
    `one_spent`; p is nan below 6 clusters.
    """
    ids = cluster_ids(meta) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    G, Z = ids.max() + 1, given(meta)
    swapped = (
        sign_patterns(G, n_draws, seed)[:, ids] < 0 if G >= MIN_CLUSTERS else np.zeros((1, len(ids)), bool)
    )
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    single, a = np.ndim(a) == 1, np.atleast_2d(a)
    diff, p = np.full(len(a), np.nan), np.full(len(a), np.nan)
    design = _design(np.ones((1, len(ids))), Z)
    uy = _unit(_midrank(np.atleast_2d(y), design[0]), design)[0]

    def correlation(places):
        e = _midrank_places(places) @ residual
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((e * e).sum(1) > 1e-9, e @ uy / np.sqrt((e * e).sum(1)), np.nan)

    for i, values in enumerate(a):
        if not (np.isfinite(values).all() and np.isfinite(b).all()):
            continue
        ra, rb = _places(values), _places(b)
        stat = correlation(np.where(swapped, rb, ra)) - correlation(np.where(swapped, ra, rb))
        if np.isfinite(stat[0]):
            diff[i] = stat[0]
            if G >= MIN_CLUSTERS:
                p[i] = p_value(stat, one_spent(G))
    return (float(diff[0]), float(p[0])) if single else (diff, p)


def _places(x) -> np.ndarray:
    """Twice the midrank [C], a whole number."""
    return np.rint(2 * rankdata(x)).astype(np.intp)


def _midrank_places(places: np.ndarray) -> np.ndarray:
    """Midranks, up to a constant, of whole numbers [R, C] between 0 and 2 C, by counting."""
    R, C = places.shape
    bins = 2 * C + 1
    flat = places + bins * np.arange(R)[:, None]
    count = np.bincount(flat.ravel(), minlength=R * bins).reshape(R, bins)
    return np.take_along_axis(np.cumsum(count, 1) - count / 2, places, axis=1)


def flip_test(d: np.ndarray, n_draws: int = 10_000, seed: int = 0) -> float:
    """p that the mean of d [G], a difference of errors in each hook, is 0: signs flipped, two-sided,
    `one_spent`. nan below 6 hooks, or where one is undefined.
    """
    if len(d) < MIN_CLUSTERS or not np.isfinite(d).all():
        return np.nan
    return p_value(sign_patterns(len(d), n_draws, seed) @ d / max(np.abs(d).sum(), 1e-300), one_spent(len(d)))


def loho_errors(x, magnitude, meta: dict) -> np.ndarray:
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
    design = np.stack([np.ones_like(x), x, x * x], 1)
    for h in range(ids.max() + 1):
        rest = ids != h
        if len(np.unique(x[rest])) < 3:
            return np.full(len(y), np.nan)
        errors[~rest] = design[~rest] @ np.linalg.lstsq(design[rest], y[rest], rcond=None)[0] - y[~rest]
    return errors


def _by_hook(v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mean of v [C] within each hook present, [G]: every hook counts once, however many SAEs it has."""
    hooks, inside = np.unique(ids, return_inverse=True)
    return np.bincount(inside, v) / np.bincount(inside)


# ---------------------------------------------------------------------------------------------- transfer across scale
def isotonic_predict(x, y, w, new):
    """Weighted increasing fit of y on x, evaluated at `new`: linear between the points, clamped outside.

    x, y, w [R, n], new [R, m] -> [R, m]. Points of weight 0 are not in the fit.

    The max-min formula (Barlow et al. 1972) fits all rows at once, where scipy's isotonic_regression takes
    one.
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
        x_lo, x_hi, f_lo, f_hi = (np.take_along_axis(v, i, axis=1) for v in (x, fit) for i in (lo, hi))
        t = np.where(x_hi > x_lo, (new - x_lo) / (x_hi - x_lo), 0.0)
        return np.where((w > 0).any(1, keepdims=True), f_lo + t * (f_hi - f_lo), np.nan)


def transfer_gap(x, y, meta: dict, models: list, w=None, judged=None, depths=None):
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
    gaps, inside, defined, kept = [], [], np.ones(len(x), bool), []
    for i, d in enumerate(shared_depths(meta, models)):
        s, l = (np.flatnonzero((model == m) & (depth == d)) for m in (models[0], models[-1]))
        s_judged, l_judged = s[judged[s]], l[judged[l]]
        if not len(s_judged) or not len(l_judged):
            continue
        kept.append(i)
        with np.errstate(invalid="ignore", divide="ignore"):
            up, down = (
                (w[:, b] * (y[:, b] - isotonic_predict(x[:, a], y[:, a], w[:, a], x[:, b]))).sum(1)
                / w[:, b].sum(1)
                for a, b in ((s, l_judged), (l, s_judged))
            )
        gaps.append((up - down) / 2)
        lo, hi = x[:, s].min(1, keepdims=True), x[:, s].max(1, keepdims=True)
        inside.append(((x[:, l_judged] >= lo) & (x[:, l_judged] <= hi)).mean(1))
        defined &= np.isfinite((x + y + w)[:, np.r_[s, l]]).all(1)
    if not gaps:
        return np.full(len(x), np.nan), np.full(len(x), np.nan)
    weights = np.ones((len(x), len(gaps))) if depths is None else depths[:, kept]
    mean = lambda parts: np.where(defined, (np.array(parts).T * weights).sum(1) / weights.sum(1), np.nan)
    return mean(gaps), mean(inside)


def noise_ceiling(target, meta: dict) -> dict:
    """How well the evaluation documents know the target: `split_half` = partial Spearman of half A with half
    B, `reliability` of both together (Spearman-Brown), `rho_max` = sqrt(reliability), the most a noise-free
    proxy can reach (Spearman 1904). A proxy measured on the same documents shares their noise and may pass
    it.
    """
    split = partial_spearman(target[1], target[2], meta)
    reliability = 2 * split / (1 + split) if split > -1 else np.nan
    rho_max = float(np.sqrt(reliability)) if reliability >= 0 else np.nan
    return dict(split_half=split, reliability=reliability, rho_max=rho_max)
