"""Exp-F as a person reads it: its tables in Markdown and on a terminal, and its figures.

by_loss {loss: {"ratio", "apart"}}: of the largest model over the smallest at equal bits, over pairs of hooks,
or of the second hook of a pair over the first; contrasts {"all" or a pair: its by_loss}; ratios, rates,
directions: rows of the CSV files of these names; code: the one shown, by its name.
"""

import typing
from collections.abc import Sequence

from transport_geometry.measuring import prequential_probe, rate
from transport_geometry.records.condition import KEY
from transport_geometry.records.results import Measured, about_the_run, label_last_block
from transport_geometry.records.tables import grouped, markdown, short
from transport_geometry.reporting.console import Answer, columns
from transport_geometry.reporting.figures import (
    BLUE,
    ORANGE,
    decade_ticks,
    joined_points,
    model_colours,
    points,
    pyplot,
    sae_name,
)
from transport_geometry.reporting.templates import blocks
from transport_geometry.saes import kl_finetune
from transport_geometry.statistics.hook_pair import PAIRED
from transport_geometry.statistics.rate_curves import CE, R2, Coded, RateCurves

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = blocks("expf_rate")


# ------------------------------------------------------------------------------------------------- tables
def factor(of: dict) -> str:
    """A positive number and its interval, three digits."""
    value, lo, hi = (of[name] for name in ("factor", "lo", "hi"))
    if not np.isfinite(value):
        return "undefined"
    ends = f"{short(lo)}, {short(hi)}" if np.isfinite([lo, hi]).all() else "undefined"
    return f"{short(value)} [{ends}]"


ALL = "all"  # all pairs of one depth, among contrasts


def unit(row: dict) -> str:
    """The column that says which hooks are compared."""
    return "pair" if "pair" in row else "depth"


def by_depth(ratios: Sequence[dict], code: str, at_equal: Sequence[str], shown: Sequence[str]) -> list[dict]:
    """A row for each depth, or pair, and a column for each ratio."""
    rows: dict[tuple, dict] = {}
    for row in ratios:
        if row["code"] == code and row["at_equal"] in at_equal and row["of"] in shown:
            key = {"at equal": row["at_equal"], unit(row): row[unit(row)]}
            into = rows.setdefault(tuple(key.values()), key)
            into[row["of"]] = factor(row | {"factor": row["ratio"]})
    return list(rows.values())


def equal_bits(ratios: Sequence[dict], contrasts: dict[str, dict], code: str) -> str:
    """A row for every depth, then what all say together; or two rows for every pair."""
    losses, first = list(next(iter(contrasts.values()))), "depth" if ALL in contrasts else "pair"
    rows = by_depth(ratios, code, ["bits"], losses)
    for name, by_loss in contrasts.items():
        apart = {loss: factor(of["apart"]) for loss, of in by_loss.items()} | {CE: ""}
        if name == ALL:
            p = {loss: short(of["apart"]["p"]) for loss, of in by_loss.items()} | {CE: ""}
            rows.append({first: name} | {loss: factor(of["ratio"]) for loss, of in by_loss.items()})
            rows += [{first: "over 1-ce_rec"} | apart, {first: "p"} | p]
        else:
            rows.append({first: f"{name}, over 1-ce_rec"} | apart)
    return markdown(rows, [first, *losses])


def equal_bits_in_short(by_loss: dict, small: str, large: str, paired: bool, colour: bool) -> str:
    """What all pairs of depths say, or the first of --pairs, for a terminal of 80 columns."""
    rows = []
    for name, of in by_loss.items():
        row = {"loss": name, f"{large} / {small}": factor(of["ratio"])}
        apart = {"over 1-ce_rec": factor(of["apart"])} | ({} if paired else {"p": short(of["apart"]["p"])})
        rows.append(row | (dict.fromkeys(apart, "") if name == CE else apart))
    over = "documents; the first pair" if paired else "pairs of hooks of one depth"
    return f"{columns(rows, colour=colour)}\n\nat equal bits; 95% over {over}"


