"""SAEs from other libraries' files: each format against its formula written out densely in float64, and what
is refused.
"""

import json
import pickle
import random as chance
import shutil
import zipfile

from helpers import measured, tiny_model
from transport_geometry.errors import UserError
from transport_geometry.formats import (
    computed_sae,
    find_and_read,
    gemma_scope,
    hook_names,
    known_fields,
    saelens,
    weights,
)
from transport_geometry.formats.computed_sae import FileSAE, fused
from transport_geometry.formats.contract import Declared
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.measuring.r2_by_library import definitions
from transport_geometry.models.lm import Hook
from transport_geometry.saes import basis_gate, external_saes

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

D, F, K, N = 12, 40, 5, 64


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


H = random(N, D) @ random(D, D, seed=1) + 2  # an offset, so that biases and means matter
W_ENC, W_DEC, B_ENC, B_DEC = random(D, F), random(F, D, seed=2), random(F, seed=3) / 2, random(D, seed=4) + 1
THRESHOLD, R_MAG, B_MAG = random(F, seed=5).abs(), random(F, seed=6) / 3, random(F, seed=7)
ZERO, W_SKIP = torch.zeros(D), random(D, D, seed=3)
WHITE = {"mean": random(D, seed=8), "matrix": random(D, D, seed=9) + 4 * torch.eye(D)}
WHITE["inverse_matrix"] = WHITE["matrix"].double().inverse().float().contiguous()


# ------------------------------------------------- the truths: functions of x [N,D], dense and in float64
def truth(code, b_in=B_DEC, b_enc=B_ENC):
    def of(x):
        z = (x - b_in.double()) @ W_ENC.double() + b_enc.double()
        return code(z) @ W_DEC.double() + B_DEC.double()

    return of


def top(z):
    return z * (z >= z.topk(K, 1).values[:, -1:])


def relu_top(z):
    return top(z).relu()


def largest(z):
    return z * (z.abs() >= z.abs().topk(K, 1).values[:, -1:])


def jump(z):
    return z.relu() * (z > THRESHOLD.double())


def above(threshold):
    return lambda z: z * (z > threshold)


