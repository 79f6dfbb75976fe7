"""SAELens 5 and 6: reading its files, and writing an SAE trained here as one."""

import os
import pathlib
import re
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Declared, Format, Named, began, check_scaling, field, rescaled
from transport_geometry.formats.hook_names import hook_of_lens
from transport_geometry.formats.known_fields import inside, known
from transport_geometry.models.loading import block_name
from transport_geometry.records import store
from transport_geometry.records.tables import as_json
from transport_geometry.saes.sae import TopKSAE

import torch
from safetensors.torch import save

VERSION = "6.54.12"  # whose files the export writes and the tests compare with
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"

COMPUTES = (
    "architecture k d_sae activation_fn activation_fn_str activation_fn_kwargs.k apply_b_dec_to_input "
    "normalize_activations rescale_acts_by_decoder_norm finetuning_scaling_factor "
    + inside(SCALER, "scaling_factor has_whitening")
    + inside(WHITENING, "mean matrix inverse_matrix")
)
SAYS = (
    "sae_lens_version hook_name hook_point model_name context_size prepend_bos exclude_special_tokens "
    "seqpos_slice model_from_pretrained_kwargs.center_writing_weights "
    "sinks"  # our own, of `write_saelens`
)
TRAINING = (
    "d_in dtype device decoder_init_norm use_sparse_activations aux_loss_coefficient topk_threshold_lr "
    "matryoshka_widths use_matryoshka_aux_loss jumprelu_init_threshold jumprelu_bandwidth "
    "jumprelu_sparsity_loss_mode l0_coefficient l0_warm_up_steps pre_act_loss_coefficient "
    "jumprelu_tanh_scale jumprelu_ste_to_input target_l0 l1_coefficient lp_norm l1_warm_up_steps "
)
# the model's loading: only what does not change the residual stream otherwise than by what is read
METADATA = (
    "sae_lens_training_version model_class_name dataset_path dataset_trust_remote_code neuronpedia_id "
    "sequence_separator_token disable_concat_sequences training_architecture training_architecture_details "
    "hook_layer hf_hook_name l0 num_dead_features "
    + inside(
        "model_from_pretrained_kwargs",
        "fold_ln fold_value_biases center_unembed refactor_factored_attn_matrices n_devices device "
        "device_map dtype torch_dtype trust_remote_code attn_implementation low_cpu_mem_usage",
    )
)
# versions before 6 keep all of it in one place, and the first ones the whole run
RUN = (
    "hook_point_layer hook_point_eval hook_eval is_dataset_tokenized streaming "
    "use_cached_activations cached_activations_path from_pretrained_path n_batches_in_buffer training_tokens "
    "total_training_tokens store_batch_size store_batch_size_prompts train_batch_size "
    "train_batch_size_tokens tokens_per_buffer act_store_device seed expansion_factor b_dec_init_method "
    "decoder_orthogonal_init decoder_heuristic_init decoder_heuristic_init_norm "
    "init_encoder_as_decoder_transpose normalize_sae_decoder noise_scale mse_loss_normalization "
    "use_ghost_grads scale_sparsity_penalty_by_decoder_norm finetuning_tokens finetuning_method autocast "
    "autocast_lm compile_llm llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2 lr "
    "lr_end lr_decay_steps lr_scheduler_name lr_warm_up_steps n_restart_cycles dead_feature_window "
    "dead_feature_threshold dead_feature_estimation_method feature_sampling_window feature_sampling_method "
    "feature_reinit_scale resample_batches n_eval_batches eval_batch_size_prompts log_to_wandb "
    "log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project wandb_id wandb_entity "
    "wandb_log_frequency run_name eval_every_n_wandb_logs resume n_checkpoints checkpoint_path verbose "
    "model_kwargs begin_batch_token begin_sequence_token"
)
TENSORS = "W_enc W_dec b_enc b_dec b_gate r_mag b_mag threshold topk_threshold scaling_factor"
VERSION_6 = known(COMPUTES + inside("metadata", SAYS), TRAINING + inside("metadata", METADATA), TENSORS)
VERSION_5 = known(COMPUTES + SAYS + " metadata.sae_lens_version", TRAINING + METADATA + RUN, TENSORS)


def is_version_6(config: Named) -> bool:
    """Version 5 keeps in one flat dictionary what version 6 keeps under `metadata`."""
    meta = field(config, "metadata", dict, {})
    version = field(meta, "sae_lens_version", str) or field(config, "sae_lens_version", str, "0")
    return int(re.sub(r"\D.*", "", version)[:9] or 0) >= 6


def declares(config: Named, path: str, beside: Named) -> Declared:
    meta = {"prepend_bos": True, **config}
    if is_version_6(config):
        meta = field(config, "metadata", dict, {})
    site, layer = hook_of_lens(field(meta, "hook_name", str) or field(meta, "hook_point", str, ""))
    centred = field(field(meta, "model_from_pretrained_kwargs", dict, {}), "center_writing_weights", bool)
    unseen = []
    for name in ("exclude_special_tokens", "seqpos_slice"):
        value = field(meta, name, list, False)
        if value is True or value and any(part is not None for part in value):
            unseen.append(name)
    if field(meta, "sinks", str) == "drop":
        unseen.append("sinks")
    return Declared(
        "saelens",
        site=site,
        layer=layer,
        model=field(meta, "model_name", str),
        ctx=field(meta, "context_size", int),
        bos=field(meta, "prepend_bos", bool),
        basis="centred" if centred else "raw",
        width=field(config, "d_sae", int),
        unseen=tuple(unseen),
    )


