"""TODO libraries."""

import torch
from tqdm import tqdm

# What libraries call R^2, explained variance or 1 - FVU. `r2` itself is SAELens' since 6.30 (and the only one
# of them for which predicting the mean is 0, a constant error costs, and neither batches nor single tokens
# matter).
LIBRARIES = {
    "r2_saelens_legacy": "mean over tokens of 1 - |delta_t|^2 / |h_t - mean|^2 (SAELens until 6.29 and `_legacy`; e2e_sae)",
    "r2_sparsify": "1 - FVU of each batch about its own mean, averaged (a batch is a sequence here; sparsify: one of training)",
    "r2_dictionary_learning": "1 - sum_d var(delta) / sum_d var(h): a constant error is free",
    "r2_saebench": "1 - E|delta|^2 / (E|h|^2 - (E|h|^2 / d)^2): about 1 - NMSE",
    "r2_overcomplete": "1 - MSE / variance about one scalar mean",
    "r2_openai": "1 - mean over tokens of |delta_t|^2 / |h_t|^2",
    "r2_per_dim": "mean over dimensions of 1 - SSE_d / SST_d",
}


@torch.no_grad()
def r2_by_library(shared: dict, reconstructions: dict, device: torch.device) -> dict:
    """{name: {definition: value, definition_nosink: value}} over the evaluated positions. shared:
    `proxies.hook_statistics`.
    """
    h, sink = shared.h[:, :-1].double(), shared.sink
    out = {}
    for name, reconstruction in tqdm(reconstructions.items(), desc="every library's R²", leave=False):
        one = lambda x: (
            reconstruction.reconstruct(x)[2]
            if isinstance(reconstruction, torch.nn.Module)
            else reconstruction(x, shared.mean)
        )
        h_hat = torch.stack([one(x.to(device)).cpu() for x in shared.h[:, :-1]]).double()
        out[name] = definitions(h, h_hat, torch.ones_like(sink)) | {
            f"{key}_nosink": v for key, v in definitions(h, h_hat, ~sink).items()
        }
    return out


def definitions(h: torch.Tensor, h_hat: torch.Tensor, keep: torch.Tensor) -> dict[str, float]:
    """LIBRARIES, of h and h_hat [S,T-1,d] in float64 at the positions keep [S,T-1]."""
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
