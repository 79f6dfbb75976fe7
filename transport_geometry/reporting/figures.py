"""Figures: colours that mean the same in every one, the few kinds of panels that experiments draw, and each
figure as PNG and as SVG, to bytes that do not change.

matplotlib is imported where something is drawn, not before: it is slow, and a run without plots needs none.
"""

import io
import itertools
import re
import types
import typing
from collections.abc import Sequence

from transport_geometry.measuring.metrics import DISTORTION, SIGNED, SIMILARITY, Metric
from transport_geometry.records.condition import without_sinks

import numpy as np

# Okabe & Ito's, which colour-blind readers tell apart; beside a colour always a marker or a name
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pyplot() -> types.ModuleType:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def model_colours(models: Sequence[str]) -> dict[str, np.ndarray]:
    """{model: colour [4], RGBA}, dark to light from the first, the smallest: the same in every plot."""
    viridis = pyplot().get_cmap("viridis")
    return dict(zip(models, viridis(np.linspace(0.1, 0.85, len(models)))))


STEPS: tuple[tuple[int, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6))  # of a decade's ticks


def ticks_within(lo: float, hi: float) -> np.ndarray:
    """Round numbers between two positive ones: the fewest kinds of STEPS that give three, or even ones."""
    from matplotlib.ticker import MaxNLocator

    decades = 10.0 ** np.arange(np.floor(np.log10(lo)), np.ceil(np.log10(hi)) + 1)
    for steps in STEPS:
        at = np.sort(np.outer(decades, steps).ravel())
        at = at[(at >= lo * (1 - 1e-9)) & (at <= hi * (1 + 1e-9))]
        if len(at) >= 3:
            return at
    even = np.asarray(MaxNLocator(4).tick_values(lo, hi))
    return even[(even >= lo) & (even <= hi)]


def score_axis(axis: "Axes", metric: Metric, values: np.ndarray) -> None:
    """The x axis of a metric's score, larger = better, with the metric's own values as its ticks; values: all
    that are shown.
    """
    score, known = metric.score, values[np.isfinite(metric.score(values))]
    if score in (SIMILARITY, DISTORTION) and len(known):
        of_distance = (lambda x: 1 - x) if score is SIMILARITY else (lambda x: x)  # its own inverse
        ends = np.sort(of_distance(np.array([known.min(), known.max()])))
        ticks = of_distance(ticks_within(0.9 * ends[0], 1.1 * ends[1]))
        axis.set_xticks(score(ticks), [f"{tick:.6g}" for tick in ticks])
        axis.set_xticks([], minor=True)
    elif score is SIGNED:
        axis.xaxis.set_major_formatter(lambda x, at: f"{-x:g}" if x else "0")
    axis.set_xlabel(metric.name)


def decade_ticks(axis: typing.Any, ends: Sequence[float], fontsize: float = 8) -> None:
    """Plain numbers, as few as do not overlap, on a logarithmic axis of a panel that shows `ends`."""
    at = ticks_within(min(ends), max(ends))
    axis.set_ticks(at, [f"{tick:.6g}" for tick in at], fontsize=fontsize)
    axis.set_ticks([], minor=True)


def points_legend(models: Sequence[str], rows: Sequence[dict]) -> dict[str, typing.Any]:
    """For Figure.legend: what the points of these SAEs are, colour = model, size = k, shape = arm."""
    line = pyplot().Line2D
    points = [
        line([], [], linestyle="", marker="o", color=colour, label=model)
        for model, colour in model_colours(models).items()
    ]
    ks = sorted({row["k"] for row in rows})
    words = [
        "larger mark: larger k" + f" ({', '.join(map(str, ks))})" * (len(ks) <= 4),
        *["diamonds: trained without sinks"] * any(without_sinks(row["sae"]) for row in rows),
    ]
    points += [line([], [], linestyle="", label=text) for text in words]
    return dict(handles=points, fontsize=8, frameon=False)


def label_ends(axis: "Axes", lines: Sequence[tuple[float, str, typing.Any]], fontsize: float = 8) -> None:
    """Names right of the axis at the ends of lines, (y, name, colour), pushed apart where they would overlap.
    After all is drawn: the limits of y are what they are.
    """
    bottom_to_top = sorted(lines, key=lambda line: line[0])
    axis.get_ylim()  # which are fitted to what is drawn only when they are asked for
    to_axes = axis.transData + axis.transAxes.inverted()
    at = np.array([float(to_axes.transform((axis.get_xlim()[1], y))[1]) for y, *_ in bottom_to_top])
    gap = 1.1 * fontsize / (axis.get_window_extent().height / axis.figure.dpi * 72)  # of the axis
    for _ in range(100):
        lack = np.maximum(gap - np.diff(at), 0) / 2
        at[:-1] -= lack
        at[1:] += lack
    for y, (_, name, colour) in zip(at, bottom_to_top):
        axis.annotate(
            name,
            (1, float(y)),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=fontsize,
            color=colour,
            annotation_clip=False,
        )


