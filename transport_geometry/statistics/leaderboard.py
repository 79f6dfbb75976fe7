"""What experiments that rank proxies share: the board of all proxies, the verdict on H2, and how a board is
shown.

Arrays as in `stats`: scores {proxy: [W, C]}, larger = better; target [W, C]; magnitude [W, C], the distortion
behind the target; C conditions under W weightings of the documents (0 all, 1 half A, 2 half B, 3..
resamples). `meta` {column: [C]}, `models` from the smallest to the largest. A board is a list of table rows,
of LEADERBOARD.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transport_geometry.measuring.metrics import BY_NAME, CONTROL, EUCLIDEAN_CONTROLS, SENSITIVE, as_score
from transport_geometry.records.results import Measured, behind
from transport_geometry.records.tables import UNDEFINED, estimate, markdown, percent, plain, short, signed
from transport_geometry.reporting import console as console
from transport_geometry.reporting.console import models_in_words
from transport_geometry.reporting.figures import BLUE, ORANGE, as_png, pyplot
from transport_geometry.statistics import claims
from transport_geometry.statistics.stats import (
    ALPHA,
    MIN_CLUSTERS,
    MIN_HOOKS,
    MIN_IN_RANGE,
    Dependence,
    bootstrap_weights,
    cluster_ids,
    correlation,
    dependence,
    depth_weights,
    flip_test,
    given,
    interval,
    loho_errors,
    mean_by_hook,
    noise_ceiling,
    partial_spearman,
    proxy_errors,
    resample_index,
    smallest_detectable,
    stretched_interval,
    swap_test,
    swap_tests,
    transfer_gap,
    unit_residual,
    weighted_design,
    weighted_ranks,
)

import numpy as np

LEADERBOARD = (
    "proxy target stratum n_cells n_clusters pearson pearson_lo pearson_hi spearman spearman_lo spearman_hi "
    "partial partial_lo partial_hi diff_r2 diff_r2_lo diff_r2_hi p_r2 "
    "diff_control diff_control_lo diff_control_hi p_control gamma gamma_lo gamma_hi in_range same_ranks_as "
    "loho loho_bias diff_loho_control p_loho phi n_effective n_effective_r2 n_effective_control"
).split() + claims.COLUMNS
MAGNITUDE = {"ce_rec": "dce", "kl": "kl"}  # target -> the distortion whose size `loho` predicts
R2, SWD = "r2", "swd_tok"

Scores = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------- the controls
def _best(values: dict[str, float], sign: int = 1) -> str | None:
    """Name of the largest (sign -1: smallest) value; None when all are nan."""
    known = {name: sign * value for name, value in values.items() if not np.isnan(value)}
    return max(known, key=known.__getitem__, default=None)


def best_control(scores: Scores, target: np.ndarray, meta: dict, controls: Sequence[str]) -> str | None:
    """The control with the highest partial Spearman on half A, to be tested on half B; None when none is
    defined.
    """
    return _best(
        {name: partial_spearman(scores[name][1], target[1], meta) for name in controls if name in scores}
    )


def best_by_loho(scores: Scores, magnitude: np.ndarray, meta: dict, controls: Sequence[str]) -> str | None:
    """The control with the smallest leave-one-hook-out error on half A, to be tested on half B; None when
    none is defined.
    """
    ids = cluster_ids(meta)
    square_errors = {
        name: loho_errors(scores[name][1], magnitude[1], meta) ** 2 for name in controls if name in scores
    }
    return _best({name: float(mean_by_hook(e, ids).mean()) for name, e in square_errors.items()}, sign=-1)


def best_by_gamma(
    scores: Scores, target: np.ndarray, meta: dict, models: list[str], controls: Sequence[str]
) -> str | None:
    """The control with the smallest transfer gap on half A, to be tested on half B; None when none is
    defined.
    """
    gaps = {
        name: transfer_gap(scores[name][1], target[1], meta, models)[0] for name in controls if name in scores
    }
    return _best({name: abs(float(gamma[0])) for name, gamma in gaps.items()}, sign=-1)


# -------------------------------------------------------------------------------------------------- the board
@dataclass(frozen=True)
class Stratum:
    """C conditions, all of them or those of one model, and how every proxy correlates with the target there:
    under R draws, each with its weights of the conditions and its weighting of the documents.
    """

    scores: Scores
    target: np.ndarray
    meta: dict
    draws: dict[str, dict[str, np.ndarray]]  # {proxy: {statistic: [R]}}
    ranks: dict[str, np.ndarray]  # {proxy: [C]} on all documents
    # {weighting of the documents, 0 all and 2 half B: {proxy: what its errors make of the hooks}}
    hooks: dict[int, dict[str, Dependence]]

    def compared(self, name: str, base: str | None, half: int) -> Dependence:
        """The hooks for a comparison of two proxies: as the one of them says that leaves fewer."""
        of = self.hooks[half]
        return min((of[one] for one in (name, base) if one in of), key=lambda d: d.n_effective)


def board(
    scores: Scores,
    target: np.ndarray,
    magnitude: np.ndarray,
    meta: dict,
    models: list[str],
    *,
    target_name: str,
    controls: Sequence[str],
    loho_control: str | None,
    n_documents: int,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """One row per proxy in each stratum: all conditions pooled, then each arm of --sinks where there are two,
    then each model alone.

    Intervals and p are about hooks in general, and nan where fewer than MIN_CLUSTERS of them are effective;
    those of `claims.COLUMNS` are about these SAEs, and resample documents (and seeds) alone.

    phi: correlation of the proxy's errors between neighbouring hooks (`stats.dependence`); n_effective: as
    how many independent hooks they count; n_effective_r2, n_effective_control: in a comparison, the fewer of
    the two proxies'. Intervals and null distributions are stretched by sqrt(hooks / effective ones), but for
    gamma's.

    Intervals: bootstrap over hooks (of gamma: over depths), nested with the shared resamples of the
    documents. diff_r2, p_r2: on all documents. r2 against itself is 0 with p = 1, as is every row of the same
    ranks. diff_control, p_control: control chosen in that stratum on half A, everything computed on half B,
    whose interval resamples hooks only (there is no resample within a half). The chosen control itself: 0
    with p = 1. gamma, in_range: pooled only. same_ranks_as: the first earlier proxy that ranks the conditions
    identically; such a row adds no test to a count. loho, loho_bias: root mean square and mean of
    `loho_errors` of the magnitude, on all documents; in a model's rows its own hooks, predicted from all
    others. diff_loho_control, p_loho: how much smaller the error is than `loho_control`'s, the best on half A
    (`best_by_loho`), on half B; signs flipped over hooks.
    """
    resample = resample_index(len(target), n_resamples)
    weights = bootstrap_weights(meta, n_resamples, seed)
    depths = depth_weights(meta, models, n_resamples, seed)
    hooks = cluster_ids(meta)
    errors, errors_b = (
        {name: loho_errors(s[half], magnitude[half], meta) for name, s in scores.items()} for half in (0, 2)
    )
    table = []
    strata = {"pooled": np.ones(len(hooks), bool)} | claims.arms(meta)
    strata |= {model: np.asarray(meta["model"]) == model for model in models}
    for stratum, inside in strata.items():
        here = np.flatnonzero(inside)
        if not len(here):
            continue
        part = _stratum(
            {name: s[:, here] for name, s in scores.items()},
            target[:, here],
            {name: np.asarray(v)[here] for name, v in meta.items()},
            weights[:, here],
            resample,
        )
        ids, control = hooks[here], best_control(part.scores, part.target, part.meta, controls)
        minus_r2 = _differences(part, "r2", R2, 0, "partial", seed)
        minus_control = _differences(part, "control", control, 2, "half_b", seed)
        errors_control = errors_b[loho_control][here] if loho_control else None
        pairs = claims.clear_pairs(part.target, part.meta) if target_name == "ce_rec" else None
        of_these = claims.here(part.scores, part.target, part.meta, n_documents, pairs)
        for name, s in part.scores.items():
            row: dict = {"proxy": name, "target": target_name, "stratum": stratum}
            row |= {"n_cells": len(np.unique(part.meta["cell"])), "n_clusters": len(np.unique(ids))}
            mine = part.hooks[0][name]
            for statistic in ("pearson", "spearman", "partial"):
                draws = part.draws[name][statistic]
                row |= _with_interval(statistic, draws[0], draws[3:], mine.stretch, fisher=True)
            row |= minus_r2[name] | minus_control[name]
            gamma, in_range = np.full(4, np.nan), np.full(1, np.nan)
            if stratum == "pooled":
                gamma, in_range = transfer_gap(
                    s[resample], part.target[resample], part.meta, models, depths=depths
                )
            row |= _with_interval("gamma", gamma[0], gamma[3:]) | {"in_range": float(in_range[0])}
            row["same_ranks_as"] = _earlier_twin(name, part.ranks)
            row["loho"] = _root_mean_square(errors[name][here], ids)
            row["loho_bias"] = float(mean_by_hook(errors[name][here], ids).mean())
            row |= _loho_gain(errors_b[name][here], errors_control, part.meta, seed)
            row |= {"phi": mine.phi, "n_effective": mine.n_effective}
            row["n_effective_r2"] = part.compared(name, R2, 0).n_effective
            row["n_effective_control"] = part.compared(name, control, 2).n_effective
            table.append(row | of_these[name])
    return table


def _stratum(
    scores: Scores, target: np.ndarray, meta: dict, weights: np.ndarray, resample: np.ndarray
) -> Stratum:
    """weights [R, C] of the conditions and `resample` [R], the weighting of the documents, of each draw. Of
    `half_b`, partial Spearman on half B, the draws differ in `weights` alone.
    """
    alone = weighted_design(weights, np.ones((len(weights[0]), 1)))
    fixed_k = weighted_design(weights, given(meta))

    def units(v: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """({statistic: unit residual [R, C] of v [W, C]}, ranks [C] of v on all documents)."""
        ranks = weighted_ranks(v[resample], alone.weights)
        residuals = {
            "pearson": unit_residual(v[resample], alone),
            "spearman": unit_residual(ranks, alone),
            "partial": unit_residual(ranks, fixed_k),
            "half_b": unit_residual(weighted_ranks(v[2:3], alone.weights), fixed_k),
        }
        return residuals, ranks[0]

    draws, ranks = {}, {}
    hooks = {
        half: {
            name: dependence(proxy_errors(s[half], target[half], meta), meta) for name, s in scores.items()
        }
        for half in (0, 2)
    }
    of_target, _ = units(target)
    for name, s in scores.items():
        of_proxy, ranks[name] = units(s)
        draws[name] = {key: correlation(of_proxy[key], of_target[key]) for key in of_target}
    return Stratum(scores, target, meta, draws, ranks, hooks)


def _differences(
    part: Stratum, key: str, base: str | None, half: int, statistic: str, seed: int
) -> dict[str, dict]:
    """{proxy: cells diff_<key>, its interval and p_<key>} of every proxy minus `base`, the test on one
    weighting of the documents. nan where there is no such base.
    """
    diff = p = np.full(len(part.scores), np.nan)
    stretch = np.array([part.compared(name, base, half).stretch for name in part.scores])
    if base in part.scores:
        proxies = np.stack([s[half] for s in part.scores.values()])
        diff, p = swap_tests(
            proxies, part.scores[base][half], part.target[half], part.meta, seed=seed, stretch=stretch
        )
    cells = {}
    for name, diff_of, p_of, stretch_of in zip(part.scores, diff, p, stretch):
        draws = np.array([])
        if base in part.draws:
            draws = (part.draws[name][statistic] - part.draws[base][statistic])[3:]
        cells[name] = _with_interval(f"diff_{key}", diff_of, draws, stretch_of) | {f"p_{key}": float(p_of)}
    return cells


def _with_interval(
    key: str, estimate: float, draws: np.ndarray, stretch: float = 1.0, fisher: bool = False
) -> dict[str, float]:
    lo, hi = np.nan, np.nan
    if not np.isnan(estimate):
        lo, hi = stretched_interval(estimate, draws, stretch, fisher)
    return {key: float(estimate), f"{key}_lo": lo, f"{key}_hi": hi}


def _earlier_twin(name: str, ranks: dict[str, np.ndarray]) -> str:
    """The first proxy before `name` of the same ranks, or nothing."""
    first = next((other for other in ranks if np.array_equal(ranks[other], ranks[name])), name)
    return "" if first == name else first


def _root_mean_square(errors: np.ndarray, ids: np.ndarray) -> float:
    """Of errors [C]; every hook counts once."""
    return float(np.sqrt(mean_by_hook(errors**2, ids).mean()))


def _loho_gain(mine: np.ndarray, control: np.ndarray | None, meta: dict, seed: int) -> dict[str, float]:
    """Cells of errors [C] against the control's."""
    if control is None:
        return {"diff_loho_control": np.nan, "p_loho": np.nan}
    ids, gains = cluster_ids(meta), [control**2, mine**2]
    stretch = np.max([dependence(errors, meta).stretch for errors in (mine, control)])
    return {
        "diff_loho_control": _root_mean_square(control, ids) - _root_mean_square(mine, ids),
        "p_loho": flip_test(np.subtract(*(mean_by_hook(v, ids) for v in gains)), seed=seed, stretch=stretch),
    }


