"""TODO metrics."""

import numpy as np

VALUE_BITS = 8

# Distortions and scores that stand on the leaderboard: name -> how it is read as "smaller is better" (None:
# see `scores`).
EUCLIDEAN_CONTROLS = ("r2_nosink", "r2_defl1", "r2_ln", "nmse_tok", "cosine")
PROXIES = (
    "r2",
    "r2_nosink",
    "r2_defl1",
    "r2_ln",
    "nmse",
    "nmse_tok",
    "mse",
    "cosine",
    "relerr",
    "swd_tok",
    "swd_seq",
    "swd_sampled",
    "gd_abs",
    "gd_mean",
)


def index_bits(fired: np.ndarray, n_tok: np.ndarray) -> float:
    """Bits per token that name the active latents: each latent coded as a Bernoulli of its own rate. nan
    without two halves.

    The rates of one half of the documents (add one half) code the other and the other way round, so that no
    rate is fitted to what it codes. fired [2,F] counts in n_tok [2] tokens. (A code for indices that fire
    alone or together alike: an upper bound on their entropy.)
    """
    n = np.asarray(n_tok)[:, None]
    with np.errstate(invalid="ignore"):
        rate, coded = (fired + 0.5) / (n + 1), fired[::-1] / n[::-1]
    return float(-(coded * np.log2(rate) + (1 - coded) * np.log2(1 - rate)).sum(1).mean())


# ------------------------------------------------------------------------------------------------ metrics
def metrics(sums: dict[str, np.ndarray], weights: np.ndarray, d: int | np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under every re-weighting: sums {quantity: [C,S]} of C conditions, weights [W,S] ->
    {metric: [W,C]}.

    R^2 keeps the one mean of the whole set. CE_rec is a ratio of sums, never a mean of ratios. d [C] =
    d_model. fed_iso_nosink is what fed_nosink is expected to be for an isotropic error, as long as this one
    at every token; fed_excess is fed_nosink minus it, from the same sampled labels: the log of rho, weighted
    by where the error is long, without sinks.
    """
    total = {q: weights @ v.T for q, v in sums.items()}
    square = lambda v: weights @ np.square(v).T
    n = total["n"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ce = {q: total[q] / n for q in ("ce_orig", "ce_recon", "ce_sinkclean", "ce_zero", "ce_mean")}
        return {
            "r2": 1 - total["sse"] / total["sst"],
            "r2_nosink": 1 - total["sse_nosink"] / total["sst_nosink"],
            "r2_defl1": 1 - total["sse_defl1"] / total["sst_defl1"],
            "r2_ln": 1 - total["sse_ln"] / total["sst_ln"],
            "nmse": total["sse"] / total["h_sq"],
            "nmse_tok": total["nmse_tok"] / n,
            "mse": total["sse"] / (n * d),
            "cosine": total["cosine"] / n,
            "relerr": total["relerr"] / n,
            "swd_tok": total["gd_sq"] / n,
            "swd_seq": square(sums["gd"]) / n,
            "swd_sampled": total["gd_sampled_seq"] / n,
            "gd_mean": total["gd"] / n,
            "gd_abs": total["gd_abs"] / n,
            "ce_orig": ce["ce_orig"],
            "ce_recon": ce["ce_recon"],
            "dce": ce["ce_recon"] - ce["ce_orig"],
            "ce_rec": 2 - ce["ce_recon"] / ce["ce_orig"],
            "ce_rec_sinkclean": 2 - ce["ce_sinkclean"] / ce["ce_orig"],
            "ce_zero": ce["ce_zero"],
            "ce_mean": ce["ce_mean"],
            "frac_zero": (ce["ce_zero"] - ce["ce_recon"]) / (ce["ce_zero"] - ce["ce_orig"]),
            "frac_mean": (ce["ce_mean"] - ce["ce_recon"]) / (ce["ce_mean"] - ce["ce_orig"]),
            "kl": total["kl"] / n,
            "l0": total["l0"] / n,
            "fed": np.log((total["fisher"] / total["fisher_h"]) / (total["sse"] / total["sst"])),
            "fed_nosink": np.log(
                (total["fisher_nosink"] / total["fisher_h_nosink"])
                / (total["sse_nosink"] / total["sst_nosink"])
            ),
            "rho": (total["fisher"] / total["sse"]) / (total["g_sq"] / (n * d)),
            "fed_iso_nosink": np.log(
                (total["fisher_iso_nosink"] / total["fisher_h_nosink"])
                / (total["sse_nosink"] / total["sst_nosink"])
            ),
            "fed_excess": np.log(total["fisher_nosink"] / total["fisher_iso_nosink"]),
        }


def oriented(name: str, value: np.ndarray) -> np.ndarray:
    """A metric as a score, larger = better: -log10 of the distortion it measures, 1 - x for R^2s and cosine.

    gd_mean is signed (it predicts dCE, and may be negative), so it keeps its own scale; CE_rec is its own
    score.
    """
    if name == "ce_rec":
        return value
    if name == "gd_mean":
        return -value
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log10(1 - value if name.startswith("r2") or name == "cosine" else value)


METRICS = [
    "r2",
    "r2_nosink",
    "r2_defl1",
    "r2_ln",
    "nmse",
    "nmse_tok",
    "mse",
    "cosine",
    "relerr",
    "swd_tok",
    "swd_seq",
    "swd_sampled",
    "gd_mean",
    "gd_abs",
    "ce_orig",
    "ce_recon",
    "dce",
    "ce_rec",
    "ce_rec_sinkclean",
    "ce_zero",
    "ce_mean",
    "frac_zero",
    "frac_mean",
    "kl",
    "alive",
    "l0",
    "bits_idx",
    "bits",
    "fed",
    "fed_nosink",
    "rho",
    "fed_iso_nosink",
    "fed_excess",
]
