"""What a person sees first: three sentences and a table within 80 columns, the picture that belongs to them,
and --quiet, --json and colours, which change what is printed and nothing else.
"""

import dataclasses
import doctest
import io
import itertools
import json
import math
import re
import shutil

import common
import expb
import zygote
from helpers import ROOT, contents, one_line, script
from transport_geometry.errors import UserError
from transport_geometry.measuring.metrics import BY_NAME
from transport_geometry.reporting import claims_report, figures
from transport_geometry.reporting import console as answers
from transport_geometry.reporting.console import WIDTH, Answer
from transport_geometry.reporting.leaderboard_report import board_in_short
from transport_geometry.statistics import leaderboard

import numpy as np
import pytest
from test_expb import ALL_HOLD

REFERENCE = ROOT / "outputs/reference"
# {script: its picture}
PICTURES = {
    "expa": "deltas.png",
    "expb": "leaderboard.png",
    "expc_fisher": "calibration.png",
    "expd_mi": "h3.png",
    "expe_attention": "leaderboard.png",
    "expf_rate": "rate.png",
    "expp_planted": "signature.png",
}
SLOW = ("expc_fisher", "expd_mi", "expe_attention", "expf_rate", "expp_planted")
EVERY = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PICTURES]
# words and widths, which do not depend on how many resamples and patterns there are
FEW = f"""{zygote.UNDRAWN}
import expa, expb
from transport_geometry.statistics import hook_tests
expa.N_RESAMPLES = expb.N_RESAMPLES = 60
drawn = hook_tests.sign_patterns
hook_tests.sign_patterns = lambda G, n_draws=401, seed=0: drawn(G, 401, seed)
"""
THREE = Answer("Is it so?", "It is.", "Not more than that.")


def test_the_examples_hold():
    tried = [doctest.testmod(module) for module in (answers, claims_report)]
    assert all(one.failed == 0 and one.attempted for one in tried)


# ------------------------------------------------------------------------------------------- the three lines
@pytest.mark.parametrize("name", EVERY)
def test_every_script_answers_first_and_within_80_columns(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(REFERENCE / name, folder)
    said = script(f"{name}.py", "--from", name, setup=FEW, folder=tmp_path).stdout
    printed = said.splitlines()
    assert all(len(line) <= WIDTH for line in printed), max(printed, key=len)
    assert not any("\x1b" in line for line in printed)  # this is no terminal
    labels = [line.split()[0] for line in printed[: printed.index("")] if line[0] != " "]
    assert labels == ["Question", "Answer", "Limits"]
    assert printed[-3] == "---" and printed[-2].startswith("verdict: ")
    assert printed[-1] == f"report: {name}/report.md"

    report = (folder / "report.md").read_text(encoding="utf-8")
    title, question, found, limits, picture = report.split("\n\n")[:5]
    assert title.startswith("# ") and question.startswith("Question: ") and limits.startswith("Limits: ")
    assert picture.strip().endswith(f"({PICTURES[name]})") and (folder / PICTURES[name]).exists()
    said = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))["answer"]
    assert (said["found"], said["limits"]) == (found[2:-2], limits.removeprefix("Limits: "))
    # the same words in both
    spoken = " ".join(" ".join(printed[: printed.index("")]).split())
    shown = " ".join(part.strip("*").replace(": ", " ", 1) for part in (question, f"Answer: {found[2:-2]}"))
    assert spoken.startswith(shown)


ENDS = {f"{name}{end}": 0.1 for name in ("diff_r2", "diff_control") for end in ("", "_lo", "_hi")}


def answer_b(leaf: str, board: list[dict]) -> Answer:
    swd = dataclasses.replace(ALL_HOLD, of_the_proxy=ALL_HOLD.of_the_proxy | ENDS, room=0.03)
    return expb.answer(leaf, "too few hooks", swd, board, {"models": ["a", "b"]})


