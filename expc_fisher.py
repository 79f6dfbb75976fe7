"""Exp-C: does the pullback Fisher, error measured where the model is sensitive, say more about patched
cross-entropy than SWD?

    python expc_fisher.py                                   # embedded models, six CPU-minutes
    python expc_fisher.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                          --data NeelNanda/pile-small-tokenized-2b
    python expc_fisher.py --from outputs/expc_fisher        # tables, verdict and plots again, without a model

Hypothesis H2': delta^T G delta, G = J^T F J, adds predictive value beyond SWD, its one-label, data-label
estimate. The form is exact (one forward-mode pass through the tail for all positions, `fisher.py`), beside it
the other two choices of block. A local quadratic form is only believed inside its radius, so it is
calibrated: against the measured KL at h + a delta for several a.
"""

import pathlib
import sys

from common import parse_args, run_script
from transport_geometry.measuring import fisher
from transport_geometry.measuring.evaluate import DRAWS
from transport_geometry.measuring.fisher_study import SHAPE, estimators, geometry, path_integral
from transport_geometry.measuring.metrics import BY_NAME, DISTORTION, PROXIES, Metric, mean
from transport_geometry.measuring.patch import Patch
from transport_geometry.models.lm import cross_entropy, kl_divergence
from transport_geometry.records import store
from transport_geometry.records.condition import Condition
from transport_geometry.records.results import about_the_run, label_last_block, load_measurements, rows_hash
from transport_geometry.records.tables import (
    as_csv,
    as_json,
    markdown,
    plain,
    read_table,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting.console import Answer, coloured, conclude, hushed
from transport_geometry.reporting.figures import decade_ticks, model_colours, points_legend, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.reporting.words import ABOUT_WORDS, OF_A_ROW, with_words
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment, eval_batch, run
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics import leaderboard, stats
from transport_geometry.statistics.leaderboard import (
    AFTER_H2,
    LEADERBOARD,
    about_these,
    board_in_short,
    how_to_read,
    leaderboard_plot,
    leaderboard_table,
)

import numpy as np
import torch

# 9 hooks: three depths of each model; what is measured once per hook is most of the cost
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in (1, 3, 5)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=24,
    ctx=256,
)
N_RESAMPLES = 2000
ALPHAS = (0.1, 0.3, 1.0)  # how far along delta the quadratic model is checked
RADIUS = 0.2  # it holds where KL is within this share of it
MIN_ADDED = 0.2  # C2': partial Spearman of the Fisher form with CE_rec given SWD
TABLES = ("geometry.csv", "estimators.csv", "path.csv")
# (metric, its sign in the report, what joins)
LADDER = (
    ("delta_sq", "‖δ‖²", "how large the error is"),
    ("fisher_seq", "½δᵀGδ", "its direction weighed"),
    ("half_var", "½Var_p(Δz)", "the network's nonlinearity"),
    ("kl", "KL", "the softmax"),
    ("dce", "ΔCE", "the labels"),
)


# ------------------------------------------------------------------------------------------- measurement
def terms(patch: Patch) -> dict[str, torch.Tensor]:
    """Per predicted position [B,T-1]: two blocks of the exact form, the variance of the real logit change, KL
    and dCE on the way.
    """
    clean, delta = patch.clean, patch.delta
    split = clean.hook, clean.input_ids, clean.h, delta, clean.p
    out = {
        "fisher_seq": fisher.sequence_form(*split),
        "fisher_same": fisher.same_form(*split),
        "half_var": fisher.variance(clean.p, patch.log_q - clean.log_p) / 2,
    }
    for alpha in ALPHAS[:-1]:
        log_a = clean.log_probs(clean.h + alpha * delta)
        out[f"kl_{alpha}"] = kl_divergence(clean.p, clean.log_p, log_a)
        out[f"ce_{alpha}"] = cross_entropy(log_a, clean.input_ids)
    return out


def at(quantity: str, alpha: float) -> str:
    """The quantity measured at h + alpha delta."""
    return quantity if alpha == 1 else f"{quantity}_{alpha}"


def locality(alpha: float) -> Metric:
    """KL at h + alpha delta over the quadratic form: 1 where the model is local."""
    return Metric(f"locality_{alpha:g}", lambda s: s[at("kl", alpha)] / (alpha**2 * s["fisher_seq"] / 2))