# ------------------------------------------------------------------------------------------ the verdict on H2
MIN_DIFFERENCE = 0.10  # (a): partial Spearman, SWD minus control
MAX_GAMMA_RATIO = 0.5  # (b): |gamma of SWD| over |gamma of control|
CANNOT = "cannot be shown here"


@dataclass(frozen=True)
class Order:
    """(a) Does it rank better? Partial Spearman on half B, against the control chosen on half A."""

    control: str | None
    gain: float  # over the control
    p: float
    gain_r2: float  # over r2, on all documents
    p_r2: float
    room: float  # between the control and 1
    p_perfect: float  # p that the target itself would have in the proxy's place
    detectable: float  # the gain that this grid shows in four of five cases
    n_effective: float = np.inf  # hooks, of the comparison that has fewer

    @property
    def holds(self) -> bool:
        return self.gain >= MIN_DIFFERENCE and self.p < ALPHA

    @property
    def holds_vs_r2(self) -> bool:
        return self.gain_r2 >= MIN_DIFFERENCE and self.p_r2 < ALPHA

    @property
    def worse(self) -> bool:
        return self.gain < 0 and self.p < ALPHA

    def no_room(self) -> list[str]:
        """What the room is less than."""
        text = []
        if self.room < MIN_DIFFERENCE:
            text.append(f"the margin of {MIN_DIFFERENCE:.2f}")
        if self.p_perfect >= ALPHA:
            text.append(f"what could show here (p would be {self.p_perfect:.2f} for the target itself)")
        if self.room < self.detectable and not self.worse:
            text.append(f"the {self.detectable:.2f} that shows here in four of five cases")
        return text


