"""Exp-D: do activations vary in more directions than the output depends on, and is that where R^2 misjudges
an SAE?

    python expd_mi.py                                # embedded models, four CPU-minutes
    python expd_mi.py --critic hybrid                # the other critic, hours
    python expd_mi.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                      --data NeelNanda/pile-small-tokenized-2b
    python expd_mi.py --from outputs/expd_mi         # tables, verdict and plots again, without a model

Hypothesis H3: the task-relevant dimension departs from the geometric one exactly where the proxy fails worst.
Geometric is pr_defl1, the participation ratio (PR) of a hook's covariance Sigma without its first direction;
task-relevant is dim_fisher, the PR of Sigma^1/2 G Sigma^1/2 with G the pullback Fisher. The proxy fails at a
hook by the residual: the log10 of what its SAEs cost in cross-entropy as predicted by R^2, calibrated on all
other hooks, minus the measured one. If h varies in directions that the output ignores, R^2 counts errors
there that cost nothing, and predicts too much. So H3 says that the residual rises with
log(pr_defl1 / dim_fisher), among the hooks of a model.

Two dimensions without gradients stand beside it: canonical correlations of h with the final norm's output,
and trained critics of their mutual information. Rules refuse a count that means nothing; it is not printed.
"""

import collections
import functools
import math
import pathlib
import typing

from common import parse_args, run_script
from transport_geometry.measuring import mutual_information as mi
from transport_geometry.measuring.dimension_study import DRAWS, dimensions, judged, trained_critics
from transport_geometry.measuring.metrics import BY_NAME
from transport_geometry.models.lm import text_config
from transport_geometry.records import store
from transport_geometry.records.results import about_the_run, label_last_block, load_measurements
from transport_geometry.records.tables import bounds, grouped, markdown, read_table, short, signed, span
from transport_geometry.reporting import leaderboard_report
from transport_geometry.reporting.console import Answer, columns
from transport_geometry.reporting.figures import BLUE, ORANGE, lines, model_colours, points, pyplot
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment, eval_batch
from transport_geometry.saes.sae import SAE
from transport_geometry.saes.sinks import SINK_FACTOR
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.hook_tests import loho_errors
from transport_geometry.statistics.intervals import ALPHA
from transport_geometry.statistics.resampling import MIN_HOOKS_OF_A_MODEL, cluster_ids, mean_by_hook
from transport_geometry.statistics.within_models import associations

import numpy as np
import torch

# every block of the three models: H3 counts hooks within models, and two k span the curve that R^2 is
# calibrated by
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in range(6)),
    k="4,32",
    tokens="40k",
    expansion=4,
    eval_seqs=20,
    ctx=256,
)

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure
FLAGS = {
    "--critic": dict(
        default="separable",
        choices=sorted(mi.SCHEDULES),
        help="of mutual information: separable, or hybrid, which takes hours",
    )
}
N_RESAMPLES = 2000
TEXT = blocks("expd_mi")


# ------------------------------------------------------------------------------------------- measurement
def study(eval_set: EvalSet, sae: SAE, device: torch.device, critic: str) -> dict[str, list[dict]]:
    """What is measured once per hook, without an SAE: {table: rows}; critics at a model's middle hook."""
    hook, held, middle = eval_set.hook, eval_set.held, eval_set.middle
    ids, ctx = held.input_ids, min(mi.CTX, held.input_ids.shape[1])
    tables = dimensions(hook, ids, held.document, eval_batch(hook, ids.shape[1]))
    if hook.layer == text_config(hook.model).num_hidden_layers // 2:
        split = getattr(middle.origin, "split", "train")
        texts = mi.rows_of(eval_set.source.data, split, eval_set.tokenizer, ctx, eval_set.bos)
        tables["critics.csv"] = trained_critics(hook, texts, ids[:1], eval_batch(hook, ctx), critic)
    name = {"model": middle.condition.model, "layer": middle.condition.layer}
    return {table: [name | row for row in rows] for table, rows in tables.items()}


# ------------------------------------------------------------------------ the rule, fixed before any result
# Models share their depths, and whatever changes smoothly with depth correlates by itself: so hooks are
# permuted within their models and then, again, whole depths. The first direction of the covariance can be
# that of one position: so the correlation must also hold without sink positions and without deflation.
MIN_RHO = 0.5  # what the research log's tree asks of H3


