"""The scripts as their users run them: a small grid on the embedded models, twice; resumed; with bad
arguments.
"""

import ast
import graphlib
import json
import os
import pathlib
import random
import re
import shutil
import sys
import time

import common
from helpers import ROOT, SMALL, contents, one_line, process, script
from transport_geometry.errors import UserError
from transport_geometry.records import store
from transport_geometry.records.tables import read_table

import pytest
import torch

SMALL_A = (
    "--models stdlib-s,stdlib-m --k 2,4,8 --tokens 3k,10k --seeds 0,1,2 --expansion 4 --eval-seqs 8 --ctx 64"
).split()


def expa(*arguments, **how):
    return script("expa.py", *arguments, **how)


def expb(*arguments, **how):
    return script("expb.py", *arguments, **how)


def expc(*arguments, **how):
    return script("expc_fisher.py", *arguments, **how)


def folders(tmp_path: pathlib.Path) -> list:
    return ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(results folder, cache folder, stdout) of one small run."""
    folder = tmp_path_factory.mktemp("expb")
    done = expb(*SMALL, *folders(folder))
    return folder / "out", folder / "cache", done.stdout


def test_what_a_run_leaves_behind(run):
    out, cache, printed = run
    assert " ".join(sorted(p.name for p in out.iterdir())) == (
        "conditions.csv harm.csv harm.png layers.png leaderboard.csv leaderboard.png proxies.png report.html "
        "report.md run.json sequences.npz swd_r2.png verdict.json worst.csv"
    )
    rows = read_table(out / "conditions.csv")
    assert len(rows) == 3 * (3 + 4) and ",".join(rows[0]).startswith(
        "model,layer,sae,recipe,d_sae,k,seed,tokens,n_seq,n_tok,n_sink,calm_share,r2,r2_nosink"
    )
    assert rows == sorted(rows, key=lambda r: list(r.values())[:8])
    by_name = {(r["model"], r["layer"], r["sae"], r["k"]): r for r in rows}
    for r in rows:
        if r["sae"] == "null-identity":
            assert r["r2"] == 1 and r["ce_rec"] == 1 and r["swd_tok"] == 0
        if r["sae"] == "null-mean":
            assert abs(r["r2"]) < 1e-5 and r["ce_recon"] == r["ce_mean"]
        if r["recipe"] == "base":
            assert r["k"] >= r["l0"] > 0 and 0 < r["alive"] <= 1
            assert r["bits"] == pytest.approx(r["bits_idx"] + 8 * r["l0"], rel=1e-4)
            assert r["dce"] == pytest.approx(r["ce_recon"] - r["ce_orig"], abs=1e-4)
            assert r["ce_rec"] == pytest.approx(2 - r["ce_recon"] / r["ce_orig"], abs=1e-4)
    saes = (("topk-x4", 8), ("topk-x4", 2), ("null-mean", 0))
    more, less, none = (by_name["stdlib-s", 3, *sae]["r2"] for sae in saes)
    assert more > less > none
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["leaf"] == "undecided" and verdict["settings"]["k"] == [2, 4, 8]
    assert "verdict: H2: undecided" in printed and "(H2) stays open until Exp-A" in printed
    report = (out / "report.md").read_text()
    assert verdict["settings"]["text_sha256"] in report and sys.version.split()[0] in report


@pytest.mark.slow
def test_twice_from_an_empty_cache_is_the_same_to_the_byte(run, tmp_path):
    expb(*SMALL, *folders(tmp_path))
    assert contents(tmp_path / "out") == contents(run[0])


def test_tables_come_again_without_a_model(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    for name in ("leaderboard.csv", "verdict.json", "report.md", "report.html", "swd_r2.png"):
        (tmp_path / "copy" / name).unlink()
    expb("--from", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run[0])


def test_another_experiments_verdict_lying_about_changes_nothing(run, tmp_path):
    """The same command once read outputs/expa/verdict.json of the current folder, and wrote other bytes."""
    settings = json.loads((run[0] / "verdict.json").read_text())["settings"]
    theirs = {"verdict.json": json.dumps({"leaf": "H1", "settings": settings}).encode()}
    store.put(tmp_path / "outputs/expa/run.json", theirs)
    shutil.copytree(run[0], tmp_path / "copy")
    expb("--from", tmp_path / "copy", folder=tmp_path)
    assert contents(tmp_path / "copy") == contents(run[0])


@pytest.mark.slow
def test_plain_pytorch_and_another_thread_count_are_no_other_run(run, tmp_path):
    environment = {"KERNELS": "ref", "OMP_NUM_THREADS": "1" if torch.get_num_threads() > 1 else "2"}
    process("expb.py", *SMALL, *folders(tmp_path), env=environment)
    done = script("common.py", "diff", run[0], tmp_path / "out")
    word = done.stdout.splitlines()[-1].split(":")[0]
    assert word in ("identical", "same SAEs", "reproduced"), done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--k", "0"], "--k 0"),
        (["--k", "8,5000"], "--k 5000"),
        (["--expansion", "1000000000"], "--expansion 1000000000"),
        (["--recipe", "gao"], "base, saelens"),
        (["--sinks", "no"], "keep, drop"),
        (["--seeds", "-1"], "--seeds"),
        (["--tokens", "1k,0"], "positive"),
        (["--models", "stdlib-s@6"], "layers 0 to 5"),
        (["--models", "no-such-model"], "stdlib-s"),
        (["--data", "{tmp}/empty.txt"], "empty"),
        (["--eval-seqs", "1000000"], "gives"),
        (["--device", "cuda"], "--device cuda"),
        (["--device", "mps"], "--device mps"),
        (["--ctx", "4096"], "--ctx"),
        (["--from", "{tmp}"], "no finished run"),
        (["--frobnicate"], "--help"),
        (["--out", "/proc/none"], "--out"),
        (["--models", "stdlib-s,stdlib-s@3"], "twice"),
        (["--k", "3"], "other settings"),
        (["--out", ""], "empty path"),
        (["--seeds", "1", "--cache", "{tmp}/empty.txt", "--out", "{tmp}/new"], "--cache"),
        (["--seeds", "1", "--cache", "/proc/none", "--out", "{tmp}/new"], "--cache"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(run, tmp_path, arguments, words):
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if arguments[0] == "--device" and here[arguments[1]]:
        pytest.skip("this machine has the device")
    (tmp_path / "empty.txt").touch()
    shutil.copytree(run[0], tmp_path / "out")
    before = contents(tmp_path / "out")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    grid = [] if arguments[0] == "--from" else SMALL
    done = expb(*grid, "--out", tmp_path / "out", "--cache", run[1], *arguments, check=2)
    assert words in one_line(done)
    assert contents(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------- Exp-A
@pytest.fixture(scope="module")
def run_a(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expa")
    done = expa(*SMALL_A, *folders(folder))
    return folder / "out", folder / "cache", done.stdout


@pytest.mark.slow
def test_exp_a_pairs_no_sae_with_one_of_another_processor(run_a, tmp_path):
    """Of three seeds one was trained elsewhere: what is left are two, too few for a verdict."""
    out = tmp_path / "out"
    shutil.copytree(run_a[0], out)
    ((here, saes),) = json.loads((out / "run.json").read_text())["trained_on"].items()
    elsewhere = [name for name in saes if name.split("-")[-2] == "2"]
    assert len(elsewhere) * 3 == len(saes)
    both = {here: sorted({*saes} - {*elsewhere}), "Another CPU": elsewhere}
    store.put(out / "run.json", {}, trained_on=both)
    expa("--from", out)
    report = (out / "report.md").read_text()
    assert f": {len(elsewhere)} that another processor trained are left out" in report
    assert {row["n_seeds"] for row in read_table(out / "deltas.csv")} == {2}
    assert json.loads((out / "verdict.json").read_text())["reason"] == "no budget has 3 seeds in both"


@pytest.mark.slow
def test_what_exp_a_leaves_behind(run_a):
    out, _, printed = run_a
    assert " ".join(sorted(p.name for p in out.iterdir())) == (
        "conditions.csv deltas.csv deltas.png learning.png mismatch.png report.html report.md run.json "
        "sequences.npz verdict.json"
    )
    rows, deltas = read_table(out / "conditions.csv"), read_table(out / "deltas.csv")
    assert list(deltas[0]) == list(read_table(ROOT / "outputs/reference/expa/deltas.csv")[0])
    assert len(rows) == 2 * (3 * 2 * 3 + 4) and len(deltas) == 3 * 2
    for row in deltas:
        cell = [r for r in rows if (r["k"], r["tokens"]) == (row["k"], row["tokens"])]
        small, large = ([r for r in cell if r["model"] == row[end]] for end in ("small", "large"))
        assert len(small) == len(large) == 3
        for metric in ("r2", "ce_rec", "frac_zero"):
            delta = sum(r[metric] for r in large) / 3 - sum(r[metric] for r in small) / 3
            assert row[f"delta_{metric}"] == pytest.approx(delta, abs=1e-5)
            assert row[f"delta_{metric}_lo"] < row[f"delta_{metric}"] < row[f"delta_{metric}_hi"]
        assert row["n_seeds"] == 3 and (row["small"], row["large"]) == ("stdlib-s", "stdlib-m")
    verdict = json.loads((out / "verdict.json").read_text())
    assert (verdict["leaf"], verdict["budget"], len(verdict["cells"])) == ("undertrained", 10_000, 3)
    assert verdict["thresholds"]["margin"] == 0.02
    assert "H0/H1: undertrained" in printed and "H0/H1: undertrained" in (out / "report.md").read_text()


@pytest.mark.slow
def test_exp_a_killed_three_times_ends_as_the_unbroken_run(run_a, tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    rng, there = random.Random(seed), 0
    for _ in range(3):  # at a random moment after the run has got further than the last
        further = (tmp_path / "cache", "*/sae.safetensors", min(there + 1, 36))
        expa(*SMALL_A, *folders(tmp_path), when=further, after=rng.uniform(0, 3), check=-9)
        there = len(list((tmp_path / "cache").glob("*/sae.safetensors")))
    expa(*SMALL_A, *folders(tmp_path))
    assert contents(tmp_path / "out") == contents(run_a[0])


@pytest.mark.slow
def test_exp_a_again_without_a_model_and_in_both_recipes(run_a, tmp_path):
    shutil.copytree(run_a[0], tmp_path / "copy")
    for name in ("deltas.csv", "verdict.json", "report.md", "deltas.png"):
        (tmp_path / "copy" / name).unlink()
    expa("--from", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run_a[0])
    arms = "--recipe base,saelens --sinks keep,drop --k 2,8 --tokens 3k,9k".split()
    expa(*SMALL_A, *arms, "--out", tmp_path / "arms", "--cache", run_a[1])
    deltas = read_table(tmp_path / "arms" / "deltas.csv")
    assert len({(r["recipe"], r["sinks"]) for r in deltas}) == 4 and len(deltas) == 4 * 4
    verdict = json.loads((tmp_path / "arms" / "verdict.json").read_text())
    assert (verdict["recipe"], verdict["sinks"]) == ("base", "keep") and len(verdict["other_arms"]) == 3
    r2 = {
        (r["sae"], r["recipe"], r["seed"]): r["r2"]
        for r in read_table(tmp_path / "arms" / "conditions.csv")
        if r["k"] == 8 and r["tokens"] == 9000 and r["model"] == "stdlib-m"
    }
    assert len(r2) == len(set(r2.values())) == 4 * 3


@pytest.mark.slow
def test_layers_of_one_model_are_compared_pair_by_pair(tmp_path):
    """The hooks that are trained follow from the pairs."""
    grid = "--k 4,8 --tokens 3k,10k --seeds 0,1,2 --expansion 4 --eval-seqs 8 --ctx 64".split()
    done = expa("--models", "stdlib-s", "--pairs", "1:3,4:1", *grid, *folders(tmp_path))
    out = tmp_path / "out"
    assert {row["layer"] for row in read_table(out / "conditions.csv")} == {1, 3, 4}
    found = [(row["small"], row["large"]) for row in read_table(out / "deltas.csv")]
    assert found == [("stdlib-s@1", "stdlib-s@3")] * 4 + [("stdlib-s@4", "stdlib-s@1")] * 4
    verdict = json.loads((out / "verdict.json").read_text())
    judged = [(one["small"], one["large"]) for one in (verdict, *verdict["other_arms"])]
    assert judged == [found[0], found[-1]]
    assert "block 3 minus block 1 of stdlib-s" in " ".join(done.stdout.split())
    before = contents(out)
    expa("--from", out)
    assert contents(out) == before
    again = expa("--models", "stdlib-s", "--pairs", "1:3,1:4", *grid, *folders(tmp_path), check=2)
    assert "other settings (pairs: " in one_line(again)


def test_the_grid_follows_from_the_pairs():
    import expa

    def grid(*typed):
        typed_command = common.parse_args("", expa.GRID, list(typed), expa.FLAGS)
        command = expa.with_pairs(typed_command, expa.GRID["models"])
        return command.grid.models, command.own

    two = (("a", 10), ("a", 11)), {"pairs": [["a@10", "a@11"]]}
    assert grid("--models", "a", "--pairs", "10:11") == grid("--pairs", "a@10:a@11") == two
    assert grid("--models", "a@3,a@5", "--pairs", "10:11") == two
    pairs = f"{common.SMALL}@2:{common.LARGE}@9,{common.LARGE}@9:{common.LARGE}@3"
    hooks, own = grid("--preset", "phase2", "--pairs", pairs)
    assert hooks == ((common.SMALL, 2), (common.LARGE, 9), (common.LARGE, 3)) and len(own["pairs"]) == 2
    assert grid("--models", "a") == ((("a", None),), {}) and grid("--from", "x")[1] == {}
    with pytest.raises(UserError, match="with --from they are those of the run"):
        grid("--from", "x", "--pairs", "1:2")


@pytest.mark.parametrize(
    "models, pairs, words",
    [
        ([], "10:11", "layers of which model? --models NAME"),
        (["--models", "stdlib-s,stdlib-m"], "1:3", "layers of which model?"),
        (["--models", "stdlib-s"], "stdlib-s@1:stdlib-m@3", "stdlib-m is not among --models"),
        (["--models", "stdlib-s"], "3:03", "two different hooks"),
        (["--models", "stdlib-s"], "1:3,1:3", "the same pair twice"),
        ([], "1:x", "two hooks, please"),
        (["--models", "stdlib-s"], "1:6", "layers 0 to 5"),
    ],
)
def test_a_bad_pair_gets_one_line_and_status_2(models, pairs, words, tmp_path):
    done = expa(*models, "--pairs", pairs, *folders(tmp_path), check=2)
    assert words in one_line(done) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_another_script_or_half_a_run_is_refused(run_a, run, tmp_path):
    assert "a run of expa.py" in expb("--from", run_a[0], check=2).stderr
    shutil.copytree(run_a[0], tmp_path / "half")
    lines = (tmp_path / "half" / "conditions.csv").read_text().splitlines(keepends=True)
    (tmp_path / "half" / "conditions.csv").write_text("".join(lines[:23]))
    for arguments in (
        ("--from", tmp_path / "half"),
        (*SMALL_A, "--out", tmp_path / "half", "--cache", run_a[1]),
    ):
        assert "conditions.csv: not as it was written" in expa(*arguments, check=2).stderr


@pytest.mark.slow
def test_published_grids_are_priced_without_network_and_nothing_is_written(tmp_path):
    for name in ("phase2", "fast2", "fast3"):
        done = expa("--preset", name, "--dry-run", *folders(tmp_path))  # offline, see zygote
        assert "EleutherAI/pythia-410m@12" in done.stdout and "TFLOP" in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, size",
    [
        ("expa", ["--eval-seqs", "2", "--ctx", "8"]),
        ("expb", ["--eval-seqs", "2", "--ctx", "8"]),
        ("expc_fisher", ["--eval-seqs", "2", "--ctx", "8"]),
        ("expc_fisher", ["--eval-seqs", "4", "--ctx", "2"]),
    ],
)
def test_a_grid_of_next_to_nothing_says_undefined_where_it_is(tmp_path, name, size):
    """One SAE of a model, two sequences, or nothing but a sink to predict from: it runs, nothing is nan or
    infinite in words, and nothing warns.
    """

    def check(done, out, where):
        written = {path.name: path.read_text() for path in out.iterdir() if path.suffix in (".md", ".csv")}
        for file, text in {**written, "stdout": done.stdout}.items():
            assert not re.search(r"(?<![\w-])[+-]?(nan|inf|NaN|Infinity|None)(?!\w)", text), file
        assert "undefined" in written[where] and "Warning" not in done.stderr

    models = "stdlib-s,stdlib-m" if name == "expa" else "stdlib-s"
    grid = ["--models", models, "--k", "2", "--tokens", "1k", *size]
    check(script(f"{name}.py", *grid, *folders(tmp_path)), tmp_path / "out", "report.md")
    if name == "expb":
        (sae,) = (tmp_path / "cache").iterdir()
        audit = ["--sae", sae, *size, "--basis", "raw", "--out", tmp_path / "audit"]
        check(script("audit.py", *audit), tmp_path / "audit", "leaderboard.csv")


# --------------------------------------------------------------------------------------------- who knows whom
def imports(path: pathlib.Path) -> set[str]:
    """Full names of all that a file imports, wherever in it; of `from a import b`, both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports by its own place"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    "name, model, more, flag",
    [
        ("expc_fisher", "stdlib-s@3", ["--leave-sinks"], "--leave-sinks"),
        ("expe_attention", "stdlib-s@3", ["--leave-sinks"], "--leave-sinks"),
        ("expf_rate", "stdlib-s+turned1@3", [], "+turned"),
    ],
)
def test_no_table_is_partly_without_a_flag(name, model, more, flag, tmp_path):
    """What is measured once a hook knows neither, while the rows of SAEs would."""
    size = "--k 4 --tokens 2k --expansion 4 --eval-seqs 4 --ctx 32".split()
    said = script(f"{name}.py", "--models", model, *size, *more, "--out", tmp_path / "out", check=2)
    assert f"{flag}: not for {name}.py" in said.stderr and not (tmp_path / "out").exists()