@dataclass(frozen=True)
class Transfer:
    """(b) Does it carry over across scale better? Transfer gaps on half B, against the control chosen on half
    A.
    """

    control: str | None = None
    gamma: float = np.nan
    gamma_control: float = np.nan
    gain: float = np.nan  # |gamma_control| - |gamma|
    gain_lo: float = np.nan
    gain_hi: float = np.nan
    in_range: float = np.nan  # the board's, on all documents
    in_range_control: float = np.nan

    @property
    def defined(self) -> bool:
        return not (np.isnan(self.gamma) or np.isnan(self.gamma_control))

    @property
    def judged(self) -> bool:
        return self.in_range >= MIN_IN_RANGE and self.in_range_control >= MIN_IN_RANGE

    @property
    def holds(self) -> bool:
        smaller = abs(self.gamma) <= MAX_GAMMA_RATIO * abs(self.gamma_control)
        return self.judged and smaller and self.gain_lo > 0


@dataclass(frozen=True)
class Size:
    """(c) Does it tell the size of dCE better? Leave-one-hook-out errors on half B, against the control
    chosen on half A.
    """

    control: str | None
    gain: float  # how much smaller the error is
    p: float

    @property
    def shown(self) -> bool:
        return self.gain > 0 and self.p < ALPHA