def groupmax(z):
    groups = z.relu().unflatten(1, (K, F // K))
    return (groups * (groups == groups.max(2, keepdim=True).values)).flatten(1)


def gated(x):
    u = (x - B_DEC.double()) @ W_ENC.double()
    opened = u + B_ENC.double() > 0
    return (opened * (u * R_MAG.double().exp() + B_MAG.double()).relu()) @ W_DEC.double() + B_DEC.double()


def layer_normed(f):
    def of(x):
        mean, sd = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return f((x - mean) / (sd + 1e-5)) * sd + mean

    return of


def constant_norm(x):
    scale = x.norm(dim=1, keepdim=True) / D**0.5
    return TOPK(x / scale) * scale


def scaled(f, factor):
    return lambda x: f(factor * x) / factor


def by_decoder_norm(x):
    norm = W_DEC.double().norm(dim=1)
    z = ((x - B_DEC.double()) @ W_ENC.double() + B_ENC.double()) * norm
    return (top(z).relu() / norm) @ W_DEC.double() + B_DEC.double()


def whitened(x):
    mean, matrix, inverse = (WHITE[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    return by_decoder_norm((x - mean) @ matrix) @ inverse + mean


TOPK, RELU, RELU_OF_H = truth(relu_top), truth(torch.relu), truth(torch.relu, b_in=ZERO)


# -------------------------------------------------------------------------- files as the libraries write them
LENS = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
JUMP = {**LENS, "b_enc": B_ENC, "threshold": THRESHOLD}
ONE_FOR_ALL = {**LENS, "b_enc": B_ENC, "topk_threshold": torch.tensor(2.0).double()}
GATED_LENS = {**LENS, "b_gate": B_ENC, "r_mag": R_MAG, "b_mag": B_MAG}
LINEAR = {"encoder.weight": W_ENC.t().contiguous(), "encoder.bias": B_ENC}
PLAIN = {**LINEAR, "decoder.weight": W_DEC.t().contiguous()}
BATCH = {**PLAIN, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(1.5)}
GATED = {name: PLAIN[name] for name in ("encoder.weight", "decoder.weight")}
GATED |= {"decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": B_ENC, "mag_bias": B_MAG}
MATRYOSHKA = {**JUMP, "threshold": torch.tensor(1.5), "k": torch.tensor(K)}
META = dict(sae_lens_version="6.54.12", hook_name="blocks.1.hook_resid_post", model_name="m")
META |= dict(prepend_bos=True, context_size=32, l0=4.5, num_dead_features=0)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lens(folder, architecture="topk", tensors=None, beside=(), **config):
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "k": K, "metadata": META, **config}
    write_json(folder / "cfg.json", {key: value for key, value in config.items() if value is not None})
    save_file(tensors or {**LENS, "b_enc": B_ENC}, folder / "sae_weights.safetensors")
    for name, content in dict(beside).items():
        if name.endswith("safetensors"):
            save_file(content, folder / name)
        else:
            write_json(folder / name, content)
    return folder


def write_sparsify(folder, W_skip=None, **config):
    default = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": K, "d_in": D}
    write_json(folder / "cfg.json", {**default, "transcode": False, **config})
    skip = {} if W_skip is None else {"W_skip": W_skip}
    save_file({**LINEAR, "W_dec": W_DEC, "b_dec": B_DEC, **skip}, folder / "sae.safetensors")
    return folder


def write_dictionary(folder, name="AutoEncoderTopK", tensors=None, file="ae.pt", buffer=(), **trainer):
    said = dict(dict_class=name, lm_name="org/m", layer=1, submodule_name="resid_post_layer_1", dict_size=F)
    write_json(folder / "config.json", {"trainer": said | trainer, "buffer": {"ctx_len": 32, **dict(buffer)}})
    if not name:
        (folder / "config.json").unlink()
    torch.save(tensors or {**BATCH, "threshold": torch.tensor(-1.0)}, folder / file)
    return folder


def write_openai(folder, wrapped="", **state):
    at = folder / "resid_post_mlp/autoencoders"
    at.mkdir(parents=True)
    own = {"pre_bias": B_DEC, "encoder.weight": W_ENC.t(), "latent_bias": B_ENC, "decoder.weight": W_DEC.t()}
    state = {**own, "stats_last_nonzero": torch.zeros(F), **state}
    torch.save({wrapped + name: value for name, value in state.items()}, at / "1.pt")
    return folder


def write_mlsae(folder, **config):
    write_json(folder / "config.json", {"n_inputs": D, "n_latents": F, "k": K, **config})
    tensors = {name: PLAIN[name] for name in ("encoder.weight", "decoder.weight")}
    tensors |= {"pre_encoder_bias": B_DEC, "last_nonzero": torch.zeros(F)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_gemma_scope(folder, **tensors):
    """Of the first: the path says all."""
    at = folder / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71"
    at.mkdir(parents=True)
    np.savez(at / "params.npz", **{name: tensor.numpy() for name, tensor in {**JUMP, **tensors}.items()})
    return folder


def write_gemma_scope_2(folder, **config):
    at = folder / "gemma-scope-2-270m-pt/resid_post/layer_1_width_16k_l0_small"
    said = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.1.output")
    said |= dict(width=F, model_name="google/gemma-3-270m-pt", architecture="jump_relu", l0=10, type="sae")
    write_json(at / "config.json", {**said, "affine_connection": False, **config})
    save_file({name.replace("W_", "w_"): tensor for name, tensor in JUMP.items()}, at / "params.safetensors")
    return folder


V5 = dict(architecture=None, metadata=None, k=None, hook_point="blocks.1.hook_resid_post", model_name="m")
V5 |= dict(sae_lens_version="3.20.0")
V5_TOPK = dict(**V5, activation_fn_str="topk", activation_fn_kwargs={"k": K})
BY_MODULE = {"sae_lens_version": "6.54.12", "hook_name": "gpt_neox.layers.1"}
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
SCALED = dict(normalize_activations="expected_average_only_in", beside={SCALER: {"scaling_factor": 0.3}})
WHITENED = dict(normalize_activations="covariance_whitening", rescale_acts_by_decoder_norm=True)
WHITENED |= dict(beside={SCALER: {"scaling_factor": None, "has_whitening": True}, WHITENING: WHITE})
ONES = dict(tensors={**LENS, "b_enc": B_ENC, "scaling_factor": torch.ones(F)}, finetuning_scaling_factor=True)
OF_INPUT = dict(submodule_name="resid_post_layer_2", layer=2, buffer={"io": "in"})
OPENAI_TOPK = dict(activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"})
WRAPPED = {f"module.{name}": tensor for name, tensor in BATCH.items()}
MID_RUN = {"ae": BATCH, "step": 9, "norm_factor": 2.5}

# what writes files of a format -> {case: (how, the truth)}
BY_FORMAT = {
    ("saelens", write_lens): {
        "topk": ({}, TOPK),
        "topk without b_dec at the input": (dict(apply_b_dec_to_input=False), truth(relu_top, b_in=ZERO)),
        "topk by decoder norm": (dict(rescale_acts_by_decoder_norm=True), by_decoder_norm),
        "topk, layer_norm": (dict(normalize_activations="layer_norm"), layer_normed(TOPK)),
        "topk, constant norm": (dict(normalize_activations="constant_norm_rescale"), constant_norm),
        "topk checkpoint, scaled": (SCALED, scaled(TOPK, 0.3)),
        "topk checkpoint, whitened": (WHITENED, whitened),
        "topk, scaling factor of ones": (ONES, TOPK),
        "topk, hook by a module's name": (dict(metadata=BY_MODULE), TOPK),
        "jumprelu": (dict(architecture="jumprelu", tensors=JUMP), truth(jump)),
        "jumprelu, scaled": (dict(architecture="jumprelu", tensors=JUMP, **SCALED), scaled(truth(jump), 0.3)),
        "batchtopk checkpoint": (dict(architecture="batchtopk", tensors=ONE_FOR_ALL), truth(above(2))),
        "matryoshka checkpoint": (  # k is a mean over tokens
            dict(architecture="matryoshka_batchtopk", k=2.5, matryoshka_widths=[10, F], tensors=ONE_FOR_ALL),
            truth(above(2)),
        ),
        "abstopk": (dict(architecture="abstopk"), truth(largest)),
        "standard": (dict(architecture="standard"), RELU),
        "gated": (dict(architecture="gated", tensors=GATED_LENS), gated),
        "5 topk": (dict(**V5_TOPK, normalize_activations=False), TOPK),
        "5 topk, other name": (dict(**V5, activation_fn="topk", activation_fn_kwargs={"k": K}), TOPK),
        "5 standard": (dict(**V5, activation_fn_str="relu", apply_b_dec_to_input=False), RELU_OF_H),
    },
    ("sparsify", write_sparsify): {
        "topk": ({}, TOPK),
        "signed": (dict(signed=True), truth(largest)),
        "groupmax": (dict(activation="groupmax"), truth(groupmax)),
        "skip": (dict(skip_connection=True, W_skip=W_SKIP), lambda x: TOPK(x) + x @ W_SKIP.double().t()),
    },
    ("dictionary_learning", write_dictionary): {
        "TopK": ({}, TOPK),
        "TopK, early": (dict(tensors={**PLAIN, "b_dec": B_DEC}, k=K), TOPK),
        "BatchTopK": (dict(name="BatchTopKSAE", tensors=BATCH), truth(above(1.5))),
        "BatchTopK, wrapped": (dict(name="BatchTopKSAE", tensors=WRAPPED), truth(above(1.5))),
        "BatchTopK mid-run": (dict(name="BatchTopKSAE", tensors=MID_RUN), scaled(truth(above(1.5)), 1 / 2.5)),
        "standard": (dict(name="AutoEncoder", tensors={**PLAIN, "bias": B_DEC}), RELU),
        "new": (dict(name="AutoEncoderNew", tensors={**PLAIN, "decoder.bias": B_DEC}), RELU_OF_H),
        "gated": (dict(name="GatedAutoEncoder", tensors=GATED), gated),
        "JumpReLU": (dict(name="JumpReluAutoEncoder", tensors=JUMP), truth(jump, b_in=ZERO)),
        "Matryoshka": (dict(name="MatryoshkaBatchTopKSAE", tensors=MATRYOSHKA), truth(above(1.5))),
        "of the input": (OF_INPUT, TOPK),
    },
    ("openai", write_openai): {
        "topk": (OPENAI_TOPK, layer_normed(TOPK)),
        "relu": (dict(activation="ReLU", activation_state_dict={}), RELU),
        "without a word on its activation": ({}, RELU),
        "compiled": (dict(wrapped="_orig_mod.module."), RELU),
    },
    ("gemma_scope", write_gemma_scope): {"1": ({}, truth(jump, b_in=ZERO))},
    ("gemma_scope", write_gemma_scope_2): {"2": ({}, truth(jump, b_in=ZERO))},
    ("mlsae", write_mlsae): {
        "": ({}, layer_normed(truth(relu_top, b_enc=torch.zeros(F)))),
        "not standardised": (dict(standardize=False), truth(relu_top, b_enc=torch.zeros(F))),
    },
}
CASES = {
    f"{name} {case}": (write, *how_and_truth)
    for (name, write), cases in BY_FORMAT.items()
    for case, how_and_truth in cases.items()
}


def written(case, tmp_path):
    """The folder of one of CASES, whose name says layer 1 where a format's does."""
    write, how, _ = CASES[case]
    return write(tmp_path / ("layers-1" if case.startswith("mlsae") else "layers.1"), **how)


def the_file(folder):
    (file,) = find_and_read.find(str(folder))
    return file


def the_sae(folder, ignore=()):
    return find_and_read.read(the_file(folder), ignore)


def declared(folder):
    return find_and_read.describe(the_file(folder))


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_its_formula(case, tmp_path):
    file, dense = the_file(written(case, tmp_path)), CASES[case][2]
    sae = find_and_read.read(file)
    values, indices, h_hat = sae.reconstruct(H)
    expected = dense(H.double())
    assert (h_hat - expected).norm() / expected.norm() < 1e-6
    assert (values >= 0).all() != (sae.rule == "signed")
    assert values.shape == indices.shape and (values != 0).any(1).float().mean() > 0.5
    for row, index in zip(values, indices):  # a code names a latent once
        assert len(index[row != 0].unique()) == (row != 0).sum()
    of = find_and_read.describe(file)
    assert (of.format, of.site, of.layer) == (case.split()[0], "resid_post", 1)
    # what the fused kernels compute is the same
    assert (fused(sae).reconstruct(H)[2] - h_hat).norm() < 1e-5 * h_hat.norm()


def test_every_format_has_its_cases():
    assert {name for name, _ in BY_FORMAT} == set(find_and_read.FORMATS) == set(STRANGER)


def test_centred_sae_sees_and_gives_back_the_mean(tmp_path):
    sae = the_sae(write_sparsify(tmp_path / "layers.1"))
    sae.centred = True
    mean = H.double().mean(1, keepdim=True)
    expected = TOPK(H.double() - mean) + mean
    assert (sae.reconstruct(H)[2] - expected).norm() / expected.norm() < 1e-6
    assert isinstance(fused(sae), FileSAE)


# --------------------------------------------------------------------------------------- what the files say
NAMES = {
    hook_names.hook_of_lens: {
        "blocks.3.hook_resid_post": ("resid_post", 3),
        "blocks.3.hook_resid_pre": ("resid_post", 2),
        "blocks.0.hook_resid_pre": ("resid_pre", 0),
        "blocks.3.hook_mlp_out": ("mlp_out", 3),
        "blocks.3.attn.hook_z": ("blocks.3.attn.hook_z", None),
        "gpt_neox.layers.3": ("resid_post", 3),
        "model.layers.3.mlp": ("mlp", 3),
        "": (None, None),
    },
    hook_names.hook_of_path: {
        "org/x/layers.3/seed0": ("resid_post", 3),
        "layers.5/run/layers.3": ("resid_post", 3),
        "org/x/layers.3.mlp": ("mlp", 3),
        "org/gpt2/h.11": ("resid_post", 11),
        "saes/resid_post_layer_4/trainer_7": ("resid_post", 4),
        "x/mlp_out_layer5": ("mlp_out", 5),
        "x/resid_out_layer3/10_32768": ("resid_post", 3),
        "x/resid_pre_layer_4/trainer_0": ("resid_post", 3),
        "x/resid_pre_layer_0": ("resid_pre", 0),
        "x/blocks.4.hook_resid_pre": ("resid_post", 3),
        "org/multilayers.x/run12": (None, None),
    },
    hook_names.hub_name: {
        "gpt2-small": "gpt2",
        "gpt2-medium": "gpt2-medium",
        "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
        "gemma-2-2b": "google/gemma-2-2b",
        "Llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
        "tiny-stories-33M": "roneneldan/TinyStories-33M",
        "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    },
}


@pytest.mark.parametrize("ours", NAMES, ids=lambda ours: ours.__name__)
def test_names_of_hooks_and_models_become_ours_and_the_hubs(ours):
    assert {name: ours(name) for name in NAMES[ours]} == NAMES[ours]


def test_hooks_of_dictionary_learnings_submodules(tmp_path):
    hooks = {
        ("resid_post_layer_4", 4, "out"): ("resid_post", 4),
        ("resid_post_layer_4", 4, "in"): ("resid_post", 3),
        ("resid_pre_layer_4", 4, "in"): ("resid_post", 3),
        (None, 4, "in"): ("resid_post", 3),
        ("resid_post_layer_0", 0, "in"): ("resid_pre", 0),
        ("mlp_out_layer4", 4, "in"): ("input of mlp_out", 4),
        ("resid_out", 4, None): ("resid_post", 4),
        ("resid_pre", 4, None): ("resid_post", 3),
    }
    for i, ((name, layer, io), hook) in enumerate(hooks.items()):
        folder = write_dictionary(tmp_path / f"x{i}", buffer={"io": io}, submodule_name=name, layer=layer)
        assert (declared(folder).site, declared(folder).layer) == hook, (name, io)


def test_what_saelens_and_sparsify_declare(tmp_path):
    assert declared(write_lens(tmp_path / "a")) == Declared(
        "saelens", site="resid_post", layer=1, model="m", ctx=32, bos=True, basis="raw", width=F
    )
    left_out = {"exclude_special_tokens": True, "seqpos_slice": [1, None]}
    some = write_lens(tmp_path / "c", metadata={"sae_lens_version": "6.1", **left_out})
    assert declared(some).unseen == tuple(left_out)
    centred = {"center_writing_weights": True}
    old = declared(write_lens(tmp_path / "b", **V5_TOPK, model_from_pretrained_kwargs=centred))
    # version 5 puts a BOS in front unless it says otherwise
    assert (old.basis, old.bos, old.layer) == ("centred", True, 1)
    assert declared(write_sparsify(tmp_path / "layers.4.mlp")).site == "mlp"
    assert declared(write_sparsify(tmp_path / "layers.5", transcode=True)).site == "transcoder"
    assert declared(write_mlsae(tmp_path / "sae-pythia-70m-deduped-x64-k32-layers-2")).layer == 2


SCOPES = {  # -> site, layer, model, width
    "2b-pt-res/layer_20/width_16k/average_l0_71": ("resid_post", 20, "gemma-2-2b", 2**14),
    "9b-it-res/layer_9/width_131k/average_l0_9": ("resid_post", 9, "gemma-2-9b-it", 2**17),
    "2b-pt-res/layer_5/width_1m/average_l0_9": ("resid_post", 5, "gemma-2-2b", 2**20),
    "2b-pt-res/embedding/width_4k/average_l0_6": ("embedding", None, "gemma-2-2b", 2**12),
    "2b-pt-att/layer_3/width_16k/average_l0_9": ("att", 3, "gemma-2-2b", 2**14),
    "2b-pt-transcoders/layer_3/width_16k/x": ("transcoder", 3, "gemma-2-2b", 2**14),
    "2-1b-it/resid_post_all/layer_3_width_16k_l0_big": ("resid_post", 3, "gemma-3-1b-it", 2**14),
    "2-270m-pt/mlp_out/layer_3_width_16k_l0_big": ("mlp_out", 3, "gemma-3-270m", 2**14),
    "2-1b-pt/transcoder_all/layer_3_width_16k_l0_x": ("transcoder", 3, "gemma-3-1b-pt", 2**14),
}


def test_gemma_scopes_paths_say_hook_model_and_width():
    for path, (site, layer, model, width) in SCOPES.items():
        of = gemma_scope.declares({}, f"google/gemma-scope-{path}", {})
        assert (of.site, of.layer, of.model, of.width) == (site, layer, f"google/{model}", width)
        assert (of.bos, of.ctx, of.unseen) == (True, 1024, ("BOS",))


@pytest.mark.parametrize(
    "into, out_of, kind, hook",
    [
        ("model.layers.3.output", None, "sae", ("resid_post", 3)),
        ("model.layers.1.output", "model.layers.1.output", "transcoder", ("transcoder", 1)),
        ("model.layers.1.output", "model.layers.1.mlp.output", "sae", ("transcoder", 1)),
        (*["model.layers.1.self_attn.o_proj.input"] * 2, "sae", ("model.layers.1.self_attn.o_proj.input", 1)),
    ],
)
def test_gemma_scopes_configuration_says_the_hook(into, out_of, kind, hook, tmp_path):
    said = dict(hf_hook_point_in=into, hf_hook_point_out=out_of, type=kind)
    of = declared(write_gemma_scope_2(tmp_path, **said))
    assert (of.site, of.layer, of.model) == (*hook, "google/gemma-3-270m")


# -------------------------------------------------------------------------------------- which SAEs are meant
def test_two_runs_of_one_name_are_told_apart(tmp_path):
    labels = [f"{run}/resid_post_layer_1/trainer_0" for run in "ab"]
    specs = [str(write_dictionary(tmp_path / label)) for label in labels]
    chosen, refused = external_saes.choose(specs, [("m", 1)])
    assert not refused and [one.file.label for one in chosen] == labels
    with pytest.raises(UserError, match="resid_post_layer_1/trainer_0 is named twice"):
        external_saes.choose([specs[0], specs[0] + "/ae.pt"], [("m", 1)])


def test_the_files_say_the_hook_and_the_model(tmp_path):
    write_dictionary(tmp_path / "x", submodule_name="mlp_out")
    with pytest.raises(UserError, match=r"mlp_out, not resid_post"):
        external_saes.choose([str(tmp_path / "x")], [("m", 1)])
    write_lens(tmp_path / "y", metadata={**META, "model_name": "gemma-2-2b"})
    ((chosen,), _) = external_saes.choose([str(tmp_path / "y")], [])
    assert (chosen.model, chosen.layer) == ("google/gemma-2-2b", 1)


def test_a_folder_of_many_and_a_pattern(tmp_path):
    for name in ("layers.1", "layers.2", "layers.2.mlp"):
        write_sparsify(tmp_path / "run" / name)
    write_dictionary(tmp_path / "run/resid_post_layer_1/trainer_0")

    def labels(spec):
        found = find_and_read.find(str(tmp_path / "run" / spec))
        return [file.label.removeprefix(f"{tmp_path.name}/").removeprefix("run/") for file in found]

    sparsify = ["layers.1", "layers.2", "layers.2.mlp"]
    assert labels("") == [*sparsify, "resid_post_layer_1/trainer_0"]
    assert labels("layers.*") == sparsify
    assert labels("resid_post_layer_1/*") == ["resid_post_layer_1/trainer_0"]
    assert len(labels("layers.2/sae.safetensors")) == 1
    with pytest.raises(UserError, match="no such file"):
        labels("layers.7")
    write_sparsify(tmp_path / "run/two\nlines")
    with pytest.raises(UserError, match=r"two\\nlines': a control character") as caught:
        labels("")
    assert "\n" not in str(caught.value)


def test_no_such_place_is_said_without_asking_the_hub(tmp_path):
    for spec in ("/nowhere/at/all", "./nowhere", "nowhere", "demo/nowhere/here", f"{tmp_path}/nowhere*/x"):
        with pytest.raises(UserError, match=r"--sae .*(no such file|no SAE)"):
            find_and_read.find(spec)


def test_fingerprint_is_of_all_that_computes(tmp_path):
    norm = {"normalize_activations": "layer_norm"}
    ways = ({}, {}, {"k": 4}, norm, {"apply_b_dec_to_input": False})
    saes = [the_sae(write_lens(tmp_path / str(i), **how)) for i, how in enumerate(ways)]
    prints = [computed_sae.sae_fingerprint(sae) for sae in saes]
    assert prints[0] == prints[1] and len(set(prints)) == 4


# -------------------------------------------------------------------------------------------- what is refused
class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def damage(write, name, content):
    """Writes files of a format, and then other bytes into one of them; None: without that file."""

    def at(folder, **how):
        path = write(folder, **how) / name
        old = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content(old))
        return folder

    return at


CROSSCODER = {"encoder.weight": torch.randn(2, D, F), "decoder.weight": torch.randn(2, F, D)}
OTHER_SCALE = {**LENS, "b_enc": B_ENC, "scaling_factor": torch.ones(F) * 1.01}
IDENTITY = dict(activation="TopK", activation_state_dict={"k": K, "postact_fn": "Identity"})


@pytest.mark.parametrize(
    "write, how, word",
    [
        (damage(write_sparsify, "sae.safetensors", lambda old: old[:-100]), {}, "SafetensorError"),
        (damage(write_sparsify, "cfg.json", None), {}, "cfg.json is missing"),
        (write_sparsify, dict(signed=True, activation="groupmax"), "signed"),
        (write_sparsify, dict(skip_connection=True), "no 'W_skip' in it"),
        (damage(write_lens, "cfg.json", lambda _: b"{"), {}, "Expecting"),
        (write_lens, dict(tensors={**LENS, "b_enc": B_ENC * float("nan")}), "not finite"),
        (write_lens, dict(tensors={**LENS, "b_enc": B_ENC[:-1]}), "b_enc is"),
        (write_lens, dict(tensors={"W_enc": W_ENC}), "no 'W_dec' in it"),
        (write_lens, dict(tensors=OTHER_SCALE), "scaling_factor"),
        (write_lens, dict(tensors={**LENS, "b_enc": B_ENC, "r_mag": R_MAG}), "r_mag is there"),
        (write_lens, dict(architecture="standard", tensors=JUMP), "threshold is there"),
        (write_lens, dict(architecture="temporal"), "'temporal' is not supported"),
        (write_lens, dict(normalize_activations="expected_average_only_in"), "holds the scale"),
        (write_lens, dict(k=41), "k = 41 of 40"),
        (write_lens, dict(reshape_activations="hook_z"), "reshape_activations (hook_z)"),
        (damage(write_dictionary, "ae.pt", lambda _: pickle.dumps(Evil())), {}, "run code"),
        (write_dictionary, dict(name=None), "TopK or BatchTopK"),
        (write_dictionary, dict(name="IdentityDict"), "'IdentityDict'"),
        (write_dictionary, dict(name="CrossCoder", tensors=CROSSCODER), "a crosscoder"),
        (write_dictionary, dict(tensors={**BATCH, "bias": B_DEC}), "bias is there"),
        (write_openai, dict(activation="Identity"), "'Identity' is not supported"),
        (write_openai, IDENTITY, "postact_fn"),
        (write_gemma_scope, dict(w_enc=W_ENC), "w_enc is there"),
        (write_gemma_scope_2, dict(affine_connection=True), "affine_connection"),
    ],
)
def test_bad_files_are_refused_in_one_line(write, how, word, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        the_sae(write(tmp_path / "x", **how))
    line = str(caught.value)
    assert tmp_path.name in line and word in line and "\n" not in line
    assert "code was run" not in capsys.readouterr().out


def within(write, name, others, **more):
    """Writes files with `field` inside the named values `name`, beside others."""
    return lambda folder, **field: write(folder, **{**more, name: {**others, **field}})


def lens_scaler(folder, **field):
    return write_lens(folder, **{**SCALED, "beside": {SCALER: {"scaling_factor": 0.3, **field}}})


def dictionary_checkpoint(folder, **field):
    tensors = {"ae": BATCH, "config": {"dict_class": "BatchTopKSAE", **field}}
    return write_dictionary(folder, name=None, tensors=tensors)


LENS_5_MODEL = within(
    write_lens, "model_from_pretrained_kwargs", {"center_writing_weights": False}, **V5_TOPK
)
OPENAI_STATE = within(
    write_openai, "activation_state_dict", {"k": K, "postact_fn": "ReLU"}, activation="TopK"
)
STRANGER = {  # format -> (what writes it with a field more, how the field is called in full)
    "saelens": [
        (write_lens, "{}"),
        (within(write_lens, "metadata", {"sae_lens_version": "6.1"}), "metadata.{}"),
        (lambda folder, **field: write_lens(folder, **V5_TOPK, **field), "{}"),
        (LENS_5_MODEL, "model_from_pretrained_kwargs.{}"),
        (lens_scaler, "activation_scaler.json.{}"),
    ],
    "sparsify": [(write_sparsify, "{}")],
    "dictionary_learning": [
        (write_dictionary, "trainer.{}"),
        (within(write_dictionary, "buffer", {}), "buffer.{}"),
        (dictionary_checkpoint, "trainer.{}"),
    ],
    "gemma_scope": [(write_gemma_scope_2, "{}")],
    "openai": [(write_openai, "{}"), (OPENAI_STATE, "activation_state_dict.{}")],
    "mlsae": [(write_mlsae, "{}")],
}


@pytest.mark.parametrize("write, called", [case for cases in STRANGER.values() for case in cases])
def test_an_unknown_field_is_refused_by_name_and_let_pass_by_a_flag(write, called, tmp_path):
    name = called.format("turned_round")
    for number, value in enumerate((True, 0, "yes", {"a": False})):
        file = the_file(write(tmp_path / str(number) / "layers.1", turned_round=value))
        for ignore in ((), ["other"]):
            with pytest.raises(UserError) as caught:
                find_and_read.read(file, ignore)
            line = str(caught.value)
            assert line.startswith(f"--sae {file.label}: ") and "\n" not in line and len(line) < 400
            assert f"{name} (" in line and "--ignore-field" in line
        for typed in (name, "turned_round"):
            sae = find_and_read.read(file, ["other", typed])
            assert sae.fields.ignored == (name,) and torch.isfinite(sae.reconstruct(H)[2]).all()
    for number, nothing in enumerate((None, False, "none", "", [], {})):
        folder = write(tmp_path / f"nothing{number}" / "layers.1", turned_round=nothing)
        assert not the_sae(folder).fields.ignored


@pytest.mark.parametrize(
    "write", [write_lens, write_sparsify, write_dictionary, write_openai, write_mlsae, write_gemma_scope_2]
)
def test_an_unknown_tensor_is_refused_by_name(write, tmp_path):
    file = the_file(write(tmp_path / "layers.1"))
    path = file.fetch(file.weights)
    tensors = {**weights.read_tensors(path), "b_more": torch.zeros(F)}
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
    with pytest.raises(UserError, match=r"b_more \(a tensor \[40\]\)"):
        find_and_read.read(file)
    assert find_and_read.read(file, ["b_more"]).fields.ignored == ("b_more",)


def test_fields_of_training_are_named_and_not_refused(tmp_path):
    lens = the_sae(write_lens(tmp_path / "a", dtype="float32", matryoshka_widths=[1, 2]))
    of_metadata = ("metadata.l0", "metadata.num_dead_features")
    assert lens.fields == known_fields.Fields(("d_in", "dtype", "matryoshka_widths", *of_metadata))
    trained = the_sae(write_dictionary(tmp_path / "b", lr=0.1, steps=9, buffer={"out_batch_size": 8}))
    assert trained.fields.unused == ("buffer.out_batch_size", "trainer.lr", "trainer.steps")


def test_the_first_saelens_files_keep_their_whole_run(tmp_path):
    """The keys of GPT-2 small's residual stream SAEs of early 2024."""
    run = (
        "hook_point_layer dataset_path cached_activations_path n_batches_in_buffer total_training_tokens "
        "store_batch_size device seed dtype b_dec_init_method expansion_factor l1_coefficient lr "
        "lr_warm_up_steps train_batch_size feature_sampling_window resample_batches feature_reinit_scale "
        "dead_feature_window dead_feature_estimation_method dead_feature_threshold log_to_wandb "
        "wandb_project wandb_log_frequency n_checkpoints checkpoint_path tokens_per_buffer run_name "
        "neuronpedia_id"
    )
    said = dict.fromkeys("is_dataset_tokenized use_cached_activations use_ghost_grads".split(), False)
    said |= dict.fromkeys(run.split(), 1) | dict(hook_point="blocks.2.hook_resid_pre", sae_lens_version=None)
    said |= dict(hook_point_head_index=None, model_from_pretrained_kwargs={"center_writing_weights": True})
    first = write_lens(tmp_path / "x", **{**V5, **said})
    assert not the_sae(first).fields.ignored
    of = declared(first)
    assert (of.site, of.layer, of.basis, of.bos) == ("resid_post", 1, "centred", True)


WRONG = {  # values of the wrong type or range, by their place; the one line names the last part of it
    write_lens: {
        "metadata.context_size": ["many", -5, True, 1e30, 2.5],
        "metadata.hook_name": [["x"]],
        "metadata.model_name": [3],
        "metadata.prepend_bos": ["yes"],
        "metadata.model_from_pretrained_kwargs": [[1]],
        "metadata.exclude_special_tokens": [{"a": 1}],
        "metadata.seqpos_slice": ["x"],
        "metadata.sae_lens_version": [["6"]],
        "metadata": [3],
        "d_sae": ["40", 1e30],
        "k": ["5", [5], 0, 1e30, 5.5],
        "architecture": [["topk"]],
        "activation_fn": [3],
        "apply_b_dec_to_input": ["no"],
        "rescale_acts_by_decoder_norm": [3],
        "normalize_activations": [["none"]],
    },
    write_sparsify: {
        "k": ["5", 0, None],
        "activation": [["topk"]],
        "transcode": ["yes"],
        "num_latents": ["40"],
        "d_in": ["12"],
        "expansion_factor": [[3]],
    },
    write_dictionary: {
        "trainer": [[1], "x"],
        "buffer": [3],
        "buffer.ctx_len": ["x"],
        "buffer.remove_bos": ["x"],
        "trainer.dict_class": [[1]],
        "trainer.dict_size": ["40"],
        "trainer.submodule_name": [3],
        "trainer.lm_name": [3],
    },
    write_mlsae: {"k": ["5", 0, 1e30], "n_latents": ["40"], "standardize": ["yes"]},
}
WRONG_TOGETHER = [
    (write_lens, {"k": None, "activation_fn_kwargs": [5]}, "activation_fn_kwargs"),
    *((write_lens, {"metadata": {**META, "context_size": ctx}}, "ctx") for ctx in (0, 1)),
    *((write_lens, {"metadata": {**META, "model_name": name}}, "model") for name in ("a\0b", "a\nb")),
    (write_sparsify, {"activation": "groupmax", "k": 7}, "k = 7"),
    *((write_dictionary, {"submodule_name": "x", "layer": at}, "layer") for at in ("three", 2.5, -1)),
]


def one_line_names(folder, word):
    (file,) = find_and_read.find(str(folder))
    with pytest.raises(UserError) as caught:
        find_and_read.describe(file)
        find_and_read.read(file)
    line = str(caught.value)
    assert line.startswith(f"--sae {file.label}: ") and word in line, line
    assert "\n" not in line and len(line) < 400 and "Error" not in line


@pytest.mark.parametrize("write", WRONG)
def test_a_value_of_the_wrong_type_is_one_line_that_names_it(write, tmp_path):
    file = the_file(write(tmp_path / "layers.1"))
    path = tmp_path / "layers.1" / file.config
    good = json.loads(path.read_text())
    for place, values in WRONG[write].items():
        for value in values:
            path.write_text(json.dumps(replaced(good, place.split("."), value)))
            one_line_names(tmp_path / "layers.1", place.rpartition(".")[2])
    for whole in ([], "x", 3, None):
        path.write_text(json.dumps(whole))
        one_line_names(tmp_path / "layers.1", "json")
    for number, (_, how, word) in enumerate(case for case in WRONG_TOGETHER if case[0] is write):
        one_line_names(write(tmp_path / str(number), **how), word)


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    metadata = {"sae_lens_version": "6.1", "context_size": 32.0}
    file = the_file(write_lens(tmp_path / "x", k=5.0, d_sae=40.0, metadata=metadata))
    k = find_and_read.read(file).k
    assert find_and_read.describe(file).ctx == 32 and k == 5 and isinstance(k, int)


# ------------------------------------------------------------------------------------------------- attacks
STRANGE = [
    *("x", "", "\0", "\ud800", "9" * 5000),
    *(0, -1, 2.5, 1e30, 10**30, float("nan"), float("inf")),
    *(True, False, None),
    *([], [1], ["x"], [[]], {}, {"a": 1}),
]


def anywhere(config, path=()):
    """The place of every value of a JSON value."""
    yield path
    items = config.items() if isinstance(config, dict) else enumerate(config if type(config) is list else ())
    for key, value in items:
        yield from anywhere(value, (*path, key))


def replaced(config, path, value):
    if not path:
        return value
    changed = dict(config) if isinstance(config, dict) else list(config)
    changed[path[0]] = replaced(config[path[0]] if path[1:] else None, path[1:], value)
    return changed


def survives(folder):
    """Everything that is found is described and read, or refused in one line."""
    try:
        for file in find_and_read.find(str(folder)):
            find_and_read.describe(file)
            find_and_read.read(file).reconstruct(H)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error


FUZZED = (  # a case of each kind of file
    ["saelens topk checkpoint, whitened", "saelens 5 topk", "saelens gated", "saelens matryoshka checkpoint"]
    + ["sparsify skip", "dictionary_learning BatchTopK mid-run", "dictionary_learning of the input"]
    + ["openai topk", "gemma_scope 1", "gemma_scope 2", "mlsae "]
)


@pytest.mark.parametrize("case", FUZZED)
def test_no_value_and_no_damage_is_a_traceback(case, tmp_path, capfd):
    folder, rng = written(case, tmp_path), chance.Random(case)
    for path in folder.rglob("*.json"):
        good = json.loads(path.read_text())
        for place in anywhere(good):
            for value in rng.sample(STRANGE, 6):
                path.write_text(json.dumps(replaced(good, place, value)))
                survives(folder)
        path.write_text(json.dumps(good))
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        good, garbage = path.read_bytes(), rng.randbytes(300)
        cut = [good[:n] for n in (0, 1, 9, len(good) // 2, -1)]
        mixed = [garbage, good[:50] + garbage + good[350:], good + garbage, b"PK\3\4" + garbage]
        for content in (*cut, *mixed, b"{}", b"\x80\x02}.", b"\x80\x02]."):
            path.write_bytes(content)
            survives(folder)
        path.unlink()
        survives(folder)
        path.mkdir()
        survives(folder)
        path.rmdir()
        path.symlink_to("nowhere")
        survives(folder)
        path.unlink()
        path.write_bytes(good)
    assert not any(capfd.readouterr())


@pytest.mark.parametrize(
    "content",
    [
        *([1], torch.zeros(3), None, {}),
        *({"ae": 3}, {"ae": {"W_enc": 3}}, {"W_enc": [1]}),
        *({"W_enc": torch.zeros(3)}, {"W_enc": torch.zeros(0, D)}),
        *({**BATCH, "k": k} for k in (torch.zeros(3), "x")),
        *({**BATCH, "encoder.weight": W} for W in (W_ENC.to_sparse(), "x")),
        {**BATCH, "threshold": torch.zeros(7)},
        {**BATCH, "encoder.bias": B_ENC * 1j},
        *({"ae": BATCH, "norm_factor": factor} for factor in ("x", 0.0, -1.0)),
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_of_other_things_is_one_line(content, tmp_path):
    folder = write_dictionary(tmp_path / "resid_post_layer_1", name="BatchTopKSAE")
    torch.save(content, folder / "ae.pt")
    with pytest.raises(UserError) as caught:
        the_sae(tmp_path)
    assert "\n" not in str(caught.value)


def enlarged(folder, how):
    """An ae.pt of a few MB at most, whose tensors take half a GB or more."""
    if how == "repeated":
        wide = {"encoder.weight": (2**14, 2**13), "encoder.bias": (2**14,)}
        wide |= {"decoder.weight": (2**13, 2**14), "b_dec": (2**13,)}
        tensors = {name: torch.zeros(1).expand(shape) for name, shape in wide.items()}
        return write_dictionary(folder, tensors=tensors, k=5)
    write_dictionary(folder, tensors={"encoder.weight": torch.zeros(2**27)}, file="whole")
    with (
        zipfile.ZipFile(folder / "whole") as whole,
        zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for name in whole.namelist():
            with whole.open(name) as source, packed.open(name, "w") as member:
                shutil.copyfileobj(source, member, 2**20)
    (folder / "whole").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, word", [("repeated", "claims 134217728 values, more than are stored"), ("packed", "inflate")]
)
def test_a_small_file_is_no_large_one(how, word, tmp_path):
    folder = enlarged(tmp_path / "resid_post_layer_1", how)
    assert (folder / "ae.pt").stat().st_size < 4e6
    code = """import sys
from transport_geometry.formats import find_and_read
try: find_and_read.read(find_and_read.find(sys.argv[1])[0])
except find_and_read.UserError as error: print(error)"""
    lines, peak = measured(code, folder)
    assert len(lines) == 1 and word in lines[0] and peak < 600  # the imports take 220


# --------------------------------------------------------------------------------------------- the basis gate
def best_of(h, dimensions):
    """The ReLU SAE that keeps the first principal directions of h: +-u as latents."""
    mean = h.mean(0)
    U = torch.linalg.eigh((h - mean).T @ (h - mean)).eigenvectors[:, -dimensions:]
    W = torch.cat([U.T, -U.T]).contiguous()
    biases = dict(b_enc=torch.zeros(len(W)), b_dec=mean, b_in=mean, threshold=torch.zeros(()))
    return FileSAE("threshold", W_enc=W, W_dec=W.clone(), **biases)


def without_mean(h):
    return h - h.mean(1, keepdim=True)


@pytest.fixture
def gate():
    model = tiny_model(d=16, layers=4, dtype=torch.float32)
    # what the last block writes has a mean over d, as GPT-NeoX' residual stream may
    for name, p in model.named_parameters():
        if "dense_4h_to_h.bias" in name or "embed_in" in name:
            p.data += 1.0
    input_ids = torch.randint(0, 41, (8, 24), generator=torch.Generator().manual_seed(1))
    return model, input_ids, basis_gate.near(Hook(model, 1), input_ids)


def test_gate_lets_through_what_is_as_its_files_say(gate):
    model, input_ids, near = gate
    assert list(near) == [0, 1, 2]  # the hook and its neighbours, here without position 0 alone
    assert torch.equal(near[1], Hook(model, 1).head(input_ids)[:, 1:].flatten(0, 1))
    readings = basis_gate.check_basis(best_of(near[1], 4), "raw", "x", 1, near)
    assert list(readings)[0] == "layer 1, raw" and len(readings) == 4
    basis_gate.check_basis(best_of(without_mean(near[1]), 4), "centred", "x", 1, near)


def test_gate_refuses_the_other_basis_with_both_numbers(gate):
    _, _, near = gate
    centred = best_of(without_mean(near[1]), 15)
    as_said, other = (basis_gate.unexplained(centred, near[1], basis) for basis in (False, True))
    assert other < 0.01 < as_said
    with pytest.raises(UserError, match="centred") as caught:
        basis_gate.check_basis(centred, "raw", "x", 1, near)
    for word in (f"{as_said:.4f}", f"{other:.4f}", "--basis"):
        assert word in str(caught.value)


def test_gate_refuses_the_block_after_its_own_and_what_is_not_finite(gate):
    model, input_ids, near = gate
    of_block_0 = best_of(basis_gate.near(Hook(model, 0), input_ids)[0], 6)
    with pytest.raises(UserError, match="layer 0, raw"):
        basis_gate.check_basis(of_block_0, "raw", "x", 1, near)
    sae = best_of(near[1], 4)
    sae.W_dec[0, 0] = torch.nan
    with pytest.raises(UserError, match="nan"):
        basis_gate.check_basis(sae, "raw", "x", 1, near)


# ------------------------------------------------------------------------------------------- the same metrics
def test_any_sae_goes_through_the_metrics_of_a_topk_sae(rows):
    """One function in three forms: the fused kind, the general kind by its own code, and without a code."""
    hook, d, F = Hook(tiny_model(dtype=torch.float32), 1), 16, 40
    W = random(F, d)
    general = FileSAE("topk", 4, W_enc=W, b_enc=random(F), W_dec=W, b_dec=random(d), b_in=random(d))
    forms = {"general": general, "fused": fused(general), "dense": lambda h, mean: general.reconstruct(h)[2]}
    results = evaluate(hook, rows, forms, 2)
    ones = np.ones((1, len(rows)))
    values = {
        name: computed(Sums({q: v[None] for q, v in result.sums.items()}, ones, d))
        for name, result in results.items()
    }
    for metric, value in values["fused"].items():
        assert value == pytest.approx(values["general"][metric], rel=1e-4, abs=1e-6), metric
        assert metric == "l0" or value == pytest.approx(values["dense"][metric], rel=1e-4, abs=1e-6), metric
    assert (results["general"].fired == results["fused"].fired).all() and results["dense"].fired is None


def test_codes_of_a_threshold_sae_are_counted_by_token(rows):
    hook, d, F = Hook(tiny_model(dtype=torch.float32), 1), 16, 40
    W, half = random(F, d), torch.tensor(0.5)
    sae = FileSAE("threshold", W_enc=W, b_enc=torch.zeros(F), W_dec=W, b_dec=torch.zeros(d), threshold=half)
    result = evaluate(hook, rows, {"x": sae}, 2)["x"]
    active = hook.head(rows)[:, :-1] @ W.t() > 0.5
    assert (result.sums["l0"] == active.sum((1, 2)).numpy()).all()
    assert (result.fired.sum(0) == active.sum((0, 1)).numpy()).all()


# ---------------------------------------------------------------------------------------- every library's R^2
def test_definitions_by_hand():
    h = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 4.0]]]).double()
    h_hat = h + torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    keep = torch.ones(2, 2, dtype=torch.bool)
    got = definitions(h, h_hat, keep)  # mean (1, 1.5), SST 6 + 11, SSE 3, |h|^2 = 1 + 9 + 4 + 16
    assert got["r2_dictionary_learning"] == pytest.approx(1 - (3 - 9 / 4) / 17)
    assert got["r2_saebench"] == pytest.approx(1 - 0.75 / (30 / 4 - (30 / 8) ** 2))
    assert got["r2_overcomplete"] == pytest.approx(1 - 3 / (30 - 8 * 1.25**2))
    assert got["r2_openai"] == pytest.approx(1 - (1 / 1 + 1 / 9 + 1 / 4) / 4)
    assert got["r2_per_dim"] == pytest.approx(1 - (0 / 6 + 3 / 11) / 2)
    assert got["r2_saelens_legacy"] == pytest.approx(1 - (1 / 2.25 + 1 / 6.25 + 1 / 1.25) / 4)
    assert got["r2_sparsify"] == pytest.approx(1 - (2 / 2 + 1 / 2) / 2)
    # the second sequence has no variance of its own
    one = definitions(h, h_hat, torch.tensor([[True, True], [True, False]]))
    assert one["r2_openai"] == pytest.approx(1 - (1 / 1 + 1 / 9 + 1 / 4) / 3)
    mean = h.flatten(0, 1).mean(0).expand_as(h)
    at_mean, biased, same = (definitions(h, x, keep) for x in (mean, h + 2, h))
    assert set(same.values()) == {1.0} and at_mean["r2_sparsify"] < 0
    for name in ("r2_dictionary_learning", "r2_per_dim", "r2_saelens_legacy"):
        assert at_mean[name] == pytest.approx(0, abs=1e-9), name
    assert biased["r2_dictionary_learning"] == pytest.approx(1) and biased["r2_per_dim"] < 0


# ----------------------------------------------------------------------------------------------------- export
MADE = {"model": "stdlib-s", "layer": 1, "ctx": 64, "data": "stdlib"}


EXPORTED = {
    "stdlib-s+null300": ("gpt_neox.layers.1", "AutoModelForCausalLM"),
    "smollm2-135m": ("model.layers.1", "AutoModelForCausalLM"),
    "nowhere/at-all": ("blocks.1.hook_resid_post", "HookedTransformer"),
}


def test_an_exported_sae_reads_back_as_itself(tmp_path):
    sae = fused(the_sae(write_sparsify(tmp_path / "layers.1")))
    for number, (model, of_model) in enumerate(EXPORTED.items()):
        saelens.write_saelens(tmp_path / str(number), sae, {**MADE, "model": model})
        metadata = json.loads((tmp_path / f"{number}/cfg.json").read_text())["metadata"]
        assert (metadata["hook_name"], metadata["model_class_name"]) == of_model
    saelens.write_saelens(tmp_path / "out", sae, MADE)
    assert torch.equal(sae.reconstruct(H)[2], fused(the_sae(tmp_path / "out")).reconstruct(H)[2])
    assert declared(tmp_path / "out") == Declared(
        "saelens", site="resid_post", layer=1, model="stdlib-s", ctx=64, bos=False, basis="raw", width=F
    )
    saelens.write_saelens(tmp_path / "without", sae, {**MADE, "sinks": "drop"})
    assert declared(tmp_path / "without").unseen == ("sinks",)
    with pytest.raises(UserError, match="holds cfg.json and sae_weights.safetensors already"):
        saelens.write_saelens(tmp_path / "out", sae, MADE)
