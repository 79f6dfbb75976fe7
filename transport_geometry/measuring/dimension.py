"""How many dimensions the activations at a hook have: by their covariance, by what the output is sensitive
to, and by what they share with the final norm's output.

Sigma is the mean-centred covariance of h, G = E[g_y g_y^T] the pullback Fisher averaged over positions, from
gradients g_y [d] of the summed CE with labels drawn from the model. A participation ratio PR = (sum lambda)^2
/ sum lambda^2 of n equal eigenvalues is n.

Shapes: N positions, d = d_model, b blocks of documents, the units of the intervals.
"""

from transport_geometry.measuring.fisher_study import Moments

import numpy as np
import scipy
from scipy.linalg import eigh, eigvalsh
from torch import Tensor

DEFLATED = (1, 2, 4)  # how many of the top eigenvalues are dropped
COUNTS = ("pr", *(f"pr_defl{m}" for m in DEFLATED), "pr_corrected", "dim_fisher", "energy")
POSITIONS = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # at which norms are shown


# --------------------------------------------------------------------------------------- participation ratios
def participation_ratio(values: np.ndarray) -> float:
    """(sum v)^2 / sum v^2 of values [n] >= 0; nan where nothing is left of them."""
    square = float((values**2).sum())
    return float(values.sum()) ** 2 / square if square > 0 else np.nan


def participation_of(h: Tensor) -> float:
    """PR of the covariance of h [N,d], float64: its trace squared over the sum of its squares."""
    centred = h.double() - h.double().mean(0)
    covariance = centred.T @ centred
    return float(covariance.trace() ** 2 / covariance.square().sum())


def covariances(sums: Moments, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Sigma, G), both [d,d], with the blocks weighted [b]."""
    n, first, second, gram = (
        np.tensordot(weights, v, 1) for v in (sums.n, sums.first, sums.second, sums.gram)
    )
    return second / n - np.outer(first, first) / n**2, gram / n


def dim_fisher(G: np.ndarray, sigma: np.ndarray) -> float:
    """PR of the eigenvalues of Sigma^1/2 G Sigma^1/2, which are those of G Sigma: [tr G Sigma]^2 / tr G Sigma
    G Sigma.

    How many directions of h's own variation change the output. Unchanged by h -> A h, g -> A^-T g, so by any
    rotation, and by any scale of either.
    """
    product = G @ sigma
    square = float((product * product.T).sum())
    return float(np.trace(product)) ** 2 / square if square > 0 else np.nan


def pr_corrected(sums: Moments, weights: np.ndarray) -> float:
    """PR of Sigma without the bias of a finite sample, by pairs of positions from different blocks (weights
    [b], each 0 or 1).

    tr Sigma^2 is the mean of (x_i . x_j)^2 over pairs, x centred. The n pairs of a position with itself make
    a plain PR too small, 1/PR_plain ~ 1/PR + 1/n, and positions of one document are not independent. nan
    below two blocks.
    """
    kept = weights > 0
    n, first, second = sums.n[kept], sums.first[kept], sums.second[kept]
    mean = first.sum(0) / n.sum()
    cross = first[:, :, None] * mean
    scatter = second - cross - cross.transpose(0, 2, 1) + n[:, None, None] * np.outer(mean, mean)
    trace = np.trace(scatter, axis1=1, axis2=2)
    square = (scatter.sum(0) ** 2).sum() - (scatter**2).sum()
    if not (n.sum() ** 2 - (n**2).sum() > 0 and square > 0):
        return np.nan
    return float((trace.sum() ** 2 - (trace**2).sum()) / square)


def counts(sums: Moments, weights: np.ndarray) -> dict[str, float]:
    """{name: dimension} with the blocks weighted [b], each 0 or 1; energy = tr G Sigma, in nats^2: the Fisher
    energy of h's whole variation. All nan where no position is left.
    """
    if not sums.n @ weights > 0:
        return dict.fromkeys(COUNTS, np.nan)
    sigma, G = covariances(sums, weights)
    values = np.clip(eigvalsh(sigma)[::-1], 0, None)
    found = {"pr": participation_ratio(values)}
    found |= {f"pr_defl{m}": participation_ratio(values[m:]) for m in DEFLATED}
    corrected, relevant = pr_corrected(sums, weights), dim_fisher(G, sigma)
    return found | {"pr_corrected": corrected, "dim_fisher": relevant, "energy": float((G * sigma).sum())}


def both_counts(with_sinks: Moments, without: Moments, weights: np.ndarray) -> list[dict[str, float]]:
    """`counts` over all positions and without sinks, and log_ratio, the log of geometric over task-relevant
    dimension: above 0 the activations vary in more directions than the output is sensitive to.

    Geometric: pr_defl1 over all positions, pr without sinks. Task-relevant: dim_fisher without sinks in both,
    since G, a mean over positions, would weigh a sink's variance by the sensitivity of the others.
    """
    whole, calm = counts(with_sinks, weights), counts(without, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.log([whole["pr_defl1"], calm["pr"]]) - np.log(calm["dim_fisher"])
    return [row | {"log_ratio": float(ratio)} for row, ratio in zip((whole, calm), ratios)]


def geometry_rows(with_sinks: Moments, without: Moments) -> list[dict]:
    """`both_counts` of all blocks, a row each, and 95% intervals, name_lo and name_hi, by leaving blocks out
    one at a time.

    Student's t around the estimate, in logarithms: a percentile bootstrap of a PR lies below its own
    estimate, since a resample repeats positions and repeats count as fewer dimensions.
    """
    b, used = len(with_sinks.n), np.flatnonzero(with_sinks.n > 0)
    of_all = both_counts(with_sinks, without, np.ones(b))
    left_out = [both_counts(with_sinks, without, (np.arange(b) != block).astype(float)) for block in used]
    rows = []
    for i, sinks in enumerate(("in", "out")):
        row: dict = {"sinks": sinks, "d": with_sinks.first.shape[1]}
        for name, value in of_all[i].items():
            to, back = (float, float) if name == "log_ratio" else (np.log, np.exp)
            half = jackknife_half([to(one[i][name]) for one in left_out])
            row |= {name: value, f"{name}_lo": float(back(to(value) - half))}
            row |= {f"{name}_hi": float(back(to(value) + half))}
        rows.append(row)
    return rows


def jackknife_half(left_out: list[float]) -> float:
    """Half the length of a 95% interval, from values without each of b blocks; nan below three."""
    b = len(left_out)
    if b < 3:
        return np.nan
    variance = (b - 1) / b * np.square(np.array(left_out) - np.mean(left_out)).sum()
    return float(scipy.stats.t.ppf(0.975, b - 1) * np.sqrt(variance))


# ------------------------------------------------------------------------------------------- norm by position
def norms(h: Tensor) -> list[dict[str, float]]:
    """Of h [S,T,d] at evaluated positions: median norm at some of them, over the median at positions >= 1,
    and the position's share of SST = sum |h - mean|^2.
    """
    used = h[:, :-1].double()
    norm = used.norm(dim=-1)
    typical = norm[:, 1:].median().item() if norm.shape[1] > 1 else np.nan
    sst = (used - used.mean((0, 1))).square().sum(-1).sum(0)
    return [
        {
            "position": position,
            "norm": norm[:, position].median().item() / typical,
            "sst_share": (sst[position] / sst.sum()).item(),
        }
        for position in POSITIONS
        if position < norm.shape[1]
    ]


# ------------------------------------------------------------------------------------- canonical correlations
def whitened(x: np.ndarray, held: np.ndarray) -> np.ndarray:
    """x [N,d] mapped so that its channels are uncorrelated, of mean 0 and variance 1 at the positions that
    are not held [N]; directions without variance are left out.
    """
    centred = x - x[~held].mean(0)
    fitted = centred[~held]
    values, vectors = eigh(fitted.T @ fitted / len(fitted))
    kept = values > 1e-10 * values[-1]
    return centred @ (vectors[:, kept] / np.sqrt(values[kept]))


def held_out_correlations(x: np.ndarray, y: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations [r] of the canonical pairs of x and y [N,.], at the positions `held` [N] bool and at the
    others, at which they are fitted and x and y are white. A negative correlation at `held` counts as 0.
    """
    left, fitted, right = np.linalg.svd(x[~held].T @ y[~held], full_matrices=False)
    a, b = x[held] @ left, y[held] @ right.T
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.clip(np.nan_to_num(rho), 0.0, 1.0), np.clip(fitted / (~held).sum(), 0.0, 1.0)