def leaf_h2(n_clusters: int, order: Order, transfer: Transfer, size: Size) -> tuple[str, str]:
    """The pre-registered tree of H2, "a sensitivity-weighted proxy predicts CE better": (leaf, why), the
    first that applies.

    Three claims, each against a control chosen on half A and tested on half B: (a) partial Spearman higher by
    >= 0.10, swap p < .05; (b) |gamma| at most half the smallest |gamma| of a control, 95% interval of
    |gamma_control| - |gamma_proxy| above 0; (c) the second primary statistic, the leave-one-hook-out error of
    log10 dCE, smaller. Order within k is one question and magnitude another: H2 is supported only where both
    point the same way.
    """
    if n_clusters < MIN_CLUSTERS:
        return "undecided", f"{n_clusters} hooks, {MIN_CLUSTERS} needed"
    if order.n_effective < MIN_CLUSTERS:
        return "undecided", (
            f"neighbouring hooks share their errors, so that {n_clusters} say as much as "
            f"{order.n_effective:.1f} independent ones, {MIN_CLUSTERS} needed"
        )
    if np.isnan(order.p):
        return "undecided", "the difference to the best control is undefined"

    # order and size must not disagree
    if order.holds and np.isnan(size.gain):
        return "undecided", (
            f"ranks better than {order.control}, and how well it predicts the size of dCE is undefined "
            "(a dCE that is not positive has no logarithm)"
        )
    if order.holds and not size.gain > 0:
        return "undecided", (
            f"the two statistics disagree: it ranks better than {order.control}, and does not predict the "
            "size of dCE better"
        )
    if not order.holds and size.shown:
        return "undecided", (
            "the two statistics disagree: it predicts the size of dCE better, and is not shown to rank "
            f"better than {order.control}"
        )

    # not (a): because it is no better, or because nothing could have been?
    if not order.holds and order.holds_vs_r2:
        return "beats-r2-only", f"ranks better than r2, not shown to rank better than {order.control}"
    if not order.holds and (no_room := order.no_room()):
        return CANNOT, (
            f"{order.control} leaves {order.room:.2f} to gain in partial Spearman, less than "
            + " and ".join(no_room)
            + ("; and it ranks worse" if order.worse else "")
        )
    if order.worse:
        return "rejected", f"ranks worse than {order.control}"
    if not order.holds:
        return "rejected", f"not shown to rank better than {order.control}, nor than r2"

    # (a) and (c): better ranks that do not carry over across scale are not what H2 claims
    if not transfer.defined:  # one model, or no depth in common: (b) was not put to the test
        return "undecided", "ranks better, transfer across scale undefined on this grid"
    if not transfer.judged:
        return "not-transferable", (
            "ranks better, but too few of the larger model's values are in range to judge"
        )
    if not transfer.holds:
        return "rejected", (
            f"ranks better than {order.control}, not shown to transfer better than {transfer.control}"
        )
    return "supported", (
        f"ranks better than {order.control} and transfers across scale better than {transfer.control}"
    )


