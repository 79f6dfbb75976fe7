"""Charts of a page: plain SVG, a mark for every row, and in each mark the row's name and numbers.

What is drawn is a function of the rows alone, to the byte. Colours are those of Okabe and Ito (2008), which
colour-blind readers tell apart; the page says what each is in light and in dark, and every colour comes with
a shape or is named by its mark.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from transport_geometry.measuring.metrics import DISTORTION, Metric
from transport_geometry.records.tables import UNDEFINED, grouped, is_undefined, readable_count

COLOURS = 8  # that the page has, named c0 to c7
SHAPES = (  # around 0, 0, of about the same area
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z",
    "M-4-4h8v8h-8Z",
    "M0-5.2L5 3.6H-5Z",
    "M0-5.6L5.6 0L0 5.6L-5.6 0Z",
    "M0 5.2L-5-3.6H5Z",
    "M-1.8-5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4Z",
)
WIDTH, HEIGHT = 440, 320  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 44  # what its axes stand in
TITLES = {"r2": "R²", "ce_rec": "CE_rec"}  # how metrics are called in text, where not by their names


Key = tuple[str, int | None, int | None]  # of a legend: a name, and its colour or shape or both


@dataclass(frozen=True)
class Mark:
    """One row: where it is drawn, with its interval, and what is said of it, lines of text."""

    x: float
    y: float
    says: str
    colour: int = 0
    shape: int = 0
    lo: float = math.nan
    hi: float = math.nan


@dataclass(frozen=True)
class Axis:
    """label: its text; log: of values above 0; falling: the largest value at the left or the bottom."""

    label: str
    log: bool = False
    falling: bool = False
    counts: bool = False  # whole numbers, written by their scale


@dataclass(frozen=True)
class Panel:
    """Marks over two axes. joined: those of one colour and shape, in the order given; zero: a line at y =
    0.
    """

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    joined: bool = False
    zero: bool = False


# -------------------------------------------------------------------------------------------------- of SAEs
def of_saes(
    rows: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    metrics: Sequence[Metric],
    about: str = "Every SAE",
    target: str = "ce_rec",
) -> str:
    """A panel for each metric, against the target: one mark an SAE, shape = k, colour = model, or, of one
    model's SAEs that have one, their word. rows: of conditions.csv, without null rows, perhaps with a `word`,
    and with the target's interval as target_lo and target_hi.

    SAEs worse than the mean would press the others together: they are counted and not drawn, where there are
    others.
    """
    drawn = [row for row in rows if not row["r2"] < 0] or rows
    there = [model for model in models if any(row["model"] == model for row in rows)]
    by, values = "model", there
    if len(there) == 1 and all("word" in row for row in rows):
        by, values = "word", sorted({row["word"] for row in rows})
    ks = sorted({row["k"] for row in rows}, key=lambda k: (not isinstance(k, int), k))
    panels = []
    for metric in metrics:
        log = metric.score is DISTORTION
        label = f"{called(metric.name)} (log scale, less at the right)" if log else called(metric.name)
        marks = tuple(
            Mark(
                row[metric.name],
                row[target],
                "\n".join([sae_words(row), *numbers(row, [*(m.name for m in metrics), target])]),
                values.index(row[by]),
                ks.index(row["k"]),
                row.get(f"{target}_lo", math.nan),
                row.get(f"{target}_hi", math.nan),
            )
            for row in drawn
        )
        panels.append(Panel(Axis(label, log, falling=log), Axis(called(target)), marks))
    keys: list[Key] = [(value, i, None) for i, value in enumerate(values)]
    shapes: list[Key] = [("no k" if k in (0, "none") else f"k = {k}", None, i) for i, k in enumerate(ks)]
    names = ", ".join(called(metric.name) for metric in metrics)
    caption = f"{about}: {names} against {called(target)}; colour = {by}, shape = k."
    if len(drawn) < len(rows):
        caption += f" Not drawn: {len(rows) - len(drawn)} with an R² below 0, worse than the mean of all."
    return figure(panels, [*keys, *shapes], caption)


def of_deltas(rows: Sequence[dict[str, Any]], difference: str) -> str:
    """Two panels a depth, the gaps in R² and in CE_rec against training tokens: a line for each k. rows: of
    deltas.csv, one pair and one arm. difference: in words, which minus which.
    """
    ks = sorted({row["k"] for row in rows})
    panels = []
    for depth, here in grouped(rows, ["depth"]).items():
        where = f", depth {depth[0]}" if len({row["depth"] for row in rows}) > 1 else ""
        for name in ("r2", "ce_rec"):
            marks = tuple(
                Mark(
                    row["tokens"],
                    row[f"delta_{name}"],
                    "\n".join([f"k {row['k']}{where}, {of_budget(row)}", *gaps(row)]),
                    ks.index(row["k"]),
                    ks.index(row["k"]),
                    row[f"delta_{name}_lo"],
                    row[f"delta_{name}_hi"],
                )
                for row in sorted(here, key=lambda row: (row["k"], row["tokens"]))
            )
            x = Axis("training tokens (log scale)", log=True, counts=True)
            panels.append(Panel(x, Axis(f"Δ{called(name)}{where}"), marks, joined=True, zero=True))
    keys: list[Key] = [(f"k = {k}", i, i) for i, k in enumerate(ks)]
    return figure(panels, keys, f"{difference}, with 95% intervals, over training tokens.")


def of_budget(row: Mapping[str, Any]) -> str:
    return f"{readable_count(row['tokens'])} tokens, {row['n_seeds']} seeds"


def gaps(row: Mapping[str, Any]) -> list[str]:
    """Lines of what a row of deltas.csv says of R² and CE_rec."""
    names = ("delta_r2", "delta_ce_rec")
    return [f"Δ{called(n.removeprefix('delta_'))} {figures(row[n])}{interval(row, n)}" for n in names]


def of_hooks(
    rows: Sequence[Mapping[str, Any]], models: Sequence[str], x: tuple[str, str], y: tuple[str, str]
) -> str:
    """One mark a hook, colour and shape = model. x, y: (column, label)."""
    marks = tuple(
        Mark(
            row[x[0]],
            row[y[0]],
            "\n".join(
                [
                    f"{row['model']}, block {row['layer']}",
                    *(f"{label} {figures(row[of])}" for of, label in (x, y)),
                ]
            ),
            list(models).index(row["model"]),
            list(models).index(row["model"]),
        )
        for row in rows
    )
    keys: list[Key] = [(model, i, i) for i, model in enumerate(models)]
    panel = Panel(Axis(x[1]), Axis(y[1]), marks, zero=True)
    return figure([panel], keys, f"Every hook: {y[1]} against {x[1]}; colour and shape = model.")


def called(name: str) -> str:
    return TITLES.get(name, name)


def sae_words(row: Mapping[str, Any]) -> str:
    """An SAE in words, from a row of conditions.csv.

    >>> sae_words(dict(model="stdlib-s", layer=3, sae="topk-x4", recipe="base", k=8, seed=1, tokens=300_000))
    'stdlib-s, block 3: topk-x4, k 8, seed 1, 300k tokens'
    """
    trained = f", seed {row['seed']}, {readable_count(row['tokens'])} tokens" if row.get("tokens") else ""
    recipe = f", {row['recipe']}" if row["recipe"] != "base" else ""
    k = f", k {row['k']}" if row["k"] not in (0, "none") else ""
    return f"{row['model']}, block {row['layer']}: {row['sae']}{recipe}{k}{trained}"


def numbers(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Lines of what the row says under these names, and its word."""
    lines = [f"{called(name)} {figures(row[name])}{interval(row, name)}" for name in names]
    return lines + ([str(row["word"])] if "word" in row else [])