# beside the proxies of Exp-B, per evaluated token
FISHER = (
    Metric("fisher_seq", mean("fisher_seq"), DISTORTION),
    Metric("fisher_tok", mean("fisher"), DISTORTION),
    Metric("fisher_same", mean("fisher_same"), DISTORTION),
    Metric("half_var", mean("half_var"), DISTORTION),
)
OWN = (*FISHER, Metric("delta_sq", mean("sse"), DISTORTION), *map(locality, ALPHAS))


def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> dict[str, list[dict]]:
    """What is measured once per hook, on few sequences or without an SAE: {table: rows}. sae: the middle one
    of the grid.
    """
    hook, input_ids, condition = eval_set.hook, eval_set.held.input_ids, eval_set.middle.condition
    batch = eval_batch(hook, input_ids.shape[1])
    few = input_ids[:batch].to(device)
    name = {"model": condition.model, "layer": condition.layer}
    which = name | {key: getattr(condition, key) for key in ("recipe", "k", "seed", "tokens")}
    return {
        "geometry.csv": [name | row for row in geometry(hook, input_ids, batch, eval_set.held.document)],
        "estimators.csv": [which | row for row in estimators(hook, few, sae)],
        "path.csv": [which | row for row in path_integral(hook, few, sae)],
    }


def check(eval_sets: list[EvalSet]) -> None:
    """Raises UserError where a position's own form cannot be had."""
    for eval_set in eval_sets:
        hook, one = eval_set.hook, eval_set.held.input_ids[:1].to(eval_set.hook.device)
        fisher.check_attention_mixes(hook, one, hook.head(one))


# of `terms` through the tail: two in forward mode, about three each, and two patches
# and of `study`: 9 backward passes of all the text, some 140 of one batch
EXPERIMENT = Experiment("expc_fisher", terms, OWN, study, more_passes=8, study_passes=34, check=check)


# ---------------------------------------------------------------------------------------------- analysis
def ladder(values: dict, meta: dict) -> list[dict]:
    """Partial Spearman with dCE given k of every rung between |delta|^2 and dCE, what each step up wins, with
    the leaderboard's intervals.
    """
    rho = [
        stats.partial_draws(DISTORTION(values[name]), -values["dce"], meta, N_RESAMPLES)
        for name, _, _ in LADDER[:-1]
    ] + [np.ones(stats.N_FIXED + N_RESAMPLES)]
    rows = []
    for (_, symbol, what), here, below in zip(LADDER, rho, [None, *rho]):
        step = here - below if below is not None else np.full(4, np.nan)
        rows.append(
            {"rung": symbol, "what joins": what, "rho": float(here[0]), "step": float(step[0])}
            | dict(zip(("step_lo", "step_hi"), stats.interval(step[stats.RESAMPLES])))
        )
    return rows


def calibration(sums: dict, meta: dict) -> list[dict]:
    """Per hook and alpha, over (SAE, sequence): slope of measured KL on alpha^2 delta^T G delta / 2, and of
    dCE on first plus second order.

    Slope through the origin; r2 = 1 - sum (measured - predicted)^2 / sum (measured - mean)^2, no parameter
    fitted.
    """
    rows = []
    for model, layer in sorted(set(zip(meta["model"], meta["layer"]))):
        here = (meta["model"] == model) & (meta["layer"] == layer)
        s = {q: v[here] / sums["n"][here] for q, v in sums.items()}
        for alpha in ALPHAS:
            kl, dce = s[at("kl", alpha)], s["ce_recon" if alpha == 1 else at("ce", alpha)] - s["ce_orig"]
            quadratic = alpha**2 * s["fisher_seq"] / 2
            row = {"model": str(model), "layer": int(layer), "alpha": alpha}
            for name, y, x in (("kl", kl, quadratic), ("dce", dce, alpha * s["gd"] + quadratic)):
                with np.errstate(divide="ignore", invalid="ignore"):
                    row |= {
                        f"{name}_slope": float((x * y).sum() / (x * x).sum()),
                        f"{name}_r2": float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
                    }
            rows.append(row)
    return rows


