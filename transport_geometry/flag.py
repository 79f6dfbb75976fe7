"""TODO flag."""

import math

from transport_geometry.tables import bounds, span

import numpy as np

# The least excess that is worth a flag: a quarter more, or less, Fisher energy than an isotropic error of the
# same lengths. An interval over text does not know that one fixed direction, drawn at random, is not the
# average direction: the errors of three embedded SAEs (k = 16, d = 64 and 128), each turned by 24 random
# rotations, had an excess of SD .016 to .025, at most .082 (24 sequences of 128 tokens). On endless text
# sqrt(2 (1/PR(G) - 1/d) (1/PR(delta) - 1/d)) would be left of it: .006 to .014 there, and .09 in a stream of
# which the model hears few directions (PR 5 and 50, d large).
MIN_EFFECT = math.log(1.25)
# 2 KL / swd_sampled, 1 for a small error: inside these the quadratic form is believed
FIRST_ORDER = (0.5, 2.0)
KL_FLOOR = 1e-6  # nats a token: less is lost in float32, and its ratio to anything means nothing
# an interval narrower than this comes of one sequence, or of an error that every text makes alike
NO_WIDTH = 1e-6


def flag(lo: float, hi: float, kl_swd_ratio: float) -> str:
    """The plain sentence about one SAE: from the 95% interval of fed_excess (`proxies.metrics`), and 2 KL /
    swd_sampled.

    Above MIN_EFFECT the model feels the error more than an isotropic one of the same lengths, so that R² says
    too much. First order does not see what a large error does (a code that shrinks h, above all): there is no
    flag then.
    """
    if not np.isfinite([lo, hi, kl_swd_ratio]).all() or hi - lo < NO_WIDTH:
        return "undefined"
    if not FIRST_ORDER[0] <= kl_swd_ratio <= FIRST_ORDER[1]:
        return "withheld: first order does not hold here"
    return (
        "R² flatters this SAE"
        if lo > MIN_EFFECT
        else "R² underrates it"
        if hi < -MIN_EFFECT
        else "no difference shown"
    )


def flagged(saes: list[dict], values: dict) -> list[dict]:
    """The rows of C SAEs, each with its flag and what it stands on. values {metric: [W,C]}, as
    `conditions.measured` gives them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(values["kl"][:1] > KL_FLOOR, 2 * values["kl"] / values["swd_sampled"], np.nan)
    ends = {
        name: np.percentile(v[3:], [2.5, 97.5], axis=0)
        for name, v in (("fed_excess", values["fed_excess"]), ("kl_swd_ratio", ratio))
    }
    rows = []
    for i, row in enumerate(saes):
        new = {"kl_swd_ratio": ratio[0, i]} | {
            f"{name}_{end}": v[j, i] for name, v in ends.items() for j, end in enumerate(("lo", "hi"))
        }
        rows.append(
            row
            | new
            | {
                "flag": flag(new["fed_excess_lo"], new["fed_excess_hi"], new["kl_swd_ratio"]),
                "isotropic fed": row["fed_iso_nosink"],
                "excess": span(row["fed_excess"], new["fed_excess_lo"], new["fed_excess_hi"]),
                "2KL/swd": new["kl_swd_ratio"],
                "2KL/swd interval": bounds(new["kl_swd_ratio_lo"], new["kl_swd_ratio_hi"]),
            }
        )
    return rows


FLAG_COLUMNS = ["rho", "fed_nosink", "isotropic fed", "excess", "2KL/swd", "2KL/swd interval", "flag"]
FLAG_TEXT = (
    "The flag compares the SAE's error with an isotropic one, as long at every token but in a random direction: where the model feels "
    f"it at least a quarter more (the 95% interval of the excess lies above {MIN_EFFECT:+.2f}) R² flatters the SAE, where it feels it that much "
    f"less (below {-MIN_EFFECT:+.2f}) R² underrates it. The flag is withheld where first order, on which it stands, is off by more than a "
    f"factor of two: where 2 KL / swd_sampled, 1 for a small error, lies outside {FIRST_ORDER[0]:g} to {FIRST_ORDER[1]:g}.\n\n"
    "fed: the log of how much larger the error is in Fisher than in Euclidean geometry, relative to the activations. isotropic fed: what "
    "fed_nosink would be for the isotropic error. excess: fed_nosink minus it, from the same sampled labels. Intervals: documents "
    "resampled. rho: the excess not as a log, over all positions, and not weighted by where the error is long."
)
