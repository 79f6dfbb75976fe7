"""How values are written and read again: the examples beside each function, and what no example can show."""

import doctest
import math

from transport_geometry.errors import Damaged
from transport_geometry.records import store, tables

import numpy as np
import pytest


def test_the_examples_hold():
    failed, tried = doctest.testmod(tables)
    assert failed == 0 and tried > 10


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_is_no_number_is_called_undefined_everywhere(value):
    texts = [tables.cell(value), tables.short(value), tables.signed(value), tables.percent(value)]
    texts += [tables.bounds(value, 1.0), tables.bounds(1.0, value), tables.span(value, 0.0, 1.0)]
    assert set(texts) == {"undefined"}
    assert tables.plain(value) is None


def test_six_digits_of_a_cell_are_read_again(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"model": "16", "x": x, "n": n} for n, x in enumerate(rng.standard_cauchy(200) * 1e3)]
    rows.append({"model": "x", "x": np.nan, "n": 200})
    (tmp_path / "t.csv").write_bytes(tables.as_csv(rows, ["model", "x", "n"]))
    again = tables.read_table(tmp_path / "t.csv")
    for row, back in zip(rows, again, strict=True):
        assert back["model"] == row["model"] and back["n"] == row["n"]  # a folder may be called 16
        assert back["x"] == pytest.approx(row["x"], rel=5e-6, nan_ok=True)


def test_columns_of_a_table_stand_below_each_other():
    rows = [{"name": "a" * n, "value": 10.0**n} for n in range(1, 9)]
    lines = tables.markdown(rows, ("name", "value")).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 10
    assert len({line.index("|", 1) for line in lines}) == 1


def test_arrays_come_back_and_pickles_do_not(tmp_path):
    store.write(path := tmp_path / "t.npz", tables.as_npz({"x": np.arange(3), "name": np.array(["a", "ö"])}))
    back = tables.read_npz(path)
    assert back["x"].tolist() == [0, 1, 2] and back["name"].tolist() == ["a", "ö"]
    half = path.read_bytes()[:80]
    np.savez(path, x=np.array([print], dtype=object))
    for content in (path.read_bytes(), b"", b"PK garbage", half):
        path.write_bytes(content)
        with pytest.raises(Damaged):
            tables.read_npz(path)
