"""The research log's numbers stand beside what a run measured of the same, and beside nothing else."""

from transport_geometry.reporting import published
from transport_geometry.reporting.published import L, S
from transport_geometry.statistics.curves import KStar

import numpy as np

HOOKS = {f"{S}@3": "0.50", f"{L}@12": "0.50", f"{L}@4": "0.17"}
ARM = {"recipe": "base", "sinks": "keep"}
DELTA = {"small": S, "large": L, "depth": "0.50", "k": 8, "tokens": 10**7, **ARM}
DELTA |= {"delta_ce_rec": -0.05, "delta_r2": 0.1, "mismatch_published": 1.0, "ratio": np.nan}
SAE = {"model": L, "layer": 12, "k": 8, "recipe": "base", "sae": "topk-x32", "tokens": 10**7}
SAE |= {"r2": 0.95, "ce_rec": 0.5, "cosine": 0.8, "alive": 0.3}


def star(k: float) -> KStar:
    return KStar(L, "0.50", "base", "keep", 10**7, 0.85, 8, 128, np.array([k]))


def cells(section: str) -> dict[str, list[str]]:
    """{what: [published, measured, difference]}"""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 4}


def test_published_numbers_stand_beside_measured_ones():
    table = cells(published.section([DELTA], [SAE], [star(90.0)], HOOKS))
    assert table["delta_ce_rec (k=8, 10M, base, sinks keep)"] == ["-0.099", "-0.05", "0.049"]
    assert table[f"ce_rec ({L}, k=8, base, topk-x32)"] == ["0.269", "0.5", "0.231"]
    assert table[f"k* at 0.85 ({L}, base, sinks keep)"] == ["98", "90", "-8"]
    assert not any(what.startswith("ratio") for what in table)  # none was published at 10M
    later = cells(published.section([DELTA | {"tokens": 10**8}], [], [], HOOKS))
    assert later["ratio (k=8, 100M, base, sinks keep)"] == ["10.7", "undefined", "undefined"]


def test_a_k_star_beyond_the_grid_is_undefined():
    table = cells(published.section([], [], [star(np.inf)], HOOKS))
    assert table[f"k* at 0.85 ({L}, base, sinks keep)"] == ["98", "undefined", "undefined"]


def test_the_correlation_is_within_k_and_of_two_models():
    saes = [
        SAE | {"model": model, "layer": layer, "k": k, "r2": k / 100 + x, "ce_rec": k / 50 - x}
        for model, layer, x in ((S, 3, 0), (L, 12, 0.1))
        for k in (8, 16)
    ]
    what = "correlation of R² with CE_rec within k (base, topk-x32)"
    assert cells(published.section([], saes, [], HOOKS))[what][1] == "-1"
    assert what not in cells(published.section([], saes[2:], [], HOOKS))


def test_nothing_published_nothing_said():
    assert published.section([DELTA | {"k": 9}, DELTA | {"depth": "0.17"}], [], [], HOOKS) == ""
    assert published.section([], [SAE | {"layer": 4}, SAE | {"tokens": 10**6}], [], HOOKS) == ""
