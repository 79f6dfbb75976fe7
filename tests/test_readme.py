"""Every figure of README's result sections comes from the committed reference folders: each sentence is made from them here, and no other
figure stands there."""
import csv
import json
import pathlib
import re

import numpy as np
import pytest

from common import signed, span

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs/reference"
SECTIONS = ("What you will see", "Does the gap survive training?", "Beyond SWD: the pullback Fisher")


def table(folder: str, name: str) -> list[dict]:
    with open(REFERENCE / folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdict(folder: str) -> dict:
    return json.loads((REFERENCE / folder / "verdict.json").read_text(encoding="utf-8"))


def of(row: dict, name: str, digits: int = 2) -> str:
    """+0.12 [−0.10, +0.14], as README prints it."""
    number = lambda end: float(row[name + end]) if row[name + end] not in ("", "undefined") else None
    return span(number(""), number("_lo"), number("_hi"), digits).replace("-", "−")


def leaderboard(folder: str) -> dict[str, dict]:
    return {row["proxy"]: row for row in table(folder, "leaderboard.csv") if row["target"] == "ce_rec" and row["stratum"] == "pooled"}


def plain(text: str) -> str:
    """Without line breaks and the spaces that align a table."""
    return re.sub(r"\s+", " ", text)


def section(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return plain(re.split(r"\n## ", text.split(f"\n## {name}\n")[1])[0])


def share(n: int, of: int) -> str:
    return f"{n} of {of}"


FIGURES: dict[str, callable] = {}


def figures(name: str):
    return lambda make: FIGURES.setdefault(name, make)
