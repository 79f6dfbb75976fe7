"""What a newcomer edits to add a proxy: one entry in one file, done on a copy of the tree."""

import shutil
import sys

from helpers import ROOT, process
from transport_geometry.records.tables import read_table

import pytest

ENTRY = """    # the largest coordinate of a token's error
    Metric("linf", mean("linf"), DISTORTION, EUCLIDEAN, lambda p: p.delta_flat.abs().amax(1)),
"""


@pytest.mark.slow
def test_a_proxy_is_one_entry_in_one_file(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "transport_geometry", copy / "transport_geometry")
    for script in ("common.py", "expb.py"):
        shutil.copy(ROOT / script, copy)
    (copy / "demo").symlink_to(ROOT / "demo")
    registry = copy / "transport_geometry/measuring/metrics.py"
    text = registry.read_text(encoding="utf-8")
    before = '    Metric("swd_tok"'
    assert text.count(before) == 1
    registry.write_text(text.replace(before, ENTRY + before), encoding="utf-8")

    command = "--models stdlib-s@2,stdlib-s@3 --k 4,8 --tokens 3k --eval-seqs 4 --ctx 32".split()
    where = "--out", tmp_path / "out", "--cache", tmp_path / "cache"
    process("expb.py", *command, *where, cwd=copy, env={"PYTHONPATH": str(copy)})

    rows = read_table(tmp_path / "out/conditions.csv")
    columns = list(rows[0])
    assert columns.index("linf") == columns.index("swd_tok") - 1
    for row in rows:  # of a token's error: between its root mean square over d and its length
        if row["recipe"] == "base":
            assert 0 < row["linf"] and row["mse"] ** 0.5 * 0.5 < row["linf"] < (row["mse"] * 64) ** 0.5
        elif row["sae"] == "null-identity":
            assert row["linf"] == 0
    board = read_table(tmp_path / "out/leaderboard.csv")
    assert {(row["target"], row["stratum"]) for row in board if row["proxy"] == "linf"} == {
        (target, stratum) for target in ("ce_rec", "kl") for stratum in ("pooled", "stdlib-s")
    }
    assert "| linf " in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert sys.modules["transport_geometry"].__file__.startswith(str(ROOT))  # the copy stayed a copy
