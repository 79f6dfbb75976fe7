"""Rate and distortion of an SAE as a code: quantised values, ideal code lengths, the distortion after
quantisation, and the Gaussian lower bound.

Shapes: N tokens, d = d_model, F = d_sae, K = active latents kept a token, D documents, R draws, n points of a
curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transport_geometry.measuring import fisher
from transport_geometry.measuring.evaluate import DRAWS, Activations, activations, label_uniforms, patched
from transport_geometry.measuring.fisher_study import reconstruction_error
from transport_geometry.measuring.metrics import BY_NAME
from transport_geometry.measuring.patch import Patch
from transport_geometry.models.lm import Hook, cross_entropy, kl_divergence
from transport_geometry.records.condition import Condition
from transport_geometry.running.grid import EvalSet
from transport_geometry.saes.sae import TopKSAE
from transport_geometry.saes.sinks import sinks_of

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

BACKED_OFF = 16  # pseudo-counts that mix the histogram of all latents into a latent's own
GROUPS = 10  # of eigendirections
# sums over a document that quantisation changes, as `metrics` has them
CODED = "n l0 bits_idx bits_val sse sse_nosink cosine kl ce_recon gd_sampled_seq fisher".split()


# ---------------------------------------------------------------------------------------- quantising a code
class Quantised(TopKSAE):
    """An SAE whose values lie on a uniform grid: h_hat = z' W_dec + b_dec with z' = step round(z / step).
    Values that round to 0 are not sent.
    """

    def __init__(self, sae: TopKSAE, step: float):
        super().__init__(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
        self.step = step
        self.requires_grad_(False)

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = super().encode(h)
        return (values / self.step).round() * self.step, indices


def unit(sae: TopKSAE, h: Tensor) -> float:
    """Standard deviation of the active latents' values on h [N,d], all latents together: the unit of the
    steps.
    """
    values = sae.encode(h)[0]
    return values[values > 0].double().std(correction=0).item()


# ---------------------------------------------------------------------------------------- ideal code lengths
def index_lengths(fired: np.ndarray, n_tok: np.ndarray) -> np.ndarray:
    """[D]: bits that name the active latents of every document, each latent coded as a Bernoulli of its own
    rate, as in `metrics.index_bits`.

    fired [D,F]: how often a latent fires in the n_tok [D] tokens of each document. The rates of the odd
    documents (add one half) code the even ones, and vice versa. nan where one half is empty.
    """
    bits = np.full(len(n_tok), np.nan)
    for coded, known in halves(len(n_tok)):
        if not (n := n_tok[known].sum()):
            continue
        rate = (fired[known].sum(0) + 0.5) / (n + 1)
        yes, no = -np.log2(rate), -np.log2(1 - rate)
        bits[coded] = fired[coded] @ (yes - no) + n_tok[coded] * no.sum()
    return bits


def value_lengths(
    latent: np.ndarray, symbol: np.ndarray, document: np.ndarray, n_documents: int
) -> np.ndarray:
    """[D]: bits of the quantised values of every document. latent, symbol >= 1, document [n], one entry per
    value sent.

    Each latent's histogram over the other half of the documents (even, odd), BACKED_OFF on that of all
    latents, which itself starts from one pseudo-count of 1 / (q (q + 1)), q = 1, 2, ...: a distribution over
    all whole numbers, so that no value is clipped and nothing is fitted to what it codes.
    """
    bits = np.zeros(n_documents)
    size = int(symbol.max(initial=0)) + 1
    for coded, known in halves(n_documents):
        here, there = coded[document], known[document]
        pair, n = np.unique(latent[there] * size + symbol[there], return_counts=True)
        of_all = np.bincount(symbol[there], minlength=size)
        of_latent = np.bincount(latent[there], minlength=int(latent.max(initial=0)) + 1)
        q, i = symbol[here], latent[here]
        p = (of_all[q] + 1 / (q * (q + 1.0))) / (of_all.sum() + 1)
        at = np.searchsorted(pair, i * size + q).clip(max=max(len(pair) - 1, 0))
        own = np.where(pair[at] == i * size + q, n[at], 0) if len(pair) else 0
        p = (own + BACKED_OFF * p) / (of_latent[i] + BACKED_OFF)
        bits += np.bincount(document[here], -np.log2(p), n_documents)
    return bits


def halves(n_documents: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(the documents [D] bool that are coded, those that are known), each half once."""
    even = np.arange(n_documents) % 2 == 0
    return [(even, ~even), (~even, even)]