# ------------------------------------------------------------------------------------------------- panels
def points(axis: "Axes", x: np.ndarray, y: np.ndarray, names: Sequence[str], **style: typing.Any) -> None:
    """A mark for every row, which says its name in a page. x, y [n]; rows without both numbers are left out.
    style: scatter's.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    style = {"edgecolor": "white", "linewidth": 0.5, "alpha": 0.75, **style}
    marks = axis.scatter(x[there], y[there], **style)
    marks.names = [name for name, known in zip(names, there) if known]  # type: ignore[attr-defined]


def joined_points(
    axis: "Axes",
    x: Sequence | np.ndarray,
    y: Sequence | np.ndarray,
    names: Sequence[str],
    colour: typing.Any,
    **style: typing.Any,
) -> None:
    """A line through marks, each of which says its name in a page. style: of the marks, scatter's."""
    axis.plot(x, y, color=colour, linewidth=1, alpha=0.8)
    marks = {"color": [colour], "s": 28, "alpha": 1, "zorder": 3, **style}
    points(axis, np.asarray(x), np.asarray(y), names, **marks)


def points_by_model(
    axis: "Axes", rows: Sequence[dict], x: np.ndarray, y: np.ndarray, models: Sequence[str]
) -> None:
    """SAEs: colour = model, size = k, diamonds = trained without sinks. rows: of conditions.csv; x, y [n]:
    where each is drawn.
    """
    x, y = np.asarray(x), np.asarray(y)
    names = np.array([f"{sae_name(row)}: {a:.4g}, {b:.4g}" for row, a, b in zip(rows, x, y)])
    looks = [(row["model"], row["k"] or 0, without_sinks(row["sae"])) for row in rows]
    colours, largest = model_colours(models), max([1, *(k for _, k, _ in looks)])
    # of one look: a page then draws one shape many times
    for look in sorted(set(looks), key=lambda look: (list(models).index(look[0]), *look[1:])):
        here = np.array([one == look for one in looks])
        model, k, without = look
        style = dict(s=12 + 80 * k / largest, color=[colours[model]], marker="D" if without else "o")
        points(axis, x[here], y[here], names[here], **style)


def sae_name(row: dict) -> str:
    """Of a row, in a few words: its hook, and what tells it from the others there."""
    trained = [f"{row['tokens']:,} tokens", f"seed {row['seed']}"] if row.get("tokens") else []
    return ", ".join([f"{row['model']}@{row['layer']} {row['sae']}", f"k {row['k']}", *trained])


def intervals(
    axis: "Axes",
    names: Sequence[str],
    at: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    looks: Sequence[tuple[typing.Any, str]],
    says: Sequence[str] = (),
    furthest: float = np.inf,
) -> None:
    """A row for each name, from below: its value, its interval and a line at 0; `says` in numbers at the
    right. looks: (colour, marker) of each. What lies further left than `furthest`, and than the right end, is
    only pointed to: one far worse would press the others together.
    """
    right = 1.1 * np.nanmax([0.05, *at, *hi])
    left = min(1.1 * np.nanmax([0.05, *-at, *-lo]), max(right, furthest))
    axis.set(xlim=(-left, right), ylim=(-0.6, len(names) - 0.4))
    for y, (x, first, last, (colour, marker)) in enumerate(zip(at, lo, hi, looks)):
        if last > first:
            axis.plot([first, last], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        if -left <= x <= right:
            axis.plot(x, y, marker, color=colour, markersize=6)
        if min(first, x) < -left:
            axis.plot(-left, y, "<", color=colour, markersize=6, clip_on=False)
    for y, text in enumerate(says):
        at_right = ("axes fraction", "data")
        axis.annotate(text, (1.01, y), xycoords=at_right, va="center", fontsize=7.5, family="monospace")
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3, axis="x")


def lines(
    axis: "Axes", curves: Sequence[tuple[Sequence, Sequence, Sequence, Sequence, dict]], zero: bool = True
) -> None:
    """Curves (x, y, lo, hi, plot's style) with their bands, and a line at 0."""
    for x, y, lo, hi, style in curves:
        axis.plot(x, y, **dict(markersize=4) | style)
        axis.fill_between(x, lo, hi, color=style["color"], alpha=0.2, linewidth=0)
    if zero:
        axis.axhline(0, color="0.4", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)


def heat_map(
    axis: "Axes", values: np.ndarray, rows: Sequence[str], columns: Sequence[str], says: typing.Callable
) -> None:
    """Shares [rows, columns] between 0 and 1 as blues, each with its number. says: value -> text."""
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = "white" if value > 0.5 else "black"
        axis.text(j, i, says(value), ha="center", va="center", fontsize=9, color=dark)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(labelsize=8, length=0)


