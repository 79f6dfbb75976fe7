"""The leaderboard as a person reads it: in Markdown, on a terminal, as a figure, and in a sentence."""

import typing
from collections.abc import Sequence

from transport_geometry.measuring.metrics import BY_NAME, CONTROL, SENSITIVE
from transport_geometry.records.results import describe_units
from transport_geometry.records.tables import UNDEFINED, estimate, markdown, percent, short, signed
from transport_geometry.reporting import claims_report, console
from transport_geometry.reporting.console import models_in_words
from transport_geometry.reporting.figures import BLUE, ORANGE, intervals, pyplot
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics import claims
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.leaderboard import (
    R2,
    Contest,
    against_r2,
    judged_in_general,
    of_target,
)
from transport_geometry.statistics.resampling import MIN_HOOKS_OF_A_MODEL

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = blocks("leaderboard")


def leaderboard_table(board: list[dict], target: str, stratum: str = "pooled") -> str:
    """The claim in general, in Markdown, the best partial Spearman first; columns that say something."""
    table = [
        {
            "proxy": row["proxy"],
            "φ": signed(row["phi"]),
            "hooks": f"{row['n_effective']:.1f}",
            "partial Spearman": estimate(row, "partial"),
            "Spearman": signed(row["spearman"]),
            "Pearson": signed(row["pearson"]),
            "minus r2": estimate(row, "diff_r2"),
            "p_r2": row["p_r2"],
            "minus best control": estimate(row, "diff_control"),
            "p_ctl": row["p_control"],
            "loho": row["loho"],
            "bias": signed(row["loho_bias"]),
            "loho gain": signed(row["diff_loho_control"], 3),
            "p_loho": row["p_loho"],
            "transfer gap": estimate(row, "gamma"),
            "in range": row["in_range"],
            "same ranks as": row["same_ranks_as"] or "",
        }
        for row in of_target(board, target, stratum)
    ]
    return markdown(table, [c for c in table[0] if not all(short(row[c]) == UNDEFINED for row in table)])


def how_to_read(swd: Contest, settings: dict) -> str:
    """Under a leaderboard, in Markdown: what its columns are and what its intervals count."""

    def number(value: float, digits: int = 2) -> str:
        return "undefined" if np.isnan(value) else f"{value:.{digits}f}"

    counts = TEXT["what counts"].format(
        n_clusters=swd.n_clusters,
        min_clusters=MIN_EFFECTIVE_HOOKS,
        min_hooks=MIN_HOOKS_OF_A_MODEL,
        units=describe_units(settings),
    )
    could_show = TEXT["what could show"].format(
        rho_max=number(swd.ceiling["rho_max"], 3),
        room=number(swd.room),
        detectable=number(swd.smallest_detectable),
    )
    return "\n\n".join([TEXT["two statistics"], counts, could_show])


def what_r2_is_worth(board: list[dict]) -> str:
    """How well R^2 orders the SAEs of one k, and which proxies are shown to do better, in a sentence."""
    rows = of_target(board)
    (r2,) = (row for row in rows if row["proxy"] == R2)
    above = [row["proxy"] for row in rows if against_r2(row) == "above"]
    better = f"shown to do better: {', '.join(above)}" if above else "no other proxy is shown to do better"
    if not np.isfinite(r2["partial_lo"]):
        better = "too few hooks to say of any proxy that it does better"
    hooks = f"{r2['n_clusters']} hooks"
    if r2["n_effective"] < r2["n_clusters"]:
        hooks += f" (which count as {r2['n_effective']:.1f})"
    partial = console.number(r2, "partial")
    return TEXT["worth of r2"].format(hooks=hooks, partial=partial, better=better)


def scope(settings: dict) -> str:
    """Which models an answer is about, in words."""
    models, stored = settings["models"], settings.get("stored_as", {})
    models = [f"{one} with {stored[one].partition(' (')[0]}" if one in stored else one for one in models]
    those = "a model" if len(models) == 1 else f"{len(models)} models"
    return f"{those} ({models_in_words(models)}) on one text"


