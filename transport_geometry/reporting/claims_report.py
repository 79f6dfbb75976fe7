"""The two claims in words: what proxies do here, in a table and two sentences, and why nothing is said in
general.
"""

from collections.abc import Sequence

from transport_geometry.measuring.metrics import EUCLIDEAN_CONTROLS
from transport_geometry.records.tables import bounds, estimate, markdown, percent, signed
from transport_geometry.reporting.console import models_in_words, number
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics.claims import ARMS, LEAVES, MARGIN, R2, SWD, row_of
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS

import numpy as np

TEXT = blocks("leaderboard")
OF_LEAF = {leaf: TEXT[f"here: {leaf}"] for leaf in LEAVES}


def layers_of(models: Sequence[str]) -> str:
    """What a claim in general is about: hooks of one model speak about that model.

    >>> layers_of(["a"]), layers_of(["a", "b"])
    ('other layers of a', 'other layers of a and b, not other models')
    """
    return f"other layers of {models_in_words(models)}" + (", not other models" if len(models) > 1 else "")


def in_short(board: list[dict]) -> str:
    """The claim here, in a few sentences: R², SWD and the best Euclidean control, then the pairs."""
    r2, swd = row_of(board, R2), row_of(board, SWD)
    if not r2 or not np.isfinite(r2["partial"]):
        return TEXT["here: nothing to order"]
    text = TEXT["here: r2"].format(r2=number(as_here(r2, "partial"), "partial"))
    if swd:
        of_swd, minus = number(as_here(swd, "partial"), "partial"), number(r2, "swd_here")
        text += TEXT["here: swd"].format(swd=of_swd, minus=minus)
        if controls := [row for name in EUCLIDEAN_CONTROLS if (row := row_of(board, name))]:
            best = max(controls, key=lambda row: np.nan_to_num(row["partial"], nan=-2.0))
            text += TEXT["here: control"].format(
                n=len(controls),
                name=best["proxy"],
                rho=number(as_here(best, "partial"), "partial"),
                minus=number(best, "swd_here"),
            )
    if r2["pairs"] > 0:
        text += TEXT["here: pairs"].format(n=f"{r2['pairs']:.0f}", r2=percent(r2["right"]))
        text += f" and SWD {percent(swd['right'])}" if swd else ""
    for arm in ARMS.values():
        of_r2, of_swd_there = row_of(board, R2, arm), row_of(board, SWD, arm)
        if of_r2 and of_swd_there and of_r2["pairs"] > 0:
            text += f"; {arm}, {percent(of_r2['right'])} and {percent(of_swd_there['right'])}"
    return f"{text}."


def none_in_general(board: list[dict], models: Sequence[str]) -> str:
    """Why nothing is said in general, in one sentence; empty where something is."""
    rows = [row for row in (row_of(board, R2), row_of(board, SWD)) if row]
    least = min(rows, key=lambda row: row["n_effective"], default=None)
    if least is None or least["n_effective"] >= MIN_EFFECTIVE_HOOKS:
        return ""
    hooks = least["n_clusters"]
    if hooks < MIN_EFFECTIVE_HOOKS:
        why = "there is 1 hook" if hooks == 1 else f"there are {hooks} hooks"
    else:
        name, effective = {R2: "R²", SWD: "SWD"}[least["proxy"]], least["n_effective"]
        why = TEXT["too few effective hooks"].format(
            name=name, phi=least["phi"], hooks=hooks, effective=effective
        )
    return TEXT["none in general"].format(layers=layers_of(models), why=why, needed=MIN_EFFECTIVE_HOOKS)


def as_here(row: dict, name: str) -> dict:
    """A column with its interval over documents, as `estimate` and `number` take it."""
    ends = {f"{name}_{end}": row[f"{name}_here_{end}"] for end in ("lo", "hi")}
    return {name: row[name]} | ends


def estimate_here(row: dict, name: str) -> str:
    """`tables.estimate` with the interval over documents."""
    return estimate(as_here(row, name), name)


def share(row: dict, name: str = "right") -> str:
    """A share of pairs with its interval, in percent.

    >>> share({"right": 0.5, "right_lo": 0.25, "right_hi": 0.75})
    '50% [25%, 75%]'
    """
    value, lo, hi = (row[f"{name}{end}"] for end in ("", "_lo", "_hi"))
    return percent(value) + ("" if np.isnan(lo) else f" [{percent(lo)}, {percent(hi)}]")


def table(board: list[dict], stratum: str = "pooled") -> str:
    """The claim here in Markdown, the best rank correlation first; where there are two arms of --sinks, the
    pooled table shows the pairs of each.
    """
    rows = [row for row in board if (row["target"], row["stratum"]) == ("ce_rec", stratum)]
    rows.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2.0))
    shown = []
    for row in rows:
        cells = {
            "proxy": row["proxy"],
            "partial Spearman": estimate_here(row, "partial"),
            "minus r2": "" if row["proxy"] == R2 else estimate_here(row, "diff_r2"),
            "swd_tok minus it": "" if row["proxy"] == SWD else estimate(row, "swd_here"),
        }
        if row["pairs"] > 0:
            minus = f"{signed(row['right_r2'])} {bounds(row['right_r2_lo'], row['right_r2_hi'])}"
            cells |= {
                "pairs": f"{row['pairs']:.0f}",
                "rightly": share(row),
                "rightly, minus r2": minus,
            }
        for arm in ARMS.values() if stratum == "pooled" else ():
            if own := row_of(board, row["proxy"], arm):
                cells[f"rightly, {arm}"] = share(own)
        shown.append(cells)
    return markdown(shown, list(shown[0]))


def how_to_read(settings: dict, behind: str) -> str:
    """Under the table. behind: what the intervals resample, as `results.describe_units` says it."""
    several = len(settings["seeds"]) > 1
    return TEXT["how to read here"].format(
        behind=behind, seeds=" and seeds" if several else "", margin=MARGIN
    )