def saes_against(
    rows: Sequence[dict],
    metrics: Sequence[Metric],
    models: Sequence[str],
    titles: Sequence[str],
    columns: int = 4,
    size: tuple[float, float] = (2.75, 2.5),
) -> "Figure":
    """CE_rec of every SAE against each metric's score, better to the right: a panel each."""
    columns = min(columns, len(metrics))
    n = -(-len(metrics) // columns)
    shape = dict(figsize=(size[0] * columns, size[1] * n), sharey=True, squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(n, columns, **shape)
    target = np.array([row["ce_rec"] for row in rows], float)
    for axis, metric, title in zip(axes.flat, metrics, titles):
        values = np.array([row[metric.name] for row in rows], float)
        points_by_model(axis, rows, metric.score(values), target, models)
        score_axis(axis, metric, values)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    figure.supylabel("CE_rec", fontsize=10)
    legend = points_legend(models, rows)
    legend["handles"].append(pyplot().Line2D([], [], linestyle="", label="all scores: better to the right"))
    figure.legend(**legend, loc="outside lower center", ncols=len(legend["handles"]))
    return figure


# column, its name, and how it is drawn: R² larger, since it lies under the next where there is no sink
ALONG_DEPTH: tuple[tuple[str, str, typing.Any, dict[str, typing.Any]], ...] = (
    ("r2", "R²", BLUE, dict(marker="o", s=70)),
    ("r2_nosink", "R² without sinks", SKY, dict(marker="s")),
    ("ce_rec", "CE_rec", ORANGE, dict(marker="D")),
)


def along_depth(rows: Sequence[dict], models: Sequence[str]) -> "Figure":
    """R², R² without sinks and CE_rec of SAEs by layer, at the middle k and the most tokens, means over
    seeds: a row of panels for each model, a column for each recipe and arm of --sinks.
    """
    ks = sorted({row["k"] for row in rows})
    k = ks[len(ks) // 2]
    most = {
        model: max([row["tokens"] for row in rows if row["model"] == model], default=0) for model in models
    }
    rows = [row for row in rows if (row["k"], row["tokens"]) == (k, most[row["model"]])]
    kinds = list(dict.fromkeys((row["recipe"], row["sae"]) for row in rows))
    arms = any(without_sinks(sae) for _, sae in kinds)
    shape = dict(figsize=(4.5 * len(kinds), 2.8 * len(models)), squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(len(models), len(kinds), **shape)
    for axis, (model, kind) in zip(axes.flat, itertools.product(models, kinds)):
        here = [row for row in rows if (row["model"], row["recipe"], row["sae"]) == (model, *kind)]
        layers = sorted({row["layer"] for row in here})
        for name, _, colour, style in ALONG_DEPTH:
            y = [np.mean([row[name] for row in here if row["layer"] == layer]) for layer in layers]
            says = [f"{model}@{layer} k {k}: {name} {value:.4g}" for layer, value in zip(layers, y)]
            joined_points(axis, layers, y, says, colour, **style)
        of_arm = "trained without sinks" if without_sinks(kind[1]) else "trained on every position"
        axis.set_title(", ".join([model, kind[0], f"k {k}", *[of_arm] * arms]), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    legend = [
        pyplot().Line2D([], [], color=colour, marker=style["marker"], label=label)
        for _, label, colour, style in ALONG_DEPTH
    ]
    figure.supxlabel("layer", fontsize=9)
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), fontsize=8, frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------- as files
INKS = {"#000000": "ink", "#ffffff": "paper", "#b0b0b0": "line", "#666666": "soft", "#4c4c4c": "soft"}


def as_svg(figure: "Figure", file: str) -> str:
    """For a page: `<svg>...</svg>`, whose text is text, whose black and white are the page's ink and paper,
    and in which every mark of `points` has its name as a `<title>`. file: what its ids are drawn from.
    """
    from xml.etree import ElementTree

    marks: list[typing.Any] = figure.findobj(lambda artist: hasattr(artist, "names"))
    for i, artist in enumerate(marks):
        artist.set_gid(f"marks-{i}")
    image = io.StringIO()
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": file}):
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    svg = "{http://www.w3.org/2000/svg}"
    ElementTree.register_namespace("", svg[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(image.getvalue())
    for element in root.iter():  # coordinates to a hundredth of a point; text and titles are left alone
        for name in {"d", "x", "y"} & element.attrib.keys():
            element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", element.attrib[name]))
    for metadata in root.findall(f"{svg}metadata"):
        root.remove(metadata)
    for i, artist in enumerate(marks):
        group = root.find(f".//*[@id='marks-{i}']")
        if group is None:  # no mark of it is drawn
            continue
        drawn = group.findall(f".//{svg}use") or group.findall(f".//{svg}path")
        for mark, text in zip(drawn, artist.names, strict=True):
            ElementTree.SubElement(mark, f"{svg}title").text = text
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub("|".join(INKS), lambda found: f"var(--{INKS[found[0]]})", text)


def as_png(figure: "Figure") -> bytes:
    """Without the program's version in it: the same bytes from the same numbers."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    return image.getvalue()


def close(figure: "Figure") -> None:
    """pyplot keeps every figure until it is told."""
    pyplot().close(figure)