def leaf_h3(found: dict) -> tuple[str, str]:
    """The pre-registered rule of H3: (leaf, why). found: of `associations`."""
    within, depths, nosink = found["within"], found["depths"], found["nosink"]
    least = MIN_HOOKS_OF_A_MODEL
    if (n := found["n_hooks"]) < MIN_EFFECTIVE_HOOKS:
        return (
            "undecided",
            f"{n} hooks in models with {least} or more, {MIN_EFFECTIVE_HOOKS} needed",
        )
    if not np.isfinite([within["rho"], within["p"], nosink["rho"]]).all():
        return "undecided", "a dimension or a residual is undefined"
    if not within["least_p"] < ALPHA:
        return "undecided", f"no order of so few hooks has p < {ALPHA}"
    if within["rho"] <= -MIN_RHO and within["p"] < ALPHA:
        return "rejected", "the opposite: R² predicts too little where the dimensions differ most"
    if not (within["rho"] >= MIN_RHO and within["p"] < ALPHA):
        return "rejected", "not shown among the hooks of a model"
    if not nosink["rho"] >= MIN_RHO:
        return "rejected", "not without sinks and deflation"
    if depths["least_p"] >= ALPHA:
        return "undecided", f"no order of so few depths has p < {ALPHA}"
    if depths["p"] >= ALPHA:  # nan where the models differ in their depths
        return "rejected", "no more than what depth alone could do"
    return "supported", "among the hooks of a model, over whole depths, and without sinks"


# ------------------------------------------------------------------------------------- tables and verdict
def residuals(values: dict, meta: dict) -> dict[tuple[str, int], float]:
    """{hook: log10 dCE predicted from R^2, a quadratic fitted on all other hooks, minus measured, mean over
    its SAEs}: above 0 R^2 says that they cost more than they do.
    """
    errors = loho_errors(BY_NAME["r2"].score(values["r2"][0]), values["dce"][0], meta)
    ids = cluster_ids(meta)
    _, first = np.unique(ids, return_index=True)
    hooks = [(str(meta["model"][i]), int(meta["layer"][i])) for i in first]
    return dict(zip(hooks, mean_by_hook(errors, ids).tolist()))


def hook_rows(geometry: list[dict], residual: dict, meta: dict) -> list[dict]:
    """One row a hook: its dimensions, the task-relevant one without sinks, and what H3 compares."""
    depth = dict(zip(zip(meta["model"].tolist(), meta["layer"].tolist()), meta["depth"].tolist()))
    rows = []
    for hook, pair in grouped(geometry, ("model", "layer")).items():
        whole, no_sinks = (next(row for row in pair if row["sinks"] == sinks) for sinks in ("in", "out"))
        row = whole | {"depth": depth[hook], "residual": residual[hook]}
        row |= {"log_ratio_nosink": no_sinks["log_ratio"], "pr_nosink": no_sinks["pr"]}
        # G is a mean over positions: `dimension.both_counts`
        of_g = {name: v for name, v in no_sinks.items() if name.startswith(("dim_fisher", "energy"))}
        rows.append(row | of_g)
    return rows


def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """A pure function of conditions.csv, sequences.npz and the tables of `study`."""
    found, models = load_measurements(out, settings, N_RESAMPLES), settings["models"]
    tables: dict[str, list[dict]] = {"critics": []}  # where no model's middle hook is on the grid
    for name in ("geometry", "positions", "canonical", "critics"):
        if f"{name}.csv" in store.written(out / store.RUN):
            rows = read_table(store.checked(out / store.RUN, f"{name}.csv"))
            tables[name] = sorted(rows, key=lambda row: (models.index(row["model"]), row["layer"]))
    hooks = hook_rows(tables["geometry"], residuals(found.values, found.meta), found.meta)
    canonical = judged([row | {"mi_se": 0.0} for row in tables["canonical"]], ("model", "layer"))
    critics = judged(tables["critics"], ("model", "layer", "target", "estimator"))
    tables |= dict(hooks=hooks, canonical=canonical, critics=critics)
    result = associations(hooks, N_RESAMPLES)
    leaf, reason = leaf_h3(result)
    shown = "model layer residual log_ratio log_ratio_nosink pr_defl1 dim_fisher energy".split()
    verdict = dict(
        leaf=leaf,
        reason=reason,
        h3=result,
        hooks=[{name: row[name] for name in shown} for row in hooks],
        refused={
            name: dict(collections.Counter(sorted(row["refused"] or "not refused" for row in tables[name])))
            for name in ("canonical", "critics")
        },
        thresholds=dict(
            min_rho=MIN_RHO,
            alpha=ALPHA,
            min_hooks=MIN_EFFECTIVE_HOOKS,
            of_a_model=MIN_HOOKS_OF_A_MODEL,
            min_mi=mi.MIN_MI,
            n_se=mi.N_SE,
            from_ceiling=mi.FROM_CEILING,
            overfit=mi.OVERFIT,
            ladder=mi.LADDER_TOLERANCE,
            ceiling=math.log(mi.BATCH),
        ),
    )
    said = answer(leaf, reason, result, settings)
    in_short = [{name: short(value) for name, value in row.items()} for row in statistics(result)]
    return Findings(
        answer=said,
        verdict=verdict,
        short_verdict=f"H3: {leaf}",
        report=report(said, verdict, tables, found.saes, settings),
        figures={
            "h3.png": h3_figure(hooks, result, models),
            "canyon.png": canyon_figure(hooks, models),
            "norms.png": norms_figure(tables["positions"], models),
        },
        table=lambda colour: columns(in_short, colour=colour),
    )