def radius(row: dict) -> float:
    """The largest alpha up to which KL stays within RADIUS of the quadratic form; 0 where it never does, nan
    where that is 0.
    """
    if not np.isfinite(row[f"locality_{ALPHAS[0]:g}"]):
        return np.nan
    inside = [abs(row[f"locality_{alpha:g}"] - 1) <= RADIUS for alpha in ALPHAS]
    return max((alpha for i, alpha in enumerate(ALPHAS) if all(inside[: i + 1])), default=0.0)


def analyse(out: pathlib.Path, settings: dict) -> dict:
    """leaderboard.csv, verdict.json, report.md and the plots: a pure function of conditions.csv,
    sequences.npz and geometry.csv.
    """
    found = load_measurements(out, settings, N_RESAMPLES, OWN)
    values, meta, sums = found.values, found.meta, found.sums
    scores = {proxy.name: proxy.score(values[proxy.name]) for proxy in (*PROXIES, *FISHER)}
    board, h2 = leaderboard.ranked(scores, found, settings, N_RESAMPLES)
    x, base, y = (v[stats.ALL] for v in (scores["fisher_seq"], scores["swd_tok"], values["ce_rec"]))
    (added, p), gain = stats.added_value(x, base, y, meta), stats.out_of_hook_gain(x, base, y, meta)
    leaf, rungs = leaderboard.leaf_added(added, p, MIN_ADDED), ladder(values, meta)
    shown = [row for row in rungs[1:-1] if row["step_lo"] > 0 or row["step_hi"] < 0]
    lost = max(shown, key=lambda row: abs(row["step"]), default=None)
    verdict = plain(
        dict(
            leaf=leaf,
            h2=h2,
            added=added,
            p=p,
            gain=dict(zip(("value", "lo", "hi"), gain)),
            ladder=rungs,
            lost_at=lost and lost["rung"],
            locality={f"{a:g}": float(np.median(values[f"locality_{a:g}"][stats.ALL])) for a in ALPHAS},
            radius=[vars(Condition.of(row)) | {"radius": radius(row)} for row in found.saes],
            thresholds=dict(min_added=MIN_ADDED, alpha=stats.ALPHA, radius=RADIUS),
            settings=settings,
            rows_sha256=rows_hash(out),
        )
    )
    verdict["answer"] = vars(answer(verdict, settings))
    tables = {name: read_table(store.checked(out / store.RUN, name)) for name in TABLES}
    tables["calibration"] = calibration(sums, meta)
    saes = with_words(found.saes, values, min(settings["documents"]))
    files: dict[str, store.Content | None] = {
        "leaderboard.csv": as_csv(board, LEADERBOARD),
        "verdict.json": as_json(verdict),
        "report.md": report(found.nulls, saes, board, verdict, tables, settings),
    }
    charts = [chart.of_saes(saes, settings["models"], [BY_NAME["r2"], BY_NAME["swd_tok"], FISHER[0]])]
    store.put(
        out / store.RUN, with_page(out, files | plots(sums, meta, board, verdict["h2"], settings), charts)
    )
    return verdict


LEAVES = {
    "supported": "The pullback Fisher predicts CE_rec beyond SWD",
    "rejected": "The pullback Fisher is not shown to predict CE_rec beyond SWD",
    "undecided": "This grid cannot decide",
}


QUESTION = (
    "Does the whole local geometry of the output (the pullback Fisher) say more about what patching an SAE "
    "in does to cross-entropy than SWD, its cheap stand-in, does?"
)
LIMITS = (
    "The p counts hooks, the interval resamples them; it is about order at one k, not about size, and "
    "about {these}."
)


def answer(verdict: dict, settings: dict) -> Answer:
    gain, h2 = verdict["gain"], verdict["h2"]
    shown = "what it adds is undefined"
    if verdict["added"] is not None:
        shown = (
            f"given SWD and k it correlates with CE_rec at {signed(verdict['added'])} in rank "
            f"(p = {verdict['p']:.3f}), and takes a share of "
            f"{span(gain['value'], gain['lo'], gain['hi'])} off the variance of hooks that were left out"
        )
    first = AFTER_H2.format(h2=h2["leaf"], claim="H2', that the Fisher adds to SWD")
    return Answer(
        QUESTION,
        f"{LEAVES[verdict['leaf']]}, on {h2['n_clusters']} hooks: {shown}.",
        first + LIMITS.format(these=about_these(settings)),
    )


