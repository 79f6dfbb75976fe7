"""The flag of one SAE: does the model feel its error as much as R² says?

R² weighs an error by its length alone. The flag compares how the model feels it with how it would feel an
isotropic error, as long at every token: `fed_excess`, the log of the ratio, from the same sampled labels.
Shapes: C SAEs, W weightings of the documents, of which 0 is all of them and 3.. are resamples.
"""

import math

from transport_geometry.stats import percentiles
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

# what is said of an SAE
FLATTERS, UNDERRATES, NO_DIFFERENCE, WITHHELD, UNDEFINED = FLAGS = (
    "R² flatters this SAE",
    "R² underrates it",
    "no difference shown",
    "withheld: first order does not hold here",
    "undefined",
)
FLAG_COLUMNS = ["rho", "fed_nosink", "isotropic fed", "excess", "2KL/swd", "2KL/swd interval", "flag"]
FLAG_TEXT = (
    "The flag compares the SAE's error with an isotropic one, as long at every token but in a random "
    "direction: where the model feels it at least a quarter more (the 95% interval of the excess lies above "
    f"{MIN_EFFECT:+.2f}) R² flatters the SAE, where it feels it that much less (below {-MIN_EFFECT:+.2f}) R² "
    "underrates it. The flag is withheld where first order, on which it stands, is off by more than a factor "
    "of two: where 2 KL / swd_sampled, 1 for a small error, lies outside "
    f"{FIRST_ORDER[0]:g} to {FIRST_ORDER[1]:g}.\n\n"
    "fed: the log of how much larger the error is in Fisher than in Euclidean geometry, relative to the "
    "activations. isotropic fed: what fed_nosink would be for the isotropic error. excess: fed_nosink minus "
    "it, from the same sampled labels. Intervals: documents resampled. rho: the excess not as a log, over "
    "all positions, and not weighted by where the error is long."
)


def flag(lo: float, hi: float, kl_swd_ratio: float) -> str:
    """The plain sentence about one SAE: from the 95% interval of fed_excess (`metrics.metrics`), and 2 KL /
    swd_sampled.

    Above MIN_EFFECT the model feels the error more than an isotropic one of the same lengths, so that R² says
    too much. First order does not see what a large error does (a code that shrinks h, above all): there is no
    flag then.
    """
    if not np.isfinite([lo, hi, kl_swd_ratio]).all() or hi - lo < NO_WIDTH:
        return UNDEFINED
    if not FIRST_ORDER[0] <= kl_swd_ratio <= FIRST_ORDER[1]:
        return WITHHELD
    if lo > MIN_EFFECT:
        return FLATTERS
    if hi < -MIN_EFFECT:
        return UNDERRATES
    return NO_DIFFERENCE


def flagged(saes: list[dict], values: dict[str, np.ndarray]) -> list[dict]:
    """The rows of C SAEs, each with its flag and what it stands on. values {metric: [W,C]}, as
    `results.measured` gives them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(values["kl"][:1] > KL_FLOOR, 2 * values["kl"] / values["swd_sampled"], np.nan)
    excess_lo, excess_hi = percentiles(values["fed_excess"][3:])
    ratio_lo, ratio_hi = percentiles(ratio[3:])
    return [
        row
        | {
            "kl_swd_ratio": ratio[0, i],
            "fed_excess_lo": excess_lo[i],
            "fed_excess_hi": excess_hi[i],
            "kl_swd_ratio_lo": ratio_lo[i],
            "kl_swd_ratio_hi": ratio_hi[i],
            "flag": flag(excess_lo[i], excess_hi[i], ratio[0, i]),
            "isotropic fed": row["fed_iso_nosink"],
            "excess": span(row["fed_excess"], excess_lo[i], excess_hi[i]),
            "2KL/swd": ratio[0, i],
            "2KL/swd interval": bounds(ratio_lo[i], ratio_hi[i]),
        }
        for i, row in enumerate(saes)
    ]
