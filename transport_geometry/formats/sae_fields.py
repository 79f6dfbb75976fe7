"""The fields of other libraries' SAE files: which a reader computes with, and which are known to change none.

Any other that says something is refused by name, whatever the format: a field that nobody reads may be the
one that makes the number another. `--ignore-field NAME` lets one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError, brief

import torch


@dataclass(frozen=True)
class Known:
    """Names of one format; a.b is b among the named values of a."""

    read: frozenset[str]  # of the configuration: computed with, or they say where
    unused: frozenset[str]  # of the configuration: how it was trained and kept; named in the report
    tensors: frozenset[str]  # of the weights' file: computed with
    idle: frozenset[str]  # of the weights' file: counters and the like


@dataclass(frozen=True)
class Fields:
    """Names in one SAE's files that nothing is computed with."""

    unused: tuple[str, ...] = ()  # known to change nothing
    ignored: tuple[str, ...] = ()  # not known, and let pass


def names(text: str, inside: str = "") -> frozenset[str]:
    return frozenset(inside + name for name in text.split())


def known(read: frozenset[str], unused: frozenset[str], tensors: str, idle: str = "") -> Known:
    return Known(read, unused, names(tensors), names(idle))


# what a model was loaded with, where it does not move the residual stream but by what is read
LOADED = names(
    "fold_ln fold_value_biases center_unembed refactor_factored_attn_matrices n_devices device device_map "
    "dtype torch_dtype trust_remote_code attn_implementation low_cpu_mem_usage",
    "model_from_pretrained_kwargs.",
)
LENS_COMPUTES = names(
    "architecture k d_sae activation_fn activation_fn_str activation_fn_kwargs.k apply_b_dec_to_input "
    "normalize_activations rescale_acts_by_decoder_norm finetuning_scaling_factor "
    "activation_scaler.json.scaling_factor activation_scaler.json.has_whitening "
    "activation_whitening.safetensors.mean activation_whitening.safetensors.matrix "
    "activation_whitening.safetensors.inverse_matrix"
)
LENS_SAYS = names(
    "sae_lens_version hook_name hook_point model_name context_size prepend_bos exclude_special_tokens "
    "seqpos_slice model_from_pretrained_kwargs.center_writing_weights"
)
LENS_TRAINING = names(
    "d_in dtype device decoder_init_norm use_sparse_activations aux_loss_coefficient topk_threshold_lr "
    "matryoshka_widths use_matryoshka_aux_loss jumprelu_init_threshold jumprelu_bandwidth "
    "jumprelu_sparsity_loss_mode l0_coefficient l0_warm_up_steps pre_act_loss_coefficient "
    "jumprelu_tanh_scale jumprelu_ste_to_input target_l0 l1_coefficient lp_norm l1_warm_up_steps"
)
LENS_METADATA = LOADED | names(
    "sae_lens_training_version model_class_name dataset_path dataset_trust_remote_code neuronpedia_id "
    "sequence_separator_token disable_concat_sequences training_architecture training_architecture_details "
    "hook_layer hf_hook_name l0 num_dead_features"
)
# versions before 6 keep all of it in one, and the first ones the whole run
LENS_RUN = names(
    "hook_point_layer hook_point_eval hook_point_head_index hook_eval is_dataset_tokenized streaming "
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
) - {"hook_point_head_index"}
LENS_TENSORS = "W_enc W_dec b_enc b_dec b_gate r_mag b_mag threshold topk_threshold scaling_factor"


def in_metadata(of: frozenset[str]) -> frozenset[str]:
    return frozenset(f"metadata.{name}" for name in of)