def interval(row: Mapping[str, Any], name: str) -> str:
    ends = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    return "" if any(map(is_undefined, ends)) else f" [{figures(ends[0])}, {figures(ends[1])}]"


def figures(value: Any) -> str:
    """Four digits; `tables.short` has three, and R² of .998 and .9984 are not the same."""
    return UNDEFINED if is_undefined(value) else f"{value:.4g}"


# --------------------------------------------------------------------------------------------------- drawing
def figure(panels: Sequence[Panel], keys: Sequence[Key], caption: str) -> str:
    """HTML of a figure: panels side by side where there is room, on one scale of height, so that
    they can be compared.
    """
    placed = [mark for panel in panels for mark in panel.marks if has_place(mark, panel)]
    heights = [y for m in placed for y in (m.y, m.lo, m.hi) if math.isfinite(y)]
    drawn = "".join(svg(panel, heights) for panel in panels)
    legend = "".join(f"<li>{swatch(colour, shape)}{escape(name)}</li>" for name, colour, shape in keys)
    return (
        f'<figure class="chart"><div class="panels">{drawn}</div>\n<ul class="keys">{legend}</ul>\n'
        f"<figcaption>{escape(caption)} Point at a mark, tap it, or go from mark to mark with the arrow "
        "keys: its name and numbers.</figcaption></figure>\n"
    )


