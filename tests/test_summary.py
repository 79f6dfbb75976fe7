"""The summary of all finished experiments: its order, its links, and what it does not show."""

import json
import pathlib
import re
import shutil
import urllib.parse

from helpers import ROOT, contents, one_line, script
from transport_geometry.errors import UserError
from transport_geometry.records import store
from transport_geometry.records.tables import as_json
from transport_geometry.reporting import console as answers
from transport_geometry.reporting import summary

import pytest

REFERENCE = ROOT / "outputs/reference"
SETTINGS = {
    "models": ["stdlib-s", "stdlib-l"],
    "weights": {"stdlib-s": "a" * 16, "stdlib-l": "b" * 16},
    "hooks": {"stdlib-s@3": "0.50", "stdlib-l@3": "0.50", "stdlib-l@10": "0.83"},
} | dict(tokens=[10_000, 100_000], recipe=["base"], data="stdlib", documents=[40], text_sha256="c" * 64)


# ----------------------------------------------------------------------------------------------- planted runs
def run(root, name, script, verdict, answer="It is so.", seconds=1.0, settings=SETTINGS) -> None:
    """A folder as a run of this script would leave it."""
    said = vars(answers.Answer("Is it?", answer, "Not more."))
    files: dict[str, store.Content | None] = {
        "conditions.csv": b"model\n",
        "verdict.json": as_json(verdict | {"answer": said}),
        "report.md": b"# Prose, which is not read\n",
    }
    record = root / name / "run.json"
    store.put(record, files, settings=settings | {"script": script}, seconds=seconds)


def leaf_of(leaf: str, **more) -> dict:
    return {"leaf": leaf, "reason": "planted", **more}


def of(root: pathlib.Path) -> str:
    return summary.outline(summary.read(root))


def lines_of(text: str, name: str) -> list[str]:
    """A run's own lines of the outline."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"- `{name}`"))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("  - ")), len(lines))
    return lines[start:end]


def table(text: str) -> dict[str, str]:
    """{claim: the verdicts}"""
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in cells[1:]}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(a copy of the reference folder with its outline, what the command printed)."""
    root = tmp_path_factory.mktemp("reported") / "reference"
    shutil.copytree(REFERENCE, root, ignore=shutil.ignore_patterns("report.json"))
    for name in ("report.md", "report.html"):
        (root / name).unlink(missing_ok=True)
    return root, script("common.py", "report", root).stdout


