"""One reconstruction, every library's R²: what each of them calls R², explained variance or 1 - FVU.

`r2` itself (`metrics`) is SAELens' since 6.30, and the only one of them for which predicting the mean is 0, a
constant error costs, and neither batches nor single tokens matter.

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, d = d_model; n positions kept. h is
the activation, h_hat its reconstruction, delta = h_hat - h.
"""

from collections.abc import Mapping
from typing import TypeVar

from transport_geometry.measuring.evaluate import Activations, Reconstruction
from transport_geometry.saes.sae import SAE

import torch
from tqdm import tqdm

Name = TypeVar("Name")  # what a reconstruction goes by

# as the report says them
LIBRARIES = {
    "r2_saelens_legacy": "mean over tokens of 1 - |delta_t|^2 / |h_t - mean|^2 "
    "(SAELens until 6.29 and `_legacy`; e2e_sae)",
    "r2_sparsify": "1 - FVU of each batch about its own mean, averaged "
    "(a batch is a sequence here; sparsify: one of training)",
    "r2_dictionary_learning": "1 - sum_d var(delta) / sum_d var(h): a constant error is free",
    "r2_saebench": "1 - E|delta|^2 / (E|h|^2 - (E|h|^2 / d)^2): about 1 - NMSE",
    "r2_overcomplete": "1 - MSE / variance about one scalar mean",
    "r2_openai": "1 - mean over tokens of |delta_t|^2 / |h_t|^2",
    "r2_per_dim": "mean over dimensions of 1 - SSE_d / SST_d",
}


@torch.no_grad()
def r2_by_library(
    shared: Activations, reconstructions: Mapping[Name, Reconstruction], device: torch.device
) -> dict[Name, dict[str, float]]:
    """{name: {definition: value, definition_nosink: value}} over the evaluated positions; the reconstructions
    run on `device`, a sequence at a time.
    """
    h, not_sink = shared.h[:, :-1], ~shared.sink
    h_exact, everywhere = h.double(), torch.ones_like(not_sink)
    out = {}
    for name, reconstruction in tqdm(
        reconstructions.items(), desc="every library's R²", leave=False, disable=None
    ):
        rebuilt = [rebuild(reconstruction, x.to(device), shared.mean).cpu() for x in h]
        h_hat = torch.stack(rebuilt).double()
        without_sinks = definitions(h_exact, h_hat, not_sink)
        out[name] = definitions(h_exact, h_hat, everywhere)
        out[name] |= {f"{key}_nosink": value for key, value in without_sinks.items()}
    return out


def rebuild(reconstruction: Reconstruction, h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """h_hat [N,d] of h [N,d]."""
    if isinstance(reconstruction, SAE):
        return reconstruction.reconstruct(h)[2]
    return reconstruction(h, mean)


def definitions(h: torch.Tensor, h_hat: torch.Tensor, keep: torch.Tensor) -> dict[str, float]:
    """LIBRARIES, of h and h_hat [S,T-1,d] in float64 at the positions keep [S,T-1] bool."""
    error = h_hat - h
    x, delta = h[keep], error[keep]
    n, d = x.shape
    centred = x - x.mean(0)
    sse_d, sst_d = delta.square().sum(0), centred.square().sum(0)
    sse, square = sse_d.sum(), x.square().sum() / n
    fvu = [e[k].square().sum() / (y[k] - y[k].mean(0)).square().sum() for y, e, k in zip(h, error, keep)]
    values = dict(
        r2_saelens_legacy=(1 - delta.square().sum(1) / centred.square().sum(1)).mean(),
        r2_sparsify=1 - torch.stack(fvu).mean(),
        r2_dictionary_learning=1 - (sse - delta.sum(0).square().sum() / n) / sst_d.sum(),
        r2_saebench=1 - sse / n / (square - (square / d) ** 2),
        r2_overcomplete=1 - sse / (x - x.mean()).square().sum(),
        r2_openai=1 - (delta.square().sum(1) / x.square().sum(1)).mean(),
        r2_per_dim=(1 - sse_d / sst_d).mean(),
    )
    return {name: value.item() for name, value in values.items()}
