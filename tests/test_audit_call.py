"""One SAE from Python: the numbers of the command, and those of the definitions."""

import math
import re
import shutil

import transport_geometry.audit as module
import zygote
from helpers import ROOT, hooked_columns, quick_sae, script
from transport_geometry.audit import audit
from transport_geometry.errors import UserError
from transport_geometry.formats.__main__ import export
from transport_geometry.formats.find_and_read import find, read
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records import store
from transport_geometry.records.tables import read_table
from transport_geometry.saes.sae import save_sae
from transport_geometry.saes.train import activation_chunks
from transport_geometry.text.heldout import heldout_rows

import pytest
import torch

LAYER, CTX, SEQS = 3, 32, 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model, tokenizer, held-out rows, folder of an SAE in sparsify's format)."""
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))
    h, sink = next(activation_chunks(Hook(model, LAYER), "stdlib", tokenizer, 128, 20_000, "keep"))
    folder = tmp_path_factory.mktemp("saes") / "my/sae"
    made = {"model": "stdlib-s", "layer": LAYER, "ctx": 128, "data": "stdlib"}
    save_sae(folder, quick_sae(h, sink), made)
    return model, tokenizer, heldout_rows("stdlib", tokenizer, ctx=CTX, n=SEQS), folder


@pytest.mark.slow
def test_the_numbers_are_the_command_s(trained, tmp_path):
    model, _, held, folder = trained
    found = audit(model, LAYER, folder, held.input_ids, held.document)
    grid = ["--models", f"stdlib-s@{LAYER}", "--eval-seqs", SEQS, "--ctx", CTX, "--device", "cpu"]
    script("audit.py", "--sae", folder, *grid, "--out", tmp_path / "out", setup=zygote.UNDRAWN)
    (row,) = read_table(tmp_path / "out/audit.csv")
    columns = [name for name in found if name in row and not isinstance(found[name], str)]
    assert {"r2", "ce_rec", "ce_rec_lo", "r2_hi", "dce", "kl", "kl_excess_lo", "l0"} <= set(columns)
    for name in columns:
        assert row[name] == pytest.approx(found[name], rel=1e-4, abs=1e-6), name
    assert all(found[name] == row[name] for name in ("word", "says", "read")) and found["n_sink"] == SEQS
    assert found["n_tok"] == SEQS * (CTX - 1)
    assert {"metric": "l0", "value": 8, "lo": 8, "hi": 8} in found.records()
    assert found["explained_variance"] == found["r2"]
    assert found["ce_loss_score"] == pytest.approx(row["frac_zero"], rel=1e-4)


def test_and_those_of_the_definitions(trained):
    """The model's own forward with its block's output replaced, losses in float64."""
    model, _, held, folder = trained
    sae, block = read(find(str(folder))[0]), model.gpt_neox.layers[LAYER]
    found = audit(model, LAYER, folder, held.input_ids)
    truth = hooked_columns(model, block, held.input_ids, lambda h: sae.reconstruct(h)[2])
    truth |= {"dce": truth["ce_recon"] - truth["ce_orig"], "l0": 8}
    for name in ("r2", "ce_orig", "ce_recon", "dce", "ce_rec", "kl", "cosine", "swd_tok", "l0"):
        assert found[name] == pytest.approx(truth[name], rel=2e-4), name
        assert found[f"{name}_lo"] <= found[name] <= found[f"{name}_hi"]


def test_rows_that_the_files_speak_against(trained, tmp_path, recwarn):
    """Rows without the BOS that an SAE was trained with, or longer: measured as asked, and said."""
    model, _, held, folder = trained
    begun, with_bos = held.input_ids.clone(), tmp_path / "with-bos"
    begun[:, 0] = 0
    export(str(folder), str(tmp_path / "lens"))
    shutil.copytree(folder, with_bos)
    store.put(with_bos / store.PROVENANCE, {}, ctx=CTX, bos=0)
    for given, rows, told in (
        (with_bos, held.input_ids, ["begin with a BOS"]),
        (with_bos, begun, []),
        (with_bos, begun[:1], []),  # one row says nothing of it
        (folder, begun, ["rows do not begin with a BOS; these do"]),
        (with_bos, begun.repeat(1, 2), [f"trained on {CTX} positions"]),
        (tmp_path / "lens", held.input_ids, []),
    ):
        recwarn.clear()
        audit(model, LAYER, given, rows)
        found = [str(one.message) for one in recwarn.list if one.category is UserWarning]
        assert len(found) == len(told) and all(words in said for words, said in zip(told, found))