# ------------------------------------------------------------------------------------------ report, plots
REPORT = """\
# Exp-C: does the pullback Fisher add anything beyond SWD?

{answer}
![calibration](calibration.png)

H2': {leaf}.

p: what CE_rec has beyond SWD changes its sign in whole hooks, {n_clusters} of them. Beside it, \
descriptive: a linear model of CE_rec on k and SWD, each hook predicted from the others, leaves {gain} \
less variance with the Fisher form in it (1 = all of it; negative: it predicts worse; hooks resampled).

## Leaderboard, target CE_rec

{board}

fisher_seq: δᵀGδ with all positions moved together, exact (half of it is KL for small δ); fisher_tok: each \
position's δ alone on all it reaches, from {draws} draws of sampled labels; fisher_same: on its own \
prediction only, exact; half_var: ½Var_p of the real logit change.

{how_to_read}
![leaderboard](leaderboard.png)

## The ladder from ‖δ‖² to ΔCE

{ladder}

Partial Spearman with ΔCE given k; steps with 95% intervals as in the leaderboard. {lost}

## Calibration

{calibration}

Over (SAE, sequence), patching h + αδ. kl_slope: KL = slope · α²½δᵀGδ; dce_slope: ΔCE = slope · (α g·δ + \
α²½δᵀGδ); r2 of the prediction with slope 1. The quadratic model is believed up to the α where KL stays \
within {radius:.0%} of it (`radius` below); beyond it ranks only. Median KL / quadratic: {locality}.

## The shape of G

{geometry}

G averaged over positions (all-downstream block, sampled labels), with sink positions in and out. pr: \
participation ratio of G (pr / d = 1 for an isotropic one), pr_sigma of the covariance; overlap_r: mean \
squared cosine between the top r directions of G and of the covariance; alignment: 1 = G does not know the \
covariance, below 1 = the model cares less for the directions in which h varies most. Intervals over \
documents.{left_none}

## Cheaper estimators of δᵀGδ

{estimators}

Of one SAE of each hook on a few sequences, over the exact form; sd of one estimate, se of the mean. A \
mean further from 1 than its se explains is bias: the uncentred diagonal F adds (E_p u)², and is not even \
defined up to a shift of all logits. Rows drawn uniformly meet p's mass less often than rows drawn from p: \
their sd. A row of the Jacobian is a backward pass of its own for every token, a set of sampled labels one \
for all of them; the data's labels are one draw that cannot be repeated.

## ΔCE as an integral along h → ĥ

{path}

The upper anchor of any gradient proxy: nodes of Gauss-Legendre until the integral of g·δ is the measured \
ΔCE (nats per token); 0 nodes: first order at h.

## Every SAE

{saes}

{words}

## Null rows (never in a correlation)

{nulls}

`undefined`: the identity has no error, so fed, rho and the excess are 0/0.

{about}"""
LOST = "The largest step that the interval shows is at {}: there the rank correlation changes."
NOT_LOST = (
    "No step's interval leaves out 0, so this grid names no rung at which the rank correlation is lost."
)
OF_AN_SAE = (
    "model layer sae recipe k seed tokens r2 swd_tok fisher_seq fisher_tok fisher_same kl ce_rec "
    "locality_0.1 locality_1 radius fed"
).split()
OF_A_NULL = (
    "model layer sae r2 fisher_seq fisher_same kl ce_rec rho fed_nosink fed_iso_nosink fed_excess".split()
)


