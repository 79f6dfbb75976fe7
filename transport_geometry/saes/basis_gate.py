"""Does an SAE read activations as its files say? The other basis and the neighbouring blocks are tried.

Shapes: N tokens, d = d_model.
"""

import math
from collections.abc import Mapping

from transport_geometry.errors import UserError
from transport_geometry.formats.computed_sae import FileSAE
from transport_geometry.models.lm import Hook, text_config
from transport_geometry.saes.sae import must_vary
from transport_geometry.saes.sinks import sink_positions

import torch

# Another reading is called better when it leaves less than this share of the declared one's unexplained
# variance. Of 108 rightly labelled SAEs trained here none came below .995 in the other basis and .98 at a
# neighbouring block; read one block too late: .73 to .93.
BASIS_MARGIN, LAYER_MARGIN = 0.99, 0.95


def near(hook: Hook, input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """{layer: h [N,d] without sink positions} of the hook and of the blocks before and after it. Raises Fault
    where the hook's do not vary.
    """
    out, n_layers = {}, text_config(hook.model).num_hidden_layers
    for layer in range(max(hook.layer - 1, 0), min(hook.layer + 2, n_layers)):
        h = Hook(hook.model, layer).head(input_ids)
        norms = torch.linalg.vector_norm(h, dim=-1)
        out[layer] = h[~sink_positions(norms, norms[:, 1:].median().item())]
    must_vary(out[hook.layer], f"layer {hook.layer}")
    return out


@torch.no_grad()
def unexplained(sae: FileSAE, h: torch.Tensor, centred: bool) -> float:
    """Share of the variance of h [N,d] that the SAE leaves, in this basis."""
    before, sae.centred = sae.centred, centred
    error = sae.reconstruct(h)[2] - h
    sae.centred = before
    return (error.cpu().double().square().sum() / (h - h.mean(0)).cpu().double().square().sum()).item()


def check_basis(
    sae: FileSAE, basis: str, label: str, layer: int, activations: Mapping[int, torch.Tensor]
) -> dict[str, float]:
    """{reading: unexplained variance}, the declared one first. Raises UserError where another one explains
    more. basis: `raw` or `centred`, as declared. activations: see `near`.

    An SAE of TransformerLens' centred activations read as raw ones, or at the block after its own, still
    gives a number that looks like one; only beside the other readings does it look wrong. (One read at the
    block before its own need not: the residual stream grows, and its beginning is as easy.)
    """
    centred = basis == "centred"
    declared, other_basis = name_of(layer, centred), name_of(layer, not centred)
    fvu = unexplained(sae, activations[layer], centred)
    readings = {declared: fvu, other_basis: unexplained(sae, activations[layer], not centred)}
    for other, h in activations.items():
        if other != layer:
            readings[name_of(other, centred)] = unexplained(sae, h, centred)
    for name, value in readings.items():
        margin = BASIS_MARGIN if name == other_basis else LAYER_MARGIN
        better = name != declared and value < fvu * margin
        if better or not math.isfinite(fvu):
            raise UserError(
                f"--sae {label}: read as its files say ({declared}) it leaves {fvu:.4f} of the variance "
                f"unexplained, read as {name} {value:.4f}: refused; --basis NAME=raw or NAME=centred goes "
                "on in that basis, with the layer as said"
            )
    return readings


def name_of(layer: int, centred: bool) -> str:
    return f"layer {layer}, {'centred' if centred else 'raw'}"
