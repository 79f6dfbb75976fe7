"""What Exp-C measures once per hook: the shape of the pullback Fisher G, cheaper estimators of its quadratic
form, and dCE as an integral.

Shapes: B sequences of a batch, S in all, T positions, d = d_model, V = vocabulary.
"""

from dataclasses import dataclass

from transport_geometry.measuring import fisher
from transport_geometry.measuring.evaluate import DRAWS, Activations, activations
from transport_geometry.models.lm import Hook, cross_entropy
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics.intervals import interval

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

SHAPE = ("trace", "pr", "top1", "pr_sigma", "overlap1", "overlap4", "overlap16", "alignment")
MAX_BLOCKS = 24  # of documents, the bootstrap's units: each holds sums of d x d
REPEATS = 50  # of an estimator
NODES = (0, 1, 2, 4, 8)  # of the quadrature


# ------------------------------------------------------------------------------------------ the shape of G
@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the positions of each block of documents."""

    n: np.ndarray  # [blocks]
    first: np.ndarray  # [blocks,d], of h
    second: np.ndarray  # [blocks,d,d], of h h^T
    gram: np.ndarray  # [blocks,d,d], of g_y g_y^T, mean over the draws of labels

    @classmethod
    def none(cls, blocks: int, d: int) -> "Moments":
        return cls(
            np.zeros(blocks), np.zeros((blocks, d)), np.zeros((blocks, d, d)), np.zeros((blocks, d, d))
        )

    def add(self, block: int, h: Tensor, g: Tensor) -> None:
        """h [n,d], g [m,n,d], float64."""
        of_all = g.flatten(0, 1)
        self.n[block] += len(h)
        self.first[block] += h.sum(0).numpy()
        self.second[block] += (h.T @ h).numpy()
        self.gram[block] += (of_all.T @ of_all).numpy() / len(g)

    def shape(self, weights: np.ndarray) -> dict[str, float]:
        """`shape_of_g` with the blocks weighted [blocks]."""
        n, first, second, gram = (
            np.tensordot(weights, v, 1) for v in (self.n, self.first, self.second, self.gram)
        )
        with np.errstate(invalid="ignore"):  # no positions but sinks
            mean = first / n
            return shape_of_g(gram / n, second / n - np.outer(mean, mean))


def geometry(hook: Hook, input_ids: Tensor, batch: int, document: np.ndarray) -> list[dict]:
    """G and the activations' covariance Sigma, over all positions and without sinks: one row each, intervals
    over documents [S].

    G = E_t[G_t], the all-downstream block averaged over positions, from gradients with sampled labels: E[g_y
    g_y^T] (d x d, float64).
    """
    shared = activations(hook, input_ids, batch)
    blocks = min(int(document.max()) + 1, MAX_BLOCKS)
    with_sinks, without = moments(hook, input_ids, shared, batch, document % blocks, blocks)
    weights = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), 100)
    out = []
    for sinks, sums in (("in", with_sinks), ("out", without)):
        shapes = [sums.shape(w) for w in (np.ones(blocks), *weights)]
        row = dict(sinks=sinks, d=shared.h.shape[-1])
        for name, value in shapes[0].items():
            lo, hi = interval(np.array([shape[name] for shape in shapes[1:]]))
            row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        out.append(row)
    return out


def moments(
    hook: Hook,
    input_ids: Tensor,
    shared: Activations,
    batch: int,
    block: np.ndarray,
    blocks: int,
    draws: int = 2 * DRAWS,
) -> tuple[Moments, Moments]:
    """(over all positions, without sinks); block [S] of each sequence, draws of sampled labels."""
    d = shared.h.shape[-1]
    both = Moments.none(blocks, d), Moments.none(blocks, d)
    uniforms = torch.rand(
        len(input_ids), draws, input_ids.shape[1] - 1, generator=torch.Generator().manual_seed(1)
    )
    start = 0
    for clean in shared.batches(hook, input_ids, uniforms, batch):
        B, T = clean.input_ids.shape
        g = torch.stack([g.view(B, T - 1, d).cpu() for g in clean.g_sampled], 1).double()  # [B,m,T-1,d]
        for i in range(B):
            h, sink = shared.h[start + i, :-1].double(), shared.sink[start + i]
            for sums, keep in zip(both, (torch.ones_like(sink), ~sink)):
                sums.add(block[start + i], h[keep], g[i][:, keep])
        start += B
    return both


def shape_of_g(G: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """Of two symmetric [d,d]: trace and participation ratio of G, its top share, how its top directions lie
    to Sigma's.

    pr = (tr G)^2 / tr G^2; overlap_r = |U_r(G)^T U_r(Sigma)|_F^2 / r, the mean squared cosine of the
    principal angles (chance r/d); alignment = tr(G Sigma) d / (tr G tr Sigma): 1 without alignment, below 1
    where the model does not care for the directions in which h varies most. All nan where no position is
    left, or one of the two is 0.
    """
    d, trace = len(G), np.trace(G)
    if not (np.isfinite([G, sigma]).all() and trace > 0 and np.trace(sigma) > 0):
        return dict.fromkeys(SHAPE, np.nan)
    (values, of_g), (_, of_sigma) = (eigh(A, subset_by_index=[max(d - 16, 0), d - 1]) for A in (G, sigma))
    of_g, of_sigma = of_g[:, ::-1], of_sigma[:, ::-1]
    overlaps = {f"overlap{r}": ((of_g[:, :r].T @ of_sigma[:, :r]) ** 2).sum() / r for r in (1, 4, 16)}
    return {
        "trace": trace,
        "pr": trace**2 / (G**2).sum(),
        "top1": values[-1] / trace,
        "pr_sigma": np.trace(sigma) ** 2 / (sigma**2).sum(),
        "alignment": (G * sigma).sum() * d / (trace * np.trace(sigma)),
    } | overlaps


# ------------------------------------------------------------------------------------------ of one SAE
def reconstruction_error(hook: Hook, input_ids: Tensor, sae: SAE) -> tuple[Tensor, Tensor, Tensor]:
    """h [B,T,d], delta [B,T,d] (0 at the last position), p [B,T-1,V] of the clean run."""
    h = hook.head(input_ids)
    with torch.no_grad():
        delta = sae.reconstruct(h.flatten(0, 1))[2].view_as(h) - h
        delta[:, -1] = 0
        return h, delta, hook.log_probs(input_ids, h).exp()


def estimators(hook: Hook, input_ids: Tensor, sae: SAE) -> list[dict]:
    """Other ways to the quadratic form of one SAE (all positions together), over the exact form: mean, its
    SE, SD of one estimate.

    The research log's subsampled Jacobian with diagonal F, from S rows of the vocabulary per token, each a
    backward pass of its own; and labels sampled from p, one backward pass for all tokens.
    """
    h, delta, p = reconstruction_error(hook, input_ids, sae)
    with torch.no_grad():
        u = fisher.push_forward(hook, input_ids, h, delta)
    exact = fisher.variance(p, u).sum().item()
    generator = torch.Generator().manual_seed(2)
    p, u = p.cpu(), u.cpu()
    rows = []
    for size in (32, 256):
        shape = (*p.shape[:2], size)
        for name, importance, centred in (
            ("uniform rows, centred", False, True),
            ("uniform rows, as proposed, uncentred", False, False),
            ("rows from p, centred", True, True),
            ("rows from p, as proposed, uncentred", True, False),
        ):
            draws = []
            for _ in range(REPEATS):
                if importance:
                    entries = torch.multinomial(p.flatten(0, 1), size, replacement=True, generator=generator)
                else:
                    entries = torch.randint(p.shape[-1], shape, generator=generator)
                form = fisher.subsampled_form(p, u, entries.view(shape), importance, centred)
                draws.append(form.sum().item())
            rows.append(estimator_row(f"diagonal F, {name}", f"{size} a token", draws, exact))
    uniforms = torch.rand(2 * REPEATS, *p.shape[:2], generator=generator).to(input_ids.device)
    _, (g, *gradients) = hook.clean_pass(input_ids, h, uniforms)
    sampled = fisher.sampled_form(gradients, delta)[1].sum(1).cpu().numpy()
    of_data = [fisher.sampled_form([g], delta)[1].sum().item()]
    return [
        *rows,
        estimator_row("sampled labels (true Fisher)", "1", sampled, exact),
        estimator_row("sampled labels (true Fisher)", f"{DRAWS}", sampled.reshape(-1, DRAWS).mean(1), exact),
        estimator_row("the data's labels (swd_seq)", "1", of_data, exact),
    ]


def estimator_row(name: str, backwards: str, draws: np.ndarray | list[float], exact: float) -> dict:
    """A row of estimators.csv."""
    ratio = np.asarray(draws) / (exact or np.nan)
    sd = ratio.std(ddof=1) if len(ratio) > 1 else np.nan
    return {
        "estimator": name,
        "backward passes": backwards,
        "repeats": len(ratio),
        "mean": ratio.mean(),
        "se": sd / len(ratio) ** 0.5,
        "sd": sd,
    }


def path_integral(hook: Hook, input_ids: Tensor, sae: SAE) -> list[dict]:
    """dCE of one SAE as the integral of g.delta from h to h_hat (exact by the fundamental theorem):
    Gauss-Legendre with m nodes against measured.

    m = 0 is the plain first-order term g(h).delta, which every gradient proxy starts from.
    """
    h, delta, p = reconstruction_error(hook, input_ids, sae)
    with torch.no_grad():
        ends = [hook.log_probs(input_ids, h + a * delta) for a in (0, 1)]
        clean, patched = (cross_entropy(log_p, input_ids).cpu().double().mean().item() for log_p in ends)

    def slope(a: float) -> float:
        """d CE / d a at h + a delta, in nats per token."""
        _, (g,) = hook.clean_pass(input_ids, h + a * delta)
        return (g * delta).cpu().double().sum().item() / p[..., 0].numel()

    rows, measured = [], patched - clean
    for m in NODES:
        if m == 0:
            integral = slope(0.0)
        else:
            nodes, weights = np.polynomial.legendre.leggauss(m)
            integral = sum(w / 2 * slope((node + 1) / 2) for node, w in zip(nodes, weights))
        error = abs(integral - measured) / abs(measured) if measured else np.nan
        rows.append({"nodes": m, "integral": integral, "measured": measured, "error": error})
    return rows
