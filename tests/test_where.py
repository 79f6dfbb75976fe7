"""Where it hurts, against the per-token arrays that --save-tokens keeps."""

import zygote
from helpers import script
from transport_geometry.records.condition import Condition
from transport_geometry.records.tables import read_npz, read_table
from transport_geometry.reporting.where_it_hurts import N_WORST, curves, position_bins, quoted, section

import numpy as np
import pytest


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("where")
    grid = "--models stdlib-s@1,stdlib-s@4 --k 2,4 --tokens 2k --expansion 2 --eval-seqs 6 --ctx 40".split()
    places = "--out", folder / "out", "--cache", folder / "cache"
    script("expb.py", *grid, "--save-tokens", "--device", "cpu", *places, setup=zygote.UNDRAWN)
    return folder / "out"


def harm_of(out):
    """{condition: [S,T-1]}."""
    kept = read_npz(out / "tokens.npz")
    names = [name.removesuffix("/ce_recon") for name in kept if name.endswith("/ce_recon")]
    return {name: kept[f"{name}/ce_recon"] - kept[f"{name}/ce_orig"] for name in names}


def name_of(row):
    one = Condition.of(row)
    return f"{one.hook}/{one.within_hook}"


def test_bins_cover_every_position_once():
    for n in (1, 2, 3, 8, 39, 255):
        assert [i for first, last in position_bins(n) for i in range(first, last + 1)] == list(range(n))


def test_harm_by_position_is_the_mean_of_its_tokens(out):
    harm, rows = harm_of(out), read_table(out / "harm.csv")
    assert len(rows) == 4 * len(position_bins(39)) and {name_of(row) for row in rows} <= harm.keys()
    for row in rows:
        part = harm[name_of(row)][:, row["first"] : row["last"] + 1]
        assert row["dce"] == pytest.approx(part.mean(), rel=1e-4, abs=1e-6)
        assert row["share"] == pytest.approx(part.sum() / harm[name_of(row)].sum(), rel=1e-3, abs=1e-6)
    conditions = {name_of(row): row["dce"] for row in read_table(out / "conditions.csv")}
    for name in {name_of(row) for row in rows}:
        here = [row for row in rows if name_of(row) == name]
        whole = sum(row["dce"] * (row["last"] - row["first"] + 1) for row in here) / 39
        assert whole == pytest.approx(conditions[name], rel=1e-4)


def test_the_worst_tokens_are_the_worst(out):
    harm, rows = harm_of(out), read_table(out / "worst.csv")
    assert len(rows) == 4 * N_WORST
    for name in {name_of(row) for row in rows}:
        here = [row for row in rows if name_of(row) == name]
        assert [row["rank"] for row in here] == list(range(1, N_WORST + 1))
        largest = np.sort(harm[name].ravel())[::-1][:N_WORST]
        assert [row["dce"] for row in here] == pytest.approx(largest.tolist(), rel=1e-4)
        for row in here:
            assert harm[name][row["sequence"], row["position"]] == pytest.approx(row["dce"], rel=1e-4)


def test_a_report_names_each_token_once(out):
    text = section(read_table(out / "harm.csv"), read_table(out / "worst.csv"))
    table = text.partition("The tokens that it costs most")[2]
    lines = [line for line in table.splitlines() if line.startswith("| stdlib-s@")]
    assert len(lines) == N_WORST == len(set(lines)) and list(curves(read_table(out / "harm.csv"))) == [
        "stdlib-s@1",
        "stdlib-s@4",
    ]
    assert text in (out / "report.md").read_text() and (out / "harm.png").exists()
    assert quoted("a|b\n`") == r"`a\u007cb\n'`"
