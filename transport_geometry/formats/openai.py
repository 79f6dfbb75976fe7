"""OpenAI's sparse_autoencoder: SAEs of GPT-2 small."""

import pathlib
import re
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Declared, Format, Named, field
from transport_geometry.formats.known_fields import inside, known

import torch

FIELDS = known(
    tensors="encoder.weight latent_bias decoder.weight pre_bias activation "
    + inside("activation_state_dict", "k postact_fn"),
    idle="stats_last_nonzero latents_activation_frequency latents_mean_square",
)
SITES = ("mlp_post_act", "resid_delta_attn", "resid_delta_mlp", "resid_post_attn")


def declares(config: Named, path: str, beside: Named) -> Declared:
    """.../LOCATION/autoencoders/LAYER.pt."""
    stem = pathlib.PurePosixPath(path).stem
    return Declared(
        "openai",
        site=next((site for site in SITES if site in path), "resid_post"),
        layer=int(stem) if stem.isdecimal() else None,
        model="gpt2",
    )


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """z = W_enc (x - pre_bias) + latent_bias; where the activation is TopK, x is h less its mean over its
    standard deviation.
    """
    args = dict(
        W_enc=t["encoder.weight"],
        b_enc=t["latent_bias"],
        W_dec=t["decoder.weight"].t(),
        b_dec=t["pre_bias"],
        b_in=t["pre_bias"],
    )
    activation, state = t.get("activation", "ReLU"), field(t, "activation_state_dict", dict, {})
    if (after := state.get("postact_fn", "ReLU")) != "ReLU":
        raise UserError(f"postact_fn {after!r} is not supported")
    if activation == "TopK":
        return args | dict(rule="topk", k=field(state, "k", int), norm="layer_norm")
    if activation == "ReLU":
        return args | dict(rule="threshold", threshold=torch.zeros(()))
    raise UserError(f"activation {repr(activation)[:60]} is not supported")


def is_weights(path: str, asked: bool) -> bool:
    return path.endswith(".pt") and (asked or bool(re.search(r"autoencoders?/", path)))


FORMAT = Format("openai", {}, declares, computes, lambda _: FIELDS, needs_config=False, is_weights=is_weights)