def row(proxy: str, lo: float, hi: float, p: float, like: str = "") -> dict:
    of_r2 = dict(diff_r2=(lo + hi) / 2, diff_r2_lo=lo, diff_r2_hi=hi, p_r2=p, same_ranks_as=like)
    partial = dict(partial=0.9, partial_lo=0.8, partial_hi=0.95, partial_here_lo=0.85, partial_here_hi=0.92)
    here = dict(diff_r2_here_lo=lo, diff_r2_here_hi=hi, swd_here=-lo, swd_here_lo=-hi, swd_here_hi=-lo)
    hooks = dict(n_clusters=9, phi=0.1, n_effective=9.0, n_effective_r2=9.0, pairs=40, right=0.75)
    return dict(proxy=proxy, target="ce_rec", stratum="pooled") | of_r2 | partial | here | hooks


BOARD = [
    row("r2", 0, 0, 1),
    row("r2_nosink", 0, 0, 1, "r2"),
    row("cosine", 0.1, 0.2, 0.01),
    row("mse", 0.1, 0.2, 0.06),
    row("swd_tok", -0.2, -0.1, 0.01),
    row("swd_seq", -0.2, 0.1, 0.01),
]


def test_an_answer_says_which_claim_a_number_is_about():
    """Here first, over documents; then in general, or why not, in one sentence."""
    found = answer_b("rejected", BOARD).found
    here, general = found.split(" In general, ")
    assert (
        here.startswith("Here, on these SAEs at equal k, the rank correlation of R²")
        and "[+0.85, +0.92]" in here
    )
    assert "Of 40 pairs that clearly differ in CE_rec, R² orders 75% rightly and SWD 75%" in here
    # the best of the controls that have a number; nothing is said where there is none
    for partial, best in ((0.95, "cosine"), (math.nan, "r2_nosink")):
        of_cosine = [one | {"partial": partial} if one["proxy"] == "cosine" else one for one in BOARD]
        says = f"; of 2 Euclidean controls the best on these documents, {best}, stands at"
        assert says in claims_report.in_short(of_cosine)
    assert "Euclidean" not in claims_report.in_short([BOARD[0], BOARD[4]])
    assert general.startswith("about other layers of a and b, not other models: On 9 hooks the rank")
    few = [one | {"n_effective": 2.5, "n_effective_r2": 2.5, "phi": 0.81} for one in BOARD]
    here_too, none = answer_b("rejected", few).found.split(" In general, ")
    assert here_too == here and none.startswith(
        "about other layers of a and b, not other models, SWD and R² cannot be compared: "
    )
    assert none.endswith("(correlation 0.81), so that 9 hooks are worth 2.5 independent ones; 6 are needed.")
    leaves = ["supported", "beats-r2-only", "rejected", "not-transferable", expb.CANNOT, "undecided"]
    assert len({answer_b(leaf, BOARD).found for leaf in leaves}) == len(leaves)


def test_the_table_marks_what_is_shown_here_and_in_general():
    """mse: here it is better, by its interval; in general its p is .06."""
    marks = [leaderboard.against_r2(row) for row in BOARD]
    assert marks == ["same", "same", "above", "not shown", "below", "not shown"]
    head, *rows = board_in_short(BOARD).splitlines()
    said = {line.split()[0]: line for line in rows[: len(BOARD)]}
    assert head.split() == ["proxy", "ρ", "here", "minus", "R²", "pairs", "in", "general"]
    assert said["mse"].endswith("not shown") and said["cosine"].endswith("better")
    assert said["swd_tok"].endswith("worse") and "75%" in said["mse"]
    assert [leaderboard.against_r2(one, here=True) for one in BOARD[2:5]] == ["above", "above", "below"]
    few = board_in_short([one | {"n_effective_r2": 2.5} for one in BOARD])
    assert "in general" not in few and "not shown" not in few and "undefined" not in few


# ----------------------------------------------------------------------------------------- how it is printed
SMALL = "--models stdlib-s --k 2,4 --tokens 2k --expansion 2 --eval-seqs 4 --ctx 64".split()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """(folder of results, folder of the cache, what was said) of a run with --quiet."""
    folder = tmp_path_factory.mktemp("quiet")
    out, cache = folder / "out", folder / "cache"
    return out, cache, script("expb.py", *SMALL, "--out", out, "--cache", cache, "--quiet", setup=FEW)