# ----------------------------------------------------------------------------------------------- a terminal
COLOURS = {"above": console.BLUE, "below": console.ORANGE, "not shown": console.DIM}
VERDICTS = {"above": "better", "below": "worse", "not shown": "not shown", "same": "same order"}


def board_in_short(board: list[dict], colour: bool = False) -> str:
    """For 80 columns: what proxies do here, and, where there are hooks enough, whether one is shown to be
    better in general. Coloured by what is shown here.
    """
    rows = of_target(board)
    general = any(judged_in_general(row) for row in rows if row["proxy"] != R2)
    table = []
    for row in rows:
        cells = {
            "proxy": row["proxy"],
            "ρ here": claims_report.estimate_here(row, "partial"),
            "minus R²": "" if row["proxy"] == R2 else claims_report.estimate_here(row, "diff_r2"),
            "pairs": percent(row["right"]) if row["pairs"] > 0 else "none",
        }
        if general:
            word = VERDICTS[against_r2(row)] if judged_in_general(row) else "-"
            cells["in general"] = "" if row["proxy"] == R2 else word
        table.append(cells)
    codes = [COLOURS.get(against_r2(row, here=True), "") for row in rows]
    read_as = TEXT["read as"] + (f"\n{TEXT['in general']}" if general else "")
    return f"{console.columns(table, codes, colour)}\n\n{read_as}"


# ------------------------------------------------------------------------------------------------ the figure
LOOKS = {SENSITIVE: (ORANGE, "o"), CONTROL: (BLUE, "s"), "other": ("0.4", "D")}  # colour, marker of a family
FURTHEST = 0.5  # below R^2 by more: the figure only points there


def leaderboard_figure(board: list[dict], subtitle: str) -> "Figure":
    """Every proxy's partial Spearman with CE_rec minus R^2's, with its interval over documents, the best
    above.
    """
    shown = of_target(board)
    (r2,) = (row for row in shown if row["proxy"] == R2)
    above = [row["proxy"] for row in shown if against_r2(row, here=True) == "above"]
    rows = [row for row in shown if row["proxy"] != R2 and np.isfinite(row["diff_r2"])]
    rows.sort(key=lambda row: row["diff_r2"])
    figure, axis = pyplot().subplots(figsize=(7.6, 0.29 * len(rows) + 1.9), layout="constrained")
    at, lo, hi = (np.array([row[f"diff_r2{end}"] for row in rows]) for end in ("", "_here_lo", "_here_hi"))
    family = [BY_NAME[row["proxy"]].family if row["proxy"] in BY_NAME else "" for row in rows]
    intervals(
        axis,
        [row["proxy"] for row in rows],
        at,
        lo,
        hi,
        looks=[LOOKS.get(one, LOOKS["other"]) for one in family],
        says=[claims_report.estimate_here(row, "diff_r2") for row in rows],
        furthest=FURTHEST,
    )
    axis.set_xlabel(
        f"rank correlation with CE_rec at one k, minus R²'s {signed(r2['partial'])}; 95% over documents",
        fontsize=8,
    )
    says = "no proxy is shown to order these SAEs better than R²"
    if above:
        says = f"shown to order these SAEs better than R²: {', '.join(above)}"
    figure.suptitle(f"On {r2['n_clusters']} hooks {says}", fontsize=10, wrap=True)
    axis.set_title(subtitle, fontsize=8)
    handles = [
        pyplot().Line2D([], [], color=colour, marker=marker, label=label)
        for label, (colour, marker) in LOOKS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def within(board: list[dict], models: Sequence[str]) -> str:
    """The claim here once more for each arm of --sinks, and for each model where there are several."""
    strata = {name: name for name in claims.ARMS.values() if claims.row_of(board, "r2", name)}
    strata |= {name: f"within {name}" for name in models if len(models) > 1}
    return "".join(
        f"### Here, {title}\n\n{claims_report.table(board, name)}\n\n" for name, title in strata.items()
    )
