"""The scripts as their users run them: a small grid on the embedded models, twice; resumed; with bad arguments."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from common import read_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ["--models", "stdlib-s@1,stdlib-s@3,stdlib-m@3", "--k", "2,4,8", "--tokens", "10k", "--expansion", "4", "--eval-seqs", "8", "--ctx", "64"]


def expb(*arguments, env=None, check=0):
    done = subprocess.run([sys.executable, str(ROOT / "expb.py"), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, **(env or {})})
    assert done.returncode == check, done.stderr[-2000:]
    return done


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "run.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(results folder, cache folder, stdout) of one small run."""
    folder = tmp_path_factory.mktemp("expb")
    done = expb(*SMALL, "--out", folder / "out", "--cache", folder / "cache")
    return folder / "out", folder / "cache", done.stdout


def test_what_a_run_leaves_behind(run):
    out, cache, printed = run
    assert sorted(p.name for p in out.iterdir()) == ["conditions.csv", "leaderboard.csv", "leaderboard.png", "proxies.png", "report.md", "run.json",
                                                     "sequences.npz", "swd_r2.png", "verdict.json"]
    rows = read_table(out / "conditions.csv")
    assert len(rows) == 3 * (3 + 4) and ",".join(rows[0]).startswith("model,layer,sae,recipe,d_sae,k,seed,tokens,n_seq,n_tok,n_sink,r2,r2_nosink")
    assert rows == sorted(rows, key=lambda r: list(r.values())[:8])
    by_name = {(r["model"], r["layer"], r["sae"], r["k"]): r for r in rows}
    for r in rows:
        if r["sae"] == "null-identity":
            assert r["r2"] == 1 and r["ce_rec"] == 1 and r["swd_tok"] == 0
        if r["sae"] == "null-mean":
            assert abs(r["r2"]) < 1e-5 and r["ce_recon"] == r["ce_mean"]
        if r["recipe"] == "base":
            assert r["k"] >= r["l0"] > 0 and 0 < r["alive"] <= 1 and r["bits"] == pytest.approx(r["bits_idx"] + 8 * r["l0"], rel=1e-4)
            assert r["dce"] == pytest.approx(r["ce_recon"] - r["ce_orig"], abs=1e-4) and r["ce_rec"] == pytest.approx(2 - r["ce_recon"] / r["ce_orig"], abs=1e-4)
    assert by_name["stdlib-s", 3, "topk-x4", 8]["r2"] > by_name["stdlib-s", 3, "topk-x4", 2]["r2"] > by_name["stdlib-s", 3, "null-mean", 0]["r2"]
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["leaf"] == "gated" and "H2: gated" in printed and verdict["settings"]["k"] == [2, 4, 8]
    report = (out / "report.md").read_text()
    assert verdict["settings"]["text_sha256"] in report and sys.version.split()[0] in report


def test_twice_from_an_empty_cache_is_the_same_to_the_byte(run, tmp_path):
    expb(*SMALL, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(run[0])


def test_tables_come_again_without_a_model(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    for name in ("leaderboard.csv", "verdict.json", "report.md", "swd_r2.png"):
        (tmp_path / "copy" / name).unlink()
    expb("--from", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run[0])


def test_a_killed_run_goes_on_to_the_same_result(run, tmp_path):
    command = [sys.executable, str(ROOT / "expb.py"), *SMALL, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while len(list((tmp_path / "cache").glob("*/sae.safetensors"))) < 4 and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expb(*SMALL, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert contents(tmp_path / "out") == contents(run[0])


def test_plain_pytorch_and_another_thread_count_agree_within_tolerance(run, tmp_path):
    expb(*SMALL, "--out", tmp_path / "ref", "--cache", tmp_path / "cache", env={"KERNELS": "ref", "OMP_NUM_THREADS": "1"})
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), "diff", str(run[0]), str(tmp_path / "ref")], capture_output=True, text=True)
    assert done.returncode == 0 and "within tolerance" in done.stdout, done.stdout


def test_exp_a_opens_the_gate_only_for_the_same_run(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    settings = json.loads((run[0] / "verdict.json").read_text())["settings"]
    for leaf, about, gated in (("H1", settings, False), ("H1", settings | {"data": "else"}, True), ("undecided", settings, True)):
        (tmp_path / "a.json").write_text(json.dumps({"leaf": leaf, "settings": about}))
        expb("--from", tmp_path / "copy", "--verdict", tmp_path / "a.json")
        assert (json.loads((tmp_path / "copy" / "verdict.json").read_text())["leaf"] == "gated") is gated


@pytest.mark.parametrize("arguments, words", [
    (["--k", "0"], "--k 0"), (["--k", "8,5000"], "--k 5000"), (["--k", "x"], "whole numbers"), (["--models", "stdlib-s@6"], "layers 0 to 5"),
    (["--models", "no-such-model"], "stdlib-s"), (["--data", "no-such-data"], "stdlib"), (["--data", "{tmp}/empty.txt"], "empty"),
    (["--eval-seqs", "1000000"], "holds"), (["--device", "cuda"], "--device cuda"), (["--device", "mps"], "--device mps"), (["--tokens", "many"], "many"),
    (["--ctx", "4096"], "--ctx"), (["--from", "{tmp}"], "no finished run"), (["--frobnicate"], "--help"), (["--out", "/proc/none"], "--out"),
    (["--models", "stdlib-s,stdlib-s@3"], "twice"), (["--k", "3"], "other settings")])
def test_bad_arguments_get_one_line_and_status_2(run, tmp_path, arguments, words):
    import torch
    if arguments[0] == "--device" and getattr(torch, arguments[1] if arguments[1] == "cuda" else "backends").__dict__.get("is_available", lambda: False)():
        pytest.skip("this machine has the device")
    (tmp_path / "empty.txt").touch()
    shutil.copytree(run[0], tmp_path / "out")
    before = contents(tmp_path / "out")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    grid = [] if arguments[0] == "--from" else SMALL
    done = expb(*grid, "--out", tmp_path / "out", "--cache", run[1], *arguments, env={"HF_HUB_OFFLINE": "1"}, check=2)
    last = done.stderr.strip().splitlines()
    assert words in last[-1] and len(last) == 1 and "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == before


def test_dry_run_writes_nothing(tmp_path):
    done = expb(*SMALL, "--dry-run", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert "tflops" in done.stdout and "stdlib-m@3" in done.stdout and not (tmp_path / "out").exists()


def test_rooms_know_only_what_they_may():
    """kernels knows torch alone, common no experiment, and no experiment another."""
    import ast
    names = {p.stem for p in ROOT.glob("*.py")} - {"setup"}
    experiments = {n for n in names if n.startswith("exp")}
    for path in ROOT.glob("*.py"):
        imported = {alias.name.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module}
        assert not imported & (experiments - {path.stem}), path.name
        if path.stem in ("kernels", "stats"):
            assert not imported & names, path.name