def answer(leaf: str, reason: str, found: dict, settings: dict) -> Answer:
    p, rho = found["within"]["p"], span(found["within"]["rho"], found["rho_lo"], found["rho_hi"])
    if np.isfinite(p):
        reason = f"rank correlation {rho} among the hooks of a model (p = {p:.3f}, {found['n_hooks']} hooks)"
    after = leaderboard_report.TEXT["after h2"].format(claim="H3, that this is why R² fails")
    scope = leaderboard_report.scope(settings)
    limits = TEXT["limits"].format(after_h2=after, n_hooks=found["n_hooks"], scope=scope)
    return Answer(TEXT["question"], f"{TEXT[leaf]}: {reason}.", limits)


# ------------------------------------------------------------------------------------------ report, figures
STATISTICS = {  # of `associations`: how a table names them
    "within": "within models (H3)",
    "depths": "the same, whole depths",
    "given_depth": "given the layer",
    "nosink": "without sinks, pr_nosink for pr_defl1",
    "nosink_depths": "that, whole depths",
    "energy": "energy for the ratio",
    "pooled": "pooled over models (confounded)",
}


def statistics(found: dict) -> list[dict]:
    """The table under the answer."""
    found = found | {"given_depth": {"rho": found["given_depth"], "p": "", "critical": ""}}
    return [
        {"": label, "Spearman": signed(found[name]["rho"])}
        | {key: found[name][key] for key in ("p", "critical")}
        for name, label in STATISTICS.items()
    ]


def report(said: Answer, verdict: dict, tables: dict, saes: list[dict], settings: dict) -> str:
    def table(rows: list[dict], names: str) -> str:
        """A refused dimension is not printed."""
        shown = [
            row | {"dimension": f"refused ({why})"} if (why := row.get("refused")) else row for row in rows
        ]
        return markdown(label_last_block(shown, settings), ["model", "layer", *names.split()])

    critics, plan = TEXT["no critics"], mi.SCHEDULES[settings["critic"]]
    if tables["critics"]:
        names = "target width n_fit n_held estimator sigma mi mi_se mi_fit mi_null dimension"
        how = dict(ctx=min(mi.CTX, settings["ctx"]), m=mi.PER_SEQUENCE, ceiling=math.log(mi.BATCH))
        critics = TEXT["critics"].format(table=table(tables["critics"], names), **vars(plan), **how)
    refused = {
        f"refused_{name}": ", ".join(f"{n} {why}" for why, n in counts.items()) or "none"
        for name, counts in verdict["refused"].items()
    }
    hooks = [hook_in_words(row) for row in tables["hooks"]]
    return TEXT["report"].format(
        answer=said.markdown(),
        leaf=verdict["leaf"],
        reason=verdict["reason"],
        statistics=markdown(statistics(verdict["h3"])),
        n_depths=len(set(settings["hooks"].values())),
        interval=bounds(verdict["h3"]["rho_lo"], verdict["h3"]["rho_hi"]),
        hooks=table(hooks, "residual log_ratio pr pr_defl1 pr_nosink dim_fisher"),
        draws=DRAWS,
        canyon=table(tables["hooks"], "d pr pr_defl1 pr_defl2 pr_defl4 pr_nosink pr_corrected"),
        positions=table([row for row in tables["positions"] if row["position"] == 0], "norm sst_share"),
        canonical=table(tables["canonical"], "sigma mi mi_fit mi_null dimension"),
        critics=critics,
        batch=mi.BATCH,
        about="\n".join(about_the_run(saes, settings)),
        **refused,
        **verdict["thresholds"],
    )