def test_the_package_imports_no_experiment_has_no_cycle_and_two_bases():
    """kernels can be read, and taken elsewhere, without the rest; statistics know of no model."""
    scripts = {path.stem: path for path in ROOT.glob("*.py") if path.stem != "setup"}
    assert {"common", "expa", "expb", "expc_fisher"} <= scripts.keys()
    experiments = scripts.keys() - {"common"}
    for name, path in scripts.items():
        assert not imports(path) & (experiments - {name}), path
    for path in (ROOT / "transport_geometry").rglob("*.py"):
        assert not imports(path) & scripts.keys(), path
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for path in (ROOT / "transport_geometry").rglob("*.py")
        if not path.stem.startswith("__")
    }
    wanted = {name: imports(path) & modules.keys() for name, path in modules.items()}
    assert wanted["transport_geometry.kernels"] == set() and len(wanted["transport_geometry.running.run"]) > 5
    below = "transport_geometry.statistics."
    for name in ("correlations", "hook_dependence", "hook_tests", "intervals", "resampling", "transfer"):
        assert all(one.startswith(below) for one in wanted[below + name]), name
    assert wanted[f"{below}intervals"] <= {f"{below}resampling"}
    graphlib.TopologicalSorter(wanted).prepare()  # raises CycleError, which names the cycle


