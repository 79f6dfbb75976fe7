"""mlsae: one SAE of several layers, or of one."""

import re
from typing import Any

from transport_geometry.formats.contract import Declared, Format, Named, field
from transport_geometry.formats.known_fields import known

import torch

FIELDS = known(
    read="n_latents k standardize",
    unused="n_inputs auxk dead_steps_threshold dead_threshold",
    tensors="encoder.weight decoder.weight pre_encoder_bias",
    idle="last_nonzero",
)


def declares(config: Named, path: str, beside: Named) -> Declared:
    """The repository's name ends in layers-L where the SAE is of one layer."""
    layer = re.search(r"layers-(\d+)(?![\d-])", path)
    return Declared(
        "mlsae",
        site="resid_post",
        layer=int(layer[1]) if layer else None,
        width=field(config, "n_latents", int),
    )


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """OpenAI's TopK without a bias on the latents."""
    W_enc = t["encoder.weight"]
    return dict(
        rule="topk",
        k=field(config, "k", int),
        W_enc=W_enc,
        b_enc=torch.zeros(len(W_enc)),
        W_dec=t["decoder.weight"].t(),
        b_dec=t["pre_encoder_bias"],
        b_in=t["pre_encoder_bias"],
        norm="layer_norm" if field(config, "standardize", bool, True) else "none",
    )


FORMAT = Format(  # language models' files have these names too
    "mlsae", {"model.safetensors": "config.json"}, declares, computes, lambda _: FIELDS, has_key="n_latents"
)