def snr_dimension(rho: np.ndarray) -> float:
    """PR = (sum SNR^2)^2 / sum SNR^4 of SNR = rho^2 / (1 - rho^2), rho [r] in [0,1).

    For jointly Gaussian x and y the optimal separable critic's embeddings have the cross-covariance spectrum
    SNR_i, so this is what such a critic's PR estimates (an eigenvalue being a squared singular value). It
    counts dimensions only where the rho are equal.
    """
    square = np.clip(rho, 0.0, 1 - 1e-12) ** 2
    return participation_ratio((square / (1 - square)) ** 2)


def gaussian_mi(rho: np.ndarray) -> float:
    """-1/2 sum log(1 - rho^2), in nats: of jointly Gaussian x and y the mutual information."""
    return float(-0.5 * np.log1p(-(np.clip(rho, 0.0, 1 - 1e-12) ** 2)).sum())


SHUFFLES = 4


def canonical_rows(
    x: np.ndarray, y: np.ndarray, document: np.ndarray, sigmas: tuple[float, ...]
) -> list[dict[str, float]]:
    """Dimension and MI of x, y [N,.] by canonical correlations, a row for each amount of Gaussian noise on y,
    in standard deviations of its channels. Each half of the documents [N] is fitted for the other; both are
    averaged. mi_null, mi_null_se: with y's positions shuffled within the halves, without noise.
    """
    halves = [held := document % 2 == 0, ~held]
    rng = np.random.default_rng(1)
    noise = y.std(0) * rng.standard_normal(y.shape)
    white_x = [whitened(x, half) for half in halves]

    def read(y: np.ndarray) -> dict[str, float]:
        found = []
        for half, of_x in zip(halves, white_x):
            rho, fitted = held_out_correlations(of_x, whitened(y, half), half)
            found.append((gaussian_mi(rho), gaussian_mi(fitted), snr_dimension(rho)))
        return dict(zip(("mi", "mi_fit", "dimension"), np.mean(found, 0).tolist()))

    def shuffled() -> np.ndarray:
        order = np.arange(len(y))
        for half in halves:
            order[half] = rng.permutation(order[half])
        return y[order]

    null = [read(shuffled())["mi"] for _ in range(SHUFFLES)]
    of_null = {"mi_null": float(np.mean(null)), "mi_null_se": float(np.std(null, ddof=1))}
    return [{"sigma": sigma} | read(y + sigma * noise) | of_null for sigma in sigmas]