def test_quiet_leaves_the_last_line_and_errors(quiet, tmp_path):
    out, _, done = quiet
    assert done.stdout == f"report: {out / 'report.md'}\n" and done.stderr == ""
    refused = script("expb.py", "--from", tmp_path / "nothing", "--quiet", check=2)
    assert "no finished run there" in one_line(refused) and not refused.stdout


def test_json_is_the_verdict_and_nothing_else_on_stdout(quiet, tmp_path):
    out, cache, _ = quiet
    done = script("expb.py", *SMALL, "--out", tmp_path, "--cache", cache, "--json", setup=FEW)
    assert done.stdout == (tmp_path / "verdict.json").read_text(encoding="utf-8")
    assert json.loads(done.stdout)["leaf"] == "undecided" and "of the run" in done.stderr
    assert contents(tmp_path) == contents(out)
    both = script("expb.py", "--from", tmp_path, "--quiet", "--json", setup=FEW)
    assert both.stdout == done.stdout and both.stderr == "" and contents(tmp_path) == contents(out)


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_a_dry_run_is_nothing_but_what_it_prints(flag):
    with pytest.raises(UserError, match=flag):
        common.parse_args("", expb.GRID, ["--dry-run", flag])
    command = common.parse_args("", expb.GRID, [flag])
    assert (command.quiet, command.json) == (flag == "--quiet", flag == "--json")
    for name in PICTURES:
        assert flag in script(f"{name}.py", "--help").stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert answers.coloured(Terminal()) and not answers.coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # "when present and not an empty string"
    assert answers.coloured(Terminal())
    monkeypatch.setenv("NO_COLOR", "0")
    assert not answers.coloured(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not answers.coloured(Terminal())
    plain, coloured = ("\n".join([*THREE.lines(on), board_in_short(BOARD, on)]) for on in (0, 1))
    assert "\x1b[" in coloured and re.sub(r"\x1b\[\d*m", "", coloured) == plain  # no word changes


# ------------------------------------------------------------------------------------------------- pictures
def overlapping(axis) -> list[tuple[str, str]]:
    """Neighbouring tick labels that lie on one another."""
    axis.axes.figure.canvas.draw()
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    return [
        (a.get_text(), b.get_text())
        for (a, of_a), (b, of_b) in itertools.combinations(zip(labels, boxes), 2)
        if of_a.overlaps(of_b)
    ]


@pytest.mark.parametrize("lo, hi", [(0.0012, 0.0085), (0.13, 1.4), (0.2, 0.3), (1e-4, 20.0)])
def test_ticks_of_a_logarithmic_axis_do_not_overlap(lo, hi):
    figure, axis = figures.pyplot().subplots(figsize=(3.6, 3.6))
    axis.set(xscale="log", yscale="log", xlim=(lo, hi), ylim=(lo, hi))
    figures.decade_ticks(axis.xaxis, (lo, hi))
    labels = [float(label.get_text()) for label in axis.get_xticklabels()]
    assert labels == pytest.approx(list(axis.get_xticks())) and len(labels) >= 2
    assert not overlapping(axis.xaxis)
    figures.pyplot().close(figure)


@pytest.mark.parametrize("name, values", [("r2", [-1.5, 0.999]), ("mse", [3, 40.0])])
def test_an_axis_of_a_score_has_the_values_of_its_metric(name, values):
    metric, values = BY_NAME[name], np.array(values)
    figure, axis = figures.pyplot().subplots(figsize=(2.8, 2.5))
    axis.scatter(metric.score(values), [0, 1])
    figures.score_axis(axis, metric, values)
    ticks = np.array([float(label.get_text()) for label in axis.get_xticklabels()])
    assert metric.score(ticks) == pytest.approx(axis.get_xticks()) and len(ticks) >= 3
    assert not overlapping(axis.xaxis)
    figures.pyplot().close(figure)
