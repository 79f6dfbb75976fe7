"""TODO evaluate."""

import math
from collections.abc import Callable

from transport_geometry import kernels
from transport_geometry.errors import Fault
from transport_geometry.lm import clean_pass, cross_entropy, head, kl_divergence, log_probs, tail
from transport_geometry.sae import TopKSAE, must_vary, sink_positions

import numpy as np
import torch
from tqdm import tqdm

DRAWS = 4  # of sampled labels


# --------------------------------------------------------------------------------------------- evaluation
def hook_statistics(model, layer: int, rows: torch.Tensor, batch: int) -> dict:
    """What all SAEs of a hook share: h [S,T,d] on the CPU, its mean, top eigenvector, LayerNorm mean, sinks,
    norms.

    Means and the covariance (mean-centred, over the evaluated positions) in float64 on the CPU.
    Raises Fault on an activation that is not finite, or where all are one.
    """
    device = next(model.parameters()).device
    h = torch.cat([head(model, layer, chunk.to(device)).cpu() for chunk in rows.split(batch)])
    if not torch.isfinite(h).all():
        raise Fault(f"layer {layer}: an activation is not finite in the evaluation text")
    used = h[:, :-1]
    norms = used.norm(dim=-1)
    sink = sink_positions(norms, norms[:, 1:].median().item())
    flat = used.flatten(0, 1).double()
    must_vary(flat, f"layer {layer}")
    mean = flat.mean(0)
    top = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -1]
    calm_mean = flat[~sink.flatten()].mean(0)
    ln_mean = torch.nn.functional.layer_norm(flat, flat.shape[-1:]).mean(0)
    as_float = lambda t: t.float().to(device)
    return {
        "h": h,
        "sink": sink,
        "mean": as_float(mean),
        "calm_mean": as_float(calm_mean),
        "top": as_float(top),
        "ln_mean": as_float(ln_mean),
    }