@pytest.mark.parametrize("other", ["weights", "dtype"])
def test_an_sae_of_another_model(trained, tmp_path, other):
    """Trained here on another model of the same shape: measured as asked, and said."""
    model, _, held, folder = trained
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    store.put(theirs / store.PROVENANCE, {}, **{other: "another"})
    with pytest.warns(UserWarning, match=rf"differs from this one \({other}"):
        audit(model, LAYER, theirs, held.input_ids)


def test_whatever_reconstructs_can_be_given(trained):
    """An SAE in memory, and a function: that of the same SAE, one that loses nothing, and the mean."""
    model, _, held, folder = trained
    ids, sae = held.input_ids, read(find(str(folder))[0])
    of_file = audit(model, LAYER, folder, ids)
    for given in (sae, lambda h: sae.reconstruct(h)[2]):
        found = audit(model, LAYER, given, ids)
        for name in ("r2", "ce_rec", "ce_rec_lo", "kl", "fed_excess", "kl_excess"):
            assert found[name] == pytest.approx(of_file[name], rel=1e-4), name
    nothing_lost = audit(model, LAYER, lambda h: h, ids)
    assert nothing_lost["r2"] == nothing_lost["ce_rec"] == 1 and "there is no error" in nothing_lost["says"]
    assert math.isnan(nothing_lost["l0"])
    mean = audit(model, LAYER, lambda h: Hook(model, LAYER).head(ids)[:, :-1].mean((0, 1)).expand_as(h), ids)
    assert mean["r2"] == pytest.approx(0, abs=1e-5)


def test_documents_are_what_the_intervals_count(trained):
    """One document has no interval, and rows of few documents a wider one."""
    model, _, held, folder = trained
    one = audit(model, LAYER, folder, held.input_ids, [7] * SEQS)
    assert one["ce_rec_lo"] == one["ce_rec_hi"] and (one["word"], one["documents"]) == ("cannot be judged", 1)
    rows = held.input_ids.repeat(2, 1)
    each, twice = (audit(model, LAYER, folder, rows, document) for document in (None, [*range(SEQS)] * 2))
    width = [found["ce_rec_hi"] - found["ce_rec_lo"] for found in (each, twice)]
    assert width[1] == pytest.approx(2**0.5 * width[0], rel=0.2)
    assert twice["ce_rec"] == pytest.approx(each["ce_rec"]) and twice["documents"] == SEQS


def test_what_cannot_be_audited_is_one_line(trained, tmp_path):
    model, _, held, folder = trained
    ids, unnamed = held.input_ids, tmp_path / "unnamed"
    shutil.copytree(folder, unnamed)
    (unnamed / store.PROVENANCE).unlink()
    for how, says in (
        (dict(tokens=ids[0]), "int64"),
        (dict(tokens=ids.float()), "int64"),
        (dict(document=[0]), "document has 1"),
        (dict(layer=99), "99"),
        (dict(sae=tmp_path / "nothing"), "no such file"),
        (dict(layer=4), "resid_post of block 3, not resid_post of block 4"),
        # where the files do not say it, the block before explains more
        (dict(sae=unnamed, layer=4), "refused"),
        (dict(sae=lambda h: h, basis="raw"), "basis"),
    ):
        with pytest.raises(UserError, match=says):
            audit(**{**dict(model=model, layer=LAYER, sae=folder, tokens=ids), **how})
    model.train()
    try:
        with pytest.raises(UserError, match="training mode"):
            audit(model, LAYER, folder, ids)
    finally:
        model.eval()


def snippets() -> dict[str, str]:
    """{where: Python lines that import `audit`} of the module's docstring, README and the pages beside it."""
    pages = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    texts = {"its docstring": module.__doc__} | {page.name: page.read_text("utf-8") for page in pages}
    found = {}
    for where, text in texts.items():
        for block in re.findall(r"(?:^    .*\n)+|(?<=```python\n)(?:.*\n)+?(?=```)", text, re.MULTILINE):
            if "from transport_geometry.audit import audit" in block:
                found[where] = "\n".join(re.sub("^    ", "", line) for line in block.splitlines())
    return found


def test_the_lines_of_the_pages_run(trained, monkeypatch, capsys):
    """As they are, where an SAE lies at my/sae."""
    monkeypatch.chdir(trained[3].parent.parent)
    assert "its docstring" in (found := snippets())
    for where, code in found.items():
        exec(code, {})
        said = capsys.readouterr().out
        assert re.search(r"\| ce_rec +\| 0\.", said) and said.startswith("As it reads. "), where
