"""EleutherAI's sparsify; SAEs trained here lie in this format too, with a provenance.json."""

from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Declared, Format, Named, began, field
from transport_geometry.formats.hook_names import hook_of_path
from transport_geometry.formats.known_fields import known
from transport_geometry.records import store

FIELDS = known(
    read="activation k signed num_latents d_in expansion_factor transcode skip_connection",
    unused="normalize_decoder multi_topk",
    tensors="encoder.weight encoder.bias W_dec b_dec W_skip",
)


OF_THE_MODEL = ("weights", "tokenizer", "dtype", "bos")  # of provenance.json


def declares(config: Named, path: str, beside: Named) -> Declared:
    """The hook is the folder's name; SAEs trained here say theirs in provenance.json."""
    made = beside.get(store.PROVENANCE, {})
    site, layer = ("resid_post", field(made, "layer", int)) if "layer" in made else hook_of_path(path)
    width = field(config, "num_latents", int)
    if not width:
        width = field(config, "d_in", int, 0) * field(config, "expansion_factor", int, 0)
    return Declared(
        "sparsify",
        site="transcoder" if field(config, "transcode", bool) else site,
        layer=layer,
        model=field(made, "model", str),
        ctx=field(made, "ctx", int),
        bos=began(made),
        width=width,
        unseen=("sinks",) if made.get("sinks") == "drop" else (),
        model_facts=tuple((name, made[name]) for name in OF_THE_MODEL if name in made),
    )


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """z = ReLU(W_enc (h - b_dec) + b_enc), top-k or the largest of each of k groups, h_hat = z W_dec + b_dec
    + W_skip h; W_dec lies as [F,d]. `signed` (June to August 2024): no ReLU, and the top k of |z|.

    num_latents may say 0 (then F = d_in expansion_factor): F is the tensor's.
    """
    activation, signed = field(config, "activation", str, "topk"), field(config, "signed", bool)
    if activation not in ("topk", "groupmax") or signed and activation != "topk":
        raise UserError(f"activation {activation!r}{', signed,' if signed else ''} is not supported")
    return dict(
        rule="signed" if signed else activation,
        k=field(config, "k", int),
        W_enc=t["encoder.weight"],
        b_enc=t["encoder.bias"],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        b_in=t["b_dec"],
        W_skip=t["W_skip"] if field(config, "skip_connection", bool) else t.get("W_skip"),
    )


FORMAT = Format(
    "sparsify", {"sae.safetensors": "cfg.json"}, declares, computes, lambda _: FIELDS, (store.PROVENANCE,)
)
