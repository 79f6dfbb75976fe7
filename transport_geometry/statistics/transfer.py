"""Does one curve of CE_rec on a proxy hold across models? Isotonic fits and the transfer gap."""

from transport_geometry.statistics.resampling import shared_depths

import numpy as np

MIN_IN_RANGE = 0.5  # a transfer gap mostly outside the fitted range is not judged


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
        """[R]: mean over the conditions `on` of y minus the curve through those `fitted`."""
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
