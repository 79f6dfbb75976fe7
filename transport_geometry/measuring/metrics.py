"""Every metric of a condition, one entry each: its formula, how it becomes a score, and what kind of proxy it
is.

A new proxy is a new entry of METRICS: it then has a column in conditions.csv, a row on the leaderboards and a
panel in the plots. Shapes: C conditions, S sequences, W re-weightings of them, B sequences of a batch, T
positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transport_geometry.measuring.patch import Patch

import numpy as np
from torch import Tensor

# missing in folders of earlier versions
NEWER = ("sst_sink", "kl_sinkclean", "kl_isotropic")
DENSE = 0.1  # a latent that fires on more of the tokens is dense
VALUE_BITS = 8  # counted for a latent's value


class Sums:
    """Sums over sequences under every re-weighting: s["sse"] is [W,C], from per-sequence sums [C,S].

    A metric is a ratio of such sums, never a mean of ratios, so that any re-weighting (a bootstrap resample,
    a half) has it.
    """

    def __init__(self, quantities: dict[str, np.ndarray], weights: np.ndarray, d: int | np.ndarray):
        """quantities {name: [C,S]}, weights [W,S], d [C] or one d_model for all."""
        self.quantities, self.weights, self.d = quantities, weights, d
        self.totals: dict[str, np.ndarray] = {}  # computed so far

    def __getitem__(self, name: str) -> np.ndarray:
        if name in NEWER and name not in self.quantities:
            return self["n"] * np.nan
        if name not in self.totals:
            self.totals[name] = self.weights @ self.quantities[name].T
        return self.totals[name]

    def square(self, name: str) -> np.ndarray:
        """Sum of each sequence's squared sum, [W,C]."""
        return self.weights @ np.square(self.quantities[name]).T

    def per_token(self, name: str) -> np.ndarray:
        """Mean over evaluated tokens, [W,C]."""
        return self[name] / self["n"]

    def explained(self, which: str = "") -> np.ndarray:
        """1 - SSE/SST, [W,C]; SST is about the one mean of the whole set under every re-weighting."""
        return 1 - self[f"sse{which}"] / self[f"sst{which}"]


