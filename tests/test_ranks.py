"""One run on several processes: the same bytes as one process gives, and nothing lost when a rank dies."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from transport_geometry import ranks
from transport_geometry.results import COLUMNS, add_results, gather, load_results

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = [
    "--models",
    "stdlib-s@1,stdlib-s@3,stdlib-m@3",
    "--k",
    "2,4,8",
    "--tokens",
    "10k",
    "--expansion",
    "4",
    "--eval-seqs",
    "8",
    "--ctx",
    "64",
    "--device",
    "cpu",
]
SMALL_A = [
    "--models",
    "stdlib-s,stdlib-m",
    "--k",
    "2,4",
    "--tokens",
    "3k,10k",
    "--seeds",
    "0,1",
    "--recipe",
    "base,saelens",
    "--sinks",
    "keep,drop",
    "--expansion",
    "4",
    "--eval-seqs",
    "8",
    "--ctx",
    "64",
    "--device",
    "cpu",
]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun gives each rank


def torchrun(n: int, *command) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        *map(str, command),
    ]


def run(command, check=0):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == check, done.stderr[-3000:]
    return done


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "run.json"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run([sys.executable, "expb.py", *SMALL, "--out", folder / "out", "--cache", folder / "cache"])
    return folder / "out"


def test_two_ranks_leave_the_bytes_of_one(one, tmp_path):
    done = run(torchrun(2, "expb.py", *SMALL, "--out", tmp_path / "out", "--cache", tmp_path / "cache"))
    assert contents(tmp_path / "out") == contents(one)
    assert done.stdout.count("kernels: ") == done.stdout.count("report: ") == 1  # one rank speaks
    assert json.loads((tmp_path / "out/run.json").read_text())["ranks"] == 2


def test_exp_a_on_three_ranks(tmp_path):
    run([sys.executable, "expa.py", *SMALL_A, "--out", tmp_path / "one", "--cache", tmp_path / "a"])
    run(torchrun(3, "expa.py", *SMALL_A, "--out", tmp_path / "three", "--cache", tmp_path / "b"))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        p.name for p in (tmp_path / "b").iterdir()
    )


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="finds the rank's process under /proc")
def test_a_rank_that_dies_is_named_and_another_number_of_ranks_goes_on(one, tmp_path):
    command = torchrun(
        2, "expb.py", *SMALL, "--save-tokens", "--out", tmp_path / "out", "--cache", tmp_path / "cache"
    )
    process = subprocess.Popen(
        command, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    part = tmp_path / "out/.rank1/conditions.csv"
    while not part.exists() and process.poll() is None:
        time.sleep(0.005)
    children = [
        int(pid)
        for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    second = next(pid for pid in children if b"RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and re.search(r"rank\s*: 1\b", said) and "-9" in said
    assert part.exists()  # what it had measured is kept
    run(
        [
            sys.executable,
            "expb.py",
            *SMALL,
            "--save-tokens",
            "--out",
            tmp_path / "out",
            "--cache",
            tmp_path / "cache",
        ]
    )
    assert not list((tmp_path / "out").glob(".rank*"))
    mine = contents(tmp_path / "out")
    del mine["tokens.npz"]
    for name, content in contents(one).items():
        if name not in ("report.md", "verdict.json"):  # which say that tokens were kept
            assert mine[name] == content, name
    with np.load(tmp_path / "out/tokens.npz") as tokens:
        assert len({name.rpartition("/")[0] for name in tokens.files}) == 3 * (3 + 4)


def test_a_fault_says_which_rank(tmp_path):
    done = run(torchrun(2, "expb.py", "--models", "nowhere/at-all", "--out", tmp_path), check=1)
    assert "expb.py, rank 0 of 2: --models nowhere/at-all" in done.stderr


def test_two_ranks_on_mps_are_refused():
    code = "import torch, ranks; ranks.join(torch.device('mps'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "MPS serves one process" in done.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_all_of_it_once_and_about_equal(world, monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", world)
    weights = [3, 1, 1, 5, 2, 2, 1, 4, 1, 1, 3]
    parts = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "RANK", rank)
        parts.append(ranks.share(list(range(len(weights))), weights))
    assert sum(parts, []) == list(range(len(weights)))
    assert max(sum(weights[i] for i in part) for part in parts) <= sum(weights) / world + max(weights)
    assert ranks.share([], []) == []


def test_shares_are_of_the_weight_not_of_the_number(monkeypatch):
    monkeypatch.setattr(ranks, "WORLD", 2)
    for rank, part in enumerate((["a"], ["b", "c", "d"])):
        monkeypatch.setattr(ranks, "RANK", rank)
        assert ranks.share(["a", "b", "c", "d"], [9, 1, 2, 3]) == part


def test_a_rank_that_writes_elsewhere_is_missed(tmp_path):
    """Rank 0 of two whose folder the other does not share: no report of half the conditions."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common, ranks, expb
ranks.join = ranks.wait = ranks.leave = lambda *a: None
sys.argv = ["expb.py", *{SMALL!r}, "--out", {str(tmp_path / "out")!r}, "--cache", {str(tmp_path / "cache")!r}]
common.run_script(expb.main)
"""
    for rank in ("1", "0"):  # the other has trained its share, and measured it into another --out
        done = subprocess.run(
            [sys.executable, "-c", code.replace("/out", f"/out{rank}")],
            capture_output=True,
            text=True,
            env={**ONE_THREAD, "RANK": rank, "WORLD_SIZE": "2"},
        )
    assert done.returncode == 1 and "do all ranks write to the same --out?" in done.stderr, done.stderr[
        -2000:
    ]
    assert not (tmp_path / "out0/report.md").exists()


def row(name, value):
    return dict(model="m", layer=1, sae=name, recipe="base", d_sae=4, k=2, seed=0, tokens=10) | {
        c: value for c in COLUMNS[8:]
    }


def test_gathering_twice_or_after_a_crash_counts_nothing_twice(tmp_path):
    part = lambda name, value: (
        [row(name, value)],
        {"sse": np.full((1, 3), value), "d": np.array([4])},
        {f"m@1/{name}/sse": np.ones(3)},
        {},
    )
    add_results(tmp_path, {}, *part("a", 1.0))
    # gathered once, and killed before its folder was removed
    add_results(tmp_path / ".rank1", {}, *part("a", 1.0))
    add_results(tmp_path / ".rank1", {}, *part("b", 2.0))
    gather(tmp_path, {})
    rows, sums = load_results(tmp_path)
    assert [r["sae"] for r in rows] == ["a", "b"] and sums["sse"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert not (tmp_path / ".rank1").exists()
    gather(tmp_path, {})
    assert len(load_results(tmp_path)[0]) == 2
