"""Exp-A's report: the gaps between two models, or two hooks, in Markdown, on a terminal and as figures."""

import itertools
import typing
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

from transport_geometry.records.tables import (
    estimate,
    grouped,
    markdown,
    percent,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting.console import ORANGE as COLOUR_OF_FLIPS
from transport_geometry.reporting.console import Answer, columns, hooks_in_words
from transport_geometry.reporting.expa_learning import budget_axis
from transport_geometry.reporting.figures import (
    BLUE,
    GREEN,
    ORANGE,
    heat_map,
    label_ends,
    lines,
    points,
    pyplot,
)
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics.hook_pair import PAIRED

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = blocks("expa")
ARM = ("small", "large", "recipe", "sinks")


def in_words(a: str, word: str, b: str, depths: Sequence[str]) -> str:
    """Two models, or two hooks, with a word between them."""
    return hooks_in_words(a, word, b) if list(depths) == [PAIRED] else f"{a} {word} {b}"


def depth_of(row: dict, deltas: Sequence[dict]) -> dict[str, str]:
    """A table's first column, where there are several."""
    return {"depth": str(row["depth"])} if len({one["depth"] for one in deltas}) > 1 else {}


def delta_table(deltas: Sequence[dict]) -> str:
    """In Markdown: every budget."""
    rows = []
    for row in deltas:
        interval = "[undefined]"
        if np.isfinite(row["mismatch_lo"]):
            interval = f"[{percent(row['mismatch_lo'])}, {percent(row['mismatch_hi'])}]"
        cells = {
            **depth_of(row, deltas),
            "k": row["k"],
            "tokens": readable_count(row["tokens"]),
            "seeds": row["n_seeds"],
            "ΔR²": estimate(row, "delta_r2", 3),
            "ΔR² no sink": estimate(row, "delta_r2_nosink", 3),
            "ΔCE_rec": estimate(row, "delta_ce_rec", 3),
            "ΔCE_rec sink clean": estimate(row, "delta_ce_rec_sinkclean", 3),
            "mismatch": f"{percent(row['mismatch'])} {interval}",
            "published rule": percent(row["mismatch_published"]),
            "ΔR²/ΔCE_rec": estimate(row, "ratio", 1),
        }
        rows.append(cells)
    return markdown(rows)


def in_short(deltas: Sequence[dict], difference: str, colour: bool) -> str:
    """For a terminal of 80 columns: the largest budget; what differs in sign is coloured."""
    if not deltas:
        return TEXT["nothing to compare"]
    most = max(row["tokens"] for row in deltas)
    deltas = [row for row in deltas if row["tokens"] == most]
    rows = []
    for row in deltas:
        cells = {
            **depth_of(row, deltas),
            "k": str(row["k"]),
            "tokens": readable_count(row["tokens"]),
            "gap in R²": estimate(row, "delta_r2", 3),
            "gap in CE_rec": estimate(row, "delta_ce_rec", 3),
            "mismatch": percent(row["mismatch"]),
        }
        rows.append(cells)
    codes = [COLOUR_OF_FLIPS if row["mismatch"] >= 0.5 else "" for row in deltas]
    under = f"gap: {difference}, 95%\nmismatch: seed pairs in which the two gaps differ in sign"
    return f"{columns(rows, codes, colour)}\n\n{under}"


# ----------------------------------------------------------------------------------------------- report.md
def report(
    said: Answer,
    verdicts: Sequence[dict],
    deltas: Sequence[dict],
    correlation: float,
    left_out: int,
    parts: Sequence[str],
    pictures: Iterable[str],
) -> str:
    """verdicts: as verdict.json has them; the first is the report's. correlation: of what a seed does in the
    two, nan where unknown. left_out: SAEs of other processors. parts: sections about training, and the
    settings. pictures: the figures' files.
    """
    first, tables = verdicts[0], {}
    for arm, here in grouped(deltas, ARM).items():
        difference = in_words(arm[1], "minus", arm[0], sorted({row["depth"] for row in here}))
        tables[arm] = dict(zip(ARM, arm), difference=difference, table=delta_table(here))
    shown = tables.pop(tuple(first[name] for name in ARM), None)
    sections = [TEXT["left out"].format(n=left_out)] if left_out else []
    if shown:
        known = TEXT["correlation"].format(value=signed(correlation)) if np.isfinite(correlation) else ""
        sections.append(TEXT["headline"].format(**shown, correlation=known))
        sections += [tree_section(first)] if "cells" in first else []
        sections.append(TEXT["mismatch"])
    *training, about = parts
    sections += [arms_section(verdicts, deltas), *training]
    sections += [TEXT["other deltas"].format(**table) for table in tables.values()]
    sections.append(about.rstrip("\n"))
    learning = [f"![learning curves]({name})" for name in sorted(pictures) if name.startswith("learning")]
    return TEXT["report"].format(
        answer=said.markdown(),
        picture=f"{TEXT['picture']}\n\n" if shown else "",
        leaf=first["leaf"],
        reason=first["reason"],
        sections="\n\n".join(filter(None, sections)),
        learning="\n".join(learning),
    )


def tree_section(verdict: dict) -> str:
    """The gates and tests of Exp-A's tree with the numbers they met. verdict: as verdict.json has it."""
    rows = []
    for row in verdict["cells"]:
        rows.append(
            {
                "depth": row["depth"],
                "k": row["k"],
                "ΔCE_rec, 90%": span(row["delta_ce_rec"], row["lo90"], row["hi90"], 3),
                "Γ of R²": signed(row["gamma_r2"], 3),
                "alive": f"{percent(row['alive_small'])} / {percent(row['alive_large'])}",
                "CE_rec moved": f"{signed(row['moved_small'], 3)} / {signed(row['moved_large'], 3)}",
                "SE": row["se"],
            }
        )
    words = {True: "yes", False: "no", None: "not judged"}
    holds = {name: words[verdict[name]] for name in ("equal", "gap_before", "h1", "normalised_away")}
    controls = [f"{score} {signed(gamma, 3)}" for score, gamma in verdict["gamma_controls"].items()]
    said = {
        "budget": readable_count(verdict["budget"]),
        "previous_budget": readable_count(verdict["previous_budget"]),
        "t": SimpleNamespace(**verdict["thresholds"]),
        "gates": {gate: "open" if is_open else "SHUT" for gate, is_open in verdict["g0"].items()},
        "holds": holds,
        "gamma_r2": estimate(verdict, "gamma_r2", 3),
        "in_range": percent(verdict["in_range"]),
        "control": verdict["control"] or "none in range",
        "gamma_control": signed(verdict["gamma_control_half_b"], 3),
        "gamma_r2_half_b": signed(verdict["gamma_r2_half_b"], 3),
        "gamma_controls": ", ".join(controls),
        "table": markdown(rows),
    }
    return TEXT["tree"].format(**{**verdict, **said})


def arms_section(verdicts: Sequence[dict], deltas: Sequence[dict]) -> str:
    """What the trainer and the sinks have to do with it; empty where the run has one arm and one pair."""
    if len(verdicts) == 1:
        return ""
    flips = {
        key: float(np.mean([row["mismatch"] for row in here])) for key, here in grouped(deltas, ARM).items()
    }
    rows = []
    for v in verdicts:
        rows.append(
            {
                "small": v["small"],
                "large": v["large"],
                "recipe": v["recipe"],
                "sinks in training": v["sinks"],
                "leaf": v["leaf"],
                "Γ of R²": estimate(v, "gamma_r2", 3) if "gamma_r2" in v else "undefined",
                "mean mismatch": percent(flips.get(tuple(v[name] for name in ARM))),
                "why": v["reason"],
            }
        )
    several_pairs = len({(v["small"], v["large"]) for v in verdicts}) > 1
    several_arms = len({(v["recipe"], v["sinks"]) for v in verdicts}) > 1
    title = "Trainer and sinks as confounds" if several_arms else "Every pair"
    parts = [
        TEXT["arms"].format(title=title, table=markdown(rows, list(rows[0])[0 if several_pairs else 2 :]))
    ]
    for sinks in dict.fromkeys(v["sinks"] for v in verdicts):
        first = verdicts[0]["small"], verdicts[0]["large"]
        theirs, ours = (flips.get((*first, recipe, sinks)) for recipe in ("saelens", "base"))
        if theirs is None or ours is None:
            continue
        share = TEXT["trainer's share"].format(share=1 - ours / theirs) if 0 < theirs >= ours else ""
        said = dict(sinks=sinks, saelens=percent(theirs), base=percent(ours), share=share)
        parts.append(TEXT["flips"].format(**said))
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------- figures
LINES = (
    ("delta_r2", "ΔR²", BLUE, "s", "-"),
    ("delta_r2_nosink", "ΔR² without sinks", GREEN, "^", ":"),
    ("delta_ce_rec", "ΔCE_rec", ORANGE, "o", "-"),
)
APART = 0.005  # of R²: less is one line under another


def delta_figure(deltas: Sequence[dict], difference: str, title: str) -> "Figure":
    """Both gaps with their intervals against training tokens, a panel for every depth and k; R² without sinks
    only where it is another line.
    """
    ks, depths, budgets = (sorted({row[name] for row in deltas}) for name in ("k", "depth", "tokens"))
    apart = [abs(row["delta_r2_nosink"] - row["delta_r2"]) for row in deltas]
    shown = [line for line in LINES if line[0] != "delta_r2_nosink" or np.nanmax(apart, initial=0) >= APART]
    size = (max(2.4 * len(ks) + 1.6, 6.4), 2.6 * len(depths) + 0.7)
    shape = dict(figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(len(depths), len(ks), **shape)
    for axis, (depth, k) in zip(axes.flat, itertools.product(depths, ks)):
        here = [row for row in deltas if row["k"] == k and row["depth"] == depth]
        at = np.array([row["tokens"] for row in here])
        for name, what, colour, marker, line in shown:
            value, lo, hi = (np.array([row[f"{name}{end}"] for row in here]) for end in ("", "_lo", "_hi"))
            lines(axis, [(list(at), list(value), list(lo), list(hi), dict(color=colour, linestyle=line))])
            names = [f"{what} at {readable_count(row['tokens'])}: {estimate(row, name, 3)}" for row in here]
            points(axis, at, value, names, color=colour, marker=marker, s=24, alpha=1, zorder=3)
        axis.set_title(f"k = {k}" + (f", depth {depth}" if len(depths) > 1 else ""), fontsize=9)
        budget_axis(axis, budgets)
    for axis, depth in zip(axes[:, -1], depths):
        end = max((row for row in deltas if row["depth"] == depth), key=lambda row: (row["k"], row["tokens"]))
        label_ends(axis, [(end[name], what, colour) for name, what, colour, *_ in shown])
    figure.supxlabel("training tokens of an SAE", fontsize=9)
    figure.supylabel(difference, fontsize=9)
    figure.suptitle(f"{title}\nBoth gaps with 95% bands", fontsize=10, wrap=True)
    return figure


def mismatch_figure(deltas: Sequence[dict]) -> "Figure":
    """The mismatch rate of every k and budget, a panel for every depth."""
    ks, budgets, depths = (sorted({row[name] for row in deltas}) for name in ("k", "tokens", "depth"))
    size = (max(0.9 * len(budgets) * len(depths) + 1, 4.5), 0.42 * len(ks) + 1.2)
    shape = dict(figsize=size, sharey=True, squeeze=False, layout="constrained")
    figure, axes = pyplot().subplots(1, len(depths), **shape)
    for axis, depth in zip(axes.flat, depths):
        rate = np.full((len(ks), len(budgets)), np.nan)
        for row in deltas:
            if row["depth"] == depth:
                rate[ks.index(row["k"]), budgets.index(row["tokens"])] = row["mismatch"]
        heat_map(axis, rate, [f"k = {k}" for k in ks], [readable_count(b) for b in budgets], percent)
        axis.set_xlabel("training tokens", fontsize=8)
        if len(depths) > 1:
            axis.set_title(f"depth {depth}", fontsize=9)
    figure.suptitle("Seed pairs in which ΔR² and ΔCE_rec differ in sign", fontsize=10)
    return figure
