"""How values are written and read again: one number format for every table, and files of one kind each.

Numbers in text come first, then rows and tables in text (Markdown), then files: CSV, JSON and npz, the same
bytes from the same values. What is not a number is never a blank or a nan: it is called `undefined`.
"""

import contextlib
import csv
import functools
import io
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transport_geometry.errors import reading

import numpy as np

Content = bytes | Callable[[io.BufferedWriter], object]  # of a file: the bytes, or what writes them
NAMES = {
    "model",
    "sae",
    "sae_a",
    "sae_b",
    "recipe",
    "before",
    "next",
    "weights",
}  # columns that stay text: a folder may be called 16
UNDEFINED = "undefined"


# --------------------------------------------------------------------------------------------------- numbers
def is_undefined(value: object) -> bool:
    return value is None or isinstance(value, (float, np.floating)) and not math.isfinite(value)


def cell(value: object) -> str:
    """A value in a table.

    >>> [cell(value) for value in (1 / 3, 1e-7, 12, "base", math.nan, None)]
    ['0.333333', '1e-07', '12', 'base', 'undefined', 'undefined']
    """
    if is_undefined(value):
        return UNDEFINED
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def short(value: object) -> str:
    """The same where people read it, in three digits.

    >>> [short(value) for value in (1 / 3, 12, math.nan)]
    ['0.333', '12', 'undefined']
    """
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else cell(value)


def signed(value: float | None, digits: int = 2) -> str:
    """A difference in text.

    >>> signed(0.1234), signed(-2, 1), signed(math.nan)
    ('+0.12', '-2.0', 'undefined')
    """
    return UNDEFINED if value is None or is_undefined(value) else f"{value:+.{digits}f}"


def bounds(lo: float | None, hi: float | None, digits: int = 2) -> str:
    """An interval in text; an end that is undefined leaves none.

    >>> bounds(0.1, 0.14), bounds(0.1, math.nan)
    ('[+0.10, +0.14]', 'undefined')
    """
    ends = signed(lo, digits), signed(hi, digits)
    return UNDEFINED if UNDEFINED in ends else f"[{', '.join(ends)}]"


def span(value: float | None, lo: float | None, hi: float | None, digits: int = 2) -> str:
    """A difference and its interval in text.

    >>> span(0.12, 0.1, 0.14), span(0.12, None, None), span(None, 0.1, 0.14)
    ('+0.12 [+0.10, +0.14]', '+0.12 [undefined]', 'undefined')
    """
    number, interval = signed(value, digits), bounds(lo, hi, digits)
    if number == UNDEFINED:
        return UNDEFINED
    return f"{number} [{interval}]" if interval == UNDEFINED else f"{number} {interval}"


def estimate(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """`span` of a column and its interval, the columns name_lo and name_hi.

    >>> estimate({"dce": 0.12, "dce_lo": 0.1, "dce_hi": 0.14}, "dce")
    '+0.12 [+0.10, +0.14]'
    """
    return span(row[name], row[f"{name}_lo"], row[f"{name}_hi"], digits)


def percent(value: float | None) -> str:
    """A share in text.

    >>> percent(0.123), percent(math.nan)
    ('12%', 'undefined')
    """
    return UNDEFINED if value is None or is_undefined(value) else f"{value:.0%}"


def readable_count(n: int) -> str:
    """A whole number by its scale, where nothing is lost; `common.parse_count` reads it.

    >>> readable_count(300_000), readable_count(2 * 10**9), readable_count(1234)
    ('300k', '2B', '1234')
    """
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{letter}"
    return str(n)


# ------------------------------------------------------------------------------------------------------ rows
def grouped(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[tuple, list[dict[str, Any]]]:
    """{values of the named columns: their rows}, in the order of the first of each.

    >>> grouped([{"k": 8, "r": 1}, {"k": 4, "r": 2}, {"k": 8, "r": 3}], ["k"])[8,]
    [{'k': 8, 'r': 1}, {'k': 8, 'r': 3}]
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


# ------------------------------------------------------------------------------------------------------ text
def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A table that reads as text and renders as Markdown; all columns of the first row where none are named.

    >>> print(markdown([{"k": 8, "r2": 0.98765}, {"k": 128, "r2": None}], ["k", "r2"]))
    | k   | r2        |
    |-----|-----------|
    | 8   | 0.988     |
    | 128 | undefined |
    """
    columns = list(rows[0] if columns is None else columns)
    lines = [columns] + [[short(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    head, *body = (
        "| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths)) + " |" for line in lines
    )
    return "\n".join([head, rule, *body])


# ------------------------------------------------------------------------------------------------------ files
def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """A table's file, every value as `cell` writes it."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([cell(row[column]) for column in columns] for row in rows)
    return text.getvalue().encode()


def read_table(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a table with numbers as int or float, names as text; `undefined` is nan. Raises Damaged."""
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        return [
            {name: text if name in NAMES else _value(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return math.nan if text == UNDEFINED else text


def as_json(content: object) -> bytes:
    """A JSON file. Raises ValueError for a nan: see `plain`."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The same in JSON's types: numpy's numbers as Python's, tuples as lists, null for what is not finite.

    >>> plain({"lo": np.float64("nan"), "n": np.int64(3), "ends": (1.0, 2.0)})
    {'lo': None, 'n': 3, 'ends': [1.0, 2.0]}
    """
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_npz(arrays: Mapping[str, np.ndarray]) -> Content:
    """What writes an npz file of these arrays, in the order of their names."""
    named: dict[str, Any] = dict(sorted(arrays.items()))
    return functools.partial(np.savez_compressed, **named)


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Raises Damaged."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        return dict(file)