def swatch(colour: int | None, shape: int | None) -> str:
    tone = "plain" if colour is None else f"c{colour % COLOURS}"
    path = SHAPES[0 if shape is None else shape % len(SHAPES)]
    mark = f'<path class="{tone}" d="{path}"/>'
    return f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{mark}</svg>'


def svg(panel: Panel, heights: Sequence[float]) -> str:
    """heights: that the panel is to hold. Marks that have no place (undefined, or none on a log axis) are
    left out, and counted under the axes.
    """
    marks = [mark for mark in panel.marks if has_place(mark, panel)]
    left_out = len(panel.marks) - len(marks)
    name = f"{panel.y.label} against {panel.x.label}"
    if not marks:
        return f"<p>{escape(name)}: nothing to draw, all {left_out} {UNDEFINED}.</p>"
    ys = [*heights, 0.0] if panel.zero else heights
    to_x = scale(panel.x, [m.x for m in marks], LEFT, WIDTH - RIGHT)
    to_y = scale(panel.y, ys, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(name)}">']
    for value, text in ticks(panel.x, [m.x for m in marks]):
        x = at(to_x(value))
        parts.append(f'<path class="grid" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="mid" x="{x}" y="{HEIGHT - BOTTOM + 16}">{text}</text>')
    for value, text in ticks(panel.y, ys):
        y = at(to_y(value))
        heavy = " zero" if panel.zero and value == 0 else ""
        parts.append(f'<path class="grid{heavy}" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y}" dy=".32em">{text}</text>')
    said = f"; {left_out} not drawn" if left_out else ""
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts.append(f'<text class="mid" x="{middle}" y="{HEIGHT - 8}">{escape(panel.x.label + said)}</text>')
    parts.append(
        f'<text class="mid" transform="translate(13 {(TOP + HEIGHT - BOTTOM) // 2}) rotate(-90)">'
        f"{escape(panel.y.label)}</text>"
    )
    if panel.joined:
        for (colour, _), line in grouped([vars(m) for m in marks], ("colour", "shape")).items():
            points = " ".join(f"{at(to_x(m['x']))},{at(to_y(m['y']))}" for m in line)
            parts.append(f'<polyline class="c{colour % COLOURS}" points="{points}"/>')
    for m in marks:
        x, tone = at(to_x(m.x)), f"c{m.colour % COLOURS}"
        if math.isfinite(m.lo) and math.isfinite(m.hi):
            parts.append(f'<path class="bar {tone}" d="M{x} {at(to_y(m.lo))}V{at(to_y(m.hi))}"/>')
    for m in marks:
        where = f'transform="translate({at(to_x(m.x))} {at(to_y(m.y))})" d="{SHAPES[m.shape % len(SHAPES)]}"'
        parts.append(
            f'<path class="mark c{m.colour % COLOURS}" {where}><title>{escape(m.says)}</title></path>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def has_place(mark: Mark, panel: Panel) -> bool:
    both = (mark.x, panel.x), (mark.y, panel.y)
    return all(math.isfinite(value) and (value > 0 or not axis.log) for value, axis in both)


def at(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """What the axis spans, in logs where it is one: its values and a twentieth on both sides."""
    placed = [math.log10(value) if axis.log else value for value in values]
    lo, hi = min(placed), max(placed)
    room = 0.05 * (hi - lo) or 0.5 * abs(hi) or 0.5
    return lo - room, hi + room


def scale(axis: Axis, values: Sequence[float], first: float, last: float) -> Any:
    """value -> coordinate between first and last."""
    lo, hi = ends(axis, values)
    if axis.falling:
        lo, hi = hi, lo
    return lambda value: (
        first + (last - first) * ((math.log10(value) if axis.log else value) - lo) / (hi - lo)
    )


def ticks(axis: Axis, values: Sequence[float]) -> list[tuple[float, str]]:
    """(value, text): the values themselves where they are few counts; about five round numbers
    otherwise.
    """
    lo, hi = ends(axis, values)
    if axis.counts and len(set(values)) <= 6:
        return [(value, readable_count(int(value))) for value in sorted(set(values))]
    if axis.log:
        powers = range(math.floor(lo), math.ceil(hi) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [step * 10.0**power for power, step in itertools.product(powers, steps)]
            found = [value for value in found if lo <= math.log10(value) <= hi]
            if len(found) >= 3:
                break
        return [(value, f"{value:.3g}") for value in found]
    rough = (hi - lo) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(lo / step), math.floor(hi / step) + 1)
    return [(n * step, f"{n * step:.{digits}f}".replace("-", "−")) for n in numbers]
