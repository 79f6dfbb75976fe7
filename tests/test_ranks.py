"""One run on several processes: the same bytes as one process gives, and nothing lost when a rank dies."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import zygote
from helpers import ROOT, SMALL, contents, process, script
from transport_geometry import torchrun
from transport_geometry.errors import UserError
from transport_geometry.records.results import COLUMNS, Measurements, add_results, gather, load_results

import numpy as np
import pytest
import torch

CPU = ["--device", "cpu"]
SMALL_A = (
    "--models stdlib-s,stdlib-m --k 2 --tokens 3k,10k --seeds 0,1 --recipe base,saelens --sinks keep,drop "
    "--expansion 4 --eval-seqs 8 --ctx 64"
).split()
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as torchrun gives each rank


def alone(name: str, *arguments):
    """The script without torchrun."""
    return script(name, *arguments, *CPU, environment=zygote.OFFLINE | ONE_THREAD)


def under_torchrun(n: int, *command) -> list[str]:
    meeting = "--rdzv-backend c10d --rdzv-endpoint localhost:0".split()
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(n), *meeting, *map(str, command), *CPU]


def folders(tmp_path: pathlib.Path) -> list:
    return ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    alone("expb.py", *SMALL, *folders(folder))
    return folder / "out"


@pytest.mark.slow
def test_three_ranks_leave_the_bytes_of_one(tmp_path):
    alone("expa.py", *SMALL_A, "--out", tmp_path / "one", "--cache", tmp_path / "a")
    three = under_torchrun(3, "expa.py", *SMALL_A, "--out", tmp_path / "three", "--cache", tmp_path / "b")
    done = process(*three, env=ONE_THREAD)
    assert done.stdout.count("kernels: ") == done.stdout.count("report: ") == 1  # one rank speaks
    assert json.loads((tmp_path / "three/run.json").read_text())["ranks"] == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len({tuple(sorted(p.name for p in (tmp_path / cache).iterdir())) for cache in "ab"}) == 1


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="finds the rank's process under /proc")
def test_a_rank_that_dies_is_named_and_another_number_of_ranks_goes_on(one, tmp_path):
    command = [*SMALL, "--save-tokens", *folders(tmp_path)]
    program = [sys.executable, *under_torchrun(2, "expb.py", *command)]
    streams = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    both = subprocess.Popen(program, cwd=ROOT, env={**os.environ, **ONE_THREAD}, **streams)
    part = tmp_path / "out/.rank1/conditions.csv"
    while not part.exists() and both.poll() is None:
        time.sleep(0.005)
    children = pathlib.Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    (second,) = [pid for pid in children if b"RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    _, said = both.communicate(timeout=120)
    assert both.returncode != 0 and re.search(r"rank\s*: 1\b", said) and "-9" in said
    assert part.exists()  # what it had measured is kept
    alone("expb.py", *command)
    assert not list((tmp_path / "out").glob(".rank*"))
    mine = contents(tmp_path / "out")
    del mine["tokens.npz"]
    for name, content in contents(one).items():
        if name not in ("report.md", "report.html", "verdict.json"):  # which say that tokens were kept
            assert mine[name] == content, name
    with np.load(tmp_path / "out/tokens.npz") as tokens:
        assert len({name.rpartition("/")[0] for name in tokens.files}) == 3 * (3 + 4)


def test_a_fault_says_which_rank(tmp_path):
    second = 'import os; os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}'
    done = script("expb.py", "--models", "nowhere/at-all", "--out", tmp_path / "out", setup=second, check=2)
    assert "expb.py, rank 1 of 2: --models nowhere/at-all" in done.stderr


def test_two_ranks_on_mps_are_refused(monkeypatch):
    monkeypatch.setattr(torchrun, "WORLD", 2)
    with pytest.raises(UserError, match="MPS serves one process"):
        torchrun.join(torch.device("mps"))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_all_of_it_once_and_about_equal_in_weight(world, monkeypatch):
    monkeypatch.setattr(torchrun, "WORLD", world)
    for weights in ([3, 1, 1, 5, 2, 2, 1, 4, 1, 1, 3], [9, 1, 2, 3], []):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(torchrun, "RANK", rank)
            parts.append(torchrun.share(list(range(len(weights))), weights))
        assert sum(parts, []) == list(range(len(weights)))
        most = max(sum(weights[i] for i in part) for part in parts)
        assert most <= sum(weights) / world + max(weights, default=0)
        assert world != 2 or len(weights) != 4 or parts == [[0], [1, 2, 3]]


UNMET = """
from transport_geometry import torchrun
torchrun.RANK, torchrun.WORLD = {rank}, 2
torchrun.join = torchrun.wait = torchrun.leave = lambda *a: None
"""


@pytest.mark.slow
def test_a_rank_that_writes_elsewhere_is_missed(tmp_path):
    """Rank 0 of two whose folder the other does not share: no report of half the conditions."""
    # the other has trained its share, and could not wait for what this one trains to measure any
    for rank, status in ((1, 2), (0, 1)):
        command = [*SMALL, "--out", tmp_path / f"out{rank}", "--cache", tmp_path / "cache"]
        done = script("expb.py", *command, setup=UNMET.format(rank=rank), check=status)
    assert "do all ranks write to the same --out?" in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "out0/report.md").exists()


def test_gathering_twice_or_after_a_crash_counts_nothing_twice(tmp_path):
    def part(name: str, value: float) -> Measurements:
        key = dict(model="m", layer=1, sae=name, recipe="base", d_sae=4, k=2, seed=0, tokens=10)
        sums = {"sse": np.full((1, 3), value), "d": np.array([4])}
        rows = [dict.fromkeys(COLUMNS, value) | key]
        return Measurements(rows, sums, {f"m@1/{name}/sse": np.ones(3)}, {})

    add_results(tmp_path, {}, part("a", 1.0))
    # gathered once, and killed before its folder was removed
    add_results(tmp_path / ".rank1", {}, part("a", 1.0))
    add_results(tmp_path / ".rank1", {}, part("b", 2.0))
    gather(tmp_path, {})
    rows, sums = load_results(tmp_path)
    assert [r["sae"] for r in rows] == ["a", "b"] and sums["sse"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert not (tmp_path / ".rank1").exists()
    gather(tmp_path, {})
    assert len(load_results(tmp_path)[0]) == 2