def report(
    nulls: list[dict],
    saes: list[dict],
    board: list[dict],
    verdict: dict,
    tables: dict[str, list[dict]],
    settings: dict,
) -> bytes:
    gain, shapes = verdict["gain"], [shape_words(row) for row in tables["geometry.csv"]]
    left_none = any(row["trace"] == "undefined" for row in shapes)
    lost = LOST.format(verdict["lost_at"]) if verdict["lost_at"] else NOT_LOST
    shown = [
        row | {"tokens": readable_count(row["tokens"]), "radius": radius(row)}
        for row in label_last_block(saes, settings)
    ]
    text = REPORT.format(
        answer=Answer(**verdict["answer"]).markdown(),
        leaf=verdict["leaf"],
        n_clusters=verdict["h2"]["n_clusters"],
        gain=span(gain["value"], gain["lo"], gain["hi"]),
        board=leaderboard_table(board, "ce_rec", "pooled"),
        draws=DRAWS,
        how_to_read="\n".join(how_to_read(verdict["h2"], settings)),
        ladder=markdown([rung_words(row) for row in verdict["ladder"]]),
        lost=lost,
        calibration=markdown(tables["calibration"]),
        radius=RADIUS,
        locality=", ".join(f"α = {a}: {signed(v)}" for a, v in verdict["locality"].items()),
        geometry=markdown(shapes, ["model", "layer", "sinks", *SHAPE[:2], "pr / d", *SHAPE[2:]]),
        left_none=" `undefined`: no positions are left without the sinks." if left_none else "",
        estimators=markdown(tables["estimators.csv"]),
        path=markdown(tables["path.csv"]),
        saes=markdown(shown, [*OF_AN_SAE, *OF_A_ROW]),
        words=ABOUT_WORDS,
        nulls=markdown(label_last_block(nulls, settings), OF_A_NULL),
        about="\n".join(about_the_run(saes, settings)),
    )
    return text.encode()


def rung_words(row: dict) -> dict:
    """The first rung has nothing below it to step from."""
    step = "" if row["rung"] == LADDER[0][1] else span(row["step"], row["step_lo"], row["step_hi"])
    return {
        "rung": row["rung"],
        "what joins": row["what joins"],
        "partial Spearman": signed(row["rho"]),
        "step": step,
    }


def shape_words(row: dict) -> dict:
    """A row of geometry.csv, each number with its interval."""
    words = {}
    for name in SHAPE:
        value, lo, hi = (
            f"{row[column]:.3g}" if np.isfinite(row[column]) else "undefined"
            for column in (name, f"{name}_lo", f"{name}_hi")
        )
        ends = "undefined" if "undefined" in (lo, hi) else f"{lo}, {hi}"
        words[name] = value if value == "undefined" else f"{value} [{ends}]"
    return row | words | {"pr / d": row["pr"] / row["d"]}


def plots(
    sums: dict, meta: dict, board: list[dict], h2: dict, settings: dict
) -> dict[str, store.Content | None]:
    """{file: PNG}."""
    plt = pyplot()
    colours = model_colours(settings["models"])
    figure, axes = plt.subplots(1, len(ALPHAS), figsize=(3.6 * len(ALPHAS) + 0.4, 4.2), layout="constrained")
    for axis, alpha in zip(axes, ALPHAS):
        x = alpha**2 * sums["fisher_seq"].sum(1) / sums["n"].sum(1) / 2
        y = sums[at("kl", alpha)].sum(1) / sums["n"].sum(1)
        for model in settings["models"]:
            here = meta["model"] == model
            axis.scatter(
                x[here],
                y[here],
                s=12 + 2.5 * meta["k"][here],
                color=colours[model],
                alpha=0.75,
                edgecolor="white",
                linewidth=0.5,
            )
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="0.4", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="α² ½ δᵀGδ per token")
        axis.set_title(f"at {alpha:g} δ the KL is {np.median(y / x):.2f} times the form", fontsize=9)
        decade_ticks(axis.xaxis, ends)
        decade_ticks(axis.yaxis, ends)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL per token, measured at h + αδ")
    figure.suptitle("What the Fisher form says of a patch, against the KL it has (line: equal)", fontsize=10)
    figure.legend(**points_legend(settings["models"]), loc="outside lower center", ncols=4)
    return {"leaderboard.png": leaderboard_plot(board, h2), "calibration.png": figure}


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
    with hushed(command):
        if (done := run(command, EXPERIMENT)) is None:
            return
        out, settings = done
        verdict = analyse(out, settings)
    table = board_in_short(read_table(out / "leaderboard.csv"), coloured(sys.stdout))
    conclude(command, out, Answer(**verdict["answer"]), table, f"H2': {verdict['leaf']}")


if __name__ == "__main__":
    run_script(main)
