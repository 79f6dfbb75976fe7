"""What experiments that rank proxies share: the board of all proxies, and what R^2 and the best Euclidean
controls leave to SWD (`Contest`), of which expb.py makes its verdict.

Arrays as in `stats`: scores {proxy: [W, C]}, larger = better; target [W, C]; magnitude [W, C], the distortion
behind the target; C conditions under W weightings of the documents (`resampling.ALL`, ...). `meta` {column:
[C]}, `models` from the smallest to the largest. A board is a list of table rows, of LEADERBOARD.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transport_geometry.measuring.metrics import EUCLIDEAN_CONTROLS, as_score
from transport_geometry.records.results import Measured
from transport_geometry.statistics import claims
from transport_geometry.statistics.correlations import (
    correlation,
    k_dummies,
    noise_ceiling,
    partial_spearman,
    rank_residual,
    unit_residual,
    weighted_design,
    weighted_ranks,
)
from transport_geometry.statistics.hook_dependence import (
    MIN_EFFECTIVE_HOOKS,
    Dependence,
    dependence,
    proxy_errors,
)
from transport_geometry.statistics.hook_tests import (
    flip_test,
    loho_errors,
    smallest_detectable,
    swap_test,
    swap_tests,
)
from transport_geometry.statistics.intervals import ALPHA, interval, stretched_interval
from transport_geometry.statistics.resampling import (
    ALL,
    ESTIMATE,
    HALF_A,
    HALF_B,
    RESAMPLES,
    bootstrap_weights,
    cluster_ids,
    depth_weights,
    mean_by_hook,
    resample_index,
)
from transport_geometry.statistics.transfer import transfer_gap

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
Columns = dict[str, dict]  # {proxy: some of its row's cells}


# ----------------------------------------------------------------------------------------------- the controls
# each is chosen on half A, to be tested on half B; None when the criterion is undefined for all of them
def best_control(scores: Scores, target: np.ndarray, meta: dict, controls: Sequence[str]) -> str | None:
    """The control with the highest partial Spearman."""
    half_a = _on_half_a(scores, controls)
    return _smallest({name: -partial_spearman(x, target[HALF_A], meta) for name, x in half_a.items()})


def best_by_loho(scores: Scores, magnitude: np.ndarray, meta: dict, controls: Sequence[str]) -> str | None:
    """The control with the smallest leave-one-hook-out error."""
    ids, half_a = cluster_ids(meta), _on_half_a(scores, controls)
    errors = {name: loho_errors(x, magnitude[HALF_A], meta) for name, x in half_a.items()}
    return _smallest({name: float(mean_by_hook(e**2, ids).mean()) for name, e in errors.items()})


def best_by_gamma(
    scores: Scores, target: np.ndarray, meta: dict, models: list[str], controls: Sequence[str]
) -> str | None:
    """The control with the smallest transfer gap."""
    half_a = _on_half_a(scores, controls)
    gaps = {name: transfer_gap(x, target[HALF_A], meta, models)[0] for name, x in half_a.items()}
    return _smallest({name: abs(float(gamma[0])) for name, gamma in gaps.items()})


def _on_half_a(scores: Scores, controls: Sequence[str]) -> Scores:
    return {name: scores[name][HALF_A] for name in controls if name in scores}


def _smallest(values: dict[str, float]) -> str | None:
    """Name of the smallest value; None when all are nan."""
    known = {name: value for name, value in values.items() if not np.isnan(value)}
    return min(known, key=known.__getitem__, default=None)


# -------------------------------------------------------------------------------------------------- the board
@dataclass(frozen=True)
class Stratum:
    """C conditions, all of them or a part, and how every proxy correlates with the target there, under R
    draws, each with its weights of the conditions and its weighting of the documents.
    """

    scores: Scores
    target: np.ndarray
    meta: dict
    draws: dict[str, dict[str, np.ndarray]]  # {proxy: {statistic: [R]}}
    ranks: dict[str, np.ndarray]  # {proxy: [C]} on all documents
    hooks: dict[int, dict[str, Dependence]]  # {ALL and HALF_B: {proxy: how far its errors make hooks alike}}

    def compared(self, name: str, base: str | None, half: int) -> Dependence:
        """The hooks in a comparison of two proxies: of the proxy that leaves fewer effective ones."""
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

    Intervals and p are about hooks in general, and nan where fewer than MIN_EFFECTIVE_HOOKS are effective;
    those of `claims.COLUMNS` are about these SAEs, and resample documents (and seeds) alone.

    Intervals: bootstrap over hooks (of gamma: over depths), nested with the shared resamples of the
    documents. They and the null distributions, except gamma's, are stretched by sqrt(hooks / effective ones).
    diff_r2, p_r2: on all documents. r2 against itself is 0 with p = 1, as is every row of the same ranks.
    diff_control, p_control: the control is chosen in that stratum on half A, everything is computed on half
    B, and the interval resamples hooks only (there is no resample within a half). The chosen control itself:
    0 with p = 1.
    gamma, in_range: pooled only.
    same_ranks_as: the first earlier proxy that ranks the conditions identically; such a row adds no test to a
    count.
    loho, loho_bias: root mean square and mean of `loho_errors` of the magnitude, on all documents; in a
    model's rows its own hooks, predicted from all others. diff_loho_control, p_loho: how much smaller the
    error is than `loho_control`'s, the best on half A (`best_by_loho`), on half B; signs flipped over hooks.
    phi: correlation of the proxy's errors between neighbouring hooks (`hook_dependence`); n_effective: how
    many independent hooks they count as; n_effective_r2, n_effective_control: in a comparison, the fewer of
    the two proxies'.
    """
    documents = resample_index(len(target), n_resamples)
    weights = bootstrap_weights(meta, n_resamples, seed)
    depths = depth_weights(meta, models, n_resamples, seed)
    hooks = cluster_ids(meta)
    errors, errors_b = (
        {name: loho_errors(s[half], magnitude[half], meta) for name, s in scores.items()}
        for half in (ALL, HALF_B)
    )
    strata = {"pooled": np.ones(len(hooks), bool)} | claims.arms(meta)
    strata |= {model: np.asarray(meta["model"]) == model for model in models}
    table = []
    for stratum, inside in strata.items():
        if not inside.any():
            continue
        part = _stratum(
            {name: s[:, inside] for name, s in scores.items()},
            target[:, inside],
            {name: np.asarray(v)[inside] for name, v in meta.items()},
            weights[:, inside],
            documents,
        )
        control = best_control(part.scores, part.target, part.meta, controls)
        pairs = claims.clear_pairs(part.target, part.meta) if target_name == "ce_rec" else None
        gammas = dict.fromkeys(scores, NO_GAMMA)
        if stratum == "pooled":
            gammas = _gammas(part, models, documents, depths)
        columns = [
            _correlations(part),
            _differences(part, "r2", R2, ALL, "partial", seed),
            _differences(part, "control", control, HALF_B, "half_b", seed),
            gammas,
            _twins(part),
            _sizes(part, inside, errors, errors_b, loho_control, seed),
            _effective_hooks(part, control),
            claims.document_columns(part.scores, part.target, part.meta, n_documents, pairs),
        ]
        for name in part.scores:
            row: dict = {"proxy": name, "target": target_name, "stratum": stratum}
            row |= {"n_cells": len(np.unique(part.meta["cell"])), "n_clusters": len(np.unique(hooks[inside]))}
            for of_proxy in columns:
                row |= of_proxy[name]
            table.append(row)
    return table


