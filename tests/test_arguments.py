"""The command line: what is taken, and the one line that what is not gets."""

import doctest
import math
import os
import subprocess
import sys

import common
from helpers import ROOT, one_line, script
from transport_geometry.errors import UserError
from transport_geometry.formats import __main__ as sae_commands
from transport_geometry.formats import find_and_read
from transport_geometry.models import loading
from transport_geometry.records import tables
from transport_geometry.saes import recipes
from transport_geometry.text import heldout, sources

import huggingface_hub
import pytest
import torch


def test_counts_read_both_ways():
    counts = {"300000": 300000, "300k": 300000, "10M": 10**7, "1.5M": 1500000, "2B": 2 * 10**9}
    assert {text: common.parse_count(text) for text in counts} == counts
    assert [tables.readable_count(n) for n in (300000, 10**7, 1500000, 77)] == ["300k", "10M", "1500k", "77"]
    for bad in ("", "x", "-1", "0", "nan", "10Q"):
        with pytest.raises(UserError):
            common.parse_count(bad)


GRID = dict(models="stdlib-s", k="4", tokens="1k", expansion=4, eval_seqs=4, ctx=64)
NUMBERS = ["--k", "--seeds", "--tokens", "--expansion", "--eval-seqs", "--ctx"]


@pytest.mark.parametrize(
    "flag, value, word",
    [(flag, value, flag) for flag in NUMBERS for value in ("9" * 5000, "-" + "9" * 5000, "x" * 5000)]
    + [
        ("--models", "a@" + "9" * 5000, "--models a@999"),
        ("--models", f"a@{10**30}", "--models a@1000"),
        ("--models", "x" * 10**5, "--models"),
        ("--seeds", str(2**32), "at most 4294967295"),
        ("--tokens", "1e300M", "at most"),
        ("--k", "4," * 5000 + "x", "whole numbers"),
        ("--recipe", "x" * 5000, "base, saelens"),
        ("--device", "x" * 5000, "--device"),
    ],
)
def test_absurd_arguments_get_one_short_line(flag, value, word):
    with pytest.raises(UserError) as caught:
        common.parse_args("", GRID, [flag, value])
    line = str(caught.value)
    assert word in line and flag in line and len(line) < 350 and "\n" not in line


def test_the_largest_arguments_are_taken():
    largest = ["--seeds", str(2**32 - 1), "--tokens", "1000B", "--expansion", str(10**9)]
    grid = common.parse_args("", GRID, largest).grid
    assert (grid.seeds, grid.tokens, grid.expansion, grid.ctx) == ((2**32 - 1,), (10**12,), 10**9, 64)
    # how the last piece is drawn
    torch.Generator().manual_seed(grid.seeds[0] * 1_000_003 + 10**12 // recipes.CHUNK)


TEXTS = "--models --data --split --config --column --revision --sae --out --cache --from".split()


@pytest.mark.parametrize("control", ["\0", "\n", "\x1b[31m", "\x7f", "\u2028", "\udc80"])
def test_no_argument_holds_a_control_character(control):
    for flag in TEXTS:
        with pytest.raises(UserError, match=f"{flag} .*control character") as caught:
            common.parse_args("", GRID, [flag, f"a{control}b"])
        assert control not in str(caught.value)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf, None])
def test_gaps_have_a_name_in_reports_too(gap):
    bounds, span = tables.bounds, tables.span
    words = [tables.signed(gap), bounds(gap, 1.0), bounds(0.0, gap), span(gap, gap, gap), span(gap, 0.0, 1.0)]
    assert set(words) == {"undefined"} and span(0.123, gap, gap) == "+0.12 [undefined]"
    assert span(0.123, -0.1, 1, 1) == "+0.1 [-0.1, +1.0]" and bounds(0.1, 0.24) == "[+0.10, +0.24]"


# ----------------------------------------------------------------------------------------------- small things
@pytest.mark.parametrize(
    "name, module, flag", [("common.py", common, "--help"), ("formats.py", sae_commands, "-h")]
)
def test_help_is_help(name, module, flag):
    done = script(name, flag)
    assert done.stdout == module.__doc__ and not done.stderr


@pytest.mark.parametrize(
    "main, status",
    [
        ("lambda: print('done')", 0),  # what is left to say at the end
        ("lambda: (print('done'), sys.exit(1))", 1),
        ("lambda: [print('x' * 10**6) for _ in range(9)]", 141),  # not at its end yet
    ],
)
def test_a_closed_pipe_is_no_fault(main, status):
    """As under `| head`, once head has gone."""
    program = f"import sys; from transport_geometry.errors import run_script; run_script({main})"
    reader, writer = os.pipe()
    os.close(reader)
    how = dict(cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": ""}, text=True)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, **how)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, "")


def test_a_name_of_sae_may_hold_a_comma():
    assert doctest.testmod(common).failed == 0

    def saes(typed: str) -> tuple[str, ...]:
        return common.parse_args("", GRID, ["--sae", typed]).grid.saes

    assert saes("a,b,a,,c") == ("a", "b", "c")
    assert saes(r"my/sae\,k=8,b") == saes('"my/sae,k=8",b') == ("my/sae,k=8", "b")
    assert saes('one",two') == ('one"', "two")


def test_fields_to_ignore_are_listed_or_repeated_and_are_of_an_sae():
    flags = ["--ignore-field", "a,b", "--ignore-field", "c"]
    assert common.parse_args("", GRID, ["--sae", "x", *flags]).grid.ignore_fields == ("a", "b", "c")
    assert common.parse_args("", GRID, ["--sae", "x"]).grid.ignore_fields == ()
    with pytest.raises(UserError, match="--ignore-field is about the SAEs of --sae"):
        common.parse_args("", GRID, flags)


def test_a_folder_with_a_comma_in_its_name_is_found(tmp_path):
    (tmp_path / "a,b").mkdir()
    escaped = str(tmp_path / "a,b").replace(",", "\\,")
    done = script("audit.py", "--models", "stdlib-s@3", "--sae", escaped, "--out", tmp_path / "o", check=2)
    assert "a,b: no SAE in it" in one_line(done)


class Asked(Exception):
    """The hub was asked."""


def test_a_path_that_is_not_here_is_said_before_the_hub_is_asked(monkeypatch, capsys):
    def asked(*arguments, **how):
        raise Asked

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", asked)
    monkeypatch.setattr(sources, "quiet_datasets", asked)
    monkeypatch.setattr(sources, "PAUSES", ())
    said = "no file or folder here of this name; asking the hub\n"
    for name, ask in (
        ("my/model", lambda: loading.load_model("my/model", torch.device("cpu"))),
        ("my/sae/layer", lambda: find_and_read.find("my/sae/layer")),
        ("my/text", lambda: heldout.find("my/text")),
    ):
        with pytest.raises((Asked, UserError)):
            ask()
        assert capsys.readouterr().out == f"{name}: {said}"


@pytest.mark.parametrize("name", ["/nothing/here", "./nothing", "a/b/c"])
def test_what_can_be_no_hub_id_is_refused_without_asking(name, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(sources, "quiet_datasets", None)
    with pytest.raises(UserError, match=f"--models {name}: no such folder"):
        loading.load_model(name, torch.device("cpu"))
    with pytest.raises(UserError, match=f"--data {name}: no such file or folder"):
        heldout.find(name)
    assert not capsys.readouterr().out
