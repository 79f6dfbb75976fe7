"""What experiments that rank proxies share: the leaderboard's columns, table and plot, the gate, the flag of one SAE."""
import hashlib
import json
import math
import pathlib

from common import as_png, bounds, markdown, pyplot, signed, span

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

# The least excess that is worth a flag: a quarter more, or less, Fisher energy than an isotropic error of the same lengths.
# An interval over text does not know that one fixed direction, drawn at random, is not the average direction: the errors of
# three embedded SAEs (k = 16, d = 64 and 128), each turned by 24 random rotations, had an excess of SD .016 to .025, at most
# .082 (24 sequences of 128 tokens). On endless text sqrt(2 (1/PR(G) - 1/d) (1/PR(delta) - 1/d)) would be left of it: .006 to
# .014 there, and .09 in a stream of which the model hears few directions (PR 5 and 50, d large).
MIN_EFFECT = math.log(1.25)
FIRST_ORDER = (0.5, 2.0)  # 2 KL / swd_sampled, 1 for a small error: inside these the quadratic form is believed
KL_FLOOR = 1e-6           # nats a token: less is lost in float32, and its ratio to anything means nothing
NO_WIDTH = 1e-6           # an interval narrower than this comes of one sequence, or of an error that every text makes alike


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


def flag(lo: float, hi: float, kl_swd_ratio: float) -> str:
    """The plain sentence about one SAE: from the 95% interval of fed_excess (`proxies.metrics`), and 2 KL / swd_sampled.

    Above MIN_EFFECT the model feels the error more than an isotropic one of the same lengths, so that R² says too much.
    First order does not see what a large error does (a code that shrinks h, above all): there is no flag then.
    """
    if not np.isfinite([lo, hi, kl_swd_ratio]).all() or hi - lo < NO_WIDTH:
        return "undefined"
    if not FIRST_ORDER[0] <= kl_swd_ratio <= FIRST_ORDER[1]:
        return "withheld: first order does not hold here"
    return "R² flatters this SAE" if lo > MIN_EFFECT else "R² underrates it" if hi < -MIN_EFFECT else "no difference shown"


def flagged(saes: list[dict], values: dict) -> list[dict]:
    """The rows of C SAEs, each with its flag and what it stands on. values {metric: [W,C]}, as `conditions.measured` gives them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(values["kl"][:1] > KL_FLOOR, 2 * values["kl"] / values["swd_sampled"], np.nan)
    ends = {name: np.percentile(v[3:], [2.5, 97.5], axis=0) for name, v in (("fed_excess", values["fed_excess"]), ("kl_swd_ratio", ratio))}
    rows = []
    for i, row in enumerate(saes):
        new = {"kl_swd_ratio": ratio[0, i]} | {f"{name}_{end}": v[j, i] for name, v in ends.items() for j, end in enumerate(("lo", "hi"))}
        rows.append(row | new | {
            "flag": flag(new["fed_excess_lo"], new["fed_excess_hi"], new["kl_swd_ratio"]), "isotropic fed": row["fed_iso_nosink"],
            "excess": span(row["fed_excess"], new["fed_excess_lo"], new["fed_excess_hi"]), "2KL/swd": new["kl_swd_ratio"],
            "2KL/swd interval": bounds(new["kl_swd_ratio_lo"], new["kl_swd_ratio_hi"])})
    return rows


FLAG_COLUMNS = ["rho", "fed_nosink", "isotropic fed", "excess", "2KL/swd", "2KL/swd interval", "flag"]
FLAG_TEXT = (
    "The flag compares the SAE's error with an isotropic one, as long at every token but in a random direction: where the model feels "
    f"it at least a quarter more (the 95% interval of the excess lies above {MIN_EFFECT:+.2f}) R² flatters the SAE, where it feels it that much "
    f"less (below {-MIN_EFFECT:+.2f}) R² underrates it. The flag is withheld where first order, on which it stands, is off by more than a "
    f"factor of two: where 2 KL / swd_sampled, 1 for a small error, lies outside {FIRST_ORDER[0]:g} to {FIRST_ORDER[1]:g}.\n\n"
    "fed: the log of how much larger the error is in Fisher than in Euclidean geometry, relative to the activations. isotropic fed: what "
    "fed_nosink would be for the isotropic error. excess: fed_nosink minus it, from the same sampled labels. Intervals: documents "
    "resampled. rho: the excess not as a log, over all positions, and not weighted by where the error is long.")


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    of = lambda row, name: span(row[name], row[f"{name}_lo"], row[f"{name}_hi"])
    chosen = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    chosen.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2))
    table = [{"proxy": row["proxy"], "partial Spearman": of(row, "partial"), "Spearman": signed(row["spearman"]), "Pearson": signed(row["pearson"]),
              "minus r2": of(row, "diff_r2"), "p_r2": row["p_r2"], "minus best control": of(row, "diff_control"), "p_ctl": row["p_control"],
              "loho": row["loho"], "bias": signed(row["loho_bias"]), "loho gain": signed(row["diff_loho_control"], 3), "p_loho": row["p_loho"],
              "transfer gap": of(row, "gamma"), "in range": row["in_range"], "same ranks as": row["same_ranks_as"] or ""} for row in chosen]
    return markdown(table, list(table[0]))


def behind(settings: dict) -> str:
    """What intervals over the evaluation text count, in words."""
    n = " or ".join(map(str, settings["documents"]))
    return f"{n} pieces of few documents, held out by piece, so that intervals are about this text" if settings["cut"] else f"{n} documents"


def how_to_read(verdict: dict, settings: dict) -> list[str]:
    """Under a leaderboard: what its columns are and what its intervals count."""
    number = lambda v, digits=2: "undefined" if v is None else f"{v:.{digits}f}"
    return [
        "Larger is better for every proxy. Two primary statistics. **Partial Spearman** given k (and budget): the order of SAEs of one k. **loho**, leave one hook "
        "out: root mean square error of log10 dCE (of log10 KL, for the target KL) predicted from the proxy by a quadratic fitted on all other hooks, so 0.1 is a quarter "
        "too much or too little; bias: its mean; loho gain: how much smaller than the best control's. Both compare with the best Euclidean control, chosen on half of the "
        "documents and tested on the other half.", "",
        f"What counts as independent is the hook, a (model, layer): {verdict['n_clusters']} of them. Intervals: 95%, hooks resampled within each model (none below "
        f"{verdict['min_hooks']} in one) together with {behind(settings)}; p_r2, p_ctl: the proxies trade places in whole hooks; p_loho: signs flipped over hooks. The "
        "p are the tests; an interval of a difference may hold 0 beside a small p, and then neither is to be leaned on. Transfer gap: CE_rec of the largest model minus "
        "what the smallest model's curve says at that value of the proxy, averaged with the reverse; depths resampled.", "",
        f"Noise ceiling of the target: rho_max {number(verdict['rho_max'], 3)}. The best control leaves {number(verdict['room'])} to gain in partial Spearman; this grid "
        f"could have shown SWD a gain of {number(verdict['smallest_detectable'])} (80% power, at SWD's own noise), and the claim is about {verdict['min_difference']:.2f}. Hooks count "
        "as independent given the model; where those of one model share what a proxy gets wrong, p < .05 comes up more often than it says (14 in 100 where half is "
        "shared: bench/RESULTS.md), so that a p between .01 and .05 speaks about these models only.", ""]


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
