"""Exp-A: does the gap between what R^2 says and what patched cross-entropy says survive the training of the
SAE?

    python expa.py                                          # embedded models, five CPU-minutes
    python expa.py --tokens 100k,300k,1M --out outputs/expa-long
    python expa.py --recipe base,saelens --sinks keep,drop  # is it the trainer, or the sink positions?
    python expa.py --preset phase2 --dry-run
    python expa.py --from outputs/expa                      # tables, verdict and plots again, without a model

H0: the larger model's SAE falls behind in CE_rec only because it is undertrained; the gap closes as the token
budget grows. H1: once trained, R^2 still does not mean the same in the two models. N: ... but a sink-free
Euclidean score does, so it is how R^2 is normalised. SAEs are trained over models x k x token budgets x
seeds, every budget with its own decay; Delta = larger model minus smaller. The tree below was fixed before
any result; its leaf opens the gate of Exp-B and Exp-C.
"""

import itertools
import pathlib

from common import parse_args, run_script
from transport_geometry import stats, store
from transport_geometry.errors import UserError
from transport_geometry.figures import as_png, model_colours, pyplot
from transport_geometry.grid import sae_name
from transport_geometry.metrics import EUCLIDEAN_CONTROLS, METRICS, oriented
from transport_geometry.results import about_the_run, measured, rows_hash
from transport_geometry.run import Experiment, run
from transport_geometry.tables import as_csv, as_json, markdown, plain, readable_count, signed, span
from transport_geometry.train import RECIPES

import numpy as np

GRID = dict(
    models="stdlib-s,stdlib-m,stdlib-l",
    k="4,8,16,32",
    tokens="10k,30k,100k",
    seeds="0,1,2",
    expansion=4,
    eval_seqs=40,
    ctx=256,
)
N_RESAMPLES = 1000
DELTAS = ["r2", "r2_nosink", "r2_defl1", "cosine", "ce_rec", "dce", "frac_zero"]
MORE_DELTAS = ["ce_rec_sinkclean", "frac_mean"]
COLUMNS = (
    ["small", "large", "depth", "recipe", "sinks", "k", "tokens", "n_seeds"]
    + [f"delta_{m}{end}" for m in DELTAS for end in ("", "_lo", "_hi")]
    + ["mismatch", "mismatch_lo", "mismatch_hi", "mismatch_published", "ratio", "ratio_lo", "ratio_hi"]
    + [f"delta_{m}{end}" for m in MORE_DELTAS for end in ("", "_lo", "_hi")]
)
SHOWN = [
    "r2",
    "r2_nosink",
    "r2_defl1",
    "cosine",
    "swd_tok",
    "ce_rec",
    "ce_rec_sinkclean",
    "frac_zero",
    "kl",
    "alive",
]

# the tree, fixed beforehand
THRESHOLDS = dict(
    min_seeds=3,  # B*: the largest budget with so many seeds in both models
    alive=0.80,  # G0: this fraction of latents alive in both models ...
    alive_gap=0.10,  # ... or no more than this between them
    converged=0.02,  # G0: CE_rec moved less than this since the budget before
    se=0.01,  # G0: standard error of Delta CE_rec over evaluation documents
    margin=0.02,  # H0: 90% interval of Delta CE_rec inside +- this, for every k
    gamma=0.03,  # H1: |transfer gap of R^2| at least this, its 95% interval without 0 ...
    same_sign=0.75,  # ... and of one sign for this share of k
    normalisation=0.5,  # N: a sink-free Euclidean score has less than this share of R^2's gap
    in_range=stats.MIN_IN_RANGE,  # a transfer gap mostly outside the fitted range is not judged
    # more patches than this that *improve* CE: nothing is lost that CE_rec could measure
    improved=0.5,
)
# may decide N; r2_defl1 breaks where the top direction is badly rebuilt
SINK_FREE = ("r2_nosink", "r2_ln", "nmse_tok", "cosine")
KSTAR = (0.85, 0.90)
MIN_BUDGETS = 5  # for a power law

# The research log's numbers, all at the middle layers. {(small, large, k, tokens): Delta CE_rec, Delta R^2,
# mismatch, ratio}
S, M, L = "EleutherAI/pythia-70m", "EleutherAI/pythia-160m", "EleutherAI/pythia-410m"
PUBLISHED_DELTAS = {
    (S, L, 8, 10**7): (-0.099, 0.150, 1.0, None),
    (S, L, 16, 10**7): (-0.028, 0.111, 0.5, None),
    (S, L, 8, 5 * 10**7): (0.018, 0.108, 0.0, None),
    (S, L, 16, 5 * 10**7): (0.018, 0.072, 0.0, None),
    (S, L, 8, 10**8): (0.009, 0.096, 0.0, 10.7),
    (S, L, 16, 10**8): (0.020, 0.067, 0.0, 3.3),
}
PUBLISHED_SAES = {  # {(model, k): r2, ce_rec, cosine, alive} at 10M tokens
    (S, 8): (0.810, 0.372, 0.856, 0.152),
    (M, 8): (0.907, 0.331, 0.869, 0.129),
    (L, 8): (0.961, 0.269, 0.809, 0.119),
    (S, 16): (0.855, 0.580, 0.893, 0.371),
    (M, 16): (0.924, 0.538, 0.908, 0.285),
    (L, 16): (0.968, 0.530, 0.883, 0.254),
    (S, 32): (0.891, 0.729, 0.920, 0.632),
    (M, 32): (0.938, 0.696, 0.932, 0.511),
    (L, 32): (0.974, 0.723, 0.919, 0.514),
    (S, 64): (0.922, 0.836, 0.944, 0.838),
    (M, 64): (0.951, 0.809, 0.934, 0.712),
    (L, 64): (0.979, 0.814, 0.901, 0.650),
}
PUBLISHED_KSTAR = {(S, 0.85): 71.2, (L, 0.85): 98.0}  # 10M tokens
PUBLISHED_CORRELATION = -0.943  # of R^2 with CE_rec within k, S and L, six k, 10M tokens


