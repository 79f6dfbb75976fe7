"""Pairs of SAEs that a user would choose between: what R² says of each pair, as CE_rec sees it.

C SAEs, W weightings of the documents (`resampling.ALL`, ...). Both SAEs of a pair stand under the same
resamples.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from transport_geometry.statistics.intervals import percentiles
from transport_geometry.statistics.resampling import ALL, N_FIXED, RESAMPLES
from transport_geometry.statistics.transfer import isotonic_predict

import numpy as np

# what SAEs share that are ranked, and that are paired; k of one that has none: its L0, to a power of two
HOOK_AND_TOKENS = "model layer ctx bos".split()
AT_ONE_K = "model k ctx bos".split()
PAIRS = [
    *AT_ONE_K,
    *"layer_a layer_b sae_a sae_b r2_a r2_b delta_r2 delta_r2_lo delta_r2_hi".split(),
    *"ce_rec_a ce_rec_b delta_ce_rec delta_ce_rec_lo delta_ce_rec_hi l0_a l0_b kind".split(),
    "documents_to_tell",
]
# what R² says of a pair, as CE_rec sees it
KINDS = ("inverts", "orders", "claims", "misses", "neither", "undefined")
NO_WIDTH = 1e-6  # an interval as narrow comes of one document
RESOLUTION = 1e-5  # a difference of R² or CE_rec that float32 cannot tell from none: one SAE in two formats
CURVE_OF = 3  # other SAEs, at least, that a curve of CE_rec on R² is drawn through


def comparable(saes: list[dict], settings: dict, names: Sequence[str]) -> dict[tuple, list[int]]:
    """{values of names: indices of the SAEs that share them}, sorted; names: AT_ONE_K or HOOK_AND_TOKENS."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        k = row["k"] or 2 ** round(math.log2(max(row["l0"], 1)))
        shared = row | {"k": k, "ctx": declared["ctx"], "bos": declared["bos"]}
        groups.setdefault(tuple(shared[name] for name in names), []).append(i)
    return dict(sorted(groups.items()))