# ------------------------------------------------------------------------------------- the reference folders
def test_the_reference_folders_in_the_order_in_which_they_may_be_read(reported):
    root, printed = reported
    text = (root / "report.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 10 * len(list(root.glob("*/run.json")))
    assert list(table(text)) == [claim.label for claim in summary.CLAIMS]
    assert "Read them in this order: H0 → H1 → N → H2 → H2′ → H3." in text
    first = ["expa", "expa-long", "expb", "expb-gemma3", "expb-short", "expb-smollm2", "expc_fisher"]
    assert re.findall("^- `(.*?)`", text, re.MULTILINE)[: len(first)] == first
    for name in first:
        verdict = json.loads((root / name / "verdict.json").read_text(encoding="utf-8"))
        assert lines_of(text, name)[0].endswith(f": {verdict['answer']['found']}")
        assert lines_of(text, name)[1] == f"  - Limits: {verdict['answer']['limits']}"
        assert f"{name}: " in printed and verdict["leaf"] in printed
    assert printed.splitlines()[-2] == text.splitlines()[2].strip("*").replace("`", "").replace("*", "")


def test_every_link_leads_to_a_file(reported):
    root, _ = reported
    links = re.findall(r"\]\((.*?)\)", (root / "report.md").read_text(encoding="utf-8"))
    assert {"expa/deltas.csv", "expb/leaderboard.csv", "expc_fisher/geometry.csv"} <= set(links)
    assert all((root / urllib.parse.unquote(link)).is_file() for link in links)


def test_nothing_else_in_the_folder_changes_and_the_bytes_are_the_same_again(reported):
    root, _ = reported
    before = contents(root, but="")
    script("common.py", "report", root)
    assert contents(root, but="") == before
    assert before == contents(REFERENCE, but="")  # they do not depend on where the folder lies


# --------------------------------------------------------------------------------------- which claim is first
def test_a_verdict_waits_for_exp_a_on_the_same_models(tmp_path):
    run(tmp_path, "open", "expb", leaf_of("beats-r2-only"))
    run(tmp_path, "fisher", "expc_fisher", leaf_of("supported", added=0.8, p=0.004))
    assert "Exp-A comes first: it is not in this folder." in of(tmp_path)

    run(tmp_path, "expa", "expa", leaf_of("undertrained"))
    said = table(of(tmp_path))
    assert said["H2"] == "[`open`](open/report.md): beats R² only; not to be interpreted before Exp-A"
    assert said["H2′"].endswith("supported; not to be interpreted before Exp-A")
    assert lines_of(of(tmp_path), "open")[0].startswith("- `open`, *not to be interpreted before Exp-A*: ")
    assert lines_of(of(tmp_path), "open")[2] == "  - Exp-A comes first: `expa` says undertrained."

    run(tmp_path, "expa-long", "expa", leaf_of("H1", h0=False, h1=True))
    text = of(tmp_path)
    said = table(text)
    assert said["H2"] == "[`open`](open/report.md): beats R² only"
    assert said["H2′"] == "[`fisher`](fisher/report.md): supported; not to be interpreted before H2"
    assert "`expa`](expa/report.md): undertrained; not to be interpreted before H0 and H1" in said["N"]
    assert said["H1"].endswith("[`expa-long`](expa-long/report.md): shown")
    first = "Exp-A comes first: `expa` says undertrained; `expa-long` says H1."
    assert lines_of(text, "open")[2] == f"  - {first}"
    assert lines_of(text, "fisher")[2] == f"  - {first} Then H2: `open` says beats-r2-only."
    assert lines_of(text, "expa")[2] == "  - It comes before `open`, `fisher`."
    assert "May be read: H0 (" in text and "Not to be interpreted yet: H2′." in text

    run(tmp_path, "elsewhere", "expb", leaf_of("supported"), settings=SETTINGS | {"data": "else"})
    assert table(of(tmp_path))["H2′"].endswith("supported; not to be interpreted before H2")
    run(tmp_path, "good", "expb", leaf_of("supported"))
    assert table(of(tmp_path))["H2′"] == "[`fisher`](fisher/report.md): supported"


@pytest.mark.parametrize("key, other", [("weights", {"stdlib-s": "d"}), ("data", "else"), ("recipe", ["x"])])
def test_exp_a_on_other_models_text_or_recipe_settles_nothing(key, other, tmp_path):
    run(tmp_path, "expa", "expa", leaf_of("H1"), settings=SETTINGS | {key: other})
    run(tmp_path, "expb", "expb", leaf_of("supported"))
    text = of(tmp_path)
    assert table(text)["H2"].endswith("supported; not to be interpreted before Exp-A")
    assert lines_of(text, "expb")[2] == f"  - Exp-A comes first: `expa` is about other {key}."
    assert lines_of(text, "expa")[2] == "  - No run here comes after it."
    # it counts by its first recipe
    run(tmp_path, "both", "expa", leaf_of("H1"), settings=SETTINGS | {"recipe": ["base", "saelens"]})
    assert table(of(tmp_path))["H2"].endswith("supported")


def test_exp_a_that_was_changed_since_settles_nothing(tmp_path):
    run(tmp_path, "expa", "expa", leaf_of("H0"))
    run(tmp_path, "expb", "expb", leaf_of("supported"))
    assert table(of(tmp_path))["H2"].endswith("): supported")
    (tmp_path / "expa/conditions.csv").write_text("other")
    assert table(of(tmp_path))["H2"].endswith("not to be interpreted before Exp-A")


WAITS = "not to be interpreted before H0 and H1"


@pytest.mark.parametrize(
    "leaf, h0, h1, said",
    [
        # of an undertrained one h1 may be true, and is not to be read
        ("undertrained", False, True, ["undertrained", "undertrained", f"undertrained; {WAITS}"]),
        ("H0", True, False, ["shown", "not shown", "not shown"]),
        ("H0", True, None, ["shown", "not judged", "not shown"]),  # R² is not transferable
        ("H0+H1", True, True, ["shown", "shown", "not shown"]),
        ("N", False, True, ["not shown", "shown, and N says how", "shown"]),
    ],
)
def test_each_word_of_exp_a(leaf, h0, h1, said, tmp_path):
    run(tmp_path, "expa", "expa", leaf_of(leaf, h0=h0, h1=h1))
    words = table(of(tmp_path))
    assert [words[claim].rpartition("): ")[2] for claim in ("H0", "H1", "N")] == said
    layers = dict(h0=h0, h1=h1, small="s@10", large="s@11")
    settings = SETTINGS | {"pairs": [["s@10", "s@11"]]}
    run(tmp_path, "expa", "expa", leaf_of(leaf, **layers), settings=settings)
    assert table(of(tmp_path))["H0"].endswith(f"): {said[0]} (s@11 minus s@10)")


def test_a_run_of_an_earlier_version_says_how_to_make_its_verdict_anew(tmp_path):
    run(tmp_path, "a", "expa", leaf_of("H0"))
    record = tmp_path / "b/run.json"
    files = {
        "verdict.json": as_json({"leaf": "gated", "leaf_if_ungated": "rejected"}),
        "report.md": b"# It\n",
    }
    store.put(record, files, settings=SETTINGS | {"script": "expb"}, seconds=1.0)
    (line,) = lines_of(of(tmp_path), "b")
    assert line.endswith("(of an earlier version: `python expb.py --from` makes it anew)")


# --------------------------------------------------------------------------------------- what is not shown
@pytest.mark.parametrize("file", ["leaderboard.csv", "report.md"])
def test_a_file_that_is_not_as_its_run_wrote_it_is_named(file, tmp_path):
    shutil.copytree(REFERENCE, tmp_path / "r")
    path = tmp_path / "r/expb" / file
    path.write_bytes(path.read_bytes() + b"\n")
    (line,) = lines_of(of(tmp_path / "r"), "expb")
    assert line.startswith(f"- `expb`: **no statement** ({file}: not as it was written (SHA-256 ")
    assert table(of(tmp_path / "r"))["H2"].split("; ")[0] == "`expb`: no statement"


def test_what_is_gone_edited_or_of_another_form_is_no_statement(tmp_path):
    run(tmp_path, "a", "expa", leaf_of("H0"))
    run(tmp_path, "b", "expb", leaf_of("supported"))
    run(tmp_path, "c", "expc_fisher", leaf_of("supported", added=0.8, p=0.004))
    run(tmp_path, "d", "expd_mi", {"leaf": "undecided"})
    (tmp_path / "b/report.md").unlink()
    edited = (tmp_path / "c/run.json").read_text().replace('"seconds": 1.0', '"seconds": 2.0')
    (tmp_path / "c/run.json").write_text(edited)
    (tmp_path / "d/run.json").write_text("{")
    run(tmp_path, "e", "expb", {"reason": "no"})
    run(tmp_path, "f", "expb", {"leaf": "supported"}, settings={"hooks": [3]})
    text = of(tmp_path)
    for name, why in (
        ("b", "report.md: No such file or directory"),
        ("c", "run.json: damaged, or edited by hand"),
        ("d", "run.json: damaged (JSONDecodeError)"),
        ("e", "verdict.json: damaged (KeyError)"),
        ("f", "run.json: damaged (AttributeError)"),
    ):
        assert lines_of(text, name) == [f"- `{name}`: **no statement** ({why})"]


def test_a_run_that_is_not_finished_says_so(tmp_path):
    run(tmp_path, "a", "expa", leaf_of("H0"))
    run(tmp_path, "b", "expb", leaf_of("supported"), seconds=None)
    store.put(tmp_path / "c/run.json", {}, settings=SETTINGS | {"script": "expc_fisher"}, seconds=1.0)
    text = of(tmp_path)
    unfinished = "- `b`: **no statement** (unfinished: the same command goes on from there)"
    assert lines_of(text, "b") == [unfinished]
    (line,) = lines_of(text, "c")
    assert "measured, no verdict yet: `python expc_fisher.py --from` makes it" in line
    assert "supported" not in text


# ---------------------------------------------------------------------------------------- what else is shown
def test_a_folder_below_a_folder_and_a_name_with_odd_characters(tmp_path):
    run(tmp_path, "reference/expa", "expa", leaf_of("H0", h0=True))
    run(tmp_path, "my run|2 (b)", "expa", leaf_of("H1", h1=True))
    run(tmp_path, "one/too/deep", "expa", leaf_of("N"))
    run(tmp_path, ".rank0", "expa", leaf_of("N"))
    run(tmp_path, "mine", "expz", {"leaf": "undecided"}, "Z: undecided.")  # no experiment of ours
    text = of(tmp_path)
    assert {one.name for one in summary.read(tmp_path)} == {"my run|2 (b)", "reference/expa", "mine"}
    assert "[`my run\\|2 (b)`](my%20run%7C2%20%28b%29/report.md): not judged" in table(text)["H0"] + text
    assert lines_of(text, "mine")[0] == "- `mine`: Z: undecided."
    assert "other            mine: undecided" in summary.in_short(summary.read(tmp_path))


def test_models_of_one_name_and_other_weights_are_told_apart(tmp_path):
    run(tmp_path, "a", "expa", leaf_of("H0"))
    other = SETTINGS | {"weights": {"stdlib-s": "d" * 16, "stdlib-l": "b" * 16}}
    run(tmp_path, "b", "expb", leaf_of("supported"), settings=other)
    text = of(tmp_path)
    assert lines_of(text, "a")[3] == (
        "  - About stdlib-s (weights aaaaaaaa) @ 3 and stdlib-l @ 3,10; 3 hooks; trained on "
        "10k, 100k tokens; text stdlib, 40 documents, SHA-256 cccccccccccc."
    )
    assert "stdlib-s (weights dddddddd)" in lines_of(text, "b")[3]


# ------------------------------------------------------------------------------------------------ the command
def test_a_report_that_the_command_did_not_write_is_kept(tmp_path):
    run(tmp_path, "a", "expa", leaf_of("H0"))
    (tmp_path / "report.md").write_text("mine")
    done = script("common.py", "report", tmp_path)
    assert (tmp_path / "report.kept.md").read_text() == "mine" and "kept as report.kept.md" in done.stdout
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    (tmp_path / "report.md").write_text("with notes")
    script("common.py", "report", tmp_path)
    assert (tmp_path / "report.kept-2.md").read_text() == "with notes"
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == written
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a", "report.md", "report.html", "report.json", "report.kept.md", "report.kept-2.md"}

    (tmp_path / "report.json").write_text("{}")
    done = script("common.py", "report", tmp_path, check=2)
    assert "report.json: not a record of this program" in one_line(done)


def test_folders_without_a_finished_run(tmp_path):
    for arguments in ((), ("report", tmp_path, tmp_path), ("diff", tmp_path)):
        assert "usage: python common.py diff" in one_line(script("common.py", *arguments, check=2))
    assert one_line(script("common.py", "report", tmp_path, check=2)).endswith("no finished run in it")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no such folder"):
        summary.read(tmp_path / "gone")
    run(tmp_path, "b", "expb", leaf_of("supported"), seconds=None)
    with pytest.raises(UserError, match=r"no finished run in it \(b: unfinished"):
        summary.read(tmp_path)
    with pytest.raises(UserError, match="a run's own folder; name the folder above it"):
        summary.read(tmp_path / "b")
