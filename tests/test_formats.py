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
from transport_geometry.formats import sae_fields, sae_files
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.measuring.r2_by_library import definitions
from transport_geometry.models.lm import Hook
from transport_geometry.saes import external_saes

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


# --------------------------------------------------------------------------- the truths, dense and in float64
def top(z, k=K):
    return z * (z >= z.topk(k, 1).values[:, -1:])


def truth(x, code, b_in=B_DEC, b_dec=B_DEC, W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC):
    z = (x - b_in.double()) @ W_enc.double() + b_enc.double()
    return code(z) @ W_dec.double() + b_dec.double()


def gated(x):
    u = (x - B_DEC.double()) @ W_ENC.double()
    opened = u + B_ENC.double() > 0
    return (opened * (u * R_MAG.double().exp() + B_MAG.double()).relu()) @ W_DEC.double() + B_DEC.double()


def largest(z, k=K):
    return z * (z.abs() >= z.abs().topk(k, 1).values[:, -1:])


def layer_normed(f):
    def of(x):
        mean, sd = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return f((x - mean) / (sd + 1e-5)) * sd + mean

    return of


def relu_top(z):
    return top(z).relu()


def jump(z):
    return z.relu() * (z > THRESHOLD.double())


def above(threshold):
    return lambda z: z * (z > threshold)


def constant_norm(x):
    scale = x.norm(dim=1, keepdim=True) / D**0.5
    return truth(x / scale, relu_top) * scale