def dominated(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[str]:
    """Of every SAE, the one of its hook and tokens with no more latents active and the highest CE_rec, where
    that is higher by a 95% interval over documents; else nothing.
    """
    out = [""] * len(saes)
    ce_rec = values["ce_rec"]
    for members in comparable(saes, settings, HOOK_AND_TOKENS).values():
        for i in members:
            others = [j for j in members if j != i and saes[j]["l0"] <= saes[i]["l0"] * (1 + RESOLUTION)]
            for j in sorted(others, key=lambda j: -ce_rec[ALL, j]):
                if percentiles((ce_rec[:, j] - ce_rec[:, i])[RESAMPLES])[0] > RESOLUTION:
                    out[i] = saes[j]["sae"]
                    break
    return out


def kind(r2: tuple[float, float], ce_rec: tuple[float, float]) -> str:
    """What R² says of a pair, as CE_rec sees it: one of KINDS, from the 95% intervals (lo, hi) of both
    differences.

    `orders`: both differ, the same way; `inverts`: both differ, R² the other way; `claims`: R² differs and
    CE_rec is not shown to; `misses`: CE_rec differs and R² is not shown to; `neither`. An interval without
    width (one document) shows nothing: `undefined`.
    """
    if not np.isfinite([r2, ce_rec]).all():
        return "undefined"
    if any(hi - lo < NO_WIDTH and max(-lo, hi) > RESOLUTION for lo, hi in (r2, ce_rec)):
        return "undefined"
    by_r2, by_ce = (int(lo > RESOLUTION) - int(hi < -RESOLUTION) for lo, hi in (r2, ce_rec))
    if by_r2 and by_ce:
        return "orders" if by_r2 == by_ce else "inverts"
    if by_r2:
        return "claims"
    return "misses" if by_ce else "neither"


def pairs(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[dict]:
    """Of pairs.csv: every two SAEs of one model, k and tokens, at one hook or at two; `sae_a` the one with
    the higher R², differences a minus b. Inverted ones come first, by the CE_rec that choosing after R² loses
    at least (the interval's near end).

    saes: rows of conditions.csv; values {metric: [W,C]}. Both SAEs of a pair stand under the same resamples.
    """
    found = []
    for group, members in comparable(saes, settings, AT_ONE_K).items():
        for i, j in itertools.combinations(members, 2):
            a, b = sorted((i, j), key=lambda at: (-values["r2"][ALL, at], saes[at]["layer"], saes[at]["sae"]))
            row = dict(zip(AT_ONE_K, group)) | difference(saes, values, a, b)
            found.append(row | {"documents_to_tell": documents_to_tell(row, min(settings["documents"]))})
    columns = [*AT_ONE_K, "layer_a", "layer_b", "sae_a", "sae_b"]

    def furthest(row: dict) -> tuple:
        lost = row["delta_ce_rec_hi"] if row["kind"] == "inverts" else 0.0
        return KINDS.index(row["kind"]), lost, *(row[column] for column in columns)

    return sorted(found, key=furthest)


def difference(saes: list[dict], values: dict[str, np.ndarray], a: int, b: int) -> dict[str, Any]:
    """Of a row of pairs.csv: a minus b, with intervals."""
    row: dict[str, Any] = {}
    for end, at in (("a", a), ("b", b)):
        row |= {f"{name}_{end}": saes[at][name] for name in ("sae", "layer", "l0")}
        row |= {f"{metric}_{end}": values[metric][ALL, at] for metric in ("r2", "ce_rec")}
    intervals = []
    for metric in ("r2", "ce_rec"):
        delta = values[metric][:, a] - values[metric][:, b]
        lo, hi = percentiles(delta[RESAMPLES])
        row |= {f"delta_{metric}": delta[ALL], f"delta_{metric}_lo": lo, f"delta_{metric}_hi": hi}
        intervals.append((lo, hi))
    return row | {"kind": kind(*intervals)}


def documents_to_tell(row: dict, n_doc: int) -> float:
    """Of how many documents the interval of the difference in CE_rec would leave out 0, if the difference
    stays: it shrinks as their root. nan where nothing is known; never below n_doc, which are there.
    """
    delta, lo, hi = (row[f"delta_ce_rec{end}"] for end in ("", "_lo", "_hi"))
    if not np.isfinite([delta, lo, hi]).all() or delta == 0 or hi - lo < NO_WIDTH:
        return math.nan
    reach = delta - lo if delta > 0 else hi - delta
    return float(np.ceil(n_doc * max(1.0, (reach / delta) ** 2)))


def residuals(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """[C,3]: CE_rec less what R^2 lets expect, and the ends of its 95% interval: the increasing curve through
    the *other* SAEs of the same hook and tokens, whatever their k, at its R^2.

    nan with fewer than CURVE_OF others on the same tokens, and at an R^2 beyond all of theirs: a curve held
    flat there would call the best SAE of every hook better than its R^2. The interval is over documents; the
    other SAEs are as they are.
    """
    out = np.full((len(saes), 3), np.nan)
    for members in comparable(saes, settings, HOOK_AND_TOKENS).values():
        # many SAEs: fewer resamples, each fit takes C steps
        n_resamples = min(len(values["r2"]) - N_FIXED, max(200, 20_000 // len(members)))
        used = np.r_[ALL, N_FIXED : N_FIXED + n_resamples]
        r2, ce_rec = values["r2"][used], values["ce_rec"][used]
        for i in members:
            others = [j for j in members if j != i]
            if len(others) < CURVE_OF or not r2[0, others].min() <= r2[0, i] <= r2[0, others].max():
                continue
            x, y = r2[:, others], ce_rec[:, others]
            residual = ce_rec[:, i] - isotonic_predict(x, y, np.ones(x.shape), r2[:, [i]])[:, 0]
            out[i] = residual[0], *percentiles(residual[1:])
    return out


def counted(found: list[dict]) -> dict[str, int]:
    """{kind: pairs}."""
    return {name: sum(row["kind"] == name for row in found) for name in KINDS}
