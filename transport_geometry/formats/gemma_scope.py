"""Gemma Scope 1 (of Gemma 2; the path says all) and 2 (of Gemma 3; with a configuration)."""

import math
import re
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Declared, Format, Named, check_scaling, field
from transport_geometry.formats.hook_names import hub_name
from transport_geometry.formats.known_fields import known

FIELDS = known(
    read="architecture model_name hf_hook_point_in hf_hook_point_out type width",
    unused="l0",
    tensors="W_enc W_dec w_enc w_dec b_enc b_dec threshold scaling_factor",
)


def declares(config: Named, path: str, beside: Named) -> Declared:
    """1: .../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71. 2:
    .../gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_small.

    Both were trained on text behind a BOS, and not on the BOS.
    """
    site = None
    if of := re.search(r"gemma-scope-\d+b-(?:pt|it)-(res|att|mlp|transcoders)", path):
        site = {"res": "resid_post", "transcoders": "transcoder"}.get(of[1], of[1])
    elif of := re.search(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(?:_all)?/", path):
        site = of[1]
    if "/embedding/" in path:
        site = "embedding"
    layer, width = re.search(r"layer_(\d+)", path), re.search(r"width_(\d+)(k|m)", path)
    thousands = int(width[1]) * {"k": 1, "m": 1000}[width[2]] if width else 0  # of a power of two
    at = int(layer[1]) if layer else None
    into, out_of = (field(config, f"hf_hook_point_{side}", str) for side in ("in", "out"))
    if into:
        block = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.output", into)
        site, at = ("resid_post", int(block[1])) if block else (into, at)
    if field(config, "type", str, "sae") != "sae" or out_of not in (None, into):
        site = "transcoder"
    return Declared(
        "gemma_scope",
        site=site,
        layer=at,
        model=model_of(field(config, "model_name", str), path),
        ctx=1024,
        bos=True,
        width=2 ** round(math.log2(1000 * thousands)) if thousands else field(config, "width", int),
        unseen=("BOS",),
    )


def model_of(said: str | None, path: str) -> str | None:
    """The hub's name of the model; the pretrained Gemma 3 270M has no -pt there."""
    if not said and (of := re.search(r"gemma-scope-2-(\d+[bm]-(?:pt|it))", path)):
        said = f"gemma-3-{of[1]}"
    if not said and (of := re.search(r"gemma-scope-(\d+b)-(pt|it)", path)):
        said = f"gemma-2-{of[1]}{'-it' if of[2] == 'it' else ''}"
    return said and hub_name(said.replace("gemma-v3-", "gemma-3-").replace("270m-pt", "270m"))


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """JumpReLU of z = W_enc h + b_enc, with nothing subtracted from h."""
    if (architecture := field(config, "architecture", str, "jump_relu")) != "jump_relu":
        raise UserError(f"architecture {architecture!r} is not supported (jump_relu is)")
    check_scaling(t, {})
    W_enc, W_dec = (t[f"W_{side}"] if f"W_{side}" in t else t[f"w_{side}"] for side in ("enc", "dec"))
    return dict(
        rule="threshold",
        W_enc=W_enc.t(),
        b_enc=t["b_enc"],
        W_dec=W_dec,
        b_dec=t["b_dec"],
        threshold=t["threshold"],
    )


FILES = {"params.npz": None, "params.safetensors": "config.json"}
FORMAT = Format("gemma_scope", FILES, declares, computes, lambda _: FIELDS, needs_config=False)
