"""TODO tables."""

import contextlib
import csv
import functools
import io
import json
import math
import pathlib
from collections.abc import Callable

from transport_geometry.errors import reading

import numpy as np

Content = bytes | Callable[[io.BufferedWriter], object]  # of a file: the bytes, or what writes them
NAMES = {"model", "sae", "sae_a", "sae_b", "recipe"}  # columns that stay text: a folder may be called 16


# -------------------------------------------------------------------------------------- formats: one of each
def cell(value) -> str:
    """One number format for every table; what is not a number says so."""
    if value is None or (isinstance(value, (float, np.floating)) and not math.isfinite(value)):
        return "undefined"
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def as_csv(rows: list[dict], columns: list[str]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([cell(row[c]) for c in columns] for row in rows)
    return text.getvalue().encode()


def read_table(path: pathlib.Path) -> list[dict]:
    """Rows of a table with numbers as int or float, names as text; `undefined` is nan. Raises Damaged."""

    def value(text):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return math.nan if text == "undefined" else text

    with reading(path), path.open(newline="", encoding="utf-8") as file:
        return [
            {name: text if name in NAMES else value(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def plain(value):
    """For JSON: plain Python, null for nan."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def as_npz(arrays: dict[str, np.ndarray]) -> Content:
    return functools.partial(np.savez_compressed, **dict(sorted(arrays.items())))


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Raises Damaged."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        return dict(file)


def readable_count(n: int) -> str:
    """300000 -> '300k'; the inverse of parse_count for round numbers."""
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{letter}"
    return str(n)


def grouped(rows: list[dict], names: list[str]) -> dict[tuple, list[dict]]:
    """{values of the named columns: their rows}, in the order of the first of each."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def percent(value: float | None) -> str:
    """12%; what is not a number says so."""
    return f"{value:.0%}" if value is not None and math.isfinite(value) else cell(None)


def estimate(row: dict, name: str, digits: int = 2) -> str:
    """`span` of a column and its interval, the columns name_lo and name_hi."""
    return span(row[name], row[f"{name}_lo"], row[f"{name}_hi"], digits)


# --------------------------------------------------------------------------------------- tables and figures
def markdown(rows: list[dict], columns: list[str]) -> str:
    """A table that reads as text and renders as Markdown."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) and math.isfinite(v) else cell(v)
    table = [columns] + [[short(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["| " + " | ".join(f"{v:<{w}}" for v, w in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def signed(value: float | None, digits: int = 2) -> str:
    """+0.12; what is not a number says so."""
    return f"{value:+.{digits}f}" if value is not None and math.isfinite(value) else cell(None)


def bounds(lo: float | None, hi: float | None, digits: int = 2) -> str:
    """[+0.10, +0.14], or `undefined` where an end is."""
    ends = signed(lo, digits), signed(hi, digits)
    return cell(None) if cell(None) in ends else f"[{', '.join(ends)}]"


def span(value: float | None, lo: float | None, hi: float | None, digits: int = 2) -> str:
    """+0.12 [+0.10, +0.14]; where there is a value and no interval: +0.12 [undefined]."""
    number, interval = signed(value, digits), bounds(lo, hi, digits)
    return (
        number
        if number == cell(None)
        else f"{number} {interval}"
        if interval != cell(None)
        else f"{number} [{interval}]"
    )
