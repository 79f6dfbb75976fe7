"""dictionary_learning: finished SAEs, and checkpoints of a run."""

import os
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Declared, Format, Named, field, rescaled
from transport_geometry.formats.hook_names import hook_of, hook_of_path
from transport_geometry.formats.known_fields import inside, known

import torch

TENSORS = (
    "encoder.weight encoder.bias decoder.weight decoder.bias b_dec bias decoder_bias gate_bias mag_bias "
    "r_mag W_enc b_enc W_dec threshold k "
)
FIELDS = known(
    read=inside("trainer", "dict_class dict_size submodule_name layer lm_name k")
    + inside("buffer", "ctx_len io remove_bos"),
    unused=inside(
        "trainer",
        "trainer_class activation_dim device seed wandb_name lr steps warmup_steps decay_start "
        "resample_steps l1_penalty sparsity_penalty sparsity_coefficient sparsity_warmup_steps "
        "sparsity_function p_start p_end anneal_start n_sparsity_updates sparsity_queue_length "
        "lambda_warm_steps auxk_alpha threshold_beta threshold_start_step top_k_aux k_anneal_steps "
        "group_fractions group_weights group_sizes weights_temperature bandwidth target_l0 "
        "steps_before_annealing",
    )
    + inside("buffer", "d_submodule n_ctxs refresh_batch_size out_batch_size device"),
    tensors=TENSORS + inside("ae", TENSORS) + "norm_factor",
    idle="group_sizes ae.group_sizes step optimizer config",
)
CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
)


def declares(config: Named, path: str, beside: Named) -> Declared:
    trainer, buffer = field(config, "trainer", dict, {}), field(config, "buffer", dict, {})
    submodule = field(trainer, "submodule_name", str)
    site, layer = hook_of_path(submodule or path)
    if layer is None:  # it may name the site alone
        site, layer = hook_of(submodule or "", field(trainer, "layer", int))
    io = field(buffer, "io", str, "out")
    if io not in ("in", "out"):
        raise UserError(f"io is {io!r}: a transcoder, and only SAEs of one hook are read")
    if io == "in" and "resid_pre" not in (submodule or path):  # the submodule's input
        block = site in (None, "resid_post")
        site, layer = hook_of("resid_pre", layer) if block else (f"input of {site}", layer)
    return Declared(
        "dictionary_learning",
        site=site,
        layer=layer,
        model=field(trainer, "lm_name", str),
        ctx=field(buffer, "ctx_len", int),
        width=field(trainer, "dict_size", int),
        unseen=("remove_bos",) if field(buffer, "remove_bos", bool) else (),
    )


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """z = ReLU(W_enc (h - b_dec) + b_enc), then by class: all of it, the top k, or what exceeds the threshold
    (BatchTopK).

    TopK and BatchTopK leave the same tensors, so the class must be said. A checkpoint of a run is nested, and
    its activations are divided by norm_factor.
    """
    factor = 1.0
    if "ae" in t:
        factor = field(t, "norm_factor", float, 1.0)
        t = field(t, "ae", dict)
    trainer = field(config, "trainer", dict, {})
    name = field(trainer, "dict_class", str)
    if name not in (None, *CLASSES):
        raise UserError(f"dict_class {name!r} is not supported ({', '.join(CLASSES)} are)")
    k = field(t if "k" in t else trainer, "k", int)  # the first TopK files hold none
    args: dict[str, Any]
    if "r_mag" in t:
        args = dict(rule="gated", b_enc=t["gate_bias"], gain=t["r_mag"].exp(), b_mag=t["mag_bias"])
        args |= dict(b_dec=t["decoder_bias"], b_in=t["decoder_bias"])
    elif "W_enc" in t:  # JumpReLU; or Matryoshka BatchTopK, which has a k and subtracts b_dec
        args = dict(rule="threshold", b_enc=t["b_enc"], threshold=t["threshold"], b_dec=t["b_dec"])
        args |= dict(b_in=t["b_dec"] if "k" in t or name == "MatryoshkaBatchTopKSAE" else None)
        return rescaled(args | dict(W_enc=t["W_enc"].t(), W_dec=t["W_dec"]), factor)
    elif "k" not in t and name not in ("AutoEncoderTopK", "BatchTopKSAE"):
        # AutoEncoder has one bias at both ends, AutoEncoderNew one after the decoder
        args = dict(rule="threshold", b_enc=t["encoder.bias"], threshold=torch.zeros(()))
        args |= dict(b_dec=t["bias"] if "bias" in t else t["decoder.bias"], b_in=t.get("bias"))
    else:
        args = dict(b_enc=t["encoder.bias"], b_dec=t["b_dec"], b_in=t["b_dec"])
        match name:
            case "AutoEncoderTopK":
                t.get("threshold")  # kept in the file, and not used by its formula
                args |= dict(rule="topk", k=k)
            case "BatchTopKSAE":
                args |= dict(rule="threshold", threshold=t["threshold"])
            case _:
                raise UserError(
                    "TopK or BatchTopK? Their tensors are alike, and config.json beside them says "
                    f"{name or 'nothing'}"
                )
    return rescaled(args | dict(W_enc=t["encoder.weight"], W_dec=t["decoder.weight"].t()), factor)


FORMAT = Format(
    "dictionary_learning",
    {"ae.pt": "config.json"},
    declares,
    computes,
    lambda _: FIELDS,
    needs_config=False,
    # a checkpoint of a run, ae_1000.pt, and the configuration in it
    is_weights=lambda path, asked: asked and os.path.basename(path).startswith("ae"),
    config_within=lambda t: {"trainer": t["config"]} if t.get("config") else {},
)