def whitened(x):
    mean, matrix, inverse = (WHITE[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    return rescaled((x - mean) @ matrix) @ inverse + mean


def rescaled(x):
    norm = W_DEC.double().norm(dim=1)
    z = ((x - B_DEC.double()) @ W_ENC.double() + B_ENC.double()) * norm
    return (top(z).relu() / norm) @ W_DEC.double() + B_DEC.double()


def groupmax(z):
    groups = z.relu().unflatten(1, (K, F // K))
    return (groups * (groups == groups.max(2, keepdim=True).values)).flatten(1)


WHITE = {"mean": random(D, seed=8), "matrix": random(D, D, seed=9) + 4 * torch.eye(D)}
WHITE["inverse_matrix"] = WHITE["matrix"].double().inverse().float().contiguous()


# -------------------------------------------------------------------------- files as the libraries write them
def saelens(folder, architecture="topk", tensors=None, beside=(), **config):
    tensors = tensors or {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    folder.mkdir(parents=True)
    meta = {
        "sae_lens_version": "6.54.12",
        "hook_name": "blocks.1.hook_resid_post",
        "model_name": "m",
        "prepend_bos": True,
        "context_size": 32,
        "l0": 4.5,
        "num_dead_features": 0,
    }
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "k": K, "metadata": meta, **config}
    (folder / "cfg.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    save_file(tensors, folder / "sae_weights.safetensors")
    for name, content in dict(beside).items():
        if name.endswith("safetensors"):
            save_file(content, folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
    return folder


def sparsify(folder, W_skip=None, **config):
    folder.mkdir(parents=True)
    default = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": K, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps({**default, "transcode": False, **config}))
    tensors = {
        "encoder.weight": W_ENC.t().contiguous(),
        "encoder.bias": B_ENC,
        "W_dec": W_DEC,
        "b_dec": B_DEC,
    }
    if W_skip is not None:
        tensors["W_skip"] = W_skip
    save_file(tensors, folder / "sae.safetensors")
    return folder


def dictionary(folder, name="AutoEncoderTopK", tensors=None, file="ae.pt", buffer=(), **trainer):
    folder.mkdir(parents=True)
    tensors = tensors or {
        "encoder.weight": W_ENC.t().contiguous(),
        "encoder.bias": B_ENC,
        "decoder.weight": W_DEC.t().contiguous(),
        "b_dec": B_DEC,
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
    }
    torch.save(tensors, folder / file)
    if name:
        said = {
            "dict_class": name,
            "lm_name": "org/m",
            "layer": 1,
            "submodule_name": "resid_post_layer_1",
            "dict_size": F,
            **trainer,
        }
        (folder / "config.json").write_text(
            json.dumps({"trainer": said, "buffer": {"ctx_len": 32, **dict(buffer)}})
        )
    return folder


PLAIN = {
    "encoder.weight": W_ENC.t().contiguous(),
    "encoder.bias": B_ENC,
    "decoder.weight": W_DEC.t().contiguous(),
}
LENS = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
BATCH = {**PLAIN, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(1.5)}


def openai(folder, wrapped="", **state):
    (folder / "resid_post_mlp/autoencoders").mkdir(parents=True)
    state = {
        "pre_bias": B_DEC,
        "encoder.weight": W_ENC.t(),
        "latent_bias": B_ENC,
        "decoder.weight": W_DEC.t(),
        "stats_last_nonzero": torch.zeros(F),
        **state,
    }
    torch.save(
        {wrapped + name: value for name, value in state.items()},
        folder / "resid_post_mlp/autoencoders/1.pt",
    )
    return folder


def mlsae(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"n_inputs": D, "n_latents": F, "k": K, **config}))
    save_file(
        {
            "encoder.weight": W_ENC.t().contiguous(),
            "decoder.weight": W_DEC.t().contiguous(),
            "pre_encoder_bias": B_DEC,
            "last_nonzero": torch.zeros(F),
        },
        folder / "model.safetensors",
    )
    return folder


def gemma_scope(folder, **tensors):
    """Of the first: the path says all."""
    at = folder / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_71"
    at.mkdir(parents=True)
    np.savez(at / "params.npz", **{name: tensor.numpy() for name, tensor in {**JUMP, **tensors}.items()})
    return folder


def gemma_scope_2(folder, **config):
    at = folder / "gemma-scope-2-270m-pt/resid_post/layer_1_width_16k_l0_small"
    at.mkdir(parents=True)
    said = {
        "hf_hook_point_in": "model.layers.1.output",
        "hf_hook_point_out": "model.layers.1.output",
        "width": F,
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": False,
        "type": "sae",
    }
    (at / "config.json").write_text(json.dumps({**said, **config}))
    save_file({name.replace("W_", "w_"): tensor for name, tensor in JUMP.items()}, at / "params.safetensors")
    return folder


V5 = dict(
    architecture=None,
    metadata=None,
    k=None,
    hook_point="blocks.1.hook_resid_post",
    model_name="m",
    sae_lens_version="3.20.0",
)
V5_TOPK = dict(**V5, activation_fn_str="topk", activation_fn_kwargs={"k": K})
SCALED = dict(
    normalize_activations="expected_average_only_in",
    beside={"activation_scaler.json": {"scaling_factor": 0.3}},
)
WHITENED = dict(
    normalize_activations="covariance_whitening",
    rescale_acts_by_decoder_norm=True,
    beside={
        "activation_scaler.json": {"scaling_factor": None, "has_whitening": True},
        "activation_whitening.safetensors": WHITE,
    },
)
JUMP = {**LENS, "b_enc": B_ENC, "threshold": THRESHOLD}
GATED_LENS = {**LENS, "b_gate": B_ENC, "r_mag": R_MAG, "b_mag": B_MAG}
GATED = {
    "encoder.weight": PLAIN["encoder.weight"],
    "decoder.weight": PLAIN["decoder.weight"],
    "decoder_bias": B_DEC,
    "r_mag": R_MAG,
    "gate_bias": B_ENC,
    "mag_bias": B_MAG,
}
MATRYOSHKA = {**LENS, "b_enc": B_ENC, "threshold": torch.tensor(1.5), "k": torch.tensor(K)}
ZERO, W_SKIP = torch.zeros(D), random(D, D, seed=3)
# name, which begins with the format's -> (what writes it, how, the truth)
CASES = {
    "saelens topk": (saelens, {}, lambda x: truth(x, relu_top)),
    "saelens topk, no b_dec at the input": (
        saelens,
        dict(apply_b_dec_to_input=False),
        lambda x: truth(x, relu_top, b_in=ZERO),
    ),
    "saelens topk, rescaled": (saelens, dict(rescale_acts_by_decoder_norm=True), rescaled),
    "saelens topk, layer_norm": (
        saelens,
        dict(normalize_activations="layer_norm"),
        layer_normed(lambda x: truth(x, relu_top)),
    ),
    "saelens topk, constant norm": (
        saelens,
        dict(normalize_activations="constant_norm_rescale"),
        constant_norm,
    ),
    "saelens topk checkpoint, scaled": (saelens, SCALED, lambda x: truth(0.3 * x, relu_top) / 0.3),
    "saelens topk checkpoint, whitened": (saelens, WHITENED, whitened),
    "saelens jumprelu": (saelens, dict(architecture="jumprelu", tensors=JUMP), lambda x: truth(x, jump)),
    "saelens jumprelu, scaled": (
        saelens,
        dict(architecture="jumprelu", tensors=JUMP, **SCALED),
        lambda x: truth(0.3 * x, jump) / 0.3,
    ),
    "saelens batchtopk checkpoint": (
        saelens,
        dict(
            architecture="batchtopk",
            tensors={**LENS, "b_enc": B_ENC, "topk_threshold": torch.tensor(2.0).double()},
        ),
        lambda x: truth(x, above(2)),
    ),
    "saelens matryoshka checkpoint": (
        saelens,
        dict(
            architecture="matryoshka_batchtopk",
            k=2.5,  # a mean over tokens
            matryoshka_widths=[10, F],
            tensors={**LENS, "b_enc": B_ENC, "topk_threshold": torch.tensor(2.0).double()},
        ),
        lambda x: truth(x, above(2)),
    ),
    "saelens abstopk": (saelens, dict(architecture="abstopk"), lambda x: truth(x, largest)),
    "saelens topk, a scaling factor of ones": (
        saelens,
        dict(
            tensors={**LENS, "b_enc": B_ENC, "scaling_factor": torch.ones(F)},
            finetuning_scaling_factor=True,
        ),
        lambda x: truth(x, relu_top),
    ),
    "saelens topk, of a module's name": (
        saelens,
        dict(
            metadata={
                "sae_lens_version": "6.54.12",
                "hook_name": "gpt_neox.layers.1",
                "model_class_name": "AutoModelForCausalLM",
            }
        ),
        lambda x: truth(x, relu_top),
    ),
    "saelens standard": (saelens, dict(architecture="standard"), lambda x: truth(x, torch.relu)),
    "saelens gated": (saelens, dict(architecture="gated", tensors=GATED_LENS), gated),
    "saelens 5 topk": (
        saelens,
        dict(**V5_TOPK, normalize_activations=False),
        lambda x: truth(x, relu_top),
    ),
    "saelens 5 standard": (
        saelens,
        dict(**V5, activation_fn_str="relu", apply_b_dec_to_input=False),
        lambda x: truth(x, torch.relu, b_in=ZERO),
    ),
    "saelens 5 topk by its other name": (
        saelens,
        dict(**V5, activation_fn="topk", activation_fn_kwargs={"k": K}),
        lambda x: truth(x, relu_top),
    ),
    "sparsify": (sparsify, {}, lambda x: truth(x, relu_top)),
    "sparsify signed": (sparsify, dict(signed=True), lambda x: truth(x, largest)),
    "sparsify groupmax": (sparsify, dict(activation="groupmax"), lambda x: truth(x, groupmax)),
    "sparsify skip": (
        sparsify,
        dict(skip_connection=True, W_skip=W_SKIP),
        lambda x: truth(x, relu_top) + x @ W_SKIP.double().t(),
    ),
    "dictionary_learning TopK": (dictionary, {}, lambda x: truth(x, relu_top)),
    "dictionary_learning TopK, early": (
        dictionary,
        dict(tensors={**PLAIN, "b_dec": B_DEC}, k=K),
        lambda x: truth(x, relu_top),
    ),
    "dictionary_learning BatchTopK": (
        dictionary,
        dict(name="BatchTopKSAE", tensors=BATCH),
        lambda x: truth(x, above(1.5)),
    ),
    "dictionary_learning standard": (
        dictionary,
        dict(name="AutoEncoder", tensors={**PLAIN, "bias": B_DEC}),
        lambda x: truth(x, torch.relu),
    ),
    "dictionary_learning AutoEncoderNew": (
        dictionary,
        dict(name="AutoEncoderNew", tensors={**PLAIN, "decoder.bias": B_DEC}),
        lambda x: truth(x, torch.relu, b_in=ZERO),
    ),
    "dictionary_learning gated": (dictionary, dict(name="GatedAutoEncoder", tensors=GATED), gated),
    "dictionary_learning JumpReLU": (
        dictionary,
        dict(name="JumpReluAutoEncoder", tensors=JUMP),
        lambda x: truth(x, jump, b_in=ZERO),
    ),
    "dictionary_learning Matryoshka": (
        dictionary,
        dict(name="MatryoshkaBatchTopKSAE", tensors=MATRYOSHKA),
        lambda x: truth(x, above(1.5)),
    ),
    "dictionary_learning mid-run, scaled": (
        dictionary,
        dict(name="BatchTopKSAE", tensors={"ae": BATCH, "step": 9, "norm_factor": 2.5}),
        lambda x: truth(x / 2.5, above(1.5)) * 2.5,
    ),
    "openai topk": (
        openai,
        dict(activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"}),
        layer_normed(lambda x: truth(x, relu_top)),
    ),
    "openai relu": (
        openai,
        dict(activation="ReLU", activation_state_dict={}),
        lambda x: truth(x, torch.relu),
    ),
    "openai without a word on its activation": (openai, {}, lambda x: truth(x, torch.relu)),
    "openai compiled": (openai, dict(wrapped="_orig_mod.module."), lambda x: truth(x, torch.relu)),
    "dictionary_learning BatchTopK, wrapped": (
        dictionary,
        dict(name="BatchTopKSAE", tensors={f"module.{name}": tensor for name, tensor in BATCH.items()}),
        lambda x: truth(x, above(1.5)),
    ),
    "dictionary_learning of the input": (
        dictionary,
        dict(submodule_name="resid_post_layer_2", layer=2, buffer={"io": "in"}),
        lambda x: truth(x, relu_top),
    ),
    "gemma_scope": (gemma_scope, {}, lambda x: truth(x, jump, b_in=ZERO)),
    "gemma_scope 2": (gemma_scope_2, {}, lambda x: truth(x, jump, b_in=ZERO)),
    "mlsae": (mlsae, {}, layer_normed(lambda x: truth(x, relu_top, b_enc=torch.zeros(F)))),
    "mlsae, not standardised": (
        mlsae,
        dict(standardize=False),
        lambda x: truth(x, relu_top, b_enc=torch.zeros(F)),
    ),
}


def written(case, tmp_path):
    """The folder of one of CASES, whose name says layer 1 where a format's does."""
    write, how, _ = CASES[case]
    return write(tmp_path / ("layers-1" if case.startswith("mlsae") else "layers.1"), **how)


def the_file(folder):
    (file,) = sae_files.find(str(folder))
    return file


def declared(folder):
    return sae_files.describe(the_file(folder))


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_its_formula(case, tmp_path):
    file, dense = the_file(written(case, tmp_path)), CASES[case][2]
    sae = sae_files.read(file)
    values, indices, h_hat = sae.reconstruct(H)
    expected = dense(H.double())
    assert (h_hat - expected).norm() / expected.norm() < 1e-6
    assert (values >= 0).all() != (sae.rule == "signed")
    assert values.shape == indices.shape and (values != 0).any(1).float().mean() > 0.5
    for row, index in zip(values, indices):  # a code names a latent once
        assert len(index[row != 0].unique()) == (row != 0).sum()
    of = sae_files.describe(file)
    assert (of.format, of.site, of.layer) == (case.split()[0].rstrip(","), "resid_post", 1)
    fused = sae_files.fused(sae)
    if type(fused) is type(sae):
        assert torch.equal(fused.reconstruct(H)[2], h_hat)
    else:
        assert (fused.reconstruct(H)[2] - h_hat).norm() < 1e-5 * h_hat.norm()


def test_centred_sae_sees_and_gives_back_the_mean(tmp_path):
    sae = sae_files.read(the_file(sparsify(tmp_path / "layers.1")))
    sae.centred = True
    mean = H.double().mean(1, keepdim=True)
    expected = truth(H.double() - mean, relu_top) + mean
    assert (sae.reconstruct(H)[2] - expected).norm() / expected.norm() < 1e-6
    assert isinstance(sae_files.fused(sae), sae_files.FileSAE)


@pytest.mark.parametrize(
    "name, hook",
    [
        ("blocks.3.hook_resid_post", ("resid_post", 3)),
        ("blocks.3.hook_resid_pre", ("resid_post", 2)),
        ("blocks.0.hook_resid_pre", ("resid_pre", 0)),
        ("blocks.3.hook_mlp_out", ("mlp_out", 3)),
        ("blocks.3.attn.hook_z", ("blocks.3.attn.hook_z", None)),
        ("gpt_neox.layers.3", ("resid_post", 3)),
        ("model.layers.3", ("resid_post", 3)),
        ("transformer.h.11", ("resid_post", 11)),
        ("model.layers.3.mlp", ("mlp", 3)),
        ("", (None, None)),
    ],
)
def test_transformerlens_names(name, hook):
    assert sae_files.hook_of_lens(name) == hook


@pytest.mark.parametrize(
    "path, hook",
    [
        ("EleutherAI/sae-pythia-70m-32k/layers.3", ("resid_post", 3)),
        ("org/x/layers.3/seed0", ("resid_post", 3)),
        ("org/x/layers.3.mlp", ("mlp", 3)),
        ("org/gpt2/h.11", ("resid_post", 11)),
        ("saes/resid_post_layer_4/trainer_7", ("resid_post", 4)),
        ("x/mlp_out_layer5", ("mlp_out", 5)),
        ("x/resid_pre_layer_4/trainer_0", ("resid_post", 3)),
        ("x/resid_pre_layer_0", ("resid_pre", 0)),
        ("x/blocks.4.hook_resid_pre", ("resid_post", 3)),
        ("x/blocks.3.hook_resid_post", ("resid_post", 3)),
        ("org/multilayers.x/run12", (None, None)),
        ("x/resid_out_layer3/10_32768", ("resid_post", 3)),
        ("layers.5/run/layers.3", ("resid_post", 3)),
        ("x/model.layers.3.mlp", ("mlp", 3)),
    ],
)
def test_hook_names_in_paths(path, hook):
    assert sae_files.hook_of_path(path) == hook


def test_what_files_declare_is_read(tmp_path):
    assert declared(saelens(tmp_path / "a")) == sae_files.Declared(
        "saelens", site="resid_post", layer=1, model="m", ctx=32, bos=True, basis="raw", width=F
    )
    left_out = {"exclude_special_tokens": True, "seqpos_slice": [1, None]}
    some = saelens(tmp_path / "c", metadata={"sae_lens_version": "6.1", **left_out})
    assert declared(some).unseen == tuple(left_out)
    old = saelens(tmp_path / "b", **V5_TOPK, model_from_pretrained_kwargs={"center_writing_weights": True})
    # version 5 puts a BOS in front unless it says otherwise
    assert declared(old).basis == "centred" and declared(old).bos is True and declared(old).layer == 1
    assert declared(sparsify(tmp_path / "layers.4.mlp")).site == "mlp"
    assert declared(sparsify(tmp_path / "layers.5", transcode=True)).site == "transcoder"
    assert declared(mlsae(tmp_path / "sae-pythia-70m-deduped-x64-k32-layers-2")).layer == 2


@pytest.mark.parametrize(
    "said, buffer, hook",
    [
        (dict(submodule_name="resid_post_layer_4", layer=4), {"io": "out"}, ("resid_post", 4)),
        (dict(submodule_name="resid_post_layer_4", layer=4), {"io": "in"}, ("resid_post", 3)),
        (dict(submodule_name="resid_pre_layer_4", layer=4), {"io": "in"}, ("resid_post", 3)),
        (dict(submodule_name=None, layer=4), {"io": "in"}, ("resid_post", 3)),
        (dict(submodule_name="resid_post_layer_0", layer=0), {"io": "in"}, ("resid_pre", 0)),
        (dict(submodule_name="mlp_out_layer4", layer=4), {"io": "in"}, ("input of mlp_out", 4)),
        (dict(submodule_name="mlp_out", layer=4), {}, ("mlp_out", 4)),
        (dict(submodule_name="resid_out", layer=4), {}, ("resid_post", 4)),
        (dict(submodule_name="resid_pre", layer=4), {}, ("resid_post", 3)),
    ],
)
def test_the_hook_of_a_submodule_and_its_side(said, buffer, hook, tmp_path):
    of = declared(dictionary(tmp_path / "x", buffer=buffer, **said))
    assert (of.site, of.layer) == hook


@pytest.mark.parametrize(
    "name, on_hub",
    [
        ("gpt2-small", "gpt2"),
        ("gpt2-medium", "gpt2-medium"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2b-it", "google/gemma-2b-it"),
        ("gpt-neo-125M", "EleutherAI/gpt-neo-125M"),
        ("Llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("tiny-stories-33M", "roneneldan/TinyStories-33M"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("stdlib-s", "stdlib-s"),
        ("smollm2-135m", "smollm2-135m"),
        ("gemma3-270m", "gemma3-270m"),
    ],
)
def test_names_of_models_become_the_hubs(name, on_hub):
    assert sae_files.hub_name(name) == on_hub


@pytest.mark.parametrize(
    "path, said",
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", ("resid_post", 20, "gemma-2-2b", 2**14)),
        ("gemma-scope-9b-it-res/layer_9/width_131k/average_l0_9", ("resid_post", 9, "gemma-2-9b-it", 2**17)),
        ("gemma-scope-2b-pt-res/layer_5/width_1m/average_l0_9", ("resid_post", 5, "gemma-2-2b", 2**20)),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", ("embedding", None, "gemma-2-2b", 2**12)),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_9", ("att", 3, "gemma-2-2b", 2**14)),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_9", ("mlp", 3, "gemma-2-2b", 2**14)),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/x", ("transcoder", 3, "gemma-2-2b", 2**14)),
        (
            "gemma-scope-2-1b-it/resid_post_all/layer_3_width_16k_l0_big",
            ("resid_post", 3, "gemma-3-1b-it", 2**14),
        ),
        ("gemma-scope-2-270m-pt/mlp_out/layer_3_width_16k_l0_big", ("mlp_out", 3, "gemma-3-270m", 2**14)),
        (
            "gemma-scope-2-1b-pt/transcoder_all/layer_3_width_16k_l0_big",
            ("transcoder", 3, "gemma-3-1b-pt", 2**14),
        ),
    ],
)
def test_gemma_scopes_paths(path, said):
    of = sae_files.gemma_scope_declares({}, f"google/{path}", {})
    site, layer, model, width = said
    assert (of.site, of.layer, of.model, of.width) == (site, layer, f"google/{model}", width)
    assert (of.bos, of.ctx, of.unseen) == (True, 1024, ("BOS",))


def test_gemma_scopes_configuration_says_the_hook(tmp_path):
    for name, said, hook in (
        ("a", {"hf_hook_point_in": "model.layers.3.output", "hf_hook_point_out": None}, ("resid_post", 3)),
        ("b", {"type": "transcoder"}, ("transcoder", 1)),
        ("c", {"hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output"}, ("transcoder", 1)),
        (
            "d",
            dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.1.self_attn.o_proj.input"),
            ("model.layers.1.self_attn.o_proj.input", 1),
        ),
    ):
        of = declared(gemma_scope_2(tmp_path / name, **said))
        assert (of.site, of.layer, of.model) == (*hook, "google/gemma-3-270m")
    with pytest.raises(UserError, match="affine_connection"):
        sae_files.read(the_file(gemma_scope_2(tmp_path / "e", affine_connection=True)))


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    for run in ("a", "b"):
        dictionary(tmp_path / run / "resid_post_layer_1/trainer_0")
    specs = [str(tmp_path / run / "resid_post_layer_1/trainer_0") for run in ("a", "b")]
    chosen, refused = external_saes.choose(specs, [("m", 1)])
    assert not refused and [one.file.label for one in chosen] == [
        "a/resid_post_layer_1/trainer_0",
        "b/resid_post_layer_1/trainer_0",
    ]
    with pytest.raises(UserError, match="resid_post_layer_1/trainer_0 is named twice"):
        external_saes.choose([specs[0], specs[0] + "/ae.pt"], [("m", 1)])


def test_what_reads_another_place_is_left_out_with_the_reason(tmp_path):
    dictionary(tmp_path / "x", submodule_name="mlp_out")
    with pytest.raises(UserError, match=r"mlp_out, not resid_post"):
        external_saes.choose([str(tmp_path / "x")], [("m", 1)])


def test_a_model_is_found_by_its_name_in_transformerlens(tmp_path):
    metadata = {
        "sae_lens_version": "6.1",
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.1.hook_resid_post",
    }
    saelens(tmp_path / "x", metadata=metadata)
    ((chosen,), _) = external_saes.choose([str(tmp_path / "x")], [])
    assert (chosen.model, chosen.layer) == ("google/gemma-2-2b", 1)


def test_a_folder_of_many_and_a_pattern(tmp_path):
    for name in ("layers.1", "layers.2", "layers.2.mlp"):
        sparsify(tmp_path / "run" / name)
    dictionary(tmp_path / "run/resid_post_layer_1/trainer_0")

    def labels(spec):
        return [file.label.removeprefix(tmp_path.name + "/") for file in sae_files.find(str(spec))]

    assert labels(tmp_path / "run") == [
        "run/layers.1",
        "run/layers.2",
        "run/layers.2.mlp",
        "run/resid_post_layer_1/trainer_0",
    ]
    assert labels(tmp_path / "run/layers.*") == ["run/layers.1", "run/layers.2", "run/layers.2.mlp"]
    assert labels(tmp_path / "run/resid_post_layer_1/*") == ["run/resid_post_layer_1/trainer_0"]
    assert len(labels(tmp_path / "run/layers.2/sae.safetensors")) == 1
    with pytest.raises(UserError, match="no such file"):
        sae_files.find(str(tmp_path / "run/layers.7"))
    sparsify(tmp_path / "run/two\nlines")
    with pytest.raises(UserError, match=r"two\\nlines': a control character") as caught:
        sae_files.find(str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- what is refused
class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def truncated(tmp_path):
    file = sparsify(tmp_path / "layers.1") / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return file.parent


def running_code(tmp_path):
    folder = dictionary(tmp_path / "x")
    (folder / "ae.pt").write_bytes(pickle.dumps(Evil()))
    return folder


def without_configuration(tmp_path):
    folder = sparsify(tmp_path / "layers.1")
    (folder / "cfg.json").unlink()
    return folder


def not_json(tmp_path):
    folder = saelens(tmp_path / "x")
    (folder / "cfg.json").write_text("{")
    return folder


def crosscoder(tmp_path):
    tensors = {
        "encoder.weight": torch.randn(2, D, F),
        "encoder.bias": B_ENC,
        "decoder.weight": torch.randn(2, F, D),
        "decoder.bias": torch.zeros(2, D),
    }
    return dictionary(tmp_path / "x", name="CrossCoder", tensors=tensors)


def a_saelens(**how):
    return lambda tmp_path: saelens(tmp_path / "x", **how)


@pytest.mark.parametrize(
    "broken, word",
    [
        (truncated, "SafetensorError"),
        (a_saelens(tensors={**LENS, "b_enc": B_ENC * float("nan")}), "not finite"),
        (a_saelens(tensors={**LENS, "b_enc": B_ENC[:-1]}), "b_enc is"),
        (running_code, "run code"),
        (lambda tmp_path: dictionary(tmp_path / "x", name=None), "TopK or BatchTopK"),
        (without_configuration, "cfg.json is missing"),
        (a_saelens(architecture="temporal"), "'temporal' is not supported"),
        (a_saelens(tensors={"W_enc": W_ENC}), "no 'W_dec' in it"),
        (a_saelens(normalize_activations="expected_average_only_in"), "holds the scale"),
        (a_saelens(k=41), "k = 41 of 40"),
        (
            a_saelens(tensors={**LENS, "b_enc": B_ENC, "scaling_factor": torch.ones(F) * 1.01}),
            "scaling_factor",
        ),
        (a_saelens(reshape_activations="hook_z"), "reshape_activations (hook_z)"),
        (lambda tmp_path: sparsify(tmp_path / "x", signed=True, activation="groupmax"), "signed"),
        (lambda tmp_path: sparsify(tmp_path / "x", skip_connection=True), "no 'W_skip' in it"),
        (lambda tmp_path: openai(tmp_path / "x", activation="Identity"), "'Identity' is not supported"),
        (
            lambda tmp_path: openai(
                tmp_path / "x",
                activation="TopK",
                activation_state_dict={"k": K, "postact_fn": "Identity"},
            ),
            "postact_fn",
        ),
        (lambda tmp_path: dictionary(tmp_path / "x", name="IdentityDict"), "'IdentityDict'"),
        (crosscoder, "a crosscoder"),
        (a_saelens(architecture="standard", tensors=JUMP), "threshold is there"),
        (a_saelens(tensors={**LENS, "b_enc": B_ENC, "r_mag": R_MAG}), "r_mag is there"),
        (lambda tmp_path: dictionary(tmp_path / "x", tensors={**BATCH, "bias": B_DEC}), "bias is there"),
        (lambda tmp_path: gemma_scope(tmp_path / "x", w_enc=W_ENC), "w_enc is there"),
        (not_json, "Expecting"),
    ],
)
def test_bad_files_are_refused_in_one_line(broken, word, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        sae_files.read(the_file(broken(tmp_path)))
    line = str(caught.value)
    assert tmp_path.name in line and word in line and "\n" not in line
    assert "code was run" not in capsys.readouterr().out


STRANGER = {  # format -> (what writes it with a field more, how the field is called in full)
    "saelens": [
        (lambda folder, **field: saelens(folder, **field), "{}"),
        (
            lambda folder, **field: saelens(folder, metadata={"sae_lens_version": "6.1", **field}),
            "metadata.{}",
        ),
        (lambda folder, **field: saelens(folder, **V5_TOPK, **field), "{}"),
        (
            lambda folder, **field: saelens(
                folder, **V5_TOPK, model_from_pretrained_kwargs={"center_writing_weights": False, **field}
            ),
            "model_from_pretrained_kwargs.{}",
        ),
        (
            lambda folder, **field: saelens(
                folder,
                normalize_activations="expected_average_only_in",
                beside={"activation_scaler.json": {"scaling_factor": 0.3, **field}},
            ),
            "activation_scaler.json.{}",
        ),
    ],
    "sparsify": [(sparsify, "{}")],
    "dictionary_learning": [
        (dictionary, "trainer.{}"),
        (lambda folder, **field: dictionary(folder, buffer=field), "buffer.{}"),
        (
            lambda folder, **field: dictionary(
                folder, name=None, tensors={"ae": BATCH, "config": {"dict_class": "BatchTopKSAE", **field}}
            ),
            "trainer.{}",
        ),
    ],
    "gemma_scope": [(gemma_scope_2, "{}")],
    "openai": [
        (openai, "{}"),
        (
            lambda folder, **field: openai(
                folder, activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU", **field}
            ),
            "activation_state_dict.{}",
        ),
    ],
    "mlsae": [(mlsae, "{}")],
}


@pytest.mark.parametrize("value", [True, 0, 1.5, "yes", [0], {"a": False}], ids=str)
@pytest.mark.parametrize("write, called", [case for cases in STRANGER.values() for case in cases])
def test_a_field_that_nobody_knows_is_refused_by_name_and_let_pass_by_a_flag(write, called, value, tmp_path):
    file = the_file(write(tmp_path / "layers.1", turned_round=value))
    with pytest.raises(UserError) as caught:
        sae_files.read(file)
    line, name = str(caught.value), called.format("turned_round")
    assert line.startswith(f"--sae {file.label}: ") and f"{name} (" in line and "--ignore-field" in line
    assert "\n" not in line and len(line) < 400
    with pytest.raises(UserError):
        sae_files.read(file, ["other"])
    for typed in (name, "turned_round"):
        sae = sae_files.read(file, ["other", typed])
        assert sae.fields.ignored == (name,) and torch.isfinite(sae.reconstruct(H)[2]).all()


@pytest.mark.parametrize("value", [None, False, "none", "", [], {}], ids=repr)
@pytest.mark.parametrize("write, called", [case for cases in STRANGER.values() for case in cases])
def test_a_field_that_says_nothing_is_none(write, called, value, tmp_path):
    sae = sae_files.read(the_file(write(tmp_path / "layers.1", turned_round=value)))
    assert not sae.fields.ignored


@pytest.mark.parametrize(
    "case", ["saelens topk", "sparsify", "dictionary_learning TopK", "openai relu", "mlsae", "gemma_scope 2"]
)
def test_a_tensor_that_nobody_knows_is_refused_by_name(case, tmp_path):
    file = the_file(written(case, tmp_path))
    path = file.fetch(file.weights)
    tensors = {**sae_files.read_tensors(path), "b_more": torch.zeros(F)}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    with pytest.raises(UserError, match=r"b_more \(a tensor \[40\]\)"):
        sae_files.read(file)
    assert sae_files.read(file, ["b_more"]).fields.ignored == ("b_more",)


def test_fields_of_training_are_named_and_not_refused(tmp_path):
    lens = saelens(tmp_path / "a", dtype="float32", matryoshka_widths=[1, 2])
    of_metadata = ("metadata.l0", "metadata.num_dead_features")
    unused = ("d_in", "dtype", "matryoshka_widths", *of_metadata)
    assert sae_files.read(the_file(lens)).fields == sae_fields.Fields(unused)
    trained = dictionary(tmp_path / "b", lr=0.1, steps=9, buffer={"out_batch_size": 8, "io": "out"})
    assert sae_files.read(the_file(trained)).fields.unused == (
        "buffer.out_batch_size",
        "trainer.lr",
        "trainer.steps",
    )


def test_the_first_saelens_files_keep_their_whole_run(tmp_path):
    """The keys of GPT-2 small's residual stream SAEs of early 2024."""
    said = dict(
        hook_point="blocks.2.hook_resid_pre",
        hook_point_layer=2,
        hook_point_head_index=None,
        dataset_path="Skylion007/openwebtext",
        is_dataset_tokenized=False,
        use_cached_activations=False,
        cached_activations_path="activations/x",
        n_batches_in_buffer=128,
        total_training_tokens=300_000_000,
        store_batch_size=32,
        device="mps",
        seed=42,
        dtype="torch.float32",
        b_dec_init_method="geometric_median",
        expansion_factor=32,
        l1_coefficient=8e-05,
        lr=0.0004,
        lr_warm_up_steps=5000,
        train_batch_size=4096,
        use_ghost_grads=False,
        feature_sampling_window=1000,
        resample_batches=1028,
        feature_reinit_scale=0.2,
        dead_feature_window=5000,
        dead_feature_estimation_method="no_fire",
        dead_feature_threshold=1e-08,
        log_to_wandb=True,
        wandb_project="x",
        wandb_log_frequency=100,
        n_checkpoints=10,
        checkpoint_path="checkpoints/x",
        tokens_per_buffer=67108864,
        run_name="x",
        neuronpedia_id="gpt2-small/2-res-jb",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    first = saelens(tmp_path / "x", **{**V5, "sae_lens_version": None, **said})
    assert not sae_files.read(the_file(first)).fields.ignored
    of = declared(first)
    assert (of.site, of.layer, of.basis, of.bos) == ("resid_post", 1, "centred", True)


def test_the_list_says_what_is_refused(tmp_path):
    sparsify(tmp_path / "run/layers.1", turned_round=True)
    assert "turned_round" in sae_files.listed(str(tmp_path / "run"))


def enlarged(folder, how):
    """An ae.pt of a few MB at most, whose tensors take half a GB or more."""
    if how == "repeated":
        wide = {
            "encoder.weight": (2**14, 2**13),
            "encoder.bias": (2**14,),
            "decoder.weight": (2**13, 2**14),
            "b_dec": (2**13,),
        }
        return dictionary(
            folder, tensors={name: torch.zeros(1).expand(shape) for name, shape in wide.items()}, k=5
        )
    dictionary(folder, tensors={"encoder.weight": torch.zeros(2**27)}, file="whole")
    with (
        zipfile.ZipFile(folder / "whole") as whole,
        zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for name in whole.namelist():
            with whole.open(name) as source, packed.open(name, "w") as member:
                shutil.copyfileobj(source, member, 2**20)
    (folder / "whole").unlink()
    return folder


def of_trainer(**trainer):
    return lambda config: {**config, "trainer": {**config["trainer"], **trainer}}


SAID = {  # (how the configuration beside a good SAE is changed, what the one line must name)
    saelens: [
        ({"metadata": {"hook_name": ["x"]}}, "hook_name"),
        ({"metadata": {"model_name": 3}}, "model_name"),
        ({"metadata": 3}, "metadata"),
        *(
            ({"metadata": {"context_size": ctx}}, "context_size")
            for ctx in ("many", -5, True, 1e30, [32], 2.5)
        ),
        ({"metadata": {"context_size": 1}}, "ctx"),
        ({"metadata": {"context_size": 0}}, "ctx"),
        ({"metadata": {"model_name": "a\0b"}}, "model"),
        ({"metadata": {"model_name": "a\nb"}}, "model"),
        ({"metadata": {"prepend_bos": "yes"}}, "prepend_bos"),
        ({"metadata": {"model_from_pretrained_kwargs": [1]}}, "model_from_pretrained_kwargs"),
        ({"metadata": {"exclude_special_tokens": {"a": 1}}}, "exclude_special_tokens"),
        ({"metadata": {"seqpos_slice": "x"}}, "seqpos_slice"),
        ({"metadata": {"sae_lens_version": ["6"]}}, "sae_lens_version"),
        *(({"d_sae": F}, "d_sae") for F in ("40", -1, 1e30, True, [40])),
        *(({"k": k}, "k") for k in ("5", [5], 0, -1, 1e30, True, 5.5, {})),
        ({"architecture": ["topk"]}, "architecture"),
        ({"activation_fn": 3}, "activation_fn"),
        ({"k": None, "activation_fn_kwargs": [5]}, "activation_fn_kwargs"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input"),
        ({"rescale_acts_by_decoder_norm": 3}, "rescale_acts_by_decoder_norm"),
        ({"normalize_activations": ["none"]}, "normalize_activations"),
    ],
    sparsify: [
        *(({"k": k}, "k") for k in ("5", [5], 0, -1, 1e30, None)),
        ({"activation": ["topk"]}, "activation"),
        ({"num_latents": "40"}, "num_latents"),
        ({"num_latents": 0, "d_in": "12"}, "d_in"),
        ({"num_latents": 0, "expansion_factor": [3]}, "expansion_factor"),
        ({"transcode": "yes"}, "transcode"),
        ({"activation": "groupmax", "k": 7}, "k = 7"),
    ],
    dictionary: [
        ({"trainer": [1]}, "trainer"),
        ({"trainer": "x"}, "trainer"),
        ({"buffer": 3}, "buffer"),
        ({"buffer": {"ctx_len": "x"}}, "ctx_len"),
        ({"buffer": {"remove_bos": "x"}}, "remove_bos"),
        (of_trainer(dict_class=[1]), "dict_class"),
        (of_trainer(dict_size="40"), "dict_size"),
        (of_trainer(submodule_name=3), "submodule_name"),
        *((of_trainer(submodule_name="x", layer=layer), "layer") for layer in ("three", 2.5, -1, [1])),
        (of_trainer(lm_name=3), "lm_name"),
    ],
    mlsae: [
        *(({"k": k}, "k") for k in ("5", 0, 1e30)),
        ({"n_latents": "40"}, "n_latents"),
        ({"standardize": "yes"}, "standardize"),
    ],
}
WHOLE = [[], [1], "x", 3, None, True]


@pytest.mark.parametrize(
    "write, change, word",
    [(write, *case) for write, cases in SAID.items() for case in cases]
    + [(write, lambda config, whole=whole: whole, "json") for write in SAID for whole in WHOLE],
)
def test_what_is_said_in_another_type_is_one_line_naming_it(write, change, word, tmp_path):
    file = the_file(write(tmp_path / "layers.1"))
    path = tmp_path / "layers.1" / file.config
    config = json.loads(path.read_text())
    if callable(change):
        config = change(config)
    else:
        for name, value in change.items():
            inside = name == "metadata" and isinstance(value, dict)
            config[name] = {**config[name], **value} if inside else value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        sae_files.describe(file)
        sae_files.read(file)
    line = str(caught.value)
    assert line.startswith(f"--sae {file.label}: ") and word in line
    assert "\n" not in line and len(line) < 400 and "Error" not in line


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    metadata = {"sae_lens_version": "6.1", "context_size": 32.0}
    file = the_file(saelens(tmp_path / "x", k=5.0, d_sae=40.0, metadata=metadata))
    k = sae_files.read(file).k
    assert sae_files.describe(file).ctx == 32 and k == 5 and isinstance(k, int)


STRANGE = [
    *("x", "", "\0", "\ud800", "9" * 5000),
    *(0, -1, 2.5, 1e30, 10**30, float("nan"), float("inf")),
    *(True, False, None),
    *([], [1], ["x"], [[]], {}, {"a": 1}),
]


def anywhere(config, path=()):
    """The place of every value of a JSON value."""
    yield path
    items = ()
    if isinstance(config, (dict, list)):
        items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield from anywhere(value, (*path, key))


def replaced(config, path, value):
    if not path:
        return value
    changed = dict(config) if isinstance(config, dict) else list(config)
    changed[path[0]] = replaced(config[path[0]], path[1:], value)
    return changed


def survives(folder):
    """Everything that is found is described and read, or refused in one line."""
    try:
        for file in sae_files.find(str(folder)):
            sae_files.describe(file)
            sae_files.read(file).reconstruct(H)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error


@pytest.mark.parametrize("case", CASES)
def test_no_value_of_a_configuration_is_a_traceback(case, tmp_path, capfd):
    folder, rng = written(case, tmp_path), chance.Random(case)
    for path in folder.glob("*.json"):
        good = json.loads(path.read_text())
        for place in anywhere(good):
            for value in rng.sample(STRANGE, 6):
                path.write_text(json.dumps(replaced(good, place, value)))
                survives(folder)
        path.write_text(json.dumps(good))
    assert not any(capfd.readouterr())


@pytest.mark.parametrize("case", CASES)
def test_no_damage_is_a_traceback(case, tmp_path, capfd):
    folder, rng = written(case, tmp_path), chance.Random(case)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        good = path.read_bytes()
        garbage = rng.randbytes(300)
        for content in (
            b"",
            good[:1],
            good[:9],
            good[: len(good) // 2],
            good[:-1],
            garbage,
            good[:50] + garbage + good[350:],
            good + garbage,
            b"{}",
            b"PK\3\4" + garbage,
            b"\x80\x02}.",
            b"\x80\x02].",
        ):
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
        [1],
        "x",
        torch.zeros(3),
        7,
        None,
        {},
        {"ae": 3},
        {"ae": {"W_enc": 3}},
        {"W_enc": [1]},
        {"W_enc": torch.zeros(3)},
        {"W_enc": torch.zeros(0, D)},
        {**BATCH, "threshold": torch.zeros(7)},
        {**BATCH, "encoder.weight": W_ENC.to_sparse()},
        {**BATCH, "k": torch.zeros(3)},
        {**BATCH, "k": "x"},
        {**BATCH, "encoder.bias": B_ENC * 1j},
        {"ae": BATCH, "norm_factor": "x"},
        {"ae": BATCH, "norm_factor": 0.0},
        {"ae": BATCH, "norm_factor": -1.0},
        {**BATCH, "encoder.weight": "x"},
    ],
    ids=lambda content: type(content).__name__,
)
def test_a_pickle_of_other_things_is_one_line(content, tmp_path):
    folder = dictionary(tmp_path / "resid_post_layer_1", name="BatchTopKSAE")
    torch.save(content, folder / "ae.pt")
    with pytest.raises(UserError) as caught:
        sae_files.read(the_file(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, word", [("repeated", "claims 134217728 values, more than are stored"), ("packed", "inflate")]
)
def test_a_small_file_is_no_large_one(how, word, tmp_path):
    folder = enlarged(tmp_path / "resid_post_layer_1", how)
    assert (folder / "ae.pt").stat().st_size < 4e6
    code = """import sys
from transport_geometry import formats
try: formats.read(formats.find(sys.argv[1])[0])
except formats.UserError as error: print(error)"""
    lines, peak = measured(code, folder)
    assert len(lines) == 1 and word in lines[0] and peak < 600  # reading formats.py takes 220


@pytest.mark.parametrize(
    "spec", ["/nowhere/at/all", "./nowhere", "nowhere", "demo/nowhere/here", "{tmp}/nowhere*/x"]
)
def test_no_such_place(spec, tmp_path):
    """Said at once, without asking the hub."""
    with pytest.raises(UserError, match=r"--sae .*(no such file|no SAE)"):
        sae_files.find(spec.format(tmp=tmp_path))


def test_fingerprint_is_of_all_that_computes(tmp_path):
    norm = {"normalize_activations": "layer_norm"}
    ways = ({}, {}, {"k": 4}, norm, {"apply_b_dec_to_input": False})
    folders = [saelens(tmp_path / str(i), **how) for i, how in enumerate(ways)]
    prints = [sae_files.sae_fingerprint(sae_files.read(the_file(folder))) for folder in folders]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_gate_refuses_what_it_cannot_read(gate):
    _, _, near = gate
    sae = best_of(near[1], 4)
    sae.W_dec[0, 0] = torch.nan
    with pytest.raises(UserError, match="nan"):
        sae_files.check_basis(sae, "raw", "x", 1, near)


# --------------------------------------------------------------------------------------------- the basis gate
def best_of(h, dimensions):
    """The ReLU SAE that keeps the first principal directions of h: +-u as latents."""
    mean = h.mean(0)
    U = torch.linalg.eigh((h - mean).T @ (h - mean)).eigenvectors[:, -dimensions:]
    W = torch.cat([U.T, -U.T]).contiguous()
    zeros = torch.zeros(len(W))
    return sae_files.FileSAE("threshold", W, zeros, W, mean, b_in=mean, threshold=torch.zeros(()))


@pytest.fixture
def gate():
    model = tiny_model(d=16, layers=4, dtype=torch.float32)
    # what the last block writes has a mean over d, as GPT-NeoX' residual stream may
    for name, p in model.named_parameters():
        if "dense_4h_to_h.bias" in name or "embed_in" in name:
            p.data += 1.0
    input_ids = torch.randint(0, 41, (8, 24), generator=torch.Generator().manual_seed(1))
    return model, input_ids, sae_files.near(Hook(model, 1), input_ids)


def test_gate_lets_through_what_is_as_its_files_say(gate):
    model, input_ids, near = gate
    readings = sae_files.check_basis(best_of(near[1], 4), "raw", "x", 1, near)
    assert list(readings)[0] == "layer 1, raw" and len(readings) == 4
    centred = best_of(near[1] - near[1].mean(1, keepdim=True), 4)
    sae_files.check_basis(centred, "centred", "x", 1, near)


def test_gate_refuses_the_other_basis_with_both_numbers(gate):
    model, input_ids, near = gate
    centred = best_of(near[1] - near[1].mean(1, keepdim=True), 15)
    as_said, other = (sae_files.unexplained(centred, near[1], basis) for basis in (False, True))
    assert other < 0.01 < as_said
    with pytest.raises(UserError, match="centred") as caught:
        sae_files.check_basis(centred, "raw", "x", 1, near)
    for word in (f"{as_said:.4f}", f"{other:.4f}", "--basis"):
        assert word in str(caught.value)


def test_gate_refuses_the_block_after_its_own(gate):
    model, input_ids, near = gate
    of_block_0 = best_of(sae_files.near(Hook(model, 0), input_ids)[0], 6)
    with pytest.raises(UserError, match="layer 0, raw"):
        sae_files.check_basis(of_block_0, "raw", "x", 1, near)


def test_near_is_the_hook_and_its_neighbours_without_sinks(gate):
    model, input_ids, near = gate
    assert list(near) == [0, 1, 2]
    # no position is ten medians long here
    assert torch.equal(near[1], Hook(model, 1).head(input_ids)[:, 1:].flatten(0, 1))


# ------------------------------------------------------------------------------------------- the same metrics
def test_any_sae_goes_through_the_metrics_of_a_topk_sae(rows):
    """One function in three dresses: the fused kind, the general kind by its own code, and without a code."""
    hook, d, F = Hook(tiny_model(dtype=torch.float32), 1), 16, 40
    W = random(F, d)
    general = sae_files.FileSAE("topk", W, random(F), W, random(d), b_in=random(d), k=4)
    dresses = {
        "general": general,
        "fused": sae_files.fused(general),
        "dense": lambda h, mean: general.reconstruct(h)[2],
    }
    results = evaluate(hook, rows, dresses, 2)
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
    W = random(F, d)
    sae = sae_files.FileSAE("threshold", W, torch.zeros(F), W, torch.zeros(d), threshold=torch.tensor(0.5))
    result = evaluate(hook, rows, {"x": sae}, 2)["x"]
    active = hook.head(rows)[:, :-1] @ W.t() > 0.5
    assert (result.sums["l0"] == active.sum((1, 2)).numpy()).all()
    assert (result.fired.sum(0) == active.sum((0, 1)).numpy()).all()


# ---------------------------------------------------------------------------------------- every library's R^2
def test_libraries_disagree_about_one_reconstruction_as_they_were_seen_to():
    """d=512, two dimensions of high variance, one token in 128 six times as long: the table that made us name
    them all.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(16, 128, 512, generator=generator).double()
    h[..., :2] *= 30
    h += 0.5
    h[:, 0] *= 6
    everything = torch.ones(16, 128, dtype=torch.bool)
    mean = h.flatten(0, 1).mean(0).expand_as(h)
    r2_biased = 1 - 2**2 * h.numel() / (h - mean).square().sum()
    at_mean, biased, same = (definitions(h, x, everything) for x in (mean, h + 2, h))
    assert all(value == pytest.approx(1) for value in same.values())
    for name in ("r2_dictionary_learning", "r2_per_dim", "r2_saelens_legacy"):
        assert at_mean[name] == pytest.approx(0, abs=1e-9), name
    assert at_mean["r2_sparsify"] < 0
    # a constant error is free there
    assert biased["r2_dictionary_learning"] == pytest.approx(1) and r2_biased < 0.8
    noisy = h + 0.6 * torch.randn(h.shape, generator=generator) * h.norm(dim=-1, keepdim=True) / 512**0.5
    several = definitions(h, noisy, everything)
    assert max(several.values()) - min(several.values()) > 0.2


def test_definitions_by_hand():
    h = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]]).double()
    h_hat = h + torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    keep = torch.ones(2, 2, dtype=torch.bool)
    got = definitions(h, h_hat, keep)  # mean (1,1), SST 6 + 4, SSE 3, |h|^2 = 1+9+4+4
    assert got["r2_dictionary_learning"] == pytest.approx(1 - (3 - 9 / 4) / 10)
    assert got["r2_saebench"] == pytest.approx(1 - 0.75 / (18 / 4 - (18 / 8) ** 2))
    assert got["r2_overcomplete"] == pytest.approx(1 - 3 / (18 - 8 * 1))
    assert got["r2_openai"] == pytest.approx(1 - (1 / 1 + 1 / 9 + 1 / 4) / 4)
    assert got["r2_per_dim"] == pytest.approx(1 - (0 / 6 + 3 / 4) / 2)
    assert got["r2_saelens_legacy"] == pytest.approx(1 - (1 / 1 + 1 / 5 + 1 / 2) / 4)
    # the second sequence has no variance of its own
    one = definitions(h, h_hat, torch.tensor([[True, True], [True, False]]))
    assert one["r2_openai"] == pytest.approx(1 - (1 / 1 + 1 / 9 + 1 / 4) / 3)


# ----------------------------------------------------------------------------------------------------- export
def exported(folder):
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    return metadata["hook_name"], metadata["model_class_name"]


@pytest.mark.parametrize(
    "model, hook_and_class",
    [
        ("stdlib-s", ("gpt_neox.layers.1", "AutoModelForCausalLM")),
        ("stdlib-s+null300", ("gpt_neox.layers.1", "AutoModelForCausalLM")),
        ("smollm2-135m", ("model.layers.1", "AutoModelForCausalLM")),
        ("nowhere/at-all", ("blocks.1.hook_resid_post", "HookedTransformer")),
    ],
)
def test_an_exports_hook_is_one_of_its_class_of_model(model, hook_and_class, tmp_path):
    sae = sae_files.fused(sae_files.read(the_file(sparsify(tmp_path / "layers.1"))))
    sae_files.write_saelens(tmp_path / "out", sae, {"model": model, "layer": 1, "ctx": 64, "data": "x"})
    assert exported(tmp_path / "out") == hook_and_class


def test_an_exported_sae_reads_back_as_itself(tmp_path):
    sae = sae_files.fused(sae_files.read(the_file(sparsify(tmp_path / "layers.1"))))
    made = {"model": "stdlib-s", "layer": 1, "ctx": 64, "data": "stdlib"}
    sae_files.write_saelens(tmp_path / "out", sae, made)
    again = sae_files.fused(sae_files.read(the_file(tmp_path / "out")))
    assert torch.equal(sae.reconstruct(H)[2], again.reconstruct(H)[2])
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == (
        "gpt_neox.layers.1",
        "AutoModelForCausalLM",
    )
    assert declared(tmp_path / "out") == sae_files.Declared(
        "saelens", site="resid_post", layer=1, model="stdlib-s", ctx=64, bos=False, basis="raw", width=F
    )
    with pytest.raises(UserError, match="holds cfg.json and sae_weights.safetensors already"):
        sae_files.write_saelens(tmp_path / "out", sae, made)
