"""What training does to SAEs, as a person reads it: k*, limits, and every metric over the budgets."""

import itertools
import typing
from collections.abc import Sequence

from transport_geometry.measuring.metrics import METRICS
from transport_geometry.records.condition import hook_of
from transport_geometry.records.tables import estimate, grouped, markdown, readable_count
from transport_geometry.reporting.figures import decade_ticks, label_ends, model_colours, pyplot
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics import intervals
from transport_geometry.statistics.curves import MIN_BUDGETS, KStar
from transport_geometry.statistics.resampling import ESTIMATE, RESAMPLES

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = blocks("expa")


# ------------------------------------------------------------------------------------------------ in Markdown
def two_digits(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if np.isfinite(value) else "undefined"


def interval(lo: float | str, hi: float | str) -> str:
    """Of numbers, or of words where an end lies beyond the grid."""
    ends = two_digits(lo), two_digits(hi)
    return "undefined" if ends[0] == "undefined" else f"[{', '.join(ends)}]"


def k_star_section(stars: Sequence[KStar], small: str, large: str) -> str:
    """Every k*, and the tax where both are on the grid: k* of `large` over that of `small`."""
    of_small = {star.cell: star for star in stars if star.model == small}
    rows = []
    for star in stars:
        value, lo, hi = star.words()
        tax = ""
        if star.model == large != small and star.cell in of_small:
            below = of_small[star.cell].draws
            known = np.isfinite(below) & np.isfinite(star.draws)
            with np.errstate(invalid="ignore"):
                ratio = np.where(known, star.draws / below, np.nan)
            if known[ESTIMATE]:
                tax = f"{two_digits(ratio[ESTIMATE])} {interval(*intervals.interval(ratio[RESAMPLES]))}"
        row = {name: getattr(star, name) for name in ("model", "depth", "recipe", "sinks")}
        row |= {"tokens": readable_count(star.tokens), "CE_rec": star.target}
        rows.append(row | {"k*": two_digits(value), "95%": interval(lo, hi), "tax": tax})
    return TEXT["k stars"].format(table=markdown(rows), small=small, large=large)


SHOWN = "r2 r2_nosink r2_defl1 cosine swd_tok ce_rec ce_rec_sinkclean frac_zero kl alive".split()


def learning_section(saes: Sequence[dict], settings: dict) -> str:
    """Means over seeds of every cell, models from the smallest."""
    names = ["model", "layer", "recipe", "sae", "k", "tokens"]
    cells = grouped(saes, names)
    rows = []
    for key in sorted(cells, key=lambda key: (settings["models"].index(key[0]), key)):
        means = {metric: float(np.mean([row[metric] for row in cells[key]])) for metric in SHOWN}
        rows.append(dict(zip(names, key)) | {"tokens": readable_count(key[-1])} | means)
    constant = TEXT["constant"] if "saelens" in settings["recipe"] else ""
    return TEXT["learning"].format(table=markdown(rows), constant=constant)


def law_section(laws: Sequence[dict]) -> str:
    """The limits that were found, and how many were not."""
    known = [row for row in laws if np.isfinite(row["limit"])]
    rows, parts = [], []
    for row in known:
        key = {name: row[name] for name in ("model", "depth", "recipe", "sinks", "k")}
        rows.append(key | {"CE_rec at infinity": estimate(row, "limit", 3), "b": row["exponent"]})
    if known:
        parts.append(TEXT["laws"].format(table=markdown(rows)))
    if not known or len(known) < len(laws):
        which = f"{len(laws) - len(known)} other curves" if known else "CE_rec at infinite tokens"
        parts.append(TEXT["no law"].format(which=which, least=MIN_BUDGETS))
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ the figures
UNTRAINED = "ce_orig ce_zero ce_mean l0".split()  # these do not depend on training
ONE_SCALE = (  # these are read against each other
    "r2 r2_nosink r2_defl1 r2_ln".split(),
    "nmse nmse_tok".split(),
    "swd_tok swd_seq swd_sampled".split(),
    "ce_rec ce_rec_sinkclean".split(),
    "frac_zero frac_mean".split(),
    "fed fed_nosink fed_iso_nosink".split(),
)
LOGARITHMIC = "swd_tok swd_seq swd_sampled gd_abs kl mse".split()


def budget_axis(axis: "Axes", budgets: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(budgets, [readable_count(b) for b in budgets])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)


def figures(saes: Sequence[dict], settings: dict) -> dict[str, "Figure"]:
    """{file: figure}: one for each depth."""
    of_depth: dict[str, list[dict]] = {}
    for row in saes:
        of_depth.setdefault(settings["hooks"][hook_of(row)], []).append(row)
    if len(of_depth) == 1:
        return {"learning.png": learning_figure(saes, settings)}
    return {
        f"learning-{depth}.png": learning_figure(here, settings) for depth, here in sorted(of_depth.items())
    }


def learning_figure(saes: Sequence[dict], settings: dict) -> "Figure":
    """Every metric against training tokens, a sheet to look things up in: colour = model, line = recipe and
    sinks, k beside the end of its line.
    """
    plt, n_columns = pyplot(), 5
    metrics = [metric.name for metric in METRICS if metric.name not in UNTRAINED]
    colours = model_colours(settings["models"])
    arms = sorted({(row["recipe"], row["sae"]) for row in saes})
    styles = dict(zip(arms, itertools.cycle(("-", "--", ":", "-."))))
    n_rows = -(-len(metrics) // n_columns)
    shape = dict(figsize=(12, 1.95 * n_rows), sharex=True, layout="constrained")
    figure, axes = plt.subplots(n_rows, n_columns, **shape)
    of_metric = dict(zip(metrics, axes.flat))
    for first, *others in ONE_SCALE:
        for other in others:
            of_metric[other].sharey(of_metric[first])
    ends: dict[str, list] = {metric: [] for metric in metrics}
    for metric, axis in of_metric.items():
        for (model, *arm, k), here in grouped(saes, ["model", "recipe", "sae", "k"]).items():
            at = {budget: rows for (budget,), rows in sorted(grouped(here, ["tokens"]).items())}
            means = [float(np.mean([row[metric] for row in rows])) for rows in at.values()]
            look = dict(linestyle=styles[tuple(arm)], color=colours[model], alpha=0.8, linewidth=1)
            axis.plot(list(at), means, marker=".", markersize=4, **look)
            if tuple(arm) == arms[0] and np.isfinite(means[-1]):
                ends[metric].append((means[-1], str(k), colours[model]))
        axis.set_title(metric, fontsize=9)
        if metric in LOGARITHMIC:
            axis.set_yscale("log")
        axis.tick_params(labelsize=7, which="both")
        budget_axis(axis, settings["tokens"])
        axis.tick_params(axis="x", labelrotation=90 if len(settings["tokens"]) > 4 else 0)
    for metric, axis in of_metric.items():  # now that what shares a scale is all drawn
        if metric in LOGARITHMIC:
            decade_ticks(axis.yaxis, axis.get_ylim(), fontsize=7)
        if ends[metric]:
            label_ends(axis, ends[metric], fontsize=5.5)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis in axes.flat[len(metrics) - n_columns : len(metrics)]:
        axis.tick_params(labelbottom=True)
    handles = [plt.Line2D([], [], color=colours[model], label=model) for model in settings["models"]]
    if len(arms) > 1:
        looks = [dict(color="0.3", linestyle=styles[arm], label=" ".join(arm)) for arm in arms]
        handles += [plt.Line2D([], [], **look) for look in looks]
    title = "against training tokens of an SAE; the number at a line's end is its k"
    words = dict(fontsize=8, frameon=False, title=title, title_fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **words)
    figure.suptitle("Every metric over the training of the SAEs, means over seeds", fontsize=10)
    return figure
