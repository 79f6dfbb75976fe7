"""What experiments that rank proxies share: the leaderboard's columns, table and plot, the gate, the flag of
one SAE.
"""

import hashlib
import json
import pathlib

from transport_geometry import store
from transport_geometry.errors import UserError
from transport_geometry.figures import as_png, pyplot
from transport_geometry.metrics import EUCLIDEAN_CONTROLS
from transport_geometry.results import behind
from transport_geometry.stats import (
    ALPHA,
    MIN_CLUSTERS,
    MIN_HOOKS,
    MIN_IN_RANGE,
    _by_hook,
    _design,
    _dot,
    _midrank,
    _rows,
    _unit,
    _with_interval,
    bootstrap_weights,
    cluster_ids,
    depth_weights,
    flip_test,
    given,
    interval,
    loho_errors,
    noise_ceiling,
    partial_spearman,
    swap_test,
    transfer_gap,
)
from transport_geometry.tables import markdown, signed, span

import numpy as np
from scipy.stats import norm

R2, SWD = "r2", "swd_tok"
MIN_DIFFERENCE = 0.10  # H2 (a): partial Spearman, SWD minus control
MAX_GAMMA_RATIO = 0.5  # H2 (b): |gamma of SWD| over |gamma of control|
ADJUDICATED = ("H0", "H1", "H0+H1", "N")  # the leaves of Exp-A that open the gate to H2


# ---------------------------------------------------------------------------------------------- leaderboard
def _best(values: dict, sign: int = 1):
    """Name of the largest (sign -1: smallest) value; None when all are nan."""
    known = {name: sign * float(v) for name, v in values.items() if not np.isnan(v)}
    return max(known, key=known.get) if known else None


def best_control(scores: dict, target, meta: dict, controls: list):
    """The control with the highest partial Spearman on half A, to be tested on half B; None when none is
    defined.
    """
    return _best(
        {name: partial_spearman(scores[name][1], target[1], meta) for name in controls if name in scores}
    )


def best_by_loho(scores: dict, magnitude, meta: dict, controls: list):
    """The control with the smallest leave-one-hook-out error on half A, to be tested on half B; None when
    none is defined.
    """
    ids = cluster_ids(meta)
    return _best(
        {
            name: _by_hook(loho_errors(scores[name][1], magnitude[1], meta) ** 2, ids).mean()
            for name in controls
            if name in scores
        },
        sign=-1,
    )