# -------------------------------------------------------------------------------------------------- deltas
def mean_over(values: np.ndarray, w: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Weighted mean [R] of values [R,C] over the conditions `where`."""
    with np.errstate(invalid="ignore"):
        return (w[:, where] * values[:, where]).sum(1) / w[:, where].sum(1)


def mismatch(r2_small, r2_large, ce_small, ce_large, n_resamples: int = 2000) -> tuple[float, float, float]:
    """How often Delta R^2 and Delta CE_rec differ in sign over all pairs of seeds, ties 1/2, with a bootstrap
    over the seeds of each model.

    Arguments [n seeds]. No interval (nan) with one seed, or where every pair says the same: resampling cannot
    doubt that.
    """
    apart = np.sign(np.subtract.outer(r2_large, r2_small)) * np.sign(np.subtract.outer(ce_large, ce_small))
    apart = (1 - apart) / 2
    rng, w = np.random.default_rng(0), []
    for n in apart.shape:  # Rao-Wu: n - 1 of n
        w.append(
            rng.multinomial(n - 1, np.full(n, 1 / n), n_resamples) / (n - 1)
            if n > 1
            else np.full((n_resamples, n), np.nan)
        )
    lo, hi = np.quantile(np.einsum("rl,ls,rs->r", w[0], apart, w[1]), [0.025, 0.975])
    return float(apart.mean()), *((np.nan, np.nan) if not lo < hi else (float(lo), float(hi)))


def delta_rows(values: dict, meta: dict, models: list, arm: dict, n_doc: int) -> list[dict]:
    """deltas.csv of one arm: larger minus smaller at every depth that both have, per k and budget."""
    at, w, sources = stats.seed_draws(meta, len(values["r2"]))
    draws = {m: values[m][at] for m in DELTAS + MORE_DELTAS}
    rows = []
    for small, large in itertools.combinations(models, 2):
        for depth, k, tokens in itertools.product(
            *(np.unique(meta[name]) for name in ("depth", "k", "tokens"))
        ):
            cell = (meta["depth"] == depth) & (meta["k"] == k) & (meta["tokens"] == tokens)
            s, l = (np.flatnonzero(cell & (meta["model"] == m)) for m in (small, large))
            if not len(s) or not len(l):
                continue
            s, l = (x[np.argsort(meta["seed"][x])] for x in (s, l))
            pair = {name: sources[name] for name in (small, large, "documents")}
            delta = {m: mean_over(draws[m], w, l) - mean_over(draws[m], w, s) for m in draws}
            row = dict(
                small=small,
                large=large,
                depth=depth,
                **arm,
                k=int(k),
                tokens=int(tokens),
                n_seeds=min(len(s), len(l)),
            )
            for m in draws:
                row[f"delta_{m}"], (row[f"delta_{m}_lo"], row[f"delta_{m}_hi"]) = (
                    delta[m][0],
                    stats.t_interval(delta[m], pair, n_doc),
                )
            r2, ce = values["r2"][0], values["ce_rec"][0]
            row["mismatch"], row["mismatch_lo"], row["mismatch_hi"] = mismatch(r2[s], r2[l], ce[s], ce[l])
            row["mismatch_published"] = (
                float(np.mean((r2[l] > r2[s]) & (ce[l] < ce[s]))) if len(s) == len(l) else np.nan
            )
            row["ratio"], row["ratio_lo"], row["ratio_hi"] = stats.ratio_interval(
                delta["r2"], delta["ce_rec"], pair, n_doc
            )
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------- the tree
def adjudicate(values: dict, alive: np.ndarray, meta: dict, models: list, n_doc: int) -> dict:
    """The pre-registered verdict on H0 and H1 between the smallest and the largest model, and every number it
    used.

    values {metric: [W,C]} as `conditions.measured` gives them, alive [C]. The first leaf that applies:

      undecided     one model; no depth in common; no budget with 3 seeds in both; no budget before B*; most patches improve CE
      undertrained  a gate of G0 is shut at B*: alive latents, CE_rec still moving, evaluation too noisy
      N             H1, but the best sink-free Euclidean score (chosen on half the documents) has under half the gap on the other half
      H0+H1, H0, H1
      undecided     neither

    H0 is about a gap that goes: it is not given where no smaller budget shows one (|Delta CE_rec| of the
    margin or more, 95% interval without 0). Where most of the larger model's R^2 lie outside the smaller
    one's range, R^2 is not transferable: h1 is None, not judged.
    """
    t, small, large = THRESHOLDS, models[0], models[-1]
    depths = [d for d in np.unique(meta["depth"]) if {small, large} <= set(meta["model"][meta["depth"] == d])]
    keep = np.isin(meta["model"], [small, large]) & np.isin(meta["depth"], depths)
    out = dict(small=small, large=large, depths=[str(d) for d in depths], thresholds=t)
    stop = lambda leaf, reason: out | dict(leaf=leaf, reason=reason)
    if small == large or not depths:
        return stop(
            "undecided",
            "one model"
            if small == large
            else "no layers of equal depth in the smallest and the largest model",
        )
    meta, alive = {name: v[keep] for name, v in meta.items()}, alive[keep]
    values = {m: v[:, keep] for m, v in values.items()}
    budgets = np.unique(meta["tokens"])
    seeds = lambda b: min(
        len(np.unique(meta["seed"][(meta["tokens"] == b) & (meta["model"] == m)])) for m in (small, large)
    )
    enough = [b for b in budgets if seeds(b) >= t["min_seeds"]]
    if not enough:
        return stop("undecided", f"no budget has {t['min_seeds']} seeds in both models")
    last = enough[-1]
    out["budget"] = int(last)
    if last == budgets[0]:
        return stop(
            "undecided",
            f"no budget before {readable_count(int(last))}, so nothing says whether training has converged",
        )
    before = budgets[budgets < last][-1]
    at, w, sources = stats.seed_draws(meta, len(values["r2"]))
    ce = values["ce_rec"][at]
    cells = list(itertools.product(depths, np.unique(meta["k"])))
    where = lambda depth, k, tokens, model: (
        (meta["depth"] == depth) & (meta["k"] == k) & (meta["tokens"] == tokens) & (meta["model"] == model)
    )

    # G0: is there anything to judge yet?
    g0, table = {"alive": True, "converged": True, "precise": True}, []
    for depth, k in cells:
        a = [float(alive[where(depth, k, last, m)].mean()) for m in (small, large)]
        moved = [
            float(
                (mean_over(ce, w, where(depth, k, last, m)) - mean_over(ce, w, where(depth, k, before, m)))[0]
            )
            for m in (small, large)
        ]
        delta = mean_over(ce, w, where(depth, k, last, large)) - mean_over(
            ce, w, where(depth, k, last, small)
        )
        se = float(delta[sources["documents"]].std(ddof=1))
        seed_variance = float(
            stats.spread(delta[None], {m: sources[m] for m in (small, large)}, n_doc)[0][0, 0]
        )
        lo, hi = stats.t_interval(delta, sources, n_doc, level=0.90)
        g0["alive"] &= min(a) >= t["alive"] or abs(a[0] - a[1]) <= t["alive_gap"]
        g0["converged"] &= max(map(abs, moved)) < t["converged"]
        g0["precise"] &= se < t["se"]
        table.append(
            dict(
                depth=str(depth),
                k=int(k),
                alive_small=a[0],
                alive_large=a[1],
                moved_small=moved[0],
                moved_large=moved[1],
                se=se,
                seed_variance=seed_variance,
                delta_ce_rec=float(delta[0]),
                lo90=lo,
                hi90=hi,
            )
        )

    # is there anything lost, and was there ever a gap?
    at_last = meta["tokens"] == last
    improved = float(np.mean(values["ce_rec"][0][at_last] > 1))
    gaps = []
    for tokens, (depth, k) in itertools.product(budgets[budgets < last], cells):
        delta = mean_over(ce, w, where(depth, k, tokens, large)) - mean_over(
            ce, w, where(depth, k, tokens, small)
        )
        lo, hi = stats.t_interval(delta, sources, n_doc)
        gaps.append(abs(delta[0]) >= t["margin"] and (lo > 0 or hi < 0))

    # C1: H0, equivalence for every k; H1, the gap of R^2 across scale
    scores = {m: oriented(m, values[m]) for m in ("r2", *EUCLIDEAN_CONTROLS)}

    def gap(name, half):  # on the even or odd documents, or all: (gap, in range)
        g, inside = stats.transfer_gap(
            scores[name][half], values["ce_rec"][half], meta, models, judged=at_last
        )
        return float(g[0]), float(inside[0])

    draws, inside = stats.transfer_gap(scores["r2"][at], ce, meta, models, w, judged=at_last)
    gamma, inside = float(draws[0]), float(inside[0])
    lo, hi = stats.t_interval(draws, sources, n_doc)
    for row, (depth, k) in zip(table, cells):
        cell = at_last & (meta["k"] == k) & (meta["depth"] == depth)
        row["gamma_r2"] = float(
            stats.transfer_gap(scores["r2"][0], values["ce_rec"][0], meta, models, judged=cell)[0][0]
        )
    same = float(np.mean([np.sign(row["gamma_r2"]) == np.sign(gamma) for row in table]))
    equal = all(-t["margin"] < row["lo90"] and row["hi90"] < t["margin"] for row in table)
    h0 = equal and any(gaps)
    h1 = (
        bool(abs(gamma) >= t["gamma"] and (lo > 0 or hi < 0) and same >= t["same_sign"])
        if inside >= t["in_range"]
        else None
    )

    # C1b: does a sink-free Euclidean score show the gap too?
    half_a = {c: gap(c, 1) for c in SINK_FREE}
    judged = {c: abs(g) for c, (g, inside_c) in half_a.items() if inside_c >= t["in_range"]}
    control = min(judged, key=judged.get) if judged else None
    gap_control, gap_r2 = (gap(control, 2)[0] if control else np.nan), gap("r2", 2)[0]
    normalised_away = bool(abs(gap_control) < t["normalisation"] * abs(gap_r2))

    out |= dict(
        previous_budget=int(before),
        g0={key: bool(v) for key, v in g0.items()},
        cells=table,
        improved=improved,
        equal=equal,
        gap_before=bool(any(gaps)),
        h0=h0,
        h1=h1,
        gamma_r2=gamma,
        gamma_r2_lo=lo,
        gamma_r2_hi=hi,
        same_sign=same,
        in_range=inside,
        control=control,
        gamma_control_half_b=gap_control,
        gamma_r2_half_b=gap_r2,
        normalised_away=normalised_away,
        gamma_controls={c: gap(c, 0)[0] for c in EUCLIDEAN_CONTROLS},
    )
    if improved > t["improved"]:
        return stop(
            "undecided",
            f"{percent(improved)} of the patches improve CE, so CE_rec does not say what an SAE loses: is this text far from the models'?",
        )
    shut = {
        "alive": "too few latents are alive, and not equally few",
        "precise": "the evaluation set is too small",
        "converged": f"CE_rec still moves by {t['converged']} or more between the last two budgets",
    }
    if not all(g0.values()):
        return stop("undertrained", "; ".join(shut[key] for key, passed in g0.items() if not passed))
    if h1 and normalised_away:
        return stop(
            "N",
            f"{control} has less than half of R²'s transfer gap" + (", and CE_rec is equal" if h0 else ""),
        )
    unjudged = (
        ""
        if h1 is not None
        else f"; R² is not transferable: {percent(inside)} of the larger model's lie in the smaller one's range"
    )
    if h0 or h1:
        reasons = ["CE_rec is equal within the margin for every k"] * h0 + [
            "R² does not mean the same in both models"
        ] * bool(h1)
        return stop("+".join(["H0"] * h0 + ["H1"] * bool(h1)), " and ".join(reasons) + unjudged)
    if equal:
        return stop(
            "undecided",
            "CE_rec is equal within the margin at every budget: there never was a gap that could go, and no transfer gap of R² is shown"
            + unjudged,
        )
    return stop(
        "undecided",
        "neither equal CE_rec nor a transfer gap of R² is shown"
        + unjudged
        + n_needed(table, t["margin"], seeds(last)),
    )


def n_needed(table: list[dict], margin: float, n: int) -> str:
    """What would show equality if the means stay: the seeds per model at which every 90% interval fits the
    margin.
    """
    seeds = []
    for row in table:  # z^2 (seed variance n / N + sequence variance) = room^2
        room = ((margin - abs(row["delta_ce_rec"])) / 1.645) ** 2 - row["se"] ** 2
        if abs(row["delta_ce_rec"]) >= margin:
            return ""
        if room <= 0:
            return "; equality would take more evaluation documents, whatever the seeds"
        seeds.append(int(np.ceil(n * row["seed_variance"] / room)))
    return (
        f"; about {max(seeds)} seeds in each model would show equality if the means stay"
        if max(seeds) > n
        else ""
    )


# -------------------------------------------------------------------------------- sparsity tax, power law
def k_star(k: np.ndarray, ce: np.ndarray, target: float) -> np.ndarray:
    """Smallest k reaching the target, linear between grid points: k [n] ascending, ce [R,n] -> [R]. -inf
    below the grid, inf above.
    """
    reached = ce >= target
    i = reached.argmax(1)
    row = np.arange(len(ce))
    with np.errstate(invalid="ignore", divide="ignore"):
        c0, c1 = ce[row, np.maximum(i - 1, 0)], ce[row, i]
        between = k[np.maximum(i - 1, 0)] + (target - c0) / (c1 - c0) * (k[i] - k[np.maximum(i - 1, 0)])
    found = np.where(~reached.any(1), np.inf, np.where(i == 0, -np.inf, between))
    return np.where(np.isnan(ce).any(1), np.nan, found)


def power_law(tokens: np.ndarray, ce: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CE_rec = limit - a tokens^-b by least squares: tokens [n], ce [R,n] -> (limit [R], b [R]).

    For given b it is a line, so b is searched on a grid; nan where the best b is at the grid's end: the curve
    then has no bend from which a limit could be read.
    """
    exponents = np.geomspace(0.05, 3, 60)
    fits = []
    for b in exponents:
        x = tokens.astype(float) ** -b
        x = x / x.max()
        slope = ((ce - ce.mean(1, keepdims=True)) @ (x - x.mean())) / ((x - x.mean()) ** 2).sum()
        limit = ce.mean(1) - slope * x.mean()
        fits.append((((ce - limit[:, None] - slope[:, None] * x) ** 2).sum(1), limit))
    errors, limits = (np.array(part) for part in zip(*fits))
    best = errors.argmin(0)
    inner = (best > 0) & (best < len(exponents) - 1)
    return np.where(inner, limits[best, np.arange(len(best))], np.nan), np.where(
        inner, exponents[best], np.nan
    )


def curves(values: dict, meta: dict, arm: dict) -> tuple[list[dict], list[dict]]:
    """k* of every model, depth and budget, and the power law over budgets of every model, depth and k: values
    with bootstrap intervals.
    """
    w = stats.bootstrap_weights(meta, N_RESAMPLES, 0, clusters=("model", "seed"), stratum="model", least=2)
    ce = values["ce_rec"][: len(w)]  # resample r of the documents with resample r of the seeds
    k, budgets = np.unique(meta["k"]), np.unique(meta["tokens"])
    taxes, laws = [], []
    for model, depth in sorted(set(zip(meta["model"], meta["depth"]))):
        here = (meta["model"] == model) & (meta["depth"] == depth)
        mean = {
            (kk, b): mean_over(ce, w, here & (meta["k"] == kk) & (meta["tokens"] == b))
            for kk in k
            for b in budgets
        }
        for b, target in itertools.product(budgets, KSTAR):
            draws = k_star(k, np.stack([mean[kk, b] for kk in k], 1), target)
            taxes.append(
                dict(
                    model=str(model),
                    depth=str(depth),
                    **arm,
                    tokens=int(b),
                    target=target,
                    k_min=int(k[0]),
                    k_max=int(k[-1]),
                    draws=draws,
                )
            )
        for kk in k:
            row = dict(
                model=str(model),
                depth=str(depth),
                **arm,
                k=int(kk),
                limit=np.nan,
                limit_lo=np.nan,
                limit_hi=np.nan,
                exponent=np.nan,
            )
            if len(budgets) >= MIN_BUDGETS and RECIPES[arm["recipe"]].DECAY:
                limit, exponent = power_law(budgets, np.stack([mean[kk, b] for b in budgets], 1))
                row |= dict(limit=limit[0], exponent=exponent[0])
                row["limit_lo"], row["limit_hi"] = (
                    stats.interval(limit[3:]) if np.isfinite(limit[0]) else (np.nan, np.nan)
                )
            laws.append(row)
    return taxes, laws


# ------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict) -> tuple[dict, list[dict]]:
    """deltas.csv, verdict.json, report.md and the plots: a pure function of conditions.csv and
    sequences.npz.
    """
    found = measured(out, settings, N_RESAMPLES)
    saes, values, meta = found.saes, found.values, found.meta
    alive, n_doc, models = (
        np.array([row["alive"] for row in saes]),
        min(settings["documents"]),
        settings["models"],
    )
    deltas, verdicts, taxes, laws = [], [], [], []
    for sinks, recipe in itertools.product(settings["sinks"], settings["recipe"]):
        arm = dict(recipe=recipe, sinks=sinks)
        mine = (meta["recipe"] == recipe) & (meta["sae"] == sae_name(settings["expansion"], sinks))
        part, part_meta = (
            {m: v[:, mine] for m, v in values.items()},
            {name: v[mine] for name, v in meta.items()},
        )
        deltas += delta_rows(part, part_meta, models, arm, n_doc)
        verdicts.append(arm | adjudicate(part, alive[mine], part_meta, models, n_doc))
        more_taxes, more_laws = curves(part, part_meta, arm)
        taxes, laws = taxes + more_taxes, laws + more_laws
    kstar = [
        {key: v for key, v in row.items() if key != "draws"}
        | dict(zip(("value", "lo", "hi"), k_star_words(row)))
        for row in taxes
    ]
    verdict = plain(
        verdicts[0]
        | dict(
            other_arms=verdicts[1:],
            kstar=kstar,
            power_law=laws,
            settings=settings,
            rows_sha256=rows_hash(out),
        )
    )
    pictures = plots(saes, headline(deltas, verdict), verdict, settings)
    text = report(
        saes, deltas, verdict, taxes, laws, sorted(pictures), seed_correlation(values, meta, models), settings
    )
    store.put(
        out / store.RUN,
        {"deltas.csv": as_csv(deltas, COLUMNS), "verdict.json": as_json(verdict), "report.md": text}
        | pictures,
    )
    return verdict, deltas


def headline(deltas: list[dict], verdict: dict) -> list[dict]:
    """The rows the verdict is about: smallest and largest model, first arm."""
    return [
        row
        for row in deltas
        if all(row[name] == verdict[name] for name in ("small", "large", "recipe", "sinks"))
    ]


def seed_correlation(values: dict, meta: dict, models: list) -> float:
    """Correlation of what a seed does to CE_rec in the smallest and in the largest model, over cells: would
    pairing be justified?
    """
    names = ["model", "depth", "recipe", "sae", "k", "tokens"]
    cells = grouped(
        [
            dict(zip(names, map(str, cell)), ce=ce)
            for *cell, ce in zip(*(meta[name] for name in names), values["ce_rec"][0])
        ],
        names,
    )
    pairs = []
    for (model, *cell), here in cells.items():  # conditions come sorted by seed
        there = cells.get((models[-1], *cell), [])
        if model == models[0] != models[-1] and len(here) == len(there) > 1:
            here, there = (np.array([row["ce"] for row in side]) for side in (here, there))
            pairs += zip(here - here.mean(), there - there.mean())
    return float(np.corrcoef(np.array(pairs).T)[0, 1]) if len(pairs) > 2 else np.nan


LEAVES = {
    "undertrained": "The SAEs are not trained far enough to say anything about the gap: a difference now may be gone with more tokens.",
    "H0": "CE_rec is the same in both models once the SAEs are trained.",
    "H1": "A gap stays after training: one value of R² means different CE_rec in the two models.",
    "H0+H1": "CE_rec is the same in both models after training, and yet one value of R² means different CE_rec in them.",
    "N": "R² does not carry over between the models, but a sink-free Euclidean score does: the gap is how R² is normalised.",
    "undecided": "This grid cannot decide.",
}


def sentence(verdict: dict) -> str:
    """The verdict in words."""
    return f"H0/H1: {verdict['leaf']}. {LEAVES[verdict['leaf']]} ({verdict['reason']}.)"


# ------------------------------------------------------------------------------------------------- report
def grouped(rows: list[dict], names: list[str]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def of(row: dict, name: str, digits: int = 3) -> str:
    """value [lo, hi] of a column; without an interval where one seed, or an undefined statistic, leaves
    none.
    """
    return span(row[name], row[f"{name}_lo"], row[f"{name}_hi"], digits)


def percent(value: float | None) -> str:
    return f"{value:.0%}" if value is not None and np.isfinite(value) else "undefined"


def delta_table(deltas: list[dict]) -> str:
    rows = []
    for row in deltas:
        interval = (
            f"[{percent(row['mismatch_lo'])}, {percent(row['mismatch_hi'])}]"
            if np.isfinite(row["mismatch_lo"])
            else "[undefined]"
        )
        rows.append(
            {
                "depth": row["depth"],
                "k": row["k"],
                "tokens": readable_count(row["tokens"]),
                "seeds": row["n_seeds"],
                "ΔR²": of(row, "delta_r2"),
                "ΔR² no sink": of(row, "delta_r2_nosink"),
                "ΔCE_rec": of(row, "delta_ce_rec"),
                "ΔCE_rec sink clean": of(row, "delta_ce_rec_sinkclean"),
                "mismatch": f"{percent(row['mismatch'])} {interval}",
                "published rule": percent(row["mismatch_published"]),
                "ΔR²/ΔCE_rec": of(row, "ratio", 1),
            }
        )
    several = len({row["depth"] for row in rows}) > 1
    return markdown(rows, list(rows[0])[0 if several else 1 :])


def verdict_lines(verdict: dict) -> list[str]:
    """The gates and tests of the tree with the numbers they met."""
    if "g0" not in verdict:
        return []
    t, g0 = (
        verdict["thresholds"],
        {key: "open" if passed else "SHUT" for key, passed in verdict["g0"].items()},
    )
    answer = lambda passed: "not judged" if passed is None else "yes" if passed else "no"
    number = lambda v: signed(v, 3)
    cells = [
        {
            "depth": c["depth"],
            "k": c["k"],
            "ΔCE_rec, 90%": span(c["delta_ce_rec"], c["lo90"], c["hi90"], 3),
            "Γ of R²": number(c["gamma_r2"]),
            "alive": f"{percent(c['alive_small'])} / {percent(c['alive_large'])}",
            "CE_rec moved": f"{number(c['moved_small'])} / {number(c['moved_large'])}",
            "SE": c["se"],
        }
        for c in verdict["cells"]
    ]
    return [
        "## The tree",
        "",
        f"At B* = {readable_count(verdict['budget'])} tokens, {verdict['small']} / {verdict['large']}, recipe {verdict['recipe']}, sinks {verdict['sinks']}:",
        "",
        f"- G0: alive ≥ {t['alive']:.0%} in both or within {t['alive_gap']:.0%}: {g0['alive']}; CE_rec moved < {t['converged']} since "
        f"{readable_count(verdict['previous_budget'])}: {g0['converged']}; SE of ΔCE_rec over documents < {t['se']}: {g0['precise']}.",
        f"- H0: 90% interval of ΔCE_rec inside ±{t['margin']} for every k: {answer(verdict['equal'])}; a gap at a smaller budget that could go (95% interval without 0, "
        f"{t['margin']} or more): {answer(verdict['gap_before'])}. Patches that improve CE: {percent(verdict['improved'])}.",
        f"- H1: transfer gap Γ of R² at least {t['gamma']} in size, interval without 0, one sign for {t['same_sign']:.0%} of k: {answer(verdict['h1'])}. "
        f"Γ = {of(verdict, 'gamma_r2')}, {percent(verdict['same_sign'])} of one sign, {percent(verdict['in_range'])} of the larger model's R² in the smaller "
        f"one's range ({t['in_range']:.0%} needed to be judged).",
        f"- N: |Γ| of the best sink-free Euclidean score under {t['normalisation']:.0%} of R²'s, on the half of the documents it was not chosen on: "
        f"{answer(verdict['normalised_away'])}. {verdict['control'] or 'none in range'}: {number(verdict['gamma_control_half_b'])}, R²: "
        f"{number(verdict['gamma_r2_half_b'])}. On all documents: "
        + ", ".join(f"{c} {number(g)}" for c, g in verdict["gamma_controls"].items())
        + ".",
        "",
        markdown(cells, list(cells[0])),
        "",
        "Γ is in units of CE_rec: what the larger model has above what the smaller one's curve of CE_rec over R² says, averaged with the reverse.",
        "",
    ]


def arm_lines(deltas: list[dict], verdict: dict) -> list[str]:
    """What the trainer and the sinks have to do with it, where the run has more than one arm."""
    arms = [verdict, *verdict["other_arms"]]
    if len(arms) == 1:
        return []
    ends = [row for row in deltas if (row["small"], row["large"]) == (verdict["small"], verdict["large"])]
    flips = {
        arm: float(np.mean([row["mismatch"] for row in here]))
        for arm, here in grouped(ends, ["recipe", "sinks"]).items()
    }
    rows = [
        {
            "recipe": v["recipe"],
            "sinks in training": v["sinks"],
            "leaf": v["leaf"],
            "Γ of R²": of(v, "gamma_r2") if "gamma_r2" in v else "undefined",
            "mean mismatch": percent(flips.get((v["recipe"], v["sinks"]), np.nan)),
            "why": v["reason"],
        }
        for v in arms
    ]
    lines = [
        "## Trainer and sinks as confounds",
        "",
        markdown(rows, list(rows[0])),
        "",
        "The verdict is the first arm's; the others are there to be compared with.",
        "",
    ]
    for sinks in dict.fromkeys(v["sinks"] for v in arms):
        theirs, ours = flips.get(("saelens", sinks)), flips.get(("base", sinks))
        if theirs is not None and ours is not None:
            share = (
                f": the trainer owns {1 - ours / theirs:.0%} of the sign flips"
                if theirs > 0 and ours <= theirs
                else ""
            )
            lines += [
                f"Sinks {sinks}: ΔR² and ΔCE_rec differ in sign in {percent(theirs)} of seed pairs under saelens, in {percent(ours)} under base{share}.",
                "",
            ]
    return lines


def k_star_words(row: dict) -> tuple:
    """(value, lo, hi) of k*: numbers, nan, or text where it lies beyond the grid."""
    known = row["draws"][3:][~np.isnan(row["draws"][3:])]
    interval = np.quantile(known, [0.025, 0.975], method="inverted_cdf") if len(known) else (np.nan, np.nan)
    return tuple(
        f"< {row['k_min']}" if v == -np.inf else f"> {row['k_max']}" if v == np.inf else float(v)
        for v in (row["draws"][0], *interval)
    )


def tax_lines(taxes: list[dict], verdict: dict) -> list[str]:
    word = lambda v: v if isinstance(v, str) else f"{v:.2f}" if np.isfinite(v) else "undefined"
    ends = lambda lo, hi: "undefined" if lo == "undefined" else f"[{lo}, {hi}]"
    where = ["depth", "recipe", "sinks", "tokens", "target"]
    smallest = {
        tuple(row[c] for c in where): row["draws"] for row in taxes if row["model"] == verdict["small"]
    }
    rows = []
    for row in taxes:
        value, lo, hi = map(word, k_star_words(row))
        tax, small = "", smallest.get(tuple(row[c] for c in where))
        if (
            row["model"] == verdict["large"] != verdict["small"]
            and small is not None
            and np.isfinite(small[0])
            and np.isfinite(row["draws"][0])
        ):
            with np.errstate(invalid="ignore"):
                ratio = np.where(np.isfinite(small) & np.isfinite(row["draws"]), row["draws"] / small, np.nan)
            tax = f"{ratio[0]:.2f} {ends(*map(word, stats.interval(ratio[3:])))}"
        rows.append(
            {c: row[c] for c in ("model", "depth", "recipe", "sinks")}
            | {
                "tokens": readable_count(row["tokens"]),
                "CE_rec": row["target"],
                "k*": value,
                "95%": ends(lo, hi),
                "tax": tax,
            }
        )
    return [
        "## k*, the smallest k that reaches a CE_rec",
        "",
        markdown(rows, list(rows[0])),
        "",
        "Linear between grid points; tax: the largest model's k* over the smallest's. Bootstrap over seeds and documents.",
        "",
    ]


def law_lines(laws: list[dict]) -> list[str]:
    known = [row for row in laws if np.isfinite(row["limit"])]
    missing = f"not identified ({MIN_BUDGETS} decayed budgets are needed, and a curve that bends)."
    if not known:
        return [f"CE_rec at infinite tokens: {missing}", ""]
    table = [
        {c: row[c] for c in ("model", "depth", "recipe", "sinks", "k")}
        | {"CE_rec at infinity": of(row, "limit"), "b": row["exponent"]}
        for row in known
    ]
    return [
        "CE_rec = limit − a · tokens^−b, least squares; bootstrap over seeds and documents:",
        "",
        markdown(table, list(table[0])),
        "",
    ] + ([f"{len(laws) - len(known)} other curves: {missing}", ""] if len(known) < len(laws) else [])


def published_lines(deltas: list[dict], saes: list[dict], taxes: list[dict], settings: dict) -> list[str]:
    """published | measured | difference, for whatever of the published grids this run holds."""
    rows, middle = [], "0.50"

    def add(what, published, measured):
        if published is not None:
            known = np.isfinite(measured)
            rows.append(
                {
                    "": what,
                    "published": published,
                    "measured": float(measured) if known else "undefined",
                    "difference": float(measured) - published if known else "undefined",
                }
            )

    for row in deltas:
        said = PUBLISHED_DELTAS.get((row["small"], row["large"], row["k"], row["tokens"]))
        if said and row["depth"] == middle:
            for name, value in zip(("delta_ce_rec", "delta_r2", "mismatch_published", "ratio"), said):
                add(
                    f"{name} (k={row['k']}, {readable_count(row['tokens'])}, {row['recipe']}, sinks {row['sinks']})",
                    value,
                    row[name],
                )
    at_10m = [
        row
        for row in saes
        if row["tokens"] == 10**7 and settings["hooks"][f"{row['model']}@{row['layer']}"] == middle
    ]
    for (model, k, recipe, sae), here in grouped(at_10m, ["model", "k", "recipe", "sae"]).items():
        for name, value in zip(("r2", "ce_rec", "cosine", "alive"), PUBLISHED_SAES.get((model, k), ())):
            add(f"{name} ({model}, k={k}, {recipe}, {sae})", value, np.mean([row[name] for row in here]))
    for row in taxes:
        if row["tokens"] == 10**7 and row["depth"] == middle:
            said = PUBLISHED_KSTAR.get((row["model"], row["target"]))
            add(
                f"k* at {row['target']} ({row['model']}, {row['recipe']}, sinks {row['sinks']})",
                said,
                row["draws"][0],
            )
    for (recipe, sae), here in grouped(
        [row for row in at_10m if row["model"] in (S, L)], ["recipe", "sae"]
    ).items():
        within = [
            np.array([(row["r2"], row["ce_rec"]) for row in cell]) for cell in grouped(here, ["k"]).values()
        ]
        centred = np.vstack([cell - cell.mean(0) for cell in within])
        if len(within) > 1 and len({row["model"] for row in here}) == 2:
            add(
                f"correlation of R² with CE_rec within k ({recipe}, {sae})",
                PUBLISHED_CORRELATION,
                np.corrcoef(centred.T)[0, 1],
            )
    return (
        ["## Published | measured", "", markdown(rows, ["", "published", "measured", "difference"]), ""]
        if rows
        else []
    )


def report(
    saes, deltas, verdict: dict, taxes, laws, pictures: list[str], correlation: float, settings: dict
) -> bytes:
    mine = headline(deltas, verdict)
    names = ["model", "layer", "recipe", "sae", "k", "tokens"]
    curve = [
        dict(zip(names, key))
        | {"tokens": readable_count(key[-1])}
        | {m: float(np.mean([row[m] for row in here])) for m in SHOWN}
        for key, here in sorted(
            grouped(saes, names).items(), key=lambda item: (settings["models"].index(item[0][0]), item[0])
        )
    ]
    text = ["# Exp-A: does the gap survive training?", "", f"**{sentence(verdict)}**", ""]
    if mine:
        text += [
            "![deltas](deltas.png)",
            "",
            f"## Deltas: {verdict['large']} minus {verdict['small']}, recipe {verdict['recipe']}, sinks {verdict['sinks']}",
            "",
            delta_table(mine),
            "",
            "Intervals: 95%, Student with Satterthwaite's degrees of freedom, seeds (jackknife in each model) and evaluation documents (bootstrap) together; "
            "undefined where one seed leaves none. Mismatch: ΔR² and ΔCE_rec differ in sign, over all pairs of seeds; published rule: ΔR² > 0 and ΔCE_rec < 0 on "
            "seeds of the same index. A mismatch that all pairs agree on has no bootstrap interval. ΔR²/ΔCE_rec: Fieller; undefined where the "
            "denominator's interval holds 0.",
            "",
            "Seeds are not paired across models: the same seed draws the same tokens in the same order in both, but starts from weights of another shape."
            + (
                f" The correlation of what a seed does to CE_rec in the two is {signed(correlation)}."
                if np.isfinite(correlation)
                else ""
            ),
            "",
            *verdict_lines(verdict),
            "![mismatch](mismatch.png)",
            "",
        ]
    constant = (
        " (saelens: a constant rate, so its budgets are checkpoints)"
        if "saelens" in settings["recipe"]
        else ""
    )
    text += [
        *arm_lines(deltas, verdict),
        *tax_lines(taxes, verdict),
        "## Learning curves",
        "",
        *(f"![learning curves]({name})" for name in pictures if name.startswith("learning")),
        "",
        markdown(curve, [*names, *SHOWN]),
        "",
        f"Means over seeds. Every budget has its own decay{constant}.",
        "",
        *law_lines(laws),
        *published_lines(deltas, saes, taxes, settings),
    ]
    for key, here in grouped(
        [row for row in deltas if row not in mine], ["small", "large", "recipe", "sinks"]
    ).items():
        text += ["## {1} minus {0}, recipe {2}, sinks {3}".format(*key), "", delta_table(here), ""]
    return "\n".join([*text, *about_the_run(saes, settings)]).encode()


# -------------------------------------------------------------------------------------------------- plots
def budget_axis(axis, budgets: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(budgets, [readable_count(b) for b in budgets])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)


def plots(saes, deltas: list[dict], verdict: dict, settings: dict) -> dict[str, bytes]:
    """{file: PNG}: deltas and mismatch of the headline rows, if any, and a figure of learning curves per
    depth.
    """
    drawn = {}
    if deltas:
        drawn["deltas.png"] = delta_plot(deltas, f"{verdict['large']} − {verdict['small']}")
        drawn["mismatch.png"] = mismatch_plot(deltas)
    by_depth: dict[str, list] = {}
    for row in saes:
        by_depth.setdefault(settings["hooks"][f"{row['model']}@{row['layer']}"], []).append(row)
    for depth, here in sorted(by_depth.items()):
        drawn[f"learning-{depth}.png" if len(by_depth) > 1 else "learning.png"] = learning_plot(
            here, settings
        )
    return drawn


def delta_plot(deltas: list[dict], what: str) -> bytes:
    k, depths = (sorted({row[name] for row in deltas}) for name in ("k", "depth"))
    lines = (
        ("delta_r2", "ΔR²", dict(color="C0")),
        ("delta_r2_nosink", "ΔR² without sinks", dict(color="C2", linestyle=":")),
        ("delta_ce_rec", "ΔCE_rec", dict(color="C1")),
    )
    figure, axes = pyplot().subplots(
        len(depths),
        len(k),
        figsize=(2.9 * len(k) + 0.8, 2.8 * len(depths) + 0.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (depth, k) in zip(axes.flat, itertools.product(depths, k)):
        here = [row for row in deltas if row["k"] == k and row["depth"] == depth]
        x = [row["tokens"] for row in here]
        for name, label, how in lines:
            axis.plot(x, [row[name] for row in here], marker="o", markersize=4, label=label, **how)
            axis.fill_between(
                x,
                *([row[name + end] for row in here] for end in ("_lo", "_hi")),
                color=how["color"],
                alpha=0.2,
                linewidth=0,
            )
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=f"k = {k}" + (f", depth {depth}" if len(depths) > 1 else ""), xlabel="training tokens")
        budget_axis(axis, x)
    axes[0, 0].set_ylabel(what)
    axes[0, 0].legend(fontsize=8)
    return as_png(figure)


def mismatch_plot(deltas: list[dict]) -> bytes:
    k, budgets, depths = (sorted({row[name] for row in deltas}) for name in ("k", "tokens", "depth"))
    figure, axes = pyplot().subplots(
        1,
        len(depths),
        figsize=(1.1 * len(budgets) * len(depths) + 2.4, 0.5 * len(k) + 1.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, depth in zip(axes.flat, depths):
        rate = np.full((len(k), len(budgets)), np.nan)
        for row in (row for row in deltas if row["depth"] == depth):
            rate[k.index(row["k"]), budgets.index(row["tokens"])] = row["mismatch"]
        image = axis.imshow(rate, vmin=0, vmax=1, cmap="RdYlGn_r", aspect="auto")
        for (i, j), value in np.ndenumerate(rate):
            axis.text(j, i, percent(value), ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(budgets)), [readable_count(b) for b in budgets])
        axis.set_yticks(range(len(k)), [f"k={value}" for value in k])
        axis.set_title(
            "sign mismatch of ΔR² and ΔCE_rec" + (f", depth {depth}" if len(depths) > 1 else ""), fontsize=9
        )
    figure.colorbar(image, ax=axes)
    return as_png(figure)


def learning_plot(saes: list[dict], settings: dict) -> bytes:
    """Every metric against training tokens: colour = model, marker = k, line = recipe and sinks."""
    plt = pyplot()
    # these do not depend on training
    metrics = [m.name for m in METRICS if m.name not in ("ce_orig", "ce_zero", "ce_mean", "l0")]
    markers = dict(zip(settings["k"], itertools.cycle("osD^vP*X")))
    colours = model_colours(settings["models"])
    arms = dict(
        zip(sorted({(row["recipe"], row["sae"]) for row in saes}), itertools.cycle(("-", "--", ":", "-.")))
    )
    figure, axes = plt.subplots(
        -(-len(metrics) // 6), 6, figsize=(15, 2.1 * -(-len(metrics) // 6)), layout="constrained"
    )
    for axis, name in zip(axes.flat, metrics):
        for (model, recipe, sae, k), here in grouped(saes, ["model", "recipe", "sae", "k"]).items():
            by_budget = sorted(grouped(here, ["tokens"]).items())
            axis.plot(
                [b for (b,), _ in by_budget],
                [np.mean([row[name] for row in rows]) for _, rows in by_budget],
                arms[recipe, sae],
                marker=markers[k],
                markersize=3,
                color=colours[model],
                alpha=0.8,
                linewidth=1,
            )
        axis.set_title(name, fontsize=9)
        axis.set_yscale(
            "log" if name in ("swd_tok", "swd_seq", "swd_sampled", "gd_abs", "kl", "mse") else "linear"
        )
        axis.tick_params(labelsize=7, which="both")
        budget_axis(axis, settings["tokens"])
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    line = lambda **how: plt.Line2D([], [], **how)
    figure.legend(
        handles=[line(color=colours[m], label=m) for m in settings["models"]]
        + [line(color="0.3", linestyle="", marker=markers[k], label=f"k={k}") for k in settings["k"]]
        + [
            line(color="0.3", linestyle=style, label=f"{recipe} {sae}")
            for (recipe, sae), style in arms.items()
            if len(arms) > 1
        ],
        loc="outside right upper",
        fontsize=8,
    )
    figure.supxlabel("training tokens", fontsize=9)
    return as_png(figure)


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
    if command.grid.saes:
        raise UserError(
            "--sae: Exp-A is about how SAEs train; expb.py and expc_fisher.py evaluate existing ones"
        )
    if (done := run(command, Experiment("expa"))) is None:
        return
    out, settings = done
    verdict, deltas = analyse(out, settings)
    if mine := headline(deltas, verdict):
        print(f"{verdict['large']} minus {verdict['small']}:\n{delta_table(mine)}")
    print(f"---\n{sentence(verdict)}\nreport: {out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
