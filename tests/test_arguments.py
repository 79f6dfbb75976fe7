"""The command line: what is taken, and the one line that what is not gets."""

import math

import common
from transport_geometry import tables, train
from transport_geometry.errors import UserError

import pytest
import torch


def test_counts_read_both_ways():
    assert [common.parse_count(t) for t in ("300000", "300k", "10M", "1.5M", "2B")] == [
        300000,
        300000,
        10**7,
        1500000,
        2 * 10**9,
    ]
    assert [tables.readable_count(n) for n in (300000, 10**7, 1500000, 77)] == ["300k", "10M", "1500k", "77"]
    for bad in ("", "x", "-1", "0", "nan", "10Q"):
        with pytest.raises(UserError):
            common.parse_count(bad)


GRID = dict(models="stdlib-s", k="4", tokens="1k", expansion=4, eval_seqs=4, ctx=64)
NUMBERS = ["--k", "--seeds", "--tokens", "--expansion", "--eval-seqs", "--ctx"]


@pytest.mark.parametrize(
    "flag, value, word",
    [
        (flag, value, flag)
        for flag in NUMBERS
        for value in ("9" * 5000, "-" + "9" * 5000, str(10**30), "x" * 5000)
    ]
    + [
        ("--models", "a@" + "9" * 5000, "--models a@999"),
        ("--models", f"a@{10**30}", "--models a@1000"),
        ("--models", "x" * 10**5, "--models"),
        ("--seeds", str(2**32), "at most 4294967295"),
        ("--tokens", "1e306", "at most"),
        ("--tokens", "1e300M", "at most"),
        ("--tokens", "1k," + "9" * 5000, "at most"),
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
    torch.Generator().manual_seed(grid.seeds[0] * 1_000_003 + 10**12 // train.CHUNK)


@pytest.mark.parametrize(
    "flag",
    ["--models", "--data", "--split", "--revision", "--sae", "--out", "--cache", "--from"],
)
@pytest.mark.parametrize("control", ["\0", "\n", "\t", "\x1b[31m", "\x7f", "\u2028", "\udc80"])
def test_no_argument_holds_a_control_character(flag, control):
    with pytest.raises(UserError, match=f"{flag} .*control character") as caught:
        common.parse_args("", GRID, [flag, f"a{control}b"])
    assert control not in str(caught.value)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf, None])
def test_gaps_have_a_name_in_reports_too(gap):
    assert (
        tables.signed(gap)
        == tables.bounds(gap, 1.0)
        == tables.bounds(0.0, gap)
        == tables.span(gap, gap, gap)
        == tables.span(gap, 0.0, 1.0)
        == "undefined"
    )
    assert (
        tables.span(0.123, gap, gap) == "+0.12 [undefined]"
        and tables.span(0.123, -0.1, 1, 1) == "+0.1 [-0.1, +1.0]"
    )
    assert tables.bounds(0.1, 0.24) == "[+0.10, +0.24]" and tables.signed(-0.5, 3) == "-0.500"
