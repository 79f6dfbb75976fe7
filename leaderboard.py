"""What experiments that rank proxies share: the leaderboard's columns, table and plot, the gate, the flag of one SAE."""
import hashlib
import json
import pathlib

from common import markdown, pyplot, save_figure, signed, span

import numpy as np

from proxies import EUCLIDEAN_CONTROLS

LEADERBOARD = ("proxy,target,stratum,n_cells,n_clusters,pearson,pearson_lo,pearson_hi,spearman,spearman_lo,spearman_hi,partial,partial_lo,"
               "partial_hi,diff_r2,diff_r2_lo,diff_r2_hi,p_r2,diff_control,diff_control_lo,diff_control_hi,p_control,gamma,gamma_lo,"
               "gamma_hi,in_range,same_ranks_as").split(",")


def read_gate(path: pathlib.Path, settings: dict) -> tuple[str | None, str]:
    """(Exp-A's leaf or None, what to say): its verdict counts only for the same models, data and recipe.

    Exp-A judges its first recipe, so a leaderboard over several recipes stays gated.
    """
    if not path.exists():
        return None, "no Exp-A verdict yet"
    raw = path.read_bytes()
    there = json.loads(raw)
    about = there.get("settings", {})
    about |= {"recipe": about.get("recipe", [])[:1]}
    differing = [key for key in ("models", "data", "recipe") if about.get(key) != settings[key]]
    if differing:
        return None, f"the Exp-A verdict at {path} is about other {', '.join(differing)}"
    return there["leaf"], f"Exp-A says {there['leaf']} (sha256 {hashlib.sha256(raw).hexdigest()[:12]})"


def flag(lo: float, hi: float) -> str:
    """The plain sentence about one SAE: the 95% interval of its Fisher-Euclidean deviation without sink positions."""
    if not np.isfinite([lo, hi]).all():
        return "undefined"
    return "R² flatters this SAE" if lo > 0 else "R² underrates it" if hi < 0 else "no difference shown"


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    of = lambda row, name: span(row[name], row[f"{name}_lo"], row[f"{name}_hi"])
    chosen = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    chosen.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2))
    return markdown([{"proxy": row["proxy"], "partial Spearman | k": of(row, "partial"), "Spearman": signed(row["spearman"]),
                      "Pearson": signed(row["pearson"]), "minus r2": of(row, "diff_r2"), "p_r2": row["p_r2"],
                      "minus best control": of(row, "diff_control"), "p_ctl": row["p_control"], "transfer gap": of(row, "gamma"),
                      "in range": row["in_range"], "same ranks as": row["same_ranks_as"] or ""} for row in chosen],
                    ["proxy", "partial Spearman | k", "Spearman", "Pearson", "minus r2", "p_r2", "minus best control", "p_ctl",
                     "transfer gap", "in range", "same ranks as"]).replace("Spearman | k", "Spearman given k")


def leaderboard_plot(path: pathlib.Path, board: list[dict]) -> None:
    """Partial Spearman with CE_rec of every proxy, with its interval."""
    pooled = sorted((row for row in board if row["target"] == "ce_rec" and row["stratum"] == "pooled"),
                    key=lambda row: np.nan_to_num(row["partial"], nan=-2))
    figure, axis = pyplot().subplots(figsize=(7, 0.32 * len(pooled) + 1), layout="constrained")
    for y, row in enumerate(pooled):
        kind = "C1" if row["proxy"].startswith(("swd", "gd")) else "C0" if row["proxy"] in EUCLIDEAN_CONTROLS else "0.4"
        axis.plot([row["partial_lo"], row["partial_hi"]], [y, y], color=kind)
        axis.plot(row["partial"], y, "o", color=kind)
    axis.set_yticks(range(len(pooled)), [row["proxy"] for row in pooled])
    axis.set_xlabel("partial Spearman with CE_rec given k, 95% interval\n(orange: gradient-weighted; blue: Euclidean controls)")
    axis.grid(alpha=0.3, axis="x")
    save_figure(figure, path)