def leaderboard(
    scores: dict,
    target,
    magnitude,
    meta: dict,
    models: list,
    *,
    target_name: str,
    controls: list,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict]:
    """One row per proxy in each stratum: all conditions pooled, then each model alone. `models`: smallest to
    largest.

    Intervals: bootstrap over hooks (of gamma: over depths), nested with the shared resamples of the
    documents. diff_r2, p_r2: on all documents. r2 against itself is 0 with p = 1, as is every row of the same
    ranks. diff_control, p_control: control chosen in that stratum on half A, everything computed on half B,
    whose interval resamples hooks only (there is no resample within a half). The chosen control itself: 0
    with p = 1. loho, loho_bias: root mean square and mean of `loho_errors` of magnitude [W, C], the
    distortion behind the target, on all documents; in a model's rows its own hooks, predicted from all
    others. diff_loho_control, p_loho: how much smaller the error is than the best control's, chosen (pooled)
    and tested on halves like diff_control; signs flipped over hooks. gamma, in_range: pooled only.
    same_ranks_as: the first earlier proxy that ranks the conditions identically; such a row adds no test to a
    count.
    """
    rows, table = _rows(len(target), n_resamples), []
    weights, depths = (
        bootstrap_weights(meta, n_resamples, seed),
        depth_weights(meta, models, n_resamples, seed),
    )
    hooks, loho_control = cluster_ids(meta), best_by_loho(scores, magnitude, meta, controls)
    missed = {
        name: [loho_errors(s[half], magnitude[half], meta) for half in (0, 2)] for name, s in scores.items()
    }
    for stratum in ("pooled", *models):
        keep = np.flatnonzero((np.asarray(meta["model"]) == stratum) | (stratum == "pooled"))
        if not len(keep):
            continue
        x, y = {p: s[:, keep] for p, s in scores.items()}, target[:, keep]
        part = {name: np.asarray(v)[keep] for name, v in meta.items()}
        plain, fixed_k = (
            _design(weights[:, keep], np.ones((len(keep), 1))),
            _design(weights[:, keep], given(part)),
        )

        def units(v):  # of one variable: for pearson, spearman, partial; for partial on half B; its ranks
            rank, rank_b = _midrank(v[rows], plain[0]), _midrank(v[2:3], plain[0])
            return (
                _unit(v[rows], plain),
                _unit(rank, plain),
                _unit(rank, fixed_k),
                _unit(rank_b, fixed_k),
            ), rank[0]

        r, order, (y_units, _) = {}, {}, units(y)
        for name, s in x.items():
            x_units, order[name] = units(s)
            r[name] = dict(zip(("pearson", "spearman", "partial", "half_b"), map(_dot, x_units, y_units)))
        control, stacked = best_control(x, y, part, controls), np.stack(list(x.values()))
        nothing = np.full(len(x), np.nan), np.full(len(x), np.nan)
        vs_r2 = swap_test(stacked[:, 0], x[R2][0], y[0], part, seed=seed) if R2 in x else nothing
        vs_control = swap_test(stacked[:, 2], x[control][2], y[2], part, seed=seed) if control else nothing
        by_hook = lambda name, half, power: _by_hook(missed[name][half][keep] ** power, hooks[keep])

        for i, (name, s) in enumerate(x.items()):
            row = dict(
                proxy=name,
                target=target_name,
                stratum=stratum,
                n_cells=len(np.unique(part["cell"])),
                n_clusters=len(np.unique(hooks[keep])),
            )
            for key in ("pearson", "spearman", "partial"):
                row |= _with_interval(key, r[name][key][0], r[name][key][3:], fisher=True)
            for key, (diff, p), base, kind in (
                ("r2", vs_r2, R2, "partial"),
                ("control", vs_control, control, "half_b"),
            ):
                draws = (r[name][kind] - r[base][kind])[3:] if base in r else np.array([])
                row |= _with_interval(f"diff_{key}", diff[i], draws) | {f"p_{key}": float(p[i])}
            gamma, inside = np.full(4, np.nan), np.full(1, np.nan)
            if stratum == "pooled":
                gamma, inside = transfer_gap(s[rows], y[rows], part, models, depths=depths)
            row |= _with_interval("gamma", gamma[0], gamma[3:]) | {"in_range": float(inside[0])}
            twin = next((p for p in order if np.array_equal(order[p], order[name])), name)
            row |= {"same_ranks_as": "" if twin == name else twin}
            row |= dict(
                loho=float(np.sqrt(by_hook(name, 0, 2).mean())),
                loho_bias=float(by_hook(name, 0, 1).mean()),
                diff_loho_control=np.nan,
                p_loho=np.nan,
            )
            if loho_control:
                mine, theirs = by_hook(name, 1, 2), by_hook(loho_control, 1, 2)
                row |= dict(
                    diff_loho_control=float(np.sqrt(theirs.mean()) - np.sqrt(mine.mean())),
                    p_loho=flip_test(theirs - mine, seed=seed),
                )
            table.append(row)
    return table


def smallest_detectable(
    scores: dict,
    target,
    meta: dict,
    *,
    controls: list,
    proxy: str = SWD,
    n_resamples: int = 2000,
    seed: int = 0,
    power: float = 0.8,
) -> float:
    """Smallest difference to the best control in partial Spearman that this grid shows with this power,
    two-sided 5%: (z.975 + z.power) times the bootstrap standard error of the difference on half B, where it
    is tested.
    """
    control = best_control(scores, target, meta, controls)
    if control is None:
        return np.nan
    design = _design(bootstrap_weights(meta, n_resamples, seed)[3:], given(meta))
    x, c, y = (_unit(_midrank(v[2:3], design[0]), design) for v in (scores[proxy], scores[control], target))
    diff = _dot(x, y) - _dot(c, y)
    diff = diff[~np.isnan(diff)]
    z = norm.ppf(1 - ALPHA / 2) + norm.ppf(power)
    return float(z * diff.std(ddof=1)) if 2 * len(diff) > n_resamples else np.nan