# --------------------------------------------------------------------------------------------- other packages
@pytest.mark.slow
def test_a_package_called_kernels_is_not_ours(tmp_path):
    """transformers imports `kernels` where it finds a distribution of that name: the hub's, not csrc's face,
    which was once a module of the same name.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(
        "import unittest.mock\n"
        "print('the kernels of the hub')\n"
        "def use_kernel_forward_from_hub(name): return lambda layer: layer\n"
        "use_kernelized_func = use_kernel_forward_from_hub\n"
        "def __getattr__(name): return unittest.mock.MagicMock()\n"  # whatever else is asked for
    )
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    tiny = "--models stdlib-s --k 4 --tokens 2k --eval-seqs 4 --ctx 32".split()
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = process("expb.py", *tiny, *folders(tmp_path), env={"PYTHONPATH": path})
    assert "the kernels of the hub" in done.stdout and (tmp_path / "out/report.md").exists()


# ------------------------------------------------------------------------------------------------- Exp-C
@pytest.mark.slow
def test_exp_c_whole_killed_and_without_a_model(tmp_path):
    small = "--models stdlib-s,stdlib-m@2 --k 2,8 --tokens 3k --eval-seqs 8 --ctx 64".split()
    # one hook of two is done
    expc(*small, *folders(tmp_path), when=(tmp_path, "out/conditions.csv", 1), check=-9)
    done = expc(*small, *folders(tmp_path))
    whole = contents(tmp_path / "out")
    assert " ".join(whole) == (
        "calibration.png conditions.csv estimators.csv geometry.csv leaderboard.csv leaderboard.png path.csv "
        "report.html report.md sequences.npz swd_fisher.png verdict.json"
    )
    expc(*small, "--out", tmp_path / "again", "--cache", tmp_path / "other")
    assert contents(tmp_path / "again") == whole
    for name in ("leaderboard.csv", "verdict.json", "report.md", "calibration.png"):
        (tmp_path / "again" / name).unlink()
    expc("--from", tmp_path / "again")
    assert contents(tmp_path / "again") == whole
    rows = read_table(tmp_path / "out" / "conditions.csv")
    assert " ".join(list(rows[0])[-8:]) == (
        "fisher_seq fisher_tok fisher_same half_var delta_sq locality_0.1 locality_0.3 locality_1"
    )
    for row in rows:
        if row["sae"] == "null-identity":
            assert row["fisher_seq"] == row["fisher_same"] == 0
        elif row["recipe"] == "base":
            assert row["locality_0.1"] == pytest.approx(1, abs=0.25) and row["fisher_seq"] > 0
    geometry, board = (read_table(tmp_path / f"out/{name}.csv") for name in ("geometry", "leaderboard"))
    assert {(r["model"], r["layer"]) for r in geometry} == {("stdlib-s", 3), ("stdlib-m", 2)}
    proxies = {"fisher_seq", "fisher_tok", "fisher_same", "half_var", "swd_tok", "r2"}
    assert proxies <= {row["proxy"] for row in board} and "H2': undecided" in done.stdout
