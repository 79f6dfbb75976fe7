"""What experiments that rank proxies share: the leaderboard's columns, table and plot, the gate, the flag of one SAE."""
import hashlib
import json
import pathlib

from common import as_png, markdown, pyplot, signed, span

import numpy as np

import store
from errors import UserError
from proxies import EUCLIDEAN_CONTROLS

LEADERBOARD = ("proxy,target,stratum,n_cells,n_clusters,pearson,pearson_lo,pearson_hi,spearman,spearman_lo,spearman_hi,partial,partial_lo,"
               "partial_hi,diff_r2,diff_r2_lo,diff_r2_hi,p_r2,diff_control,diff_control_lo,diff_control_hi,p_control,gamma,gamma_lo,"
               "gamma_hi,in_range,same_ranks_as,loho,loho_bias,diff_loho_control,p_loho").split(",")


MAGNITUDE = {"ce_rec": "dce", "kl": "kl"}  # target -> the distortion whose size `loho` predicts
EXP_A = pathlib.Path("outputs/expa/verdict.json")
LEAVES = {"undertrained", "H0", "H1", "H0+H1", "N", "undecided"}


def read_verdict(path: pathlib.Path | None) -> dict | None:
    """Exp-A's verdict at `path`, or, where none is named, at EXP_A if there is one; read before the work that it may gate.

    Raises UserError: not there, not a verdict of Exp-A, or not as its run.json says that it was written.
    """
    if path is None:
        try:
            return read_verdict(EXP_A) if EXP_A.exists() else None
        except UserError as why:  # which nobody asked for
            print(f"{why}: taken for no verdict")
            return None
    try:
        raw = path.read_bytes()
        verdict = json.loads(raw)
        known = verdict["leaf"] in LEAVES and isinstance(verdict["settings"].get("recipe", []), list)
    except OSError as error:
        raise UserError(f"--verdict {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--verdict {path}: not a verdict of expa.py") from error
    if not known:
        raise UserError(f"--verdict {path}: not a verdict of expa.py")
    record = path.parent / store.RUN
    if path.name in store.written(record):
        store.checked(record, path.name)
    return verdict | {"sha256": hashlib.sha256(raw).hexdigest()}


def gate(there: dict | None, settings: dict) -> tuple[str | None, str]:
    """(Exp-A's leaf or None, what to say): its verdict counts only for the same models, weights, data and recipe.

    Exp-A judges its first recipe, so a leaderboard over several recipes stays gated.
    """
    if there is None:
        return None, "no Exp-A verdict yet"
    about = there["settings"] | {"recipe": there["settings"].get("recipe", [])[:1]}
    differing = [key for key in ("models", "weights", "tokenizers", "data", "data_content", "split", "recipe") if about.get(key) != settings.get(key)]
    if differing:
        return None, f"Exp-A's verdict is about other {', '.join(differing)}"
    return there["leaf"], f"Exp-A says {there['leaf']} (sha256 {there['sha256'][:12]})"


def flag(lo: float, hi: float) -> str:
    """The plain sentence about one SAE: the 95% interval of its Fisher-Euclidean deviation without sink positions."""
    if not np.isfinite([lo, hi]).all():
        return "undefined"
    return "R² flatters this SAE" if lo > 0 else "R² underrates it" if hi < 0 else "no difference shown"


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    of = lambda row, name: span(row[name], row[f"{name}_lo"], row[f"{name}_hi"])
    chosen = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    chosen.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2))
    table = [{"proxy": row["proxy"], "partial Spearman": of(row, "partial"), "Spearman": signed(row["spearman"]), "Pearson": signed(row["pearson"]),
              "minus r2": of(row, "diff_r2"), "p_r2": row["p_r2"], "minus best control": of(row, "diff_control"), "p_ctl": row["p_control"],
              "loho": row["loho"], "bias": signed(row["loho_bias"]), "loho gain": signed(row["diff_loho_control"], 3), "p_loho": row["p_loho"],
              "transfer gap": of(row, "gamma"), "in range": row["in_range"], "same ranks as": row["same_ranks_as"] or ""} for row in chosen]
    return markdown(table, list(table[0]))


def how_to_read(verdict: dict, behind: str) -> list[str]:
    """Under a leaderboard: what its columns are and what its intervals count. behind: the documents."""
    number = lambda v, digits=2: "undefined" if v is None else f"{v:.{digits}f}"
    return [
        "Larger is better for every proxy. Two primary statistics. **Partial Spearman** given k (and budget): the order of SAEs of one k. **loho**, leave one hook "
        "out: root mean square error of log10 dCE (of log10 KL, for the target KL) predicted from the proxy by a quadratic fitted on all other hooks, so 0.1 is a quarter "
        "too much or too little; bias: its mean; loho gain: how much smaller than the best control's. Both compare with the best Euclidean control, chosen on half of the "
        "documents and tested on the other half.", "",
        f"What counts as independent is the hook, a (model, layer): {verdict['n_clusters']} of them. Intervals: 95%, hooks resampled within each model (none below "
        f"{verdict['min_hooks']} in one) together with {behind}; p_r2, p_ctl: the proxies trade places in whole hooks; p_loho: signs flipped over hooks. The "
        "p are the tests; an interval of a difference may hold 0 beside a small p, and then neither is to be leaned on. Transfer gap: CE_rec of the largest model minus "
        "what the smallest model's curve says at that value of the proxy, averaged with the reverse; depths resampled.", "",
        f"Noise ceiling of the target: rho_max {number(verdict['rho_max'], 3)}. The best control leaves {number(verdict['room'])} to gain in partial Spearman; this grid "
        f"could have shown a gain of {number(verdict['smallest_detectable'])} (80% power), and the claim is about {verdict['min_difference']:.2f}.", ""]


def leaderboard_plot(board: list[dict]) -> bytes:
    """Partial Spearman with CE_rec of every proxy, with its interval."""
    pooled = sorted((row for row in board if row["target"] == "ce_rec" and row["stratum"] == "pooled"),
                    key=lambda row: np.nan_to_num(row["partial"], nan=-2))
    figure, axis = pyplot().subplots(figsize=(7, 0.32 * len(pooled) + 1), layout="constrained")
    for y, row in enumerate(pooled):
        kind = "C1" if row["proxy"].startswith(("swd", "gd")) else "C0" if row["proxy"] in EUCLIDEAN_CONTROLS else "0.4"
        axis.plot([row["partial_lo"], row["partial_hi"]], [y, y], color=kind)
        axis.plot(row["partial"], y, "o", color=kind)
    axis.set_yticks(range(len(pooled)), [row["proxy"] for row in pooled])
    axis.set_xlabel("partial Spearman with CE_rec given k, 95% interval over hooks\n(orange: gradient-weighted; blue: Euclidean controls)")
    axis.grid(alpha=0.3, axis="x")
    return as_png(figure)