def _stratum(
    scores: Scores, target: np.ndarray, meta: dict, weights: np.ndarray, documents: np.ndarray
) -> Stratum:
    """weights [R, C] of the conditions and `documents` [R], the weighting of the documents, of each draw.
    Draws of `half_b`, partial Spearman on half B, differ in `weights` alone.
    """
    alone = weighted_design(weights, np.ones((len(weights[0]), 1)))
    fixed_k = weighted_design(weights, k_dummies(meta))

    def units(v: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """({statistic: unit residual [R, C] of v [W, C]}, ranks [C] of v on all documents)."""
        ranks = weighted_ranks(v[documents], alone.weights)
        residuals = {
            "pearson": unit_residual(v[documents], alone),
            "spearman": unit_residual(ranks, alone),
            "partial": unit_residual(ranks, fixed_k),
            "half_b": rank_residual(v[HALF_B][None], fixed_k),
        }
        return residuals, ranks[ESTIMATE]

    draws, ranks = {}, {}
    hooks = {
        half: {
            name: dependence(proxy_errors(s[half], target[half], meta), meta) for name, s in scores.items()
        }
        for half in (ALL, HALF_B)
    }
    of_target, _ = units(target)
    for name, s in scores.items():
        of_proxy, ranks[name] = units(s)
        draws[name] = {key: correlation(of_proxy[key], of_target[key]) for key in of_target}
    return Stratum(scores, target, meta, draws, ranks, hooks)


def _correlations(part: Stratum) -> Columns:
    columns: Columns = {name: {} for name in part.scores}
    for name, cells in columns.items():
        stretch = part.hooks[ALL][name].stretch
        for statistic in ("pearson", "spearman", "partial"):
            cells |= _with_interval(statistic, part.draws[name][statistic], stretch=stretch, fisher=True)
    return columns


def _differences(part: Stratum, key: str, base: str | None, half: int, statistic: str, seed: int) -> Columns:
    """diff_<key>, its interval and p_<key> of every proxy minus `base`, the test on one weighting of the
    documents. nan where there is no such base.
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
        draws = np.array([np.nan])
        if base in part.draws:
            draws = part.draws[name][statistic] - part.draws[base][statistic]
        cells[name] = _with_interval(f"diff_{key}", draws, diff_of, stretch_of) | {f"p_{key}": float(p_of)}
    return cells


NO_GAMMA = dict.fromkeys(("gamma", "gamma_lo", "gamma_hi", "in_range"), np.nan)


def _gammas(part: Stratum, models: list[str], documents: np.ndarray, depths: np.ndarray) -> Columns:
    columns = {}
    for name, s in part.scores.items():
        gamma, in_range = transfer_gap(s[documents], part.target[documents], part.meta, models, depths=depths)
        columns[name] = _with_interval("gamma", gamma) | {"in_range": float(in_range[ESTIMATE])}
    return columns


def _twins(part: Stratum) -> Columns:
    """same_ranks_as: the first proxy before of the same ranks, or nothing."""
    columns = {}
    for name, own in part.ranks.items():
        first = next(
            other for other, ranks in part.ranks.items() if other == name or np.array_equal(ranks, own)
        )
        columns[name] = {"same_ranks_as": "" if first == name else first}
    return columns


def _sizes(
    part: Stratum, inside: np.ndarray, errors: Scores, errors_b: Scores, control: str | None, seed: int
) -> Columns:
    """Of leave-one-hook-out errors {proxy: [all conditions]} on all documents, and on half B against the
    control's; every hook counts once. inside: which conditions are the stratum's.
    """
    ids, columns = cluster_ids(part.meta), {}

    def root_mean_square(e: np.ndarray) -> float:
        return float(np.sqrt(mean_by_hook(e**2, ids).mean()))

    for name in part.scores:
        e, gain, p = errors[name][inside], np.nan, np.nan
        if control:
            mine, theirs = errors_b[name][inside], errors_b[control][inside]
            stretch = np.max([dependence(one, part.meta).stretch for one in (mine, theirs)])
            gain = root_mean_square(theirs) - root_mean_square(mine)
            d = mean_by_hook(theirs**2, ids) - mean_by_hook(mine**2, ids)
            p = flip_test(d, seed=seed, stretch=stretch)
        size = {"loho": root_mean_square(e), "loho_bias": float(mean_by_hook(e, ids).mean())}
        columns[name] = size | {"diff_loho_control": gain, "p_loho": p}
    return columns


def _effective_hooks(part: Stratum, control: str | None) -> Columns:
    return {
        name: {
            "phi": own.phi,
            "n_effective": own.n_effective,
            "n_effective_r2": part.compared(name, R2, ALL).n_effective,
            "n_effective_control": part.compared(name, control, HALF_B).n_effective,
        }
        for name, own in part.hooks[ALL].items()
    }


def _with_interval(
    key: str, draws: np.ndarray, value: float | None = None, stretch: float = 1.0, fisher: bool = False
) -> dict[str, float]:
    """value: the estimate, where it is not the first draw."""
    value = float(draws[ESTIMATE] if value is None else value)
    lo, hi = np.nan, np.nan
    if not np.isnan(value):
        lo, hi = stretched_interval(value, draws[RESAMPLES], stretch, fisher)
    return {key: value, f"{key}_lo": lo, f"{key}_hi": hi}


# ------------------------------------------------------------------------- SWD against the best controls
@dataclass(frozen=True)
class Contest:
    """A proxy against R^2, on all documents, and against the best Euclidean control of each kind, chosen on
    half A and met on half B: what a rule on H2 may ask. Names are verdict.json's.
    """

    proxy: str
    target: str
    n_conditions: int
    n_cells: int
    n_clusters: int
    phi: float
    n_effective: float  # hooks, in the comparison that has fewer
    in_general: bool  # are there hooks enough for a comparison with R^2 in general?
    here: dict  # the claim about these SAEs, `claims.in_verdict`
    n_proxies: int
    n_proxies_distinct: int
    # does it rank better? partial Spearman
    order_control: str | None
    room: float  # between the control and 1
    p_perfect: float  # p that the target itself would have in the proxy's place
    smallest_detectable: float  # the gain that this grid shows in four of five cases
    of_the_proxy: dict  # its own columns of the board, OF_THE_PROXY
    # does it tell the size of dCE better? leave-one-hook-out error
    size_control: str | None
    # does it carry over across scale better? transfer gaps
    transfer_control: str | None
    gamma_proxy: float
    gamma_control: float
    gamma_gain: float  # |gamma_control| - |gamma_proxy|
    gamma_gain_lo: float
    gamma_gain_hi: float
    in_range_proxy: float
    in_range_control: float
    ceiling: dict  # `correlations.noise_ceiling` of the target
    n_resamples: int
    seed: int

    def record(self) -> dict:
        """As verdict.json has it: flat."""
        names = dict(order_control="a_control", size_control="loho_control", transfer_control="b_control")
        flat = {names.get(name, name): value for name, value in vars(self).items()}
        return flat | flat.pop("of_the_proxy") | flat.pop("ceiling")


# columns of its row that the contest repeats
OF_THE_PROXY = (
    "partial partial_lo partial_hi diff_control diff_control_lo diff_control_hi p_control "
    "diff_r2 diff_r2_lo diff_r2_hi p_r2 loho loho_bias diff_loho_control p_loho"
).split()


def contest(
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
) -> Contest:
    """rows, loho_control: of `board`, for this target."""
    pooled = [row for row in rows if row["stratum"] == "pooled"]
    by_proxy: dict[str | None, dict] = {row["proxy"]: row for row in pooled}
    mine = by_proxy[proxy]
    half_b, y = {name: s[HALF_B] for name, s in scores.items()}, target[HALF_B]
    control = best_control(scores, target, meta, controls)
    room = p_perfect = detectable = np.nan
    if control:
        x, base = half_b[proxy], half_b[control]
        room = 1 - partial_spearman(base, y, meta)
        # the target has no errors: the control's say how many hooks there are
        of_control = dependence(proxy_errors(base, y, meta), meta).stretch
        _, p_perfect = swap_test(y, base, y, meta, seed=seed, stretch=of_control)
        hooks = Dependence(np.nan, mine["n_clusters"], mine["n_effective_control"])
        detectable = hooks.stretch * smallest_detectable(x, base, y, meta, n_resamples=n_resamples, seed=seed)
    gap_control = best_by_gamma(scores, target, meta, models, controls)
    gamma = gamma_control = np.full(4, np.nan)
    if gap_control:
        depths = depth_weights(meta, models, n_resamples, seed)

        def gammas(name: str) -> np.ndarray:
            """[R]: the draws differ in the depths alone."""
            x, same_y = (np.broadcast_to(v, (len(depths), len(y))) for v in (half_b[name], y))
            return transfer_gap(x, same_y, meta, models, depths=depths)[0]

        gamma, gamma_control = gammas(proxy), gammas(gap_control)
    gain = np.abs(gamma_control) - np.abs(gamma)
    gain_lo, gain_hi = interval(gain[RESAMPLES])
    return Contest(
        proxy=proxy,
        target=mine["target"],
        n_conditions=target.shape[1],
        n_cells=mine["n_cells"],
        n_clusters=mine["n_clusters"],
        phi=mine["phi"],
        n_effective=min(mine["n_effective_r2"], mine["n_effective_control"]),
        in_general=judged_in_general(mine),
        here=claims.in_verdict(rows, controls),
        n_proxies=len(pooled),
        n_proxies_distinct=sum(row["same_ranks_as"] == "" for row in pooled),
        order_control=control,
        room=room,
        p_perfect=p_perfect,
        smallest_detectable=detectable,
        of_the_proxy={key: mine[key] for key in OF_THE_PROXY},
        size_control=loho_control,
        transfer_control=gap_control,
        gamma_proxy=float(gamma[0]),
        gamma_control=float(gamma_control[0]),
        gamma_gain=float(gain[0]),
        gamma_gain_lo=gain_lo,
        gamma_gain_hi=gain_hi,
        in_range_proxy=mine["in_range"] if gap_control else np.nan,
        in_range_control=by_proxy[gap_control]["in_range"] if gap_control else np.nan,
        ceiling=noise_ceiling(target, meta),
        n_resamples=n_resamples,
        seed=seed,
    )


def judged_in_general(row: dict) -> bool:
    """Are there hooks enough, of a row of the board, for a comparison with R² in general?"""
    return row["n_effective_r2"] >= MIN_EFFECTIVE_HOOKS


def ranked(scores: Scores, found: Measured, settings: dict, n_resamples: int) -> tuple[list[dict], Contest]:
    """(the board for both targets, SWD's contest for CE_rec) of a finished folder."""
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
    swd = contest(
        [row for row in rows if row["target"] == "ce_rec"],
        scores,
        targets["ce_rec"],
        meta,
        models,
        controls=controls,
        loho_control=loho_controls["ce_rec"],
        n_resamples=n_resamples,
    )
    return rows, swd


# --------------------------------------------------------------------------------------- what a row says
def of_target(board: list[dict], target: str = "ce_rec", stratum: str = "pooled") -> list[dict]:
    """Its rows, the best partial Spearman first; undefined is below all."""
    rows = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    return sorted(rows, key=lambda row: -np.nan_to_num(row["partial"], nan=-2.0))


def against_r2(row: dict, here: bool = False) -> str:
    """`above`, `below` or `not shown`; of R^2 and its like, `same`. In general test and interval must both
    say so; here, of these SAEs, the interval over documents.
    """
    if R2 in (row["proxy"], row["same_ranks_as"]):
        return "same"
    shown = here or row["p_r2"] < ALPHA
    lo, hi = (row[f"diff_r2_here_{end}" if here else f"diff_r2_{end}"] for end in ("lo", "hi"))
    if shown and lo > 0:
        return "above"
    return "below" if shown and hi < 0 else "not shown"