# ---------------------------------------------------------------------------------------- the Gaussian bound
def share_left(spectrum: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """D(R) / D(0) of a Gaussian with this spectrum of variances, at R = bits [...]: the least share of the
    variance that is lost at this rate (Cover & Thomas 2006, 10.3.3).

    The water level in closed form: with the m largest above it, theta = (their geometric mean) 2^(-2 R / m).
    """
    found = np.sort(spectrum[spectrum > 1e-12 * spectrum.max()])[::-1]
    logs = np.log2(found)
    # bits at which the next one is reached
    reached = 0.5 * (np.cumsum(logs)[:-1] - np.arange(1, len(found)) * logs[1:])
    m = 1 + np.searchsorted(reached, bits, side="right")
    theta = 2 ** ((np.cumsum(logs)[m - 1] - 2 * bits) / m)
    below = np.r_[np.cumsum(found[::-1])[::-1], 0.0][m]
    return (m * theta + below) / found.sum()


# ---------------------------------------------------------------------------------------- of one hook
def coded_rows(
    eval_set: EvalSet,
    saes: Mapping[Condition, TopKSAE],
    units: Mapping[Condition, float],
    steps: Sequence[float],
    shared: Activations,
    batch: int,
) -> tuple[list[dict], np.ndarray]:
    """(rows, G): one row per SAE, step and document, the sums CODED of the patched runs of the quantised
    code; and G [d,d] of `Geometry`, from the same clean run.

    steps: of the grid of values, in `units`. The sampled labels are those of `evaluate`.
    """
    hook, input_ids, document = eval_set.hook, eval_set.held.input_ids, eval_set.held.document
    n_doc = int(document.max()) + 1
    coders = {(one, step): Quantised(sae, step * units[one]) for one, sae in saes.items() for step in steps}
    sums = {key: {q: np.zeros(n_doc) for q in CODED} for key in coders}
    sent: dict[tuple[Condition, float], list] = {key: [] for key in coders}  # `symbols` of every batch
    G, start = torch.zeros(eval_set.d, eval_set.d, dtype=torch.float64), 0
    total, what = len(input_ids) * len(coders), f"quantised {eval_set.label}"
    bar = tqdm(total=total, unit="seq", desc=what, leave=False, disable=None)
    with bar, torch.no_grad():
        for clean in shared.batches(hook, input_ids, label_uniforms(input_ids), batch):
            here = document[start : start + len(clean.input_ids)]
            start += len(here)
            g = torch.cat(clean.g_sampled).cpu().double()
            G += g.T @ g / DRAWS
            for key, coder in coders.items():
                patch = patched(clean, coder, shared)
                for name, value in quantities(patch).items():
                    np.add.at(sums[key][name], here, value)
                sent[key].append(symbols(patch, coder.step, here))
                bar.update(len(here))
    rows = []
    for (one, step), of_sae in sums.items():
        latent, symbol, where = (np.concatenate(part) for part in zip(*sent[one, step]))
        fired = np.zeros((n_doc, len(saes[one].W_dec)))
        np.add.at(fired, (where, latent), 1)
        of_sae["bits_idx"] = index_lengths(fired, of_sae["n"])
        of_sae["bits_val"] = value_lengths(latent, symbol, where, n_doc)
        for i in range(n_doc):
            of_document = {q: float(value[i]) for q, value in of_sae.items()}
            rows.append(vars(one) | {"step": step, "document": i} | of_document)
    return rows, (G / len(input_ids) / (input_ids.shape[1] - 1)).numpy()


def quantities(patch: Patch) -> dict[str, np.ndarray]:
    """{quantity: [B]}: sums over the sequences of a batch, of the same names and definitions as in
    `evaluate`.
    """
    clean, stats = patch.clean, patch.stats
    cosine = BY_NAME["cosine"].term
    assert patch.values is not None and cosine is not None
    per_token = {
        "n": torch.ones(clean.sink.shape, dtype=torch.float64),
        "l0": clean.per_token((patch.values > 0).sum(1)),
        "sse": stats["delta_sq"],
        "sse_nosink": stats["delta_sq"] * ~clean.sink,
        "cosine": cosine(patch),
        "kl": clean.per_token(kl_divergence(clean.p, clean.log_p, patch.log_q)),
        "ce_recon": clean.per_token(cross_entropy(patch.log_q, clean.input_ids)),
        "fisher": torch.stack([v.square() for v in patch.g_delta_sampled]).mean(0),
    }
    found = {name: value.sum(1).numpy() for name, value in per_token.items()}
    sampled = [v.sum(1).square() for v in patch.g_delta_sampled]
    return found | {"gd_sampled_seq": torch.stack(sampled).mean(0).numpy()}


def symbols(patch: Patch, step: float, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latent, symbol, document), each [n]: the values of a batch that are sent. document [B]."""
    assert patch.values is not None and patch.indices is not None
    symbol = (patch.values / step).round().long().cpu().numpy()
    rows = np.repeat(document, len(symbol) // len(document))[:, None]
    sent = symbol > 0
    return (patch.indices.long().cpu().numpy()[sent], symbol[sent], np.broadcast_to(rows, symbol.shape)[sent])


# ---------------------------------------------------------------------------------------- shapes of a hook
@dataclass(frozen=True, eq=False)
class Geometry:
    """Means over the evaluated positions of a hook, [d,d] in float64."""

    sigma: np.ndarray  # covariance of h
    sigma_nosink: np.ndarray  # without sink positions
    G: np.ndarray  # E[g_y g_y^T], the all-downstream block with sampled labels
    error: np.ndarray  # E[delta delta^T] of one SAE


def geometry_of(shared: Activations, G: np.ndarray, sae: TopKSAE, device: torch.device) -> Geometry:
    """Of the evaluation text, and of one SAE's error on it."""
    h = shared.h[:, :-1].flatten(0, 1)
    with torch.no_grad():
        error = [sae.reconstruct(x.to(device))[2].cpu() - x for x in h.split(8192)]
    x, delta = h.double(), torch.cat(error).double()
    return Geometry(
        torch.cov(x.T, correction=0).numpy(),
        torch.cov(x[~shared.sink.flatten()].T, correction=0).numpy(),
        G,
        (delta.T @ delta / len(h)).numpy(),
    )


def spectrum_rows(of: Geometry) -> list[dict]:
    """Eigenvalues, descending: of Sigma, of Sigma without sinks, and of Sigma^1/2 G Sigma^1/2, the spectrum
    that bounds a code of h under the Fisher distortion.
    """
    values, vectors = np.linalg.eigh(of.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    spectra = (
        np.linalg.eigvalsh(matrix).clip(0)[::-1] for matrix in (of.sigma, of.sigma_nosink, root @ of.G @ root)
    )
    names = ("sigma", "sigma_nosink", "fisher")
    return [{"rank": i} | dict(zip(names, map(float, row))) for i, row in enumerate(zip(*spectra))]


def direction_rows(of: Geometry) -> list[dict]:
    """GROUPS of eigendirections of Sigma and of G, from those of the largest eigenvalues: the share that each
    has of the variance of h, of the trace of G, and of the error's square.
    """
    rows = []
    for name, matrix in (("Σ", of.sigma), ("G", of.G)):
        vectors = np.linalg.eigh(matrix).eigenvectors[:, ::-1]

        def shares(of_what: np.ndarray, vectors: np.ndarray = vectors) -> list[float]:
            along = np.einsum("di,de,ei->i", vectors, of_what, vectors) / np.trace(of_what)
            return [float(part.sum()) for part in np.array_split(along, GROUPS)]

        columns = zip(shares(of.sigma), shares(of.G), shares(of.error))
        for i, (variance, sensitivity, error) in enumerate(columns, 1):
            row = {"directions": name, "group": i, "variance": variance, "sensitivity": sensitivity}
            rows.append(row | {"error": error})
    return rows


# ---------------------------------------------------------------------------------------- softmax geometry
def softmax_form(hook: Hook, input_ids: Tensor, h: Tensor, delta: Tensor, p: Tensor) -> Tensor | None:
    """[B,T-1]: delta^T G delta at the last block's hook, where the logits are an unembedding of the final
    LayerNorm and J is known: J delta = W_U (gamma / s (delta - mean delta - x mean(x delta))), x = (h - mean
    h) / s.

    None where another block follows, the final norm is not a LayerNorm, or more than the unembedding comes
    after it. h, delta [B,T,d], p [B,T-1,V].
    """
    norms = [m for m in hook.model.base_model.children() if isinstance(m, torch.nn.LayerNorm)]
    if not (hook.is_last and len(norms) == 1 and hook.unembeds(input_ids)):
        return None
    norm, centred = norms[0], h - h.mean(-1, keepdim=True)
    s = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    x = centred / s
    moved = delta - delta.mean(-1, keepdim=True) - x * (x * delta).mean(-1, keepdim=True)
    y = (norm.weight * moved / s)[:, :-1]
    W_U = hook.model.get_output_embeddings().weight.to(y.dtype)
    return fisher.variance(p, torch.nn.functional.linear(y, W_U))


def softmax_rows(hook: Hook, input_ids: Tensor, sae: TopKSAE) -> list[dict]:
    """Relative distance of `fisher`'s two exact forms from the closed form, on one SAE's error; no row where
    there is no closed form. input_ids [B,T].
    """
    with torch.no_grad():
        h, delta, p = reconstruction_error(hook, input_ids, sae)
        closed = softmax_form(hook, input_ids, h, delta, p)
        if closed is None:
            return []
        off = {}
        for name, form in (("sequence", fisher.sequence_form), ("same", fisher.same_form)):
            off[name] = (form(hook, input_ids, h, delta, p) - closed).norm() / closed.norm()
    return [{"positions": closed.numel()} | {name: value.item() for name, value in off.items()}]


# ---------------------------------------------------------------------------------------- the whole of a hook
def study(
    eval_set: EvalSet,
    saes: Mapping[Condition, TopKSAE],
    training: Tensor,
    steps: Sequence[float],
    batch: int,
    device: torch.device,
) -> dict[str, list[dict]]:
    """{table: rows} of one hook, each row with model and layer. training: token ids [B,T] of the training
    side, which fix the steps before any evaluation token is read.
    """
    hook, middle = eval_set.hook, saes[eval_set.middle.condition]
    with torch.no_grad():
        h = hook.head(training.to(device))
        calm = h[~sinks_of(h)]
        units = {one: unit(sae, calm) for one, sae in saes.items()}
    shared = activations(hook, eval_set.held.input_ids, batch)
    name = {"model": eval_set.name, "layer": hook.layer}
    coded, G = coded_rows(eval_set, saes, units, steps, shared, batch)
    of = geometry_of(shared, G, middle, device)
    tables = {
        "quantised.csv": coded,
        "units.csv": [vars(one) | {"unit": value} for one, value in units.items()],
        "spectra.csv": [name | row for row in spectrum_rows(of)],
        "directions.csv": [name | row for row in direction_rows(of)],
    }
    checked = softmax_rows(hook, eval_set.held.input_ids[:batch].to(device), middle)
    return tables | ({"softmax.csv": [name | row for row in checked]} if checked else {})


# ---------------------------------------------------------------------------------------- curves compared
def along(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[R,m]: y at `at` [R,m], linear between the points (x, y) [R,n] sorted by x, and beyond them."""
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    right = (x[:, None, :] <= at[:, :, None]).sum(2).clip(1, x.shape[1] - 1)
    (x0, x1), (y0, y1) = ([np.take_along_axis(v, i, 1) for i in (right - 1, right)] for v in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return y0 + np.where(x1 > x0, (at - x0) / (x1 - x0), 0.0) * (y1 - y0)


def log_ratio(
    small: tuple[np.ndarray, np.ndarray], large: tuple[np.ndarray, np.ndarray], points: int = 33
) -> np.ndarray:
    """[R]: mean of ln y of the large model minus ln y of the small one at equal x, over the x that both
    curves (x, y) [R,n] reach. nan where they do not overlap, or a point is undefined.
    """
    lo = np.maximum(small[0].min(1), large[0].min(1))
    hi = np.minimum(small[0].max(1), large[0].max(1))
    at = lo[:, None] + (hi - lo)[:, None] * np.linspace(0, 1, points)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (along(large[0], np.log(large[1]), at) - along(small[0], np.log(small[1]), at)).mean(1)
    return np.where(hi > lo, found, np.nan)


def front(l0: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """[n] bool: the Pareto front of active latents and loss, less of both being better."""
    better = (l0[None] <= l0[:, None]) & (loss[None] <= loss[:, None])
    strictly = (l0[None] < l0[:, None]) | (loss[None] < loss[:, None])
    return np.logical_not((better & strictly).any(1))