def computes(t: Named, config: Named, beside: Named) -> dict[str, Any]:
    """z = (norm(h) - b_dec) W_enc + b_enc, b_dec only where apply_b_dec_to_input; top-k before the ReLU (of
    |z| and without it: abstopk), on z |W_dec_i| where rescaled.
    """
    architecture = field(config, "architecture", str, "standard")
    activation = field(config, "activation_fn_str", str) or field(config, "activation_fn", str, "relu")
    if activation == "topk":  # version 5 has it as a standard SAE's activation function
        architecture = "topk"
    elif activation != "relu":
        raise UserError(f"activation function {activation!r} is not supported")
    check_scaling(t, config)
    W_dec, b_dec = t["W_dec"], t["b_dec"]
    b_in = b_dec if field(config, "apply_b_dec_to_input", bool, True) else torch.zeros_like(b_dec)
    args = dict(W_enc=t["W_enc"].t(), W_dec=W_dec, b_dec=b_dec, b_in=b_in)
    match architecture:
        case "topk" | "abstopk":
            k = field(config, "k", int) or field(field(config, "activation_fn_kwargs", dict, {}), "k", int)
            args |= dict(rule="topk" if architecture == "topk" else "signed", b_enc=t["b_enc"], k=k)
        case "gated":
            args |= dict(rule="gated", b_enc=t["b_gate"], gain=t["r_mag"].exp(), b_mag=t["b_mag"])
        case "jumprelu":
            args |= dict(rule="threshold", b_enc=t["b_enc"], threshold=t["threshold"])
        case "batchtopk" | "matryoshka_batchtopk":  # a checkpoint, which keeps one threshold for all
            args |= dict(rule="threshold", b_enc=t["b_enc"], threshold=t["topk_threshold"])
        case "standard":
            args |= dict(rule="threshold", b_enc=t["b_enc"], threshold=torch.zeros(()))
        case _:
            raise UserError(
                f"architecture {architecture!r} is not supported "
                "(topk, abstopk, batchtopk, matryoshka_batchtopk, jumprelu, standard and gated are)"
            )
    # latents are ranked by how much they write
    if field(config, "rescale_acts_by_decoder_norm", bool) and architecture.endswith("topk"):
        length = W_dec.norm(dim=1).clamp(min=1e-8)
        args["W_enc"] = args["W_enc"] * length[:, None]
        args["W_dec"] = W_dec / length[:, None]
        args["b_enc"] = args["b_enc"] * length
    return of_raw_activations(args, config.get("normalize_activations") or "none", beside)


def of_raw_activations(args: dict[str, Any], norm: Any, beside: Named) -> dict[str, Any]:
    """The SAE of h, from one that was trained on activations normalised as its configuration says."""
    # a checkpoint; a finished SAE has the scale folded in and says none
    if norm in (True, "expected_average_only_in"):
        scale = field(beside.get(SCALER, {}), "scaling_factor", float)
        if scale is None:
            raise UserError(
                f"trained on scaled activations, and {SCALER}, which holds the scale, is not beside it"
            )
        return rescaled(args, 1 / scale)
    if norm == "covariance_whitening":
        if WHITENING not in beside:
            raise UserError(f"trained on whitened activations, and {WHITENING} is not beside it")
        # its activations are (h - mean) M: both maps are affine, so they fold into the weights
        white = [beside[WHITENING][name].double() for name in ("mean", "matrix", "inverse_matrix")]
        mean, matrix, inverse = white
        return args | dict(
            W_enc=args["W_enc"].double() @ matrix.t(),
            W_dec=args["W_dec"].double() @ inverse,
            b_in=args["b_in"].double() @ inverse + mean,
            b_dec=args["b_dec"].double() @ inverse + mean,
        )
    if norm not in ("none", "layer_norm", "constant_norm_rescale"):
        raise UserError(f"normalize_activations {norm!r} is not supported")
    return args | dict(norm=norm)


FORMAT = Format(
    "saelens",
    {"sae_weights.safetensors": "cfg.json"},
    declares,
    computes,
    lambda config: VERSION_6 if is_version_6(config) else VERSION_5,
    beside=(SCALER, WHITENING),
)


def write_saelens(folder: pathlib.Path, sae: TopKSAE, made: Named) -> None:
    """An SAE trained here in SAELens' format (cfg.json, sae_weights.safetensors), where it computes the same.
    made: provenance.json. Raises UserError, Fault.

    SAELens looks for the hook in the class of model that is named beside it: by the module's name in a model
    of transformers, by TransformerLens' name where this model's own is not known here.
    """
    d_sae, d = sae.W_dec.shape
    module = block_name(made["model"], made["layer"])
    metadata = dict(
        sae_lens_version=VERSION,
        model_name=made["model"],
        hook_name=module or f"blocks.{made['layer']}.hook_resid_post",
        context_size=made["ctx"],
        dataset_path=made["data"],
        model_class_name="AutoModelForCausalLM" if module else "HookedTransformer",
    )
    if (begins := began(made)) is not None:
        metadata["prepend_bos"] = begins
    if made.get("sinks") == "drop":  # SAELens has no word for it, and keeps those that it does not know
        metadata["sinks"] = "drop"
    config = dict(
        architecture="topk",
        d_in=d,
        d_sae=d_sae,
        k=sae.k,
        dtype="float32",
        device="cpu",
        apply_b_dec_to_input=True,
        normalize_activations="none",
        reshape_activations="none",
        rescale_acts_by_decoder_norm=False,
        metadata=metadata,
    )
    tensors = dict(W_enc=sae.W_enc.t(), b_enc=sae.b_enc, W_dec=sae.W_dec, b_dec=sae.b_dec)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    files = {"cfg.json": as_json(config), "sae_weights.safetensors": weights}
    if there := [name for name in files if os.path.lexists(folder / name)]:
        raise UserError(f"{folder} holds {' and '.join(there)} already: export to another folder")
    for name, content in files.items():
        store.write(folder / name, content)
