"""Every script of bench/ at the smallest size: it ends well, and its tables hold what they are about."""

import importlib.util
import json
import math
import re
import runpy
import sys
import zipfile

import zygote
from helpers import ROOT, script
from transport_geometry.records import compare_runs
from transport_geometry.records.tables import read_table
from transport_geometry.statistics import sae_pairs

import pytest

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "bench")
absent = [
    name for name in ("sae_lens", "sparsify", "dictionary_learning") if not importlib.util.find_spec(name)
]
needs_peers = pytest.mark.skipif(bool(absent), reason=f"the extra [parity] is not installed: no {absent}")


def bench(name: str, *arguments, **how) -> str:
    """What it prints."""
    return script(f"bench/{name}.py", *arguments, **how).stdout


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in it: rows {column: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
        )
        found.append([dict(zip(head, row)) for row in rows])
    return found


def test_every_script_is_started_here():
    assert [name for name in SCRIPTS if f"test_{name}" not in globals()] == []


# ------------------------------------------------------------------------------------------------- the timers
def test_bench_fisher():
    said = bench("bench_fisher", "stdlib-s", "--ctx", 16, "--n", 1)
    ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) x the patched forward", said)]
    assert ratios[0] == 1 and len(ratios) == 3 and min(ratios) > 0


@pytest.mark.parametrize(
    "what, n", [("--shapes 8x300,64x300", 2), ("--trained stdlib-s@1 --expansion 4 --tokens 2000", 1)]
)
def test_bench_encode(what, n):
    said = bench("bench_encode", *what.split(), *"--k 4 --N 100 --n 1".split())
    ratios = [float(ratio) for ratio in re.findall(r"encode ([\d.]+)  on \d+$", said, re.MULTILINE)]
    assert len(ratios) == n and min(ratios) > 0


def test_bench_kernels():
    said = bench("bench_kernels", *"--shapes 8x32 --N 16 --k 4 --n 1".split())
    lines = [line.rsplit(maxsplit=4) for line in said.splitlines()[-9:]]
    names, *numbers = zip(*lines[:4])
    assert names == ("encode", "decode", "distortion", "step") and len(numbers) == 4
    assert min(float(x) for column in numbers[2:] for x in column) > 0
    assert float(re.search(r"takes ([\d.]+) times", said)[1]) > 0


def test_bits():
    """A line an operator and input; the same bits whichever screen comes first."""
    lines = bench("bits").splitlines()
    assert len(lines) == len(set(lines)) == 396
    encoded: dict[str, set[str]] = {}
    for line in lines:
        at, found = line.split(": ")
        if found.startswith("topk_encode"):
            encoded.setdefault(at, set()).add(found.rsplit(maxsplit=1)[1])
    assert len(encoded) == 36 and all(len(digests) == 1 for digests in encoded.values())


def test_bench_evaluate():
    """Together and one at a time, the same numbers."""
    said = bench("bench_evaluate", "--small", *"--saes 7 --alone 3 --sequences 3".split())
    assert float(re.search(r"ratio: ([\d.]+)", said)[1]) > 0
    worst = dict(re.findall(r"(\w+) (\S+?)(?:,|$)", said.splitlines()[-1]))
    assert len(worst) == 16 and max(map(float, worst.values())) < 1e-4, worst


@pytest.mark.slow
def test_coverage(tmp_path):
    cache = tmp_path / "cache"
    run = "--models stdlib-s@2 --k 2,4 --tokens 1k --eval-seqs 4 --ctx 32".split()
    script("expb.py", *run, "--out", tmp_path / "out", "--cache", cache)
    saes = sorted(path for path in cache.iterdir() if path.is_dir())
    small = "--pool 12 --documents 3,4 --ctx 32 --draws 2".split()
    both = tables(bench("coverage", *saes, *small))
    ways = ["3 documents", "4 documents", "3 documents, two rows of each", "6 rows in a row, rows resampled"]
    for found in both:
        assert {"r2", "swd_tok", "difference in ce_rec"} < {row[""] for row in found}
        assert all(list(row) == ["", *ways] for row in found)
        assert {row[way] for row in found for way in ways} <= {"0.0%", "50.0%", "100.0%"}
    assert len(both) == 2


# -------------------------------------------------------------------------------------------- numbers of runs
def test_levels():
    found = tables(bench("levels", 1))
    # the last four: the two claims, 4 grids x 4 phi, and the claim here
    assert [len(rows) for rows in found] == [27, 9, 8, 6, 3, 16, 16, 16, 18]
    level, covered, along_depth, in_documents = found[0], found[4], found[5], found[8]
    assert {row["swap, hooks"] for row in level} <= {"0.0 ± 0.0", "100.0 ± 0.0"}
    assert all(0.5 < float(row["truth"]) < 1 for row in covered)
    assert {row["swap: no verdict"] for row in along_depth} <= {"0", "100"}
    assert {row["partial"] for row in in_documents} <= {f"{a} ({b})" for a in (0, 100) for b in (0, 100)}
    (rows,) = tables(bench("levels", 1, "--only", "rows", "--rows", ROOT / "outputs/reference/expb"))
    assert [row["SAEs"] for row in rows[::8]] == ["all", "stdlib-s", "stdlib-m", "stdlib-l"]