# ---------------------------------------------------------------------------------------------- verdict
CANNOT = "cannot be shown here"


def verdict_h2(
    rows: list[dict],
    scores: dict,
    target,
    magnitude,
    meta: dict,
    models: list,
    *,
    controls: list,
    gate: str | None,
    proxy: str = SWD,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """The pre-registered verdict on H2, "a sensitivity-weighted proxy predicts CE better", and every number
    it used.

    `rows` are the leaderboard's, `gate` the leaf of Exp-A or None. Three claims, each against a control
    chosen on half A and tested on half B: (a) partial Spearman higher by >= 0.10, swap p < .05; (b) |gamma|
    at most half the smallest |gamma| of a control, 95% interval of |gamma_control| - |gamma_proxy| above 0;
    (c) the second primary statistic, the leave-one-hook-out error of log10 dCE, smaller. Order within k is
    one question and magnitude another: H2 is supported only where both point the same way. The first leaf
    that applies:

      undecided             fewer than 6 hooks, or (a) undefined
      undecided             (a) holds and the leave-one-hook-out error is not smaller, or undefined, or (a) does not and it is (p < .05)
      beats-r2-only         not (a), but both its conditions hold against r2, on all documents
      cannot be shown here  not (a), and the control leaves less room (1 - its partial Spearman) than the margin, or so little that the
                            target itself in the proxy's place would have p_perfect >= .05: no proxy could have passed here; or less than
                            `smallest_detectable`, unless the proxy is shown to rank worse
      rejected              not (a), nor against r2
      undecided             (a), but gamma is undefined (one model, or no depth in common): (b) was not put to the test
      not-transferable      (a), but under half the larger model's values are in range, of the proxy or the control of (b)
      supported             (a), (b) and (c)
      rejected              (a), not (b): better ranks that do not carry over across scale are not what H2 claims

    An Exp-A leaf that adjudicated nothing (undecided, undertrained) gates as None does. in_range is the
    leaderboard's, on all documents.
    """
    pooled = [row for row in rows if row["stratum"] == "pooled"]
    row = {r["proxy"]: r for r in pooled}
    mine, control_a = row[proxy], best_control(scores, target, meta, controls)
    room = 1 - partial_spearman(scores[control_a][2], target[2], meta) if control_a else np.nan
    p_perfect = (
        swap_test(target[2], scores[control_a][2], target[2], meta, seed=seed)[1] if control_a else np.nan
    )
    detectable = smallest_detectable(
        scores, target, meta, controls=controls, proxy=proxy, n_resamples=n_resamples, seed=seed
    )

    half_a = {
        c: abs(transfer_gap(scores[c][1], target[1], meta, models)[0][0]) for c in controls if c in scores
    }
    control_b, depths = _best(half_a, sign=-1), depth_weights(meta, models, n_resamples, seed)
    g_mine, g_control, inside_mine, inside_control = np.full(4, np.nan), np.full(4, np.nan), np.nan, np.nan
    if control_b:
        shape = (len(depths), target.shape[1])
        # one value under every draw
        half_b = {p: np.broadcast_to(scores[p][2], shape) for p in (proxy, control_b)}
        y_b = np.broadcast_to(target[2], shape)
        g_mine, g_control = (
            transfer_gap(half_b[p], y_b, meta, models, depths=depths)[0] for p in (proxy, control_b)
        )
        inside_mine, inside_control = mine["in_range"], row[control_b]["in_range"]
    gain = np.abs(g_control) - np.abs(g_mine)
    gain_lo, gain_hi = interval(gain[3:])

    a_holds = mine["diff_control"] >= MIN_DIFFERENCE and mine["p_control"] < ALPHA
    a_holds_r2 = mine["diff_r2"] >= MIN_DIFFERENCE and mine["p_r2"] < ALPHA
    worse = mine["diff_control"] < 0 and mine["p_control"] < ALPHA
    better_loho = mine["diff_loho_control"] > 0 and mine["p_loho"] < ALPHA
    b_judged = min(inside_mine, inside_control) >= MIN_IN_RANGE
    b_holds = b_judged and abs(g_mine[0]) <= MAX_GAMMA_RATIO * abs(g_control[0]) and gain_lo > 0
    no_room = [f"the margin of {MIN_DIFFERENCE:.2f}"] * (room < MIN_DIFFERENCE)
    no_room += [f"what could show here (p would be {p_perfect:.2f} for the target itself)"] * (
        p_perfect >= ALPHA
    )
    no_room += [f"the {detectable:.2f} that shows here in four of five cases"] * (
        room < detectable and not worse
    )
    if mine["n_clusters"] < MIN_CLUSTERS:
        leaf, why = "undecided", f"{mine['n_clusters']} hooks, {MIN_CLUSTERS} needed"
    elif np.isnan(mine["p_control"]):
        leaf, why = "undecided", "the difference to the best control is undefined"
    elif a_holds and np.isnan(mine["diff_loho_control"]):
        leaf, why = (
            "undecided",
            f"ranks better than {control_a}, and how well it predicts the size of dCE is undefined (a dCE that is not positive has no logarithm)",
        )
    elif a_holds and not mine["diff_loho_control"] > 0:
        leaf, why = (
            "undecided",
            f"the two statistics disagree: it ranks better than {control_a}, and does not predict the size of dCE better",
        )
    elif not a_holds and better_loho:
        leaf, why = (
            "undecided",
            f"the two statistics disagree: it predicts the size of dCE better, and is not shown to rank better than {control_a}",
        )
    elif not a_holds and a_holds_r2:
        leaf, why = "beats-r2-only", f"ranks better than r2, not shown to rank better than {control_a}"
    elif not a_holds and no_room:
        leaf, why = (
            CANNOT,
            f"{control_a} leaves {room:.2f} to gain in partial Spearman, less than {' and '.join(no_room)}"
            + "; and it ranks worse" * worse,
        )
    elif not a_holds:
        leaf, why = (
            "rejected",
            f"ranks worse than {control_a}"
            if worse
            else f"not shown to rank better than {control_a}, nor than r2",
        )
    elif np.isnan(g_mine[0]) or np.isnan(g_control[0]):
        leaf, why = "undecided", "ranks better, transfer across scale undefined on this grid"
    elif not b_judged:
        leaf, why = (
            "not-transferable",
            "ranks better, but too few of the larger model's values are in range to judge",
        )
    elif b_holds:
        leaf, why = (
            "supported",
            f"ranks better than {control_a} and transfers across scale better than {control_b}",
        )
    else:
        leaf, why = (
            "rejected",
            f"ranks better than {control_a}, not shown to transfer better than {control_b}",
        )

    out = dict(leaf=leaf if gate in ADJUDICATED else "gated", leaf_if_ungated=leaf, reason=why, gate=gate)
    out |= dict(
        proxy=proxy,
        target=mine["target"],
        n_conditions=target.shape[1],
        n_cells=mine["n_cells"],
        n_clusters=mine["n_clusters"],
        n_proxies=len(pooled),
        n_proxies_distinct=sum(r["same_ranks_as"] == "" for r in pooled),
    )
    out |= dict(
        a_control=control_a,
        a_holds=a_holds,
        a_holds_vs_r2=a_holds_r2,
        room=room,
        p_perfect=p_perfect,
        smallest_detectable=detectable,
    )
    out |= {
        key + end: mine[key + end]
        for key in ("partial", "diff_control", "diff_r2")
        for end in ("", "_lo", "_hi")
    }
    out |= dict(p_control=mine["p_control"], p_r2=mine["p_r2"])
    out |= dict(loho_control=best_by_loho(scores, magnitude, meta, controls)) | {
        key: mine[key] for key in ("loho", "loho_bias", "diff_loho_control", "p_loho")
    }
    out |= dict(
        b_control=control_b,
        b_judged=b_judged,
        b_holds=b_holds,
        gamma_proxy=g_mine[0],
        gamma_control=g_control[0],
        gamma_gain=gain[0],
        gamma_gain_lo=gain_lo,
        gamma_gain_hi=gain_hi,
        in_range_proxy=inside_mine,
        in_range_control=inside_control,
    )
    out |= noise_ceiling(target, meta)
    out |= dict(
        n_resamples=n_resamples,
        seed=seed,
        alpha=ALPHA,
        min_clusters=MIN_CLUSTERS,
        min_hooks=MIN_HOOKS,
        min_difference=MIN_DIFFERENCE,
        max_gamma_ratio=MAX_GAMMA_RATIO,
        min_in_range=MIN_IN_RANGE,
    )
    return {key: _jsonable(value) for key, value in out.items()}


def _jsonable(value):
    """Plain Python, with None for nan."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


LEADERBOARD = (
    "proxy,target,stratum,n_cells,n_clusters,pearson,pearson_lo,pearson_hi,spearman,spearman_lo,spearman_hi,partial,partial_lo,"
    "partial_hi,diff_r2,diff_r2_lo,diff_r2_hi,p_r2,diff_control,diff_control_lo,diff_control_hi,p_control,gamma,gamma_lo,"
    "gamma_hi,in_range,same_ranks_as,loho,loho_bias,diff_loho_control,p_loho"
).split(",")


MAGNITUDE = {"ce_rec": "dce", "kl": "kl"}  # target -> the distortion whose size `loho` predicts
EXP_A = pathlib.Path("outputs/expa/verdict.json")
LEAVES = {"undertrained", "H0", "H1", "H0+H1", "N", "undecided"}


def read_verdict(path: pathlib.Path | None) -> dict | None:
    """Exp-A's verdict at `path`, or, where none is named, at EXP_A if there is one; read before the work that
    it may gate.

    Raises UserError: not there, not a verdict of Exp-A, or not as its run.json says that it was written.
    """
    if path is None:
        try:
            return read_verdict(EXP_A) if EXP_A.exists() else None
        except UserError as why:  # which nobody asked for
            print(f"{why}: taken for no verdict")
            return None
    try:
        raw = path.read_bytes()
        verdict = json.loads(raw)
        known = verdict["leaf"] in LEAVES and isinstance(verdict["settings"].get("recipe", []), list)
    except OSError as error:
        raise UserError(f"--verdict {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--verdict {path}: not a verdict of expa.py") from error
    if not known:
        raise UserError(f"--verdict {path}: not a verdict of expa.py")
    record = path.parent / store.RUN
    if path.name in store.written(record):
        store.checked(record, path.name)
    return verdict | {"sha256": hashlib.sha256(raw).hexdigest()}


def gate(there: dict | None, settings: dict) -> tuple[str | None, str]:
    """(Exp-A's leaf or None, what to say): its verdict counts only for the same models, weights, data and
    recipe.

    Exp-A judges its first recipe, so a leaderboard over several recipes stays gated.
    """
    if there is None:
        return None, "no Exp-A verdict yet"
    about = there["settings"] | {"recipe": there["settings"].get("recipe", [])[:1]}
    differing = [
        key
        for key in ("models", "weights", "tokenizers", "data", "data_content", "split", "recipe")
        if about.get(key) != settings.get(key)
    ]
    if differing:
        return None, f"Exp-A's verdict is about other {', '.join(differing)}"
    return there["leaf"], f"Exp-A says {there['leaf']} (sha256 {there['sha256'][:12]})"


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    of = lambda row, name: span(row[name], row[f"{name}_lo"], row[f"{name}_hi"])
    chosen = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    chosen.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2))
    table = [
        {
            "proxy": row["proxy"],
            "partial Spearman": of(row, "partial"),
            "Spearman": signed(row["spearman"]),
            "Pearson": signed(row["pearson"]),
            "minus r2": of(row, "diff_r2"),
            "p_r2": row["p_r2"],
            "minus best control": of(row, "diff_control"),
            "p_ctl": row["p_control"],
            "loho": row["loho"],
            "bias": signed(row["loho_bias"]),
            "loho gain": signed(row["diff_loho_control"], 3),
            "p_loho": row["p_loho"],
            "transfer gap": of(row, "gamma"),
            "in range": row["in_range"],
            "same ranks as": row["same_ranks_as"] or "",
        }
        for row in chosen
    ]
    return markdown(table, list(table[0]))


def how_to_read(verdict: dict, settings: dict) -> list[str]:
    """Under a leaderboard: what its columns are and what its intervals count."""
    number = lambda v, digits=2: "undefined" if v is None else f"{v:.{digits}f}"
    return [
        "Larger is better for every proxy. Two primary statistics. **Partial Spearman** given k (and budget): the order of SAEs of one k. **loho**, leave one hook "
        "out: root mean square error of log10 dCE (of log10 KL, for the target KL) predicted from the proxy by a quadratic fitted on all other hooks, so 0.1 is a quarter "
        "too much or too little; bias: its mean; loho gain: how much smaller than the best control's. Both compare with the best Euclidean control, chosen on half of the "
        "documents and tested on the other half.",
        "",
        f"What counts as independent is the hook, a (model, layer): {verdict['n_clusters']} of them. Intervals: 95%, hooks resampled within each model (none below "
        f"{verdict['min_hooks']} in one) together with {behind(settings)}; p_r2, p_ctl: the proxies trade places in whole hooks; p_loho: signs flipped over hooks. The "
        "p are the tests; an interval of a difference may hold 0 beside a small p, and then neither is to be leaned on. Transfer gap: CE_rec of the largest model minus "
        "what the smallest model's curve says at that value of the proxy, averaged with the reverse; depths resampled.",
        "",
        f"Noise ceiling of the target: rho_max {number(verdict['rho_max'], 3)}. The best control leaves {number(verdict['room'])} to gain in partial Spearman; this grid "
        f"could have shown SWD a gain of {number(verdict['smallest_detectable'])} (80% power, at SWD's own noise), and the claim is about {verdict['min_difference']:.2f}. Hooks count "
        "as independent given the model; where those of one model share what a proxy gets wrong, p < .05 comes up more often than it says (14 in 100 where half is "
        "shared: bench/RESULTS.md), so that a p between .01 and .05 speaks about these models only.",
        "",
    ]


def leaderboard_plot(board: list[dict]) -> bytes:
    """Partial Spearman with CE_rec of every proxy, with its interval."""
    pooled = sorted(
        (row for row in board if row["target"] == "ce_rec" and row["stratum"] == "pooled"),
        key=lambda row: np.nan_to_num(row["partial"], nan=-2),
    )
    figure, axis = pyplot().subplots(figsize=(7, 0.32 * len(pooled) + 1), layout="constrained")
    for y, row in enumerate(pooled):
        kind = (
            "C1"
            if row["proxy"].startswith(("swd", "gd"))
            else "C0"
            if row["proxy"] in EUCLIDEAN_CONTROLS
            else "0.4"
        )
        axis.plot([row["partial_lo"], row["partial_hi"]], [y, y], color=kind)
        axis.plot(row["partial"], y, "o", color=kind)
    axis.set_yticks(range(len(pooled)), [row["proxy"] for row in pooled])
    axis.set_xlabel(
        "partial Spearman with CE_rec given k, 95% interval over hooks\n(orange: gradient-weighted; blue: Euclidean controls)"
    )
    axis.grid(alpha=0.3, axis="x")
    return as_png(figure)