def verdict_h2(
    rows: list[dict],
    scores: Scores,
    target: np.ndarray,
    meta: dict,
    models: list[str],
    *,
    controls: Sequence[str],
    loho_control: str | None,
    proxy: str = SWD,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """The verdict of `leaf_h2`, and every number it used: plain Python, None for nan.

    rows, loho_control: of `board`, for this target.
    """
    pooled = [row for row in rows if row["stratum"] == "pooled"]
    by_proxy: dict[str | None, dict] = {row["proxy"]: row for row in pooled}
    mine = by_proxy[proxy]
    half_b, y = {name: s[2] for name, s in scores.items()}, target[2]
    control = best_control(scores, target, meta, controls)
    order = _order(mine, control, half_b, y, meta, n_resamples, seed)
    control = best_by_gamma(scores, target, meta, models, controls)
    transfer = _transfer(mine, by_proxy.get(control), half_b, y, meta, models, n_resamples, seed)
    size = Size(loho_control, mine["diff_loho_control"], mine["p_loho"])
    leaf, why = leaf_h2(mine["n_clusters"], order, transfer, size)
    return plain(
        {
            "leaf": leaf,
            "reason": why,
            "proxy": proxy,
            "target": mine["target"],
            "n_conditions": target.shape[1],
            "n_cells": mine["n_cells"],
            "n_clusters": mine["n_clusters"],
            "phi": mine["phi"],
            "n_effective": order.n_effective,
            "in_general": judged_in_general(mine),
            "here": claims.in_verdict(rows, controls),
            "n_proxies": len(pooled),
            "n_proxies_distinct": sum(row["same_ranks_as"] == "" for row in pooled),
            "a_control": order.control,
            "a_holds": order.holds,
            "a_holds_vs_r2": order.holds_vs_r2,
            "room": order.room,
            "p_perfect": order.p_perfect,
            "smallest_detectable": order.detectable,
            **{key: mine[key] for key in OF_THE_PROXY},
            "loho_control": size.control,
            "b_control": transfer.control,
            "b_judged": transfer.judged,
            "b_holds": transfer.holds,
            "gamma_proxy": transfer.gamma,
            "gamma_control": transfer.gamma_control,
            "gamma_gain": transfer.gain,
            "gamma_gain_lo": transfer.gain_lo,
            "gamma_gain_hi": transfer.gain_hi,
            "in_range_proxy": transfer.in_range,
            "in_range_control": transfer.in_range_control,
            **noise_ceiling(target, meta),
            "n_resamples": n_resamples,
            "seed": seed,
            "alpha": ALPHA,
            "min_clusters": MIN_CLUSTERS,
            "min_hooks": MIN_HOOKS,
            "min_difference": MIN_DIFFERENCE,
            "max_gamma_ratio": MAX_GAMMA_RATIO,
            "min_in_range": MIN_IN_RANGE,
        }
    )


def judged_in_general(row: dict) -> bool:
    """Are there hooks enough, of a row of the board, for a comparison with R² in general?"""
    return row["n_effective_r2"] >= MIN_CLUSTERS


# columns of its row that the verdict repeats
OF_THE_PROXY = (
    "partial partial_lo partial_hi diff_control diff_control_lo diff_control_hi p_control "
    "diff_r2 diff_r2_lo diff_r2_hi p_r2 loho loho_bias diff_loho_control p_loho"
).split()


def _order(
    mine: dict, control: str | None, half_b: Scores, y: np.ndarray, meta: dict, n_resamples: int, seed: int
) -> Order:
    """mine: the proxy's pooled row; half_b {proxy: [C]} and y [C]: scores and target on half B."""
    room = p_perfect = detectable = np.nan
    if control:
        x, base = half_b[mine["proxy"]], half_b[control]
        room = 1 - partial_spearman(base, y, meta)
        # the target has no errors: the control's say how many hooks there are
        of_control = dependence(proxy_errors(base, y, meta), meta).stretch
        _, p_perfect = swap_test(y, base, y, meta, seed=seed, stretch=of_control)
        hooks = Dependence(np.nan, mine["n_clusters"], mine["n_effective_control"])
        detectable = hooks.stretch * smallest_detectable(x, base, y, meta, n_resamples=n_resamples, seed=seed)
    return Order(
        control=control,
        gain=mine["diff_control"],
        p=mine["p_control"],
        gain_r2=mine["diff_r2"],
        p_r2=mine["p_r2"],
        room=room,
        p_perfect=p_perfect,
        detectable=detectable,
        n_effective=min(mine["n_effective_r2"], mine["n_effective_control"]),
    )


def _transfer(
    mine: dict,
    control: dict | None,
    half_b: Scores,
    y: np.ndarray,
    meta: dict,
    models: list[str],
    n_resamples: int,
    seed: int,
) -> Transfer:
    """mine, control: their pooled rows; half_b and y as in `_order`."""
    if control is None:
        return Transfer()
    depths = depth_weights(meta, models, n_resamples, seed)

    def gammas(row: dict) -> np.ndarray:
        """[R]: the draws differ in the depths alone."""
        x, same_y = (np.broadcast_to(v, (len(depths), len(y))) for v in (half_b[row["proxy"]], y))
        return transfer_gap(x, same_y, meta, models, depths=depths)[0]

    gamma, gamma_control = gammas(mine), gammas(control)
    gain = np.abs(gamma_control) - np.abs(gamma)
    lo, hi = interval(gain[3:])
    return Transfer(
        control=control["proxy"],
        gamma=float(gamma[0]),
        gamma_control=float(gamma_control[0]),
        gain=float(gain[0]),
        gain_lo=lo,
        gain_hi=hi,
        in_range=mine["in_range"],
        in_range_control=control["in_range"],
    )


def ranked(scores: Scores, found: Measured, settings: dict, n_resamples: int) -> tuple[list[dict], dict]:
    """(the board for both targets, the verdict on H2) of a finished folder."""
    values, meta, models, controls = found.values, found.meta, settings["models"], EUCLIDEAN_CONTROLS
    targets = {name: as_score(name, values[name]) for name in MAGNITUDE}
    loho_controls = {
        name: best_by_loho(scores, values[magnitude], meta, controls) for name, magnitude in MAGNITUDE.items()
    }
    rows = []
    for name, target in targets.items():
        rows += board(
            scores,
            target,
            values[MAGNITUDE[name]],
            meta,
            models,
            target_name=name,
            controls=controls,
            loho_control=loho_controls[name],
            n_documents=min(settings["documents"]),
            n_resamples=n_resamples,
        )
    verdict = verdict_h2(
        [row for row in rows if row["target"] == "ce_rec"],
        scores,
        targets["ce_rec"],
        meta,
        models,
        controls=controls,
        loho_control=loho_controls["ce_rec"],
        n_resamples=n_resamples,
    )
    return rows, verdict


# -------------------------------------------------------------------------------- claims that come after H2
def leaf_added(added: float, p: float, least: float) -> str:
    """Of a claim that a proxy adds to another (`stats.added_value`)."""
    if np.isnan(added):
        return "undecided"
    return "supported" if added >= least and p < ALPHA else "rejected"


# which claim comes first, for an answer's limits; `outline` applies it where verdicts meet
AFTER_EXP_A = "Exp-A comes first: until it has judged these models, this decides nothing about H2. "
AFTER_H2 = (
    "H2 comes first, and Exp-A before it: until H2 is supported on these SAEs (here: {h2}) and Exp-A has "
    "judged these models, this decides nothing about {claim}. "
)


# ------------------------------------------------------------------------------------------- the board, shown
def _partial(row: dict) -> float:
    """By which rows are sorted; undefined is below all."""
    return -2.0 if np.isnan(row["partial"]) else row["partial"]


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    """The claim in general, in Markdown, the best partial Spearman first; columns that say something."""
    table = [
        {
            "proxy": row["proxy"],
            "φ": signed(row["phi"]),
            "hooks": f"{row['n_effective']:.1f}",
            "partial Spearman": estimate(row, "partial"),
            "Spearman": signed(row["spearman"]),
            "Pearson": signed(row["pearson"]),
            "minus r2": estimate(row, "diff_r2"),
            "p_r2": row["p_r2"],
            "minus best control": estimate(row, "diff_control"),
            "p_ctl": row["p_control"],
            "loho": row["loho"],
            "bias": signed(row["loho_bias"]),
            "loho gain": signed(row["diff_loho_control"], 3),
            "p_loho": row["p_loho"],
            "transfer gap": estimate(row, "gamma"),
            "in range": row["in_range"],
            "same ranks as": row["same_ranks_as"] or "",
        }
        for row in of_target(board, target, stratum)
    ]
    return markdown(table, [c for c in table[0] if not all(short(row[c]) == UNDEFINED for row in table)])


TWO_STATISTICS = (
    "Larger is better for every proxy. Two primary statistics. **Partial Spearman** given k (and budget): "
    "the order of SAEs of one k. **loho**, leave one hook out: root mean square error of log10 dCE (of "
    "log10 KL, for the target KL) predicted from the proxy by a quadratic fitted on all other hooks, so 0.1 "
    "is a quarter too much or too little; bias: its mean; loho gain: how much smaller than the best "
    "control's. Both compare with the best Euclidean control, chosen on half of the documents and tested on "
    "the other half."
)
WHAT_COUNTS = (
    "The unit is the hook, a (model, layer): {n_clusters} of them. Neighbouring hooks share their errors,"
    " and so may all hooks of a model. φ: how far a proxy's errors at one hook correlate with those at "
    "the next, corrected for the number of hooks; hooks: how many independent ones that leaves. Intervals"
    " and tests are widened by the square root of the loss, in a comparison by the larger one; below "
    "{min_clusters} effective hooks there are none (`undefined`). Intervals: 95%, hooks resampled within "
    "each model (none below {min_hooks} in one) together with {behind}; p_r2, p_ctl: the proxies trade "
    "places in whole hooks; p_loho: signs flipped over hooks. The p are the tests; an interval of a "
    "difference may hold 0 beside a small p, and then neither is to be leaned on. Transfer gap: CE_rec of"
    " the largest model minus what the smallest model's curve says at that value of the proxy, averaged "
    "with the reverse; depths resampled, as if they were independent."
)
WHAT_COULD_SHOW = (
    "Noise ceiling of the target: rho_max {rho_max}. The best control leaves {room} to gain in partial "
    "Spearman; this grid could have shown SWD a gain of {detectable} (80% power, at SWD's own noise), and "
    "the claim is about {min_difference:.2f}. A p speaks about other layers of these models, and not about "
    "other models, of which there are too few here."
)


def how_to_read(verdict: dict, settings: dict) -> list[str]:
    """Under a leaderboard, in Markdown lines: what its columns are and what its intervals count."""

    def number(value: float | None, digits: int = 2) -> str:
        return "undefined" if value is None else f"{value:.{digits}f}"

    counts = WHAT_COUNTS.format(
        n_clusters=verdict["n_clusters"],
        min_clusters=verdict["min_clusters"],
        min_hooks=verdict["min_hooks"],
        behind=behind(settings),
    )
    could_show = WHAT_COULD_SHOW.format(
        rho_max=number(verdict["rho_max"], 3),
        room=number(verdict["room"]),
        detectable=number(verdict["smallest_detectable"]),
        min_difference=verdict["min_difference"],
    )
    return [TWO_STATISTICS, "", counts, "", could_show, ""]


# --------------------------------------------------------------------- what it says to who knows only R^2
LOOKS = {SENSITIVE: (ORANGE, "o"), CONTROL: (BLUE, "s")}  # of a family: colour, marker
OTHER = ("0.4", "D")
FURTHEST = 0.5  # below R^2 by more: the picture only points there


def of_target(board: list[dict], target: str = "ce_rec", stratum: str = "pooled") -> list[dict]:
    """Its rows, the best partial Spearman first."""
    rows = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    return sorted(rows, key=_partial, reverse=True)


def family(proxy: str) -> str:
    """Of a proxy; empty for an experiment's own."""
    return BY_NAME[proxy].family if proxy in BY_NAME else ""


def against_r2(row: dict) -> str:
    """`above`, `below` or `not shown`: the test and the interval say so both; of R^2 and its like, `same`."""
    if R2 in (row["proxy"], row["same_ranks_as"]):
        return "same"
    if row["p_r2"] < ALPHA and row["diff_r2_lo"] > 0:
        return "above"
    return "below" if row["p_r2"] < ALPHA and row["diff_r2_hi"] < 0 else "not shown"


def what_r2_is_worth(board: list[dict]) -> str:
    """How well R^2 orders the SAEs of one k, and which proxies are shown to do better, in a sentence."""
    rows = of_target(board)
    (r2,) = (row for row in rows if row["proxy"] == R2)
    above = [row["proxy"] for row in rows if against_r2(row) == "above"]
    better = f"shown to do better: {', '.join(above)}" if above else "no other proxy is shown to do better"
    if not np.isfinite(r2["partial_lo"]):
        better = "too few hooks to say of any proxy that it does better"
    hooks = f"{r2['n_clusters']} hooks"
    if r2["n_effective"] < r2["n_clusters"]:
        hooks += f" (which count as {r2['n_effective']:.1f})"
    return (
        f"On {hooks} the order that R² gives SAEs of one k correlates with what patching them "
        f"in does to cross-entropy at {console.number(r2, 'partial')}; {better}."
    )


def about_these(settings: dict) -> str:
    """What every answer is about, and no more."""
    models, stored = settings["models"], settings.get("stored_as", {})
    models = [f"{one} with {stored[one].partition(' (')[0]}" if one in stored else one for one in models]
    those = "a model" if len(models) == 1 else f"{len(models)} models"
    return f"{those} ({models_in_words(models)}) on one text"


READ_AS = """\
ρ: rank correlation with CE_rec among SAEs of one k. pairs: of one model and k,
clearly apart in CE_rec, ordered rightly. here: these SAEs, 95% over documents"""
IN_GENERAL = "in general: tested over hooks, about other layers of these models"
CODES = {"above": console.BLUE, "below": console.ORANGE, "not shown": console.DIM}
VERDICTS = {"above": "better", "below": "worse", "not shown": "not shown", "same": "same order"}


def against_r2_here(row: dict) -> str:
    """As `against_r2`, of these SAEs: the interval over documents says so."""
    if R2 in (row["proxy"], row["same_ranks_as"]):
        return "same"
    if row["diff_r2_here_lo"] > 0:
        return "above"
    return "below" if row["diff_r2_here_hi"] < 0 else "not shown"


def board_in_short(board: list[dict], colour: bool = False) -> str:
    """The leaderboard for a terminal of 80 columns: what proxies do here, and, where there are hooks enough,
    whether one is shown to be better in general. Coloured by what is shown here.
    """
    rows = of_target(board)
    general = any(judged_in_general(row) for row in rows if row["proxy"] != R2)
    table = []
    for row in rows:
        cells = {
            "proxy": row["proxy"],
            "ρ here": claims.estimate_here(row, "partial"),
            "minus R²": "" if row["proxy"] == R2 else claims.estimate_here(row, "diff_r2"),
            "pairs": percent(row["right"]) if row["pairs"] > 0 else "none",
        }
        if general:
            said = VERDICTS[against_r2(row)] if judged_in_general(row) else "-"
            cells["in general"] = "" if row["proxy"] == R2 else said
        table.append(cells)
    codes = [CODES.get(against_r2_here(row), "") for row in rows]
    read_as = f"{READ_AS}\n{IN_GENERAL}" if general else READ_AS
    return f"{console.columns(table, codes, colour)}\n\n{read_as}"


def leaderboard_plot(board: list[dict], verdict: dict) -> bytes:
    """Every proxy's partial Spearman with CE_rec minus R^2's, with its interval over documents, the best
    above: a PNG. verdict: on H2.
    """
    shown = of_target(board)
    (r2,) = (row for row in shown if row["proxy"] == R2)
    above = [row["proxy"] for row in shown if against_r2_here(row) == "above"]
    rows = [row for row in shown if row["proxy"] != R2 and np.isfinite(row["diff_r2"])]
    rows.sort(key=lambda row: row["diff_r2"])
    figure, axis = pyplot().subplots(figsize=(7.6, 0.29 * len(rows) + 1.9), layout="constrained")
    names = ("diff_r2_here_lo", "diff_r2", "diff_r2_here_hi")
    ends = np.array([[row[name] for name in names] for row in rows])
    # what is better is shown whole; one that is far worse does not press the others together
    right = 1.1 * max(np.nanmax(ends, initial=0), 0.05)
    left = min(1.1 * max(np.nanmax(-ends, initial=0), 0.05), max(right, FURTHEST))
    axis.set(xlim=(-left, right), ylim=(-0.6, len(rows) - 0.4))
    for y, row in enumerate(rows):
        colour, marker = LOOKS.get(family(row["proxy"]), OTHER)
        at = row["diff_r2"]
        lo, hi = np.nan_to_num(ends[y, [0, 2]], nan=at)
        if hi > lo:
            axis.plot([lo, hi], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        if -left <= at <= right:
            axis.plot(at, y, marker, color=colour, markersize=6)
        if min(lo, at) < -left:
            axis.plot(-left, y, "<", color=colour, markersize=6, clip_on=False)
        axis.annotate(
            claims.estimate_here(row, "diff_r2"),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=7.5,
            family="monospace",
        )
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["proxy"] for row in rows], fontsize=8)
    axis.set_xlabel(
        f"rank correlation with CE_rec at one k, minus R²'s {signed(r2['partial'])}; 95% over documents",
        fontsize=8,
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3, axis="x")
    says = "no proxy is shown to order these SAEs better than R²"
    if above:
        says = f"shown to order these SAEs better than R²: {', '.join(above)}"
    figure.suptitle(f"On {r2['n_clusters']} hooks {says}", fontsize=10, wrap=True)
    axis.set_title(f"H2, that SWD does: {verdict['leaf']}", fontsize=8)
    labels = {**{kind: LOOKS[kind] for kind in (SENSITIVE, CONTROL)}, "other": OTHER}
    handles = [
        pyplot().Line2D([], [], color=colour, marker=marker, label=label)
        for label, (colour, marker) in labels.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return as_png(figure)