def hook_in_words(row: dict) -> dict:
    """Each dimension with its interval."""
    words = {"residual": signed(row["residual"], 3)}
    words["log_ratio"] = span(row["log_ratio"], row["log_ratio_lo"], row["log_ratio_hi"])
    for name in ("pr", "pr_defl1", "dim_fisher"):
        words[name] = f"{short(row[name])} [{short(row[f'{name}_lo'])}, {short(row[f'{name}_hi'])}]"
    return row | words


def h3_figure(hooks: list[dict], found: dict, models: list[str]) -> "Figure":
    """Left as they are, right with each model's mean taken out of both."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for axis, centred in zip(axes, (False, True)):
        for model, colour in model_colours(models).items():
            here = [row for row in hooks if row["model"] == model]
            x, y = (np.array([row[c] for row in here], float) for c in ("log_ratio", "residual"))
            if centred:
                x, y = x - x.mean(), y - y.mean()
            names = [f"{model}@{row['layer']}: {a:.3g}, {b:.3g}" for row, a, b in zip(here, x, y)]
            points(axis, x, y, names, s=40, color=[colour], alpha=1, label=model)
            for row, *at in zip(here, x, y):
                if np.isfinite(at).all():
                    axis.annotate(str(row["layer"]), at, (5, 3), textcoords="offset points", fontsize=8)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="log(pr_defl1 / dim_fisher)", ylabel="log10 ΔCE that R² predicts, minus measured")
    axes[1].set(xlabel="log ratio minus its model's mean", ylabel="residual minus its model's mean")
    axes[0].set_title(f"pooled, confounded: Spearman {signed(found['pooled']['rho'])}", fontsize=10)
    axes[1].set_title(f"within models, H3: Spearman {signed(found['within']['rho'])}", fontsize=10)
    axes[0].legend(title="number = layer", fontsize=8)
    return figure


CURVES: dict[str, dict] = {  # column: how the canyon draws it
    "pr": dict(label="PR", color="0.55", linestyle="--", marker="o"),
    "pr_nosink": dict(label="PR without sinks", color=BLUE, linestyle=":", marker="v"),
    "pr_defl1": dict(label="PR deflated by 1", color=BLUE, marker="s"),
    "pr_corrected": dict(label="PR, corrected", color="0.55", linestyle=":", marker="x"),
    "dim_fisher": dict(label="dim_fisher, 95%", color=ORANGE, marker="D", linewidth=2),
}


def canyon_figure(hooks: list[dict], models: list[str]) -> "Figure":
    shape = dict(figsize=(3.3 * len(models) + 1, 4), layout="constrained", squeeze=False, sharey=True)
    figure, axes = pyplot().subplots(1, len(models), **shape)
    for axis, model in zip(axes[0], models):
        here = [row for row in hooks if row["model"] == model]
        for column, style in CURVES.items():
            ends = ("dim_fisher_lo", "dim_fisher_hi") if column == "dim_fisher" else (column, column)
            x, y, lo, hi = ([row[name] for row in here] for name in ("layer", column, *ends))
            lines(axis, [(x, y, lo, hi, style)], zero=False)
        axis.set(yscale="log", xlabel="layer", title=f"{model}, d = {here[0]['d']}")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0, 0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes[0, 0].set_ylabel("dimensions")
    axes[0, -1].legend(fontsize=7)
    return figure


def norms_figure(positions: list[dict], models: list[str]) -> "Figure":
    figure, axis = pyplot().subplots(figsize=(6.5, 3.8), layout="constrained")
    for model, colour in model_colours(models).items():
        here = grouped([row for row in positions if row["model"] == model], ("layer",))
        for i, rows in enumerate(here.values()):
            x, y = ([row[column] for row in rows] for column in ("position", "norm"))
            axis.plot(x, y, color=colour, alpha=0.7, linewidth=1, marker=".", label=None if i else model)
    axis.axhline(SINK_FACTOR, color="0.4", linewidth=0.8, linestyle="--", label="sink: above this")
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set(xlim=(-0.2, None), yscale="log", xlabel="position (a line for each hook)")
    axis.set_ylabel("median ‖h‖, in medians over positions ≥ 1")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID, flags=FLAGS)
    measure = functools.partial(study, critic=command.own["critic"])
    run_and_report(command, Experiment("expd_mi", study=measure), analyse)


if __name__ == "__main__":
    run_script(main)