def dense_statistics(h: torch.Tensor, h_hat: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The columns kernels.STATS [N,7] of a reconstruction that has no code."""
    delta = h_hat - h
    return torch.stack(
        [
            (g * delta).sum(1),
            delta.square().sum(1),
            h_hat.square().sum(1),
            (h * h_hat).sum(1),
            h.square().sum(1),
            delta.sum(1),
            h.sum(1),
        ],
        1,
    )


def evaluate(
    model,
    layer: int,
    rows: torch.Tensor,
    reconstructions: dict[str, torch.nn.Module | Callable],
    batch: int,
    seed: int = 0,
    keep_tokens: bool = False,
    what: str = "",
    terms: Callable | None = None,
    shared: dict | None = None,
    document: np.ndarray | None = None,
) -> dict[str, dict]:
    """{name: {"sums": {quantity: [S] float64}, "fired": [2,F] counts in the halves, "tokens": {..} if kept}}.

    A reconstruction is a TopKSAE, another SAE (`formats.FileSAE`), or a function (h [N,d], mean [d]) -> h_hat
    [N,d]. The clean forward, g and its sampled twins are computed once per batch for all of them. An
    experiment's own quantities [B,T-1] come from terms(model, layer, x, h, delta, p, log_p, log_q), where
    delta [B,T,d] is 0 at the last position, which is not patched. Per-token values are formed in float32 on
    the model's device, summed in float64 on the CPU. shared: `hook_statistics`, where they are known. Raises
    Fault on a loss that is not finite. document [S], default one a sequence: the halves are its even and odd
    numbers.
    """
    device = next(model.parameters()).device
    half = (np.arange(len(rows)) if document is None else document) % 2
    shared = shared or hook_statistics(model, layer, rows, batch)
    uniforms = torch.rand(len(rows), DRAWS, rows.shape[1] - 1, generator=torch.Generator().manual_seed(seed))
    out = {name: {"sums": [], "fired": 0, "tokens": []} for name in reconstructions}
    bar = tqdm(total=len(rows) * len(out), unit="seq", desc=f"patching {what}", leave=False)
    for start in range(0, len(rows), batch):
        x = rows[start : start + batch].to(device)
        h = shared["h"][start : start + batch].to(device)
        B, T, d = h.shape
        sink = shared["sink"][start : start + batch]
        log_p, gradients = clean_pass(
            model, layer, x, h, uniforms[start : start + batch].transpose(0, 1).to(device)
        )
        p = log_p.exp()
        h_flat = h[:, :-1].flatten(0, 1)
        g, *g_sampled = [gradient[:, :-1].flatten(0, 1) for gradient in gradients]
        per_token = lambda v: (
            v.reshape(B, T - 1).double() if v.device.type == "cpu" else v.reshape(B, T - 1).cpu().double()
        )
        patched = lambda h_hat: log_probs(
            tail(model, layer, x, torch.cat([h_hat.view(B, T - 1, d), h[:, -1:]], 1))
        )

        centred, calm = h_flat - shared["mean"], h_flat - shared["calm_mean"]
        top = shared["top"]
        ln = torch.nn.functional.layer_norm(h_flat, (d,))
        keep = (~sink).double()
        common = {
            "n": torch.ones(B, T - 1, dtype=torch.float64),
            "n_nosink": keep,
            "h_sq": per_token(h_flat.square().sum(1)),
            "sst": per_token(centred.square().sum(1)),
            "sst_nosink": per_token(calm.square().sum(1)) * keep,
            "sst_defl1": per_token((centred - torch.outer(centred @ top, top)).square().sum(1)),
            "sst_ln": per_token((ln - shared["ln_mean"]).square().sum(1)),
            "g_sq": per_token(torch.stack([gy.square().sum(1) for gy in g_sampled]).mean(0)),
            "fisher_h": per_token(torch.stack([(gy * centred).sum(1).square() for gy in g_sampled]).mean(0)),
            "fisher_h_nosink": per_token(
                torch.stack([(gy * calm).sum(1).square() for gy in g_sampled]).mean(0)
            )
            * keep,
        }
        with torch.no_grad():
            common["ce_orig"] = per_token(cross_entropy(log_p, x))
            common["ce_zero"] = per_token(cross_entropy(patched(torch.zeros_like(h_flat)), x))
            log_mean = patched(shared["mean"].expand(len(h_flat), d))
            common["ce_mean"] = per_token(cross_entropy(log_mean, x))
            for name, reconstruction in reconstructions.items():
                values = None
                if isinstance(reconstruction, TopKSAE):
                    values, indices = reconstruction.encode(h_flat)
                    stats, h_hat = kernels.gradient_weighted_distortion(
                        values,
                        indices,
                        reconstruction.W_dec,
                        reconstruction.b_dec,
                        h_flat,
                        g,
                        want_h_hat=True,
                    )
                elif isinstance(reconstruction, torch.nn.Module):
                    values, indices, h_hat = reconstruction.reconstruct(h_flat)
                    stats = dense_statistics(h_flat, h_hat, g)
                else:
                    h_hat = reconstruction(h_flat, shared["mean"])
                    stats = dense_statistics(h_flat, h_hat, g)
                delta = h_hat - h_flat
                s = {column: per_token(stats[:, i]) for i, column in enumerate(kernels.STATS)}
                sampled = [per_token((gy * delta).sum(1)) for gy in g_sampled]
                # nothing lost and everything lost (null rows) are runs that have been made
                all_mean = h_hat.stride(0) == 0 and torch.equal(h_hat[0], shared["mean"])
                log_q = log_p if h_hat is h_flat else log_mean if all_mean else patched(h_hat)
                calm_hat = torch.where(sink.to(device).view(-1, 1), h_flat, h_hat)
                t = common | {
                    "sse": s["delta_sq"],
                    "sse_nosink": s["delta_sq"] * keep,
                    "sse_defl1": per_token((delta - torch.outer(delta @ top, top)).square().sum(1)),
                    "sse_ln": per_token((torch.nn.functional.layer_norm(h_hat, (d,)) - ln).square().sum(1)),
                    "nmse_tok": s["delta_sq"] / s["h_sq"],
                    "cosine": s["h_h_hat"] / (s["h_sq"] * s["h_hat_sq"]).sqrt().clamp(min=1e-20),
                    "relerr": s["delta_sq"].sqrt() / (s["h_sq"].sqrt() + 1e-10),
                    "gd": s["g_delta"],
                    "gd_sq": s["g_delta"].square(),
                    "gd_abs": s["g_delta"].abs(),
                    "fisher": torch.stack([v.square() for v in sampled]).mean(0),
                    "ce_recon": per_token(cross_entropy(log_q, x)),
                    "kl": per_token(kl_divergence(p, log_p, log_q)),
                    "ce_sinkclean": per_token(
                        cross_entropy(log_p if h_hat is h_flat else patched(calm_hat), x)
                    ),
                    "l0": per_token((values > 0).sum(1))
                    if values is not None
                    else torch.full((B, T - 1), math.nan, dtype=torch.float64),
                }
                # what an error as long as this one, in a random direction at every token, is expected to
                # have: no direction is drawn
                t["fisher_iso"] = t["g_sq"] * t["sse"] / d
                t |= {f"{form}_nosink": t[form] * keep for form in ("fisher", "fisher_iso")}
                if terms is not None:
                    whole = torch.cat([delta.view(B, T - 1, d), torch.zeros_like(h[:, -1:])], 1)
                    t |= {
                        quantity: per_token(v)
                        for quantity, v in terms(model, layer, x, h, whole, p, log_p, log_q).items()
                    }
                sums = {quantity: v.sum(1).numpy() for quantity, v in t.items()}
                # all positions move together, so the sampled form squares the sequence's sum
                sums["gd_sampled_seq"] = torch.stack([v.sum(1).square() for v in sampled]).mean(0).numpy()
                if not np.isfinite(sums["ce_recon"]).all():
                    raise Fault(
                        f"{what} {name}: patched CE is not finite in evaluation sequences {start} to {start + B - 1}"
                    )
                out[name]["sums"].append(sums)
                if values is not None:
                    fired = torch.zeros(2, reconstruction.W_dec.shape[0] + 1, dtype=torch.float64)
                    slots = torch.where(values > 0, indices, reconstruction.W_dec.shape[0]).cpu().view(B, -1)
                    for i in range(B):
                        fired[half[start + i]] += torch.bincount(slots[i], minlength=fired.shape[1])
                    out[name]["fired"] = out[name]["fired"] + fired[:, :-1]
                if keep_tokens:
                    out[name]["tokens"].append({quantity: v.float().numpy() for quantity, v in t.items()})
                bar.update(B)
    bar.close()
    for result in out.values():
        for part in ("sums", "tokens"):
            pieces = result[part]
            result[part] = {q: np.concatenate([p[q] for p in pieces]) for q in pieces[0]} if pieces else {}
        result["n_sink"] = int(shared["sink"].sum())
    return out