def test_seed_sd(tmp_path):
    shown, *_ = tables(bench("seed_sd", ROOT / "outputs/reference/expa", "--out", tmp_path))
    rows, record = read_table(tmp_path / "seed_sd.csv"), json.loads((tmp_path / "seed_sd.json").read_text())
    assert record["seeds"] == [0, 1, 2] and record["pairs"] == 3 * record["cells"]
    known = set(compare_runs.seed_spreads().columns)
    assert {row["column"] for row in rows} == {row["column"] for row in shown} == known
    assert all(math.isfinite(row["sd"]) and row["df"] > 4 for row in rows)
    # what evaluation alone makes has no seed
    assert {row["column"] for row in rows if row["sd"] == 0} == {"ce_orig", "ce_zero", "ce_mean", "l0"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kills", "corruptions"])
def test_attacks(what, monkeypatch, capsys):
    """Here and not in the fork server, which it asks for runs of its own."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "argv", ["attacks.py", what, "1", "--scripts", "expb.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench/attacks.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert not end.value.code and f"1 {what}, 0 wrong" in said, said


# ------------------------------------------------------------------------------------------------------ peers
@needs_peers
@pytest.mark.slow
def test_parity():
    (rows,) = tables(bench("parity", *"--tokens 4k --seqs 4 --ctx 64 --width 128 --k 8".split()))
    assert len(rows) == 17 and all(float(row["forward error"]) < 1e-5 for row in rows)
    assert all(abs(float(row["CE theirs"]) - float(row["CE ours"])) < 1e-4 for row in rows)


@needs_peers
@pytest.mark.slow
def test_compare_peers():
    """Where definitions coincide it agrees; in so few steps a peer may train better, which is exit 1."""
    small = "--model stdlib-s --tokens 9k --k 4 --ctx 64 --eval-seqs 8 --parity-seqs 8".split()
    done = zygote.run("bench/compare_peers.py", *small)
    said = done.stdout
    quality, same, apart, read = tables(said)
    assert len(quality) == 9 and all(float(row["L0"]) <= 4 for row in quality)
    assert len(same) == 9 and all(float(row["difference"]) < 1e-4 for row in same)
    assert float(read[0]["difference"]) < 1e-4
    failures = re.findall(r"^FAILED (.*)$", said, re.MULTILINE)
    assert all("higher R²" in why for why in failures) and done.returncode == bool(failures), done.stderr


@needs_peers
@pytest.mark.slow
def test_planted_peers():
    """Where the token is seen R^2, by any name, rises and r2_nosink falls; left out it moves nothing. (CE_rec
    goes either way by chance after so few tokens.)
    """
    small = "--tokens 8k --seqs 8 --ctx 64 --seeds 0 --k 4".split()
    stood, theirs, ours = tables(bench("planted_peers", *small))
    fed = [(row["library"], row["fed"]) for row in stood]
    assert len(fed) == 11 and fed == [(row["library"], row["fed"]) for row in ours]
    assert {library for library, _ in fed} == {"SAELens", "sparsify", "dictionary_learning"}
    first = [float(row["position 0"]) for row in stood]
    seen = [share > 0.9 for share in first]
    assert seen == [True, False, False, False, True, False, True, True, False, True, False]

    def pair(feed: str, metric: str) -> list[float]:
        (row,) = [row for row in ours if row["fed"] == feed]
        return [float(number) for number in row[metric].split(",")]

    rows, passages = "rows that begin with it", "passages that begin with it"
    for feed in (f"{rows}, one a step", passages):
        (plain, planted), (calm, calm_planted) = pair(feed, "r2"), pair(feed, "r2_nosink")
        assert planted > 0.9 > plain and calm_planted < calm - 0.02
    changes = {(row["fed"], row["its score"]): float(row["difference"]) for row in theirs}
    assert changes[f"{rows}, one a step", "fvu of held-out rows"] < -0.3
    assert changes[passages, "frac_variance_explained"] > 0.3
    assert abs(changes[f"{rows}, exclude_tokens", "fvu of held-out rows"]) < 1e-3
    assert abs(changes["its defaults: nowhere", "frac_variance_explained"]) < 1e-3


@needs_peers
@pytest.mark.slow
def test_peers_real(tmp_path):
    """On a model without a sink."""
    small = "--model stdlib-s --layers 1,3 --tokens 5k --seqs 8 --ctx 64 --k 4 --out".split()
    said = bench("peers_real", *small, tmp_path)
    saes, pairs = tables(said)
    assert [(row["library"], row["block"]) for row in saes] == [
        (library, layer) for library in ("SAELens", "sparsify", "dictionary_learning") for layer in "13"
    ]
    for row in saes:
        low, high = map(float, row["R²"].split(" to "))
        # sparsify's is of its last steps of training
        assert row["library"] == "sparsify" or low - 0.1 < float(row["its own score"].split()[0]) < high + 0.1
        assert row["the audit"] and float(row["CE_rec"].split()[0]) < 1
    assert [row["R² says, as the audit sees it"] in sae_pairs.KINDS for row in pairs] == [True] * 3


@pytest.mark.slow
def test_mps_operators(tmp_path):
    """A macOS wheel that registers two kernels lacks the others'."""
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as wheel:
        wheel.writestr("torch/lib/libtorch_cpu.dylib", b"_127wrapper_MPS_Tensor_sub..16wrapper_MPS_topk6_")
    done = script("bench/mps_operators.py", "--wheel", tmp_path / "torch.whl", check=1)
    found = dict(re.findall(r"^aten::(\S+) +MPS +(in|NOT in) the wheel", done.stdout, re.MULTILINE))
    assert found["topk"] == "in" and found["mm"] == found["searchsorted.Tensor"] == "NOT in"
    assert len(found) > 80 and found["_scaled_dot_product_attention_math_for_mps"]