def equal_output(ratios: Sequence[dict], code: str) -> str:
    """Bits and losses where the output changes as much."""
    shown = ["bits", R2, "1-cosine", "1-r2_fisher", "half_swd"]
    rows = by_depth(ratios, code, ["kl", CE], shown)
    if not rows:
        return "No depth is shared by two models."
    return markdown(rows, ["at equal", unit(rows[0]), *shown])


def code_tables(rates: Sequence[dict], code: str) -> tuple[str, str]:
    """(bits and 1 - R^2 of every SAE under every code, its losses over the Gaussian bound under this one)."""
    under_each, over_bound = [], []
    for rows in grouped(rates, KEY).values():
        which = {name: rows[0][name] for name in ("model", "layer", "recipe", "k", "seed")}
        bits = {f"{row['code']}: bits": f"{row['bits']:.1f}" for row in rows}
        under_each.append(which | bits | {f"{row['code']}: 1-r2": row[R2] for row in rows})
        (mine,) = (row for row in rows if row["code"] == code)
        over_bound.append(
            which
            | {"bits": f"{mine['bits']:.1f}", R2: mine[R2], "over the bound in Σ": mine["above_sigma"]}
            | {"without sinks": mine["above_sigma_nosink"], "1-r2_fisher": mine["1-r2_fisher"]}
            | {"over the bound in Σ^½GΣ^½": mine["above_fisher"]}
        )
    return markdown(under_each), markdown(over_bound)


OWN_SHARE = {"Σ": "variance", "G": "sensitivity"}  # {eigendirections of: the column that is their own share}


