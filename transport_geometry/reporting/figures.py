"""Plots: the program that draws them, colours that mean the same in every one, and bytes that do not change.

matplotlib is imported where something is drawn, not before: it is slow, and a run without plots needs none.
"""

import io
import types
import typing
from collections.abc import Sequence

from transport_geometry.measuring.metrics import DISTORTION, SIGNED, SIMILARITY, Metric

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


def points_legend(models: Sequence[str]) -> dict[str, typing.Any]:
    """For Figure.legend: what the points of SAEs are, colour = model, size = k."""
    line = pyplot().Line2D
    points = [
        line([], [], linestyle="", marker="o", color=colour, label=model)
        for model, colour in model_colours(models).items()
    ]
    size = line([], [], linestyle="", label="larger points: larger k")
    return dict(handles=[*points, size], fontsize=8, frameon=False)


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


def as_png(figure: "Figure") -> bytes:
    """A PNG without the program's version in it: the same bytes from the same numbers. Closes it."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return image.getvalue()
