"""demo/plant.py: a folder with a planted sink computes what the model computed, and its activations differ by
the planted vector and nothing else.
"""

import json
import re
import sys

from helpers import ROOT, contents
from transport_geometry.errors import UserError
from transport_geometry.models import loading
from transport_geometry.models.lm import Hook
from transport_geometry.saes.sinks import sink_positions

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "demo"))
import plant  # noqa: E402

CPU = torch.device("cpu")
EMBEDDED, EMBEDDINGS = loading.EMBEDDED["stdlib-s"], "gpt_neox.embed_in.weight"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(the folder that is made, what is said of it)."""
    out = tmp_path_factory.mktemp("plant") / "below" / "planted"
    return out, plant.run("stdlib-s", 3700, out)


@pytest.fixture(scope="module")
def both(planted):
    """(stdlib-s, the model of the folder) as transformers loads it, both in float64, and text [3,64]: the
    token stands at positions 0, 5 and 40 of the first row, at 0 of the second, and nowhere in the last.
    """
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, with_sink = load(EMBEDDED), load(planted[0])
    assert with_sink.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(planted[0])
    input_ids = torch.tensor(tokenizer("import os\n\n\nclass Path(object):\n    pass\n" * 40).input_ids[:192])
    input_ids = input_ids.view(3, 64)
    input_ids[0, [0, 5, 40]] = input_ids[1, 0] = 0
    assert (input_ids == 0).sum() == 4
    return plain.double(), with_sink.double(), input_ids


def test_the_function_is_the_same_and_every_block_puts_out_the_vector_where_the_token_stands(both):
    plain, with_sink, input_ids = both
    with torch.no_grad():
        before, after = plain(input_ids).logits, with_sink(input_ids).logits
        assert (after - before).abs().max() < 1e-4
        rounded = with_sink.float()(input_ids).logits
        with_sink.double()
    assert (rounded - before).abs().max() < 1e-2 * before.std()
    vector = (3700 / 8) * (input_ids == 0)[..., None]
    for layer in range(6):
        h, h_planted = (Hook(model, layer).head(input_ids) for model in (plain, with_sink))
        assert (h_planted - h - vector).abs().max() < 1e-3, layer
        norms = h_planted.norm(dim=-1)
        sinks = sink_positions(norms, norms[:, 1:].median().item())
        assert torch.equal(sinks[:2], input_ids[:2] == 0), layer


def test_only_one_row_of_one_weight_differs_and_the_card_says_so(planted):
    folder, said = planted
    old, new = (load_file(at / "model.safetensors") for at in (EMBEDDED, folder))
    assert {name for name in new if not torch.equal(old[name].float(), new[name])} == {EMBEDDINGS}
    assert new.keys() == old.keys() and {tensor.dtype for tensor in new.values()} == {torch.float32}
    a, b = old[EMBEDDINGS].float(), new[EMBEDDINGS]
    assert (a != b).any(1).nonzero().tolist() == [[0]] and torch.equal(b[0], a[0] + 462.5)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert said.strip() == card.strip() and str(folder) not in card
    assert "462.5 is added to each of the 64 dimensions" in card and "token 0 ('<|endoftext|>')" in card
    assert "python demo/plant.py stdlib-s --norm 3700 OUT" in card
    ours, theirs = (loading.load_model(str(at), CPU)[1] for at in (EMBEDDED, folder))
    assert loading.tokenizer_hash(ours) == loading.tokenizer_hash(theirs)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_command_with_another_token_and_an_empty_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    command = ["plant.py", "stdlib-s", "--norm", "200", "--token", "17", str(tmp_path / "there")]
    monkeypatch.setattr(sys, "argv", command)
    plant.run_script(plant.main)
    card = capsys.readouterr().out
    assert "token 17" in card and "--norm 200 --token 17 OUT" in card
    a, b = (load_file(at / "model.safetensors")[EMBEDDINGS] for at in (EMBEDDED, tmp_path / "there"))
    assert (a.float() != b).any(1).nonzero().tolist() == [[17]]


# ------------------------------------------------------------------------------------------------- refusals
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=2048)
GROUPED = dict(SMALL, intermediate_size=64, num_key_value_heads=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=2048, bos_token_id=0, eos_token_id=0)
BLOOM = dict(hidden_size=32, n_layer=2, n_head=2, vocab_size=2048)
SEEN, UNTIED = "do not carry the planted vector", dict(tie_word_embeddings=False)
NOT_BLIND = {
    "RMSNorm": (transformers.LlamaConfig(**GROUPED, initializer_range=0.3), SEEN),
    "a norm after the embedding": (transformers.BloomConfig(**BLOOM, **UNTIED), SEEN),
    "tied": (transformers.GPT2Config(**GPT2), "its unembedding is tied to its embeddings"),
}


def saved(config, folder):
    """A model of random weights, no norm's offset at 0, and the embedded tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "embed" not in name and weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", NOT_BLIND)
def test_a_model_that_sees_the_vector_is_refused_with_the_number(kind, tmp_path):
    config, why = NOT_BLIND[kind]
    name = saved(config, tmp_path / "model")
    with pytest.raises(UserError, match=rf"model: .*{why}") as refusal:
        plant.run(name, 1000, tmp_path / "out")
    (number,) = re.findall(r"(?:up to|a logit by) ([\d.e+]+)", str(refusal.value))
    assert float(number) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_untied_gpt2_is_blind_to_it(tmp_path):
    config = transformers.GPT2Config(**GPT2, **UNTIED)
    assert "--norm 100 OUT" in plant.run(saved(config, tmp_path / "model"), 100, tmp_path / "out")


def test_float32_cannot_hold_every_norm(tmp_path):
    with pytest.raises(UserError, match="float32|changes a logit"):
        plant.run("stdlib-s", 1e7, tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["stdlib-s", "--norm", "-1", "OUT"], "--norm -1: a positive number"),
        (["stdlib-s", "--norm", "nan", "OUT"], "--norm nan: a positive number"),
        (["stdlib-s", "--norm", "5", "FULL"], "only a new or empty folder"),
        (["stdlib-s", "--norm", "5", "FULL/file"], "only a new or empty folder"),
        (["stdlib-s", "--norm", "5", "--token", "2048", "OUT"], "the model has tokens 0 to 2047"),
        (["nowhere", "--norm", "5", "OUT"], "nowhere (known by name are stdlib-s"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/file").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plant.py", *arguments])
    with pytest.raises(SystemExit) as end:
        plant.run_script(plant.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in line and "--models" not in line
    assert contents(tmp_path) == before
