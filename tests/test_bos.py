"""The token that rows begin with: when it is put, where it stands, and what of a run it changes."""

import json
import random
import shutil
import types

from helpers import small_grid
from transport_geometry.formats import find_and_read
from transport_geometry.formats.__main__ import export
from transport_geometry.models import loading
from transport_geometry.models.loading import load_model
from transport_geometry.models.model_files import bos_of
from transport_geometry.running.grid import Loaded, plan
from transport_geometry.saes import train
from transport_geometry.text import heldout

import pytest
import tokenizers
import torch
import transformers
from test_data import Letters, write

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------- what a tokenizer says
def words(template: str | None):
    """A tokenizer of whole words that puts a text into `template`."""
    vocabulary = {"<s>": 0, "</s>": 1, "<cls>": 2, "a": 3, "b": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="b"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        special = [(token, i) for token, i in vocabulary.items() if i < 3]
        backend.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
    special = dict(bos_token="<s>", eos_token="</s>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    "template, token",
    [(None, None), ("<s> $A", 0), ("<s> $A </s>", 0), ("<cls> $A </s>", 2), ("$A </s>", None)],
)
def test_what_stands_before_a_text_is_seen_in_an_encoding(template, token):
    """Whatever the attributes say: Gemma 3's `add_bos_token` is False, and others name a BOS that they do not
    put.
    """
    assert bos_of(words(template)) == token


# ------------------------------------------------------------------------------------------------------- rows
def test_rows_are_cut_one_after_another():
    """Nothing is lost, no row is of another length, and BOS stands once where it is wanted."""
    rng = random.Random(0)
    for bos in [None, 7] * 200:
        ids, ctx = rng.choices([5, 6, 7, 8], k=rng.randrange(40)), rng.randint(2, 9)
        rows, rest = heldout.cut(ids, ctx, bos)
        assert all(len(row) == ctx for row in rows) and len(rest) < ctx
        again: list[int] = []
        for row in rows:
            theirs = bos is None or ids[len(again)] == bos
            assert bos is None or row[0] == bos
            again += row if theirs else row[1:]
        assert again + rest == ids


TEXTS = [f"text number {i} of them " * (3 + i % 5) for i in range(300)]


def test_every_row_begins_with_it(tmp_path):
    data = write(tmp_path / "t.jsonl", [{"text": one} for one in TEXTS])
    plain = torch.cat(list(heldout.packed_rows(data, "train", Letters(), 9)))
    rows = torch.stack(list(heldout.packed_rows(data, "train", Letters(), 10, bos=50)))
    assert rows.shape[1] == 10 and (rows[:, 0] == 50).all() and (rows[:, 1:] != 50).all()
    assert torch.equal(rows[:, 1:].flatten(), plain)
    batch = next(heldout.train_rows(data, Letters(), 10, 4, bos=50))
    assert torch.equal(batch, rows[:4])
    plain_held, held = (
        heldout.heldout_rows(data, Letters(), ctx=9, n=20),
        heldout.heldout_rows(data, Letters(), ctx=10, n=20, bos=50),
    )
    assert (held.input_ids[:, 0] == 50).all() and torch.equal(held.input_ids[:, 1:], plain_held.input_ids)
    assert held.sha256 == plain_held.sha256 and (held.document == plain_held.document).all()
    spread = heldout.spread_rows(data, Letters(), 10, 6, bos=50)
    assert sorted(spread.tolist()) == sorted(rows[: 6 * heldout.ROW_STRIDE : heldout.ROW_STRIDE].tolist())


def test_rows_that_are_kept_are_kept_apart():
    """A text with BOS is another one than without."""
    tokenizer = load_model("stdlib-s", CPU)[1]
    with heldout.keeping_rows():
        for bos in (None, 3, None, 3):
            row = next(heldout.train_rows("stdlib", tokenizer, 16, 1, bos=bos))[0]
            assert (row[0] == 3) == (bos == 3)


def test_rows_of_ids_that_have_it_do_not_get_a_second(tmp_path):
    """As SAELens writes them: every row of 10 begins with it."""
    rng = random.Random(1)
    rows = [[30, *rng.choices(range(1, 30), k=9)] for _ in range(400)]
    data = write(tmp_path / "ids.jsonl", [{"input_ids": row} for row in rows])

    assert heldout.kind_of(data, "train") == "ids"
    packed = torch.stack(list(heldout.packed_rows(data, "train", Letters(), 10, bos=30)))
    held = heldout.heldout_rows(data, Letters(), ctx=10, n=12, bos=30).input_ids
    for found in (packed, held):
        assert (found[:, 0] == 30).all() and (found[:, 1] != 30).all()
    assert set(map(tuple, packed.tolist())) <= set(map(tuple, rows))  # each its own row again


# ------------------------------------------------------------------------------------------------------ a run
@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """stdlib-s with a tokenizer that puts its token 1 before a text."""
    folder = tmp_path_factory.mktemp("models") / "begun"
    shutil.copytree(loading.EMBEDDED["stdlib-s"], folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    token = next(word for word, i in rules["model"]["vocab"].items() if i == 1)
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [1], "tokens": [token]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return str(folder)


def planned(model, bos, data="stdlib"):
    grid = small_grid(eval_seqs=2, ctx=16, models=((model, 3),), bos=bos, data=data, tokens=(1000,))
    settings, (eval_set,) = plan(grid, CPU, "test")
    return settings, eval_set, eval_set.candidates[0].origin


@pytest.mark.parametrize("bos, token", [("auto", 1), ("yes", 1), ("no", None)])
def test_a_model_whose_tokenizer_puts_it(begun, bos, token):
    settings, eval_set, spec = planned(begun, bos)
    assert eval_set.bos == spec.bos == token and ("bos" in spec.facts()) == (token is not None)
    assert settings.get("bos") == (token and {"begun": token})
    assert ((eval_set.held.input_ids[:, 0] == 1).all()) == (token == 1)


def test_an_embedded_model_is_as_it_was():
    """Nothing about BOS in settings or keys, unless it is asked for: then the token between documents."""
    settings, eval_set, spec = planned("stdlib-s", "auto")
    assert "bos" not in settings and "bos" not in spec.facts() and eval_set.bos is None
    other_settings, other, other_spec = planned("stdlib-s", "yes")
    assert other_settings["bos"] == {"stdlib-s": 0} and (other.held.input_ids[:, 0] == 0).all()
    assert other_spec.bos == 0 and other_spec.identity() == spec.identity() | {"bos": 0}


def test_rows_of_ids_stay_as_they_are_unless_asked_for(begun, tmp_path):
    rng = random.Random(2)
    data = write(tmp_path / "ids.jsonl", [{"tokens": rng.choices(range(5, 99), k=40)} for _ in range(300)])
    for bos, token in (("auto", None), ("no", None), ("yes", 1)):
        _, eval_set, spec = planned(begun, bos, data)
        assert eval_set.bos == spec.bos == token
        assert (eval_set.held.input_ids[:, 0] == 1).any() == (token == 1)


def test_a_files_own_word_stands_above_it(begun, tmp_path):
    """Where it says nothing, rows that come as token ids stay as they are, as in training."""
    model, tokenizer = load_model(begun, CPU)
    loaded = Loaded("begun", model, tokenizer, "w", "t")
    rows = [{"tokens": list(range(5, 45))} for _ in range(9)]
    ids = write(tmp_path / "ids.jsonl", rows)
    cases = [(True, "no", True), (False, "yes", False), (None, "auto", True), (None, "no", False)]
    for declared, asked, expected in cases:
        of_file = types.SimpleNamespace(bos=declared, ctx=None)
        one = types.SimpleNamespace(model="begun", layer=1, declared=of_file)
        for data, kind in (("stdlib", "text"), (ids, "ids")):
            assert heldout.kind_of(data, "train") == kind
            grid = small_grid(eval_seqs=2, ctx=16, bos=asked, data=data)
            as_they_are = kind == "ids" and declared is None
            assert loaded.place(one, grid, kind).bos is (expected and not as_they_are)


@pytest.mark.parametrize(
    "bos, ids, said", [("auto", False, True), ("no", False, False), ("yes", True, True), ("auto", True, None)]
)
def test_an_sae_trained_here_says_what_its_rows_began_with(begun, bos, ids, said, tmp_path, capsys):
    """Else an audit of it would read rows that it has not seen, as Gemma's without BOS. Of rows that came as
    token ids nothing is known. What is exported for SAELens says the same. Where --bos says otherwise, it is
    told that the files stand.
    """
    rng, data = random.Random(2), "stdlib"
    if ids:
        rows = [{"tokens": rng.choices(range(5, 99), k=40)} for _ in range(300)]
        data = write(tmp_path / "ids.jsonl", rows)
    _, eval_set, spec = planned(begun, bos, data)
    train.train_missing(eval_set.hook.model, eval_set.tokenizer, [spec], tmp_path / "saes", eval_set.source)
    folder = spec.folder(tmp_path / "saes")
    (file,) = find_and_read.find(str(folder))
    assert find_and_read.describe(file).bos is said
    for asked in ("yes", "no"):
        grid = small_grid(eval_seqs=2, ctx=16, models=((begun, 3),), bos=asked, saes=(str(folder),))
        _, (eval_set,) = plan(grid, CPU, "test")
        begins = asked == "yes" if said is None else said
        assert bool((eval_set.held.input_ids[:, 0] == 1).all()) == begins
        told = f"--bos {asked}: not for 1 of 1 SAEs" in capsys.readouterr().out
        assert told == (begins != (asked == "yes"))
    grid = small_grid(eval_seqs=2, ctx=32, models=((begun, 3),), saes=(str(folder),))
    assert plan(grid, CPU, "test")[1][0].held.input_ids.shape[1] == 16
    assert "--ctx 32: not for 1 of 1 SAEs" in capsys.readouterr().out
    export(str(folder), str(tmp_path / "lens"))
    (file,) = find_and_read.find(str(tmp_path / "lens"))
    assert find_and_read.describe(file).bos is said


def test_another_chat_template_makes_other_rows_of_chats(begun, tmp_path):
    """So neither an SAE nor a results folder is taken for that of the other; of text it changes nothing."""
    rng, chats = random.Random(0), []
    for _ in range(200):
        said = [" ".join(rng.choices("abcdefgh", k=9)) for _ in range(20)]
        chats.append({"messages": [{"role": "user", "content": words} for words in said]})
    data = write(tmp_path / "chats.jsonl", chats)
    template = "{% for m in messages %}{{ m.content }}%s{% endfor %}"
    found = {}
    for between in ("; ", ": "):
        (tmp_path / between).mkdir()
        folder = shutil.copytree(begun, tmp_path / between / "m")
        (folder / "chat_template.jinja").write_text(template.replace("%s", between, 1))
        for of in (data, "stdlib"):
            settings, _, spec = planned(str(folder), "no", of)
            found[between, of] = settings["tokenizers"], spec.folder(tmp_path)
    assert found["; ", data] != found[": ", data] and found["; ", data][1] != found[": ", data][1]
    assert found["; ", "stdlib"] == found[": ", "stdlib"]


@pytest.mark.parametrize("bos", ["auto", "no"])
def test_saes_are_trained_on_the_rows_they_are_evaluated_on(begun, bos, tmp_path, monkeypatch):
    seen, outputs = [], train.block_outputs

    def watched(*run):
        seen.append(run[2][:, 0] == 1)
        return outputs(*run)

    monkeypatch.setattr(train, "block_outputs", watched)
    _, eval_set, spec = planned(begun, bos)
    train.train_missing(eval_set.hook.model, eval_set.tokenizer, [spec], tmp_path, eval_set.source)
    assert torch.cat(seen).all() == (eval_set.held.input_ids[:, 0] == 1).all() == (bos == "auto")