DICTIONARY_TENSORS = (
    "encoder.weight encoder.bias decoder.weight decoder.bias b_dec bias decoder_bias gate_bias mag_bias "
    "r_mag W_enc b_enc W_dec threshold k"
)
KNOWN = {
    "saelens": known(
        LENS_COMPUTES | in_metadata(LENS_SAYS), LENS_TRAINING | in_metadata(LENS_METADATA), LENS_TENSORS
    ),
    "saelens 5": known(
        LENS_COMPUTES | LENS_SAYS | in_metadata(names("sae_lens_version")),
        LENS_TRAINING | LENS_METADATA | LENS_RUN,
        LENS_TENSORS,
    ),
    "sparsify": known(
        names("activation k signed num_latents d_in expansion_factor transcode skip_connection"),
        names("normalize_decoder multi_topk"),
        "encoder.weight encoder.bias W_dec b_dec W_skip",
    ),
    "dictionary_learning": known(
        names("dict_class dict_size submodule_name layer lm_name k", "trainer.")
        | names("ctx_len io remove_bos", "buffer."),
        names(
            "trainer_class activation_dim device seed wandb_name lr steps warmup_steps decay_start "
            "resample_steps l1_penalty sparsity_penalty sparsity_coefficient sparsity_warmup_steps "
            "sparsity_function p_start p_end anneal_start n_sparsity_updates sparsity_queue_length "
            "lambda_warm_steps auxk_alpha threshold_beta threshold_start_step top_k_aux k_anneal_steps "
            "group_fractions group_weights group_sizes weights_temperature bandwidth target_l0 "
            "steps_before_annealing",
            "trainer.",
        )
        | names("d_submodule n_ctxs refresh_batch_size out_batch_size device", "buffer."),
        f"{DICTIONARY_TENSORS} norm_factor " + " ".join(names(DICTIONARY_TENSORS, "ae.")),
        "group_sizes ae.group_sizes step optimizer config",
    ),
    "openai": known(
        names(""),
        names(""),
        "encoder.weight latent_bias decoder.weight pre_bias activation activation_state_dict.k "
        "activation_state_dict.postact_fn",
        "stats_last_nonzero latents_activation_frequency latents_mean_square",
    ),
    "gemma_scope": known(
        names("architecture model_name hf_hook_point_in hf_hook_point_out type width"),
        names("l0"),
        "W_enc W_dec w_enc w_dec b_enc b_dec threshold scaling_factor",
    ),
    "mlsae": known(
        names("n_latents k standardize"),
        names("n_inputs auxk dead_steps_threshold dead_threshold"),
        "encoder.weight decoder.weight pre_encoder_bias",
        "last_nonzero",
    ),
}


def says_nothing(value: Any) -> bool:
    """Is it null, false, "none" or empty?"""
    if isinstance(value, torch.Tensor):
        return not value.numel()
    if isinstance(value, str):
        return value.lower() in ("", "none")
    return value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)


def said(content: Mapping[str, Any], of: frozenset[str], inside: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all that says something, with the named values that `of` knows inside of."""
    for key, value in content.items():
        name = f"{inside}{key}"
        if isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in of):
            yield from said(value, of, f"{name}.")
        elif not says_nothing(value):
            yield name, value


def is_called(name: str, typed: str) -> bool:
    """Does --ignore-field mean this field? It may be typed without what it lies in."""
    return f".{name}".endswith(f".{typed}")


def check(
    layout: str, config: Mapping[str, Any], tensors: Mapping[str, Any], ignore: Sequence[str]
) -> Fields:
    """What is in an SAE's files that nothing is computed with. Raises UserError, which names them, for fields
    that are not known.

    layout: of KNOWN. config: with the files beside it, by name. ignore: of --ignore-field.
    """
    of = KNOWN[layout]
    unused, strange = set(), {}
    for content, read, idle in ((config, of.read, of.unused), (tensors, of.tensors, of.idle)):
        for name, value in said(content, read | idle):
            if name in idle:
                unused.add(name)
            elif name not in read:
                strange[name] = value
    refused = [name for name in strange if not any(is_called(name, typed) for typed in ignore)]
    if refused:
        shown = ", ".join(f"{in_words(name)} ({in_words(strange[name])})" for name in refused[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(f"not known, so not computed: {shown}{more}; --ignore-field NAME goes on without")
    return Fields(tuple(sorted(unused)), tuple(sorted(strange)))


def untaken(layout: str, tensors: Mapping[str, Any], taken: set[str], ignore: Sequence[str]) -> list[str]:
    """Tensors that the format has, and that this SAE was not computed with."""
    of = KNOWN[layout].tensors
    return [
        name
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.numel() and name in of and name not in taken
        if not any(is_called(name, typed) for typed in ignore)
    ]


def in_words(value: Any) -> str:
    """A field's name or value, short and on one line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return brief(ascii(value)[1:-1] if isinstance(value, str) else ascii(value), 80)