def direction_table(directions: Sequence[dict]) -> str:
    rows: dict[tuple, dict] = {}
    for row in directions:
        into = rows.setdefault((row["model"], row["layer"]), {"model": row["model"], "layer": row["layer"]})
        for last, words in ((1, "first tenth"), (rate.GROUPS // 2, "first half")):
            for name, what in ((OWN_SHARE[row["directions"]], "own"), ("error", "error")):
                column = f"{row['directions']} {words}: {what}"
                into[column] = into.get(column, 0.0) + (row[name] if row["group"] <= last else 0.0)
    return markdown(list(rows.values()))


def report(
    found: Measured,
    rates: list[dict],
    ratios: list[dict],
    contrasts: dict[str, dict[str, dict]],
    verdict: dict,
    said: Answer,
    tables: dict[str, list[dict]],
    settings: dict,
    code: str,
    training_rows: int,
) -> str:
    """report.md. training_rows: sequences that say what a standard deviation of the values is."""
    softmax, (small, large) = TEXT["no softmax"], verdict["models"]
    if closed := tables["softmax.csv"]:
        each = "{model} {sequence:.1e} (sequence), {same:.1e} (same position)"
        distances = "; ".join(each.format(**row) for row in closed)
        softmax = TEXT["softmax"].format(positions=closed[0]["positions"], text=distances)
    under_each, over_bound = code_tables(rates, code)
    paired = " of a pair" if "pairs" in settings else ""
    seeds = " and seeds" if len(settings["seeds"]) > 1 else ""
    units = dict(documents=" or ".join(map(str, settings["documents"])), seeds=seeds)
    return TEXT["report"].format(
        answer=said.markdown(),
        larger=TEXT[f"larger{paired}"],
        clean=TEXT[f"clean{paired}"].format(large=large, small=small),
        first=TEXT[f"first{paired}"].format(large=large, small=small),
        equal_bits=equal_bits(ratios, contrasts, code),
        compared=TEXT[f"compared{paired}"].format(
            large=large, small=small, step=verdict["thresholds"]["step"]
        ),
        rows=TEXT[f"rows{paired}"].format(**units),
        small=small,
        large=large,
        step=verdict["thresholds"]["step"],
        seeds=seeds,
        by_code="; ".join(f"{name} {factor(of)}" for name, of in verdict["by_code"].items()),
        equal_output=equal_output(ratios, code),
        reached=markdown(verdict["reached"]),
        rates=under_each,
        training=f"{training_rows * settings['ctx']:,}",
        backed_off=rate.BACKED_OFF,
        bound=over_bound,
        on_front=sum(row["front"] for row in rates if row["code"] == "8 bits"),
        n_saes=len(found.saes),
        directions=direction_table(tables["directions.csv"]),
        softmax=softmax,
        finish=kl_finetune.section(tables["finish.csv"]),
        observer=prequential_probe.section(tables["observer.csv"]),
        about="\n".join(about_the_run(label_last_block(found.saes, settings), settings)),
    )


# ------------------------------------------------------------------------------------------------ figures
BOUNDED = {R2: ("1 − R²", "sigma"), "1-r2_fisher": ("1 − R²_Fisher", "fisher"), CE: ("ΔCE / L_orig", "")}


def rate_figure(
    lines: RateCurves, codes: Sequence[Coded], spectra: dict[tuple[str, str], list[dict]], code: str
) -> "Figure":
    """Loss against bits: a column for every depth, a row for every geometry. spectra {hook: its rows}."""
    plt, colours = pyplot(), model_colours(lines.models)
    depths = sorted({depth for _, depth in lines.hooks})
    shape = dict(sharex=True, sharey="row", squeeze=False, layout="constrained")
    figure, axes = plt.subplots(len(BOUNDED), len(depths), figsize=(2.2 * len(depths) + 2, 7), **shape)
    reach = np.concatenate([lines.along_k(one.bits, hook)[0] for one in codes for hook in lines.hooks])
    bits = np.geomspace(reach.min() / 1.1, reach.max() * 1.1, 100)
    for row, (name, (label, column)) in zip(axes, BOUNDED.items()):
        shown = []
        for (model, depth), ks in lines.hooks.items():
            axis, colour = row[depths.index(depth)], colours[model]
            for one in codes:
                x, y = (lines.along_k(v, (model, depth))[0] for v in (one.bits, one.losses[name]))
                shown += [value for value in y if value > 0]
                if one.name == code:
                    of = model if depth == PAIRED else f"{model}, depth {depth}"
                    says = [f"{of}, k {k}: {a:.4g} bits, {b:.4g}" for k, a, b in zip(ks, x, y)]
                    joined_points(axis, x, y, says, colour)
                else:
                    style = (":", 1.5, 0.7) if one.name == "8 bits" else ("-", 0.6, 0.6)
                    axis.plot(x, y, color=colour, **dict(zip(("linestyle", "linewidth", "alpha"), style)))
            if column:
                spectrum = np.array([s[column] for s in spectra[model, depth]])
                axis.plot(bits, rate.share_left(spectrum, bits), "--", color=colour, linewidth=0.9)
        ends = (min(shown) / 1.3, max(shown) * 1.3)
        row[0].set(xscale="log", yscale="log", xlim=(bits[0], bits[-1]), ylim=ends, ylabel=label)
        decade_ticks(row[0].yaxis, ends)
        for axis in row:
            decade_ticks(axis.xaxis, (bits[0], bits[-1]))
            axis.grid(alpha=0.3)
    for axis, depth in zip(axes[0], depths if lines.unit == "depth" else ()):
        axis.set_title(f"depth {depth}", fontsize=9)
    line = plt.Line2D
    handles = [line([], [], color=colour, label=model) for model, colour in colours.items()]
    handles += [
        line([], [], color="0.3", marker="o", markersize=4, label=f"values at {code}"),
        line([], [], color="0.3", linewidth=0.6, label="other steps"),
        line([], [], color="0.3", linestyle=":", label="8 bits a value"),
        line([], [], color="0.3", linestyle="--", linewidth=0.9, label="Gaussian bound"),
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.supxlabel("bits a token", fontsize=10)
    return figure


def ratio_figure(
    ratios: Sequence[dict], contrasts: dict[str, dict], code: str, over: str, margin: float
) -> "Figure":
    """The ratio of losses at equal bits in every geometry. over: which hooks' over which, where all pairs
    stand together; a pair has its own panel.
    """
    n = len(contrasts)
    figure, axes = pyplot().subplots(n, 1, figsize=(7.5, 3.8 * n), squeeze=False, layout="constrained")
    for axis, (which, by_loss) in zip(axes[:, 0], contrasts.items()):
        for i, (name, of) in enumerate(by_loss.items()):
            here = [
                row for row in ratios if (row["code"], row["at_equal"], row["of"]) == (code, "bits", name)
            ]
            pairs = [row for row in here if which in (ALL, row[unit(row)])]
            says = [f"{name} at {unit(row)} {row[unit(row)]}: {row['ratio']:.3g}" for row in pairs]
            at, ratio = np.array([row["ratio"] for row in pairs]), of["ratio"]
            points(axis, at, np.full(len(at), i), says, s=24, color="0.6")
            axis.plot(ratio["factor"], i, "D", color=BLUE, zorder=3)
            axis.plot([ratio["lo"], ratio["hi"]], [i, i], color=BLUE, linewidth=2, zorder=3)
        of_ce = by_loss[CE]["ratio"]["factor"]
        if np.isfinite(of_ce):
            axis.axvspan(of_ce / margin, of_ce * margin, color=ORANGE, alpha=0.12, zorder=0)
            axis.axvline(of_ce, color=ORANGE, linewidth=1, zorder=1)
        axis.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(by_loss)), list(by_loss))
        axis.set(xlabel=f"loss of {over if which == ALL else which} at equal bits", xscale="log")
        grey = "grey: a pair of hooks; " if which == ALL else ""
        axis.set_title(f"{grey}line: {CE}, band: a factor of {margin:g} around it", fontsize=9)
        decade_ticks(axis.xaxis, axis.get_xlim())
        axis.grid(alpha=0.3, axis="x")
        axis.invert_yaxis()
    return figure


def colour_at(colours: dict[str, np.ndarray], model: str, layer: int) -> np.ndarray:
    """Of a model, or with --pairs of a hook."""
    return colours[model if model in colours else f"{model}@{layer}"]


def front_figure(rates: Sequence[dict], models: Sequence[str], ks: Sequence[int]) -> "Figure":
    """CE_rec against L0, the front of every hook joined."""
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    colours = model_colours(models)
    rows = sorted((row for row in rates if row["code"] == "8 bits"), key=lambda row: row["l0"])
    for hook, of_hook in grouped(rows, ["model", "layer"]).items():
        l0, ce, on_front = (np.array([row[name] for row in of_hook]) for name in ("l0", CE, "front"))
        says = np.array([f"{sae_name(row)}: {1 - row[CE]:.4g}" for row in of_hook])
        kept, beaten, colour = on_front == 1, on_front == 0, colour_at(colours, *hook)
        joined_points(axis, l0[kept], 1 - ce[kept], says[kept], colour)
        points(axis, l0[beaten], 1 - ce[beaten], says[beaten], color=[colour], s=28, marker="X")
    handles = [pyplot().Line2D([], [], color=colour, marker="o", label=m) for m, colour in colours.items()]
    axis.legend(handles=handles, fontsize=8, title="one line a hook")
    axis.set(xscale="log", xlabel="L0, active latents a token", ylabel="CE_rec")
    axis.set_xticks(ks, map(str, ks))
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    return figure


def direction_figure(directions: Sequence[dict], models: Sequence[str]) -> "Figure":
    """How much of the error the first eigendirections hold, of Sigma and of G."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    colours, share = model_colours(models), np.linspace(0, 1, rate.GROUPS + 1)
    for (name, model, layer), rows in grouped(directions, ["directions", "model", "layer"]).items():
        axis, colour = axes["ΣG".index(name)], colour_at(colours, model, layer)
        error, own = (
            np.r_[0, np.cumsum([row[column] for row in rows])] for column in ("error", OWN_SHARE[name])
        )
        says = [
            f"{model}@{layer}: {held:.0%} of the error in the first {x:.0%}" for x, held in zip(share, error)
        ]
        joined_points(axis, share, error, says, colour, s=10, linewidth=0)
        axis.plot(share, own, ":", color=colour, alpha=0.7, linewidth=1)
    for axis, name, words in zip(axes, "ΣG", ("variance of h", "trace of G")):
        axis.plot([0, 1], [0, 1], color="0.4", linewidth=0.8)
        axis.set(xlabel=f"eigendirections of {name}, largest first (share)")
        axis.set_title(f"solid: squared error, dotted: {words}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share that they hold")
    handles = [pyplot().Line2D([], [], color=colour, label=model) for model, colour in colours.items()]
    axes[1].legend(handles=handles, fontsize=8, title="one line a hook")
    return figure