@dataclass(frozen=True)
class Score:
    """A metric read so that larger is better."""

    of: Callable[[np.ndarray], np.ndarray]
    label: str  # of an axis; {} is the metric's name

    def __call__(self, value: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.of(value)


DISTORTION = Score(lambda x: -np.log10(x), "−log10({})")
# of something that is 1 when nothing is lost
SIMILARITY = Score(lambda x: -np.log10(1 - x), "−log10(1 − {})")
SIGNED = Score(np.negative, "−{}")  # a distortion that may be negative keeps its own scale
IDENTITY = Score(np.asarray, "{}")

# kinds of proxies; a metric without a family is a column and no proxy
EUCLIDEAN, CONTROL, SENSITIVE = "Euclidean", "Euclidean control", "gradient-weighted"


@dataclass(frozen=True)
class Metric:
    """A column of conditions.csv."""

    name: str
    # [W,C]; None: from the counts of what fired, see `code_metrics`
    formula: Callable[[Sums], np.ndarray] | None
    score: Score = IDENTITY
    family: str = ""
    # the per-token quantity of this name that the formula sums, [B,T-1] or [N]; None: `evaluate` has it
    term: Callable[[Patch], Tensor] | None = None

    @property
    def axis(self) -> str:
        return self.score.label.format(self.name)


def mean(name: str) -> Callable[[Sums], np.ndarray]:
    """Formula: the mean of a quantity over evaluated tokens."""
    return lambda s: s.per_token(name)


def recovered(patched: str) -> Callable[[Sums], np.ndarray]:
    """Formula: 2 - L / L_orig, a ratio of sums."""
    return lambda s: 2 - s.per_token(patched) / s.per_token("ce_orig")


def fraction(ablated: str) -> Callable[[Sums], np.ndarray]:
    """Formula: the share of what an ablation costs that the patch does not."""
    return lambda s: (
        (s.per_token(ablated) - s.per_token("ce_recon")) / (s.per_token(ablated) - s.per_token("ce_orig"))
    )


def relative_fisher(form: str, which: str = "") -> Callable[[Sums], np.ndarray]:
    """Formula: log of how much larger the error is, relative to h, in Fisher than in Euclidean geometry."""
    return lambda s: np.log(
        (s[f"{form}{which}"] / s[f"fisher_h{which}"]) / (s[f"sse{which}"] / s[f"sst{which}"])
    )


METRICS = (
    Metric("r2", lambda s: s.explained(), SIMILARITY, EUCLIDEAN),
    Metric("r2_nosink", lambda s: s.explained("_nosink"), SIMILARITY, CONTROL),
    Metric("sink_share", lambda s: s["sst_sink"] / s["sst"]),
    Metric("r2_defl1", lambda s: s.explained("_defl1"), SIMILARITY, CONTROL),
    Metric("r2_ln", lambda s: s.explained("_ln"), SIMILARITY, CONTROL),
    Metric("nmse", lambda s: s["sse"] / s["h_sq"], DISTORTION, EUCLIDEAN),
    Metric(
        "nmse_tok", mean("nmse_tok"), DISTORTION, CONTROL, lambda p: p.stats["delta_sq"] / p.stats["h_sq"]
    ),
    Metric("mse", lambda s: s["sse"] / (s["n"] * s.d), DISTORTION, EUCLIDEAN),
    Metric(
        "cosine",
        mean("cosine"),
        SIMILARITY,
        CONTROL,
        lambda p: p.stats["h_h_hat"] / (p.stats["h_sq"] * p.stats["h_hat_sq"]).sqrt().clamp(min=1e-20),
    ),
    Metric(
        "relerr",
        mean("relerr"),
        DISTORTION,
        EUCLIDEAN,
        lambda p: p.stats["delta_sq"].sqrt() / (p.stats["h_sq"].sqrt() + 1e-10),
    ),
    Metric("swd_tok", mean("gd_sq"), DISTORTION, SENSITIVE),
    Metric("swd_seq", lambda s: s.square("gd") / s["n"], DISTORTION, SENSITIVE),
    Metric("swd_sampled", mean("gd_sampled_seq"), DISTORTION, SENSITIVE),
    Metric("gd_mean", mean("gd"), SIGNED, SENSITIVE),
    Metric("gd_abs", mean("gd_abs"), DISTORTION, SENSITIVE),
    Metric("ce_orig", mean("ce_orig")),
    Metric("ce_recon", mean("ce_recon")),
    Metric("dce", lambda s: s.per_token("ce_recon") - s.per_token("ce_orig")),
    Metric("ce_rec", recovered("ce_recon")),
    Metric("ce_rec_sinkclean", recovered("ce_sinkclean")),
    Metric("ce_zero", mean("ce_zero")),
    Metric("ce_mean", mean("ce_mean")),
    Metric("frac_zero", fraction("ce_zero")),
    Metric("frac_mean", fraction("ce_mean")),
    Metric("kl", mean("kl"), DISTORTION),
    # KL of the patch over that of an isotropic error, as long at every position; sinks clean in both
    Metric("kl_excess", lambda s: np.log(s["kl_sinkclean"] / s["kl_isotropic"])),
    Metric("alive", None),
    Metric("dense", None),
    Metric("l0", mean("l0")),
    Metric("bits_idx", None),
    Metric("bits", None),
    Metric("fed", relative_fisher("fisher")),
    Metric("fed_nosink", relative_fisher("fisher", "_nosink")),
    Metric("rho", lambda s: (s["fisher"] / s["sse"]) / (s["g_sq"] / (s["n"] * s.d))),
    # the expected fed_nosink of an isotropic error with this one's length at every token
    Metric("fed_iso_nosink", relative_fisher("fisher_iso", "_nosink")),
    # fed_nosink minus it, from the same sampled labels: the log of rho, weighted by where the error is long
    Metric("fed_excess", lambda s: np.log(s["fisher_nosink"] / s["fisher_iso_nosink"])),
)
BY_NAME = {metric.name: metric for metric in METRICS}
# in the order of the leaderboard: signed scores come last
PROXIES = tuple(sorted((m for m in METRICS if m.family), key=lambda metric: metric.score is SIGNED))
EUCLIDEAN_CONTROLS = tuple(metric.name for metric in METRICS if metric.family == CONTROL)


def computed(sums: Sums, metrics: Sequence[Metric] = METRICS) -> dict[str, np.ndarray]:
    """{name: [W,C]} of every metric that has a formula."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {metric.name: metric.formula(sums) for metric in metrics if metric.formula}


def as_score(name: str, value: np.ndarray) -> np.ndarray:
    """A metric of METRICS as a score, larger = better."""
    return BY_NAME[name].score(value)


# ------------------------------------------------------------------------------------------ of the code
def code_metrics(fired: np.ndarray, n_tok: np.ndarray, l0: float) -> dict[str, float]:
    """alive, dense: shares of latents that fire at all, and on more than DENSE of the tokens; bits a token of
    their indices, and of indices and values.

    fired [2,F]: how often each latent fires in the n_tok [2] tokens of the two halves of the documents.
    """
    bits = index_bits(fired, n_tok)
    often = fired.sum(0) / np.sum(n_tok)
    return {
        "alive": float((often > 0).mean()),
        "dense": float((often > DENSE).mean()),
        "bits_idx": bits,
        "bits": bits + VALUE_BITS * l0,
    }


def index_bits(fired: np.ndarray, n_tok: np.ndarray) -> float:
    """Bits per token that name the active latents: each latent coded as a Bernoulli of its own rate. nan
    without two halves.

    The rates of one half of the documents (add one half) code the other and vice versa, so that no rate is
    fitted to what it codes. fired [2,F] counts in n_tok [2] tokens. The code ignores which latents fire
    together: an upper bound on their entropy.
    """
    n = np.asarray(n_tok)[:, None]
    with np.errstate(invalid="ignore"):
        rate, coded = (fired + 0.5) / (n + 1), fired[::-1] / n[::-1]
    return float(-(coded * np.log2(rate) + (1 - coded) * np.log2(1 - rate)).sum(1).mean())
