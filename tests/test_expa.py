"""Exp-A's statistics on planted truths: intervals over seeds and sequences, the tree and its error rates,
mismatch.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import expa
from transport_geometry.measuring.metrics import EUCLIDEAN_CONTROLS
from transport_geometry.statistics import deltas
from transport_geometry.statistics.hook_pair import Conditions, ModelPair, mismatch
from transport_geometry.statistics.intervals import ratio_interval

import numpy as np
import pytest
from scipy.stats import ttest_ind

MODELS, K, BUDGETS, SEEDS, N_DOC = ["small", "large"], [4, 8, 16, 32], [3, 10, 30], 3, 40
ARM = ("base", "keep")  # recipe, sinks


def grid(seeds: int = SEEDS) -> dict[str, np.ndarray]:
    cells = list(itertools.product(MODELS, K, BUDGETS, range(seeds)))
    meta = {name: np.array(column) for name, column in zip(("model", "k", "tokens", "seed"), zip(*cells))}
    return meta | {"depth": np.full(len(cells), "0.50")}


def planted(
    rng: np.random.Generator,
    delta: float | list[float] = 0.0,
    gap: float = 0.0,
    control_gap: float | None = None,
    moved: float = 0.0,
    before: float = -0.06,
    seed_sd: float = 0.003,
    seq_sd: float = 0.002,
    n_resamples: int = 100,
    seeds: int = SEEDS,
    alive: float | np.ndarray = 0.9,
) -> Conditions:
    """CE_rec of the larger model `delta` (a number or one per k) above the smaller one's, and its R^2 such
    that the smaller model's curve is `gap` in CE_rec below it; `control_gap` the same for the sink-free
    scores. At the first of three budgets the larger model's CE_rec is `before` above, at the second both are
    `moved` below. Columns of deltas.csv that nothing is planted in are CE_rec.
    """
    meta = grid(seeds)
    C, large = len(meta["k"]), meta["model"] == "large"
    at_k = np.log2(meta["k"]) - 2  # 0 1 2 3
    ce = (
        0.75
        + 0.05 * at_k
        - moved * (meta["tokens"] == BUDGETS[1])
        + large * before * (meta["tokens"] == BUDGETS[0])
        + large * np.broadcast_to(delta, 4)[at_k.astype(int)]
    )

    def score(gap: float) -> np.ndarray:
        """On the common curve, CE_rec = 0.2 + 0.8 R^2, but the larger model lies `gap` above it."""
        return (ce - 0.2 - large * gap) / 0.8

    truth = {"ce_rec": ce, "r2": score(gap)}
    truth |= {c: score(gap if control_gap is None else control_gap) for c in EUCLIDEAN_CONTROLS}
    truth["nmse_tok"] = 1 - truth["nmse_tok"]

    def measured(value: np.ndarray) -> np.ndarray:
        """Seeds, then sequences: halves around the point, resamples too; each model has its own noise."""
        seeds, of_large, of_small = rng.standard_normal(C), *rng.standard_normal(2)
        point = value + seed_sd * seeds + seq_sd * np.where(large, of_large, of_small)
        of_large, of_small = rng.standard_normal((2, n_resamples + 1, 1))
        noise = seq_sd * np.where(large, of_large, of_small)
        return np.vstack([point, point + noise[0], point - noise[0], point + noise[1:]])

    values = {name: measured(v) for name, v in truth.items()}
    values = dict.fromkeys(deltas.DELTAS + deltas.MORE_DELTAS, values["ce_rec"]) | values
    return Conditions(values, meta, np.broadcast_to(alive, C), MODELS, N_DOC)


def verdict(c: Conditions) -> dict[str, Any]:
    return expa.adjudicate(c, *ARM).record()


def verdicts(n: int, **how: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [verdict(planted(rng, **how)) for _ in range(n)]


def share(verdicts: list[dict], leaf: str) -> float:
    return float(np.mean([v["leaf"] == leaf for v in verdicts]))


# ------------------------------------------------------------------------------------------------- the tree
def test_no_gap_at_all_is_h0():
    found = verdicts(60)
    assert share(found, "H0") > 0.9
    assert share(found, "H1") == share(found, "H0+H1") == share(found, "N") == 0


def test_a_gap_that_never_was_cannot_go():
    found = verdicts(40, before=0.0)
    assert share(found, "undecided") > 0.9
    assert all(v["equal"] for v in found if "there never was a gap" in v["reason"])
    assert share(verdicts(40, before=0.0, gap=0.06), "H1") > 0.85  # what does not go may still be there


def test_patches_that_improve_ce_decide_nothing():
    """A text far from the models': CE_rec above 1 in most SAEs, whatever the gaps say."""
    rng = np.random.default_rng(0)
    for gap in (0.0, 0.06):
        c = planted(rng, gap=gap)
        found = verdict(dataclasses.replace(c, values=c.values | {"ce_rec": c.values["ce_rec"] + 0.3}))
        assert found["leaf"] == "undecided" and "improve CE" in found["reason"] and found["improved"] > 0.5


def test_r2_defl1_decides_nothing():
    rng = np.random.default_rng(0)
    c = planted(rng, gap=0.06, control_gap=0.055, delta=0.05)
    without_gap = planted(rng, gap=0.0, delta=0.05).values["r2_defl1"]
    found = verdict(dataclasses.replace(c, values=c.values | {"r2_defl1": without_gap}))
    assert found["leaf"] == "H1"
    assert "r2_defl1" in found["gamma_controls"] and found["control"] != "r2_defl1"


def pairs(n: int, **how: Any) -> Iterator[tuple[ModelPair, list[dict]]]:
    """With the tree's table at B*: for what needs a part of the tree only."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        pair = planted(rng, **how).pair(*MODELS)
        yield pair, deltas.tree_cells(pair, BUDGETS[2], BUDGETS[1])


@pytest.mark.slow
def test_h0_is_accepted_wrongly_in_at_most_one_of_twenty():
    """Delta CE_rec at the margin for one k: the worst case that is not equivalence, where 5% is reached."""
    earlier = np.array(BUDGETS[:2])
    wrong = [expa.equality(pair, cells, earlier)["h0"] for pair, cells in pairs(800, delta=[0.02, 0, 0, 0])]
    assert abs(np.mean(wrong) - 0.05) < 4 * (0.05 * 0.95 / 800) ** 0.5  # standard errors


@pytest.mark.slow
def test_h1_is_accepted_wrongly_in_at_most_one_of_twenty():
    """No gap, under noise that makes estimates of 0.03 common: only the interval protects."""
    noise = dict(delta=0.05, seed_sd=0.03, seq_sd=0.02)
    found = [expa.transfer(pair, cells, BUDGETS[2]) for pair, cells in pairs(300, **noise)]
    assert np.mean([abs(one["gamma_r2"]) >= 0.03 for one in found]) > 0.2
    assert np.mean([one["h1"] is True for one in found]) <= 0.07


@pytest.mark.slow
def test_a_gap_is_found():
    assert share(verdicts(60, gap=0.06), "H0+H1") > 0.85
    assert share(verdicts(60, gap=0.06, delta=0.05), "H1") > 0.85
    assert share(verdicts(60, gap=-0.06, delta=-0.05), "H1") > 0.85


def test_a_gap_of_normalisation_is_called_that():
    found = verdicts(40, gap=0.06, control_gap=0.0, delta=0.05)
    assert share(found, "N") > 0.9 and {v["control"] for v in found} <= set(expa.SINK_FREE)
    assert share(verdicts(40, gap=0.06, control_gap=0.055, delta=0.05), "N") < 0.1


def test_gates_stop_what_is_not_trained():
    moving = verdicts(20, moved=0.05)
    assert share(moving, "undertrained") == 1 and "still moves" in moving[0]["reason"]
    small = grid()["model"] == "small"
    assert share(verdicts(20, alive=np.where(small, 0.9, 0.5)), "undertrained") == 1
    assert share(verdicts(20, alive=np.where(small, 0.55, 0.5)), "H0") > 0.8
    noisy = verdicts(20, seq_sd=0.02)
    assert share(noisy, "undertrained") > 0.9 and "evaluation set" in noisy[0]["reason"]


def cell(**change: float) -> dict[str, float]:
    """A row of the tree's table that passes every gate."""
    row = dict(alive_small=0.9, alive_large=0.85, moved_small=0.01, moved_large=-0.01)
    return row | dict(delta_ce_rec=0.01, se=0.002, seed_variance=4e-4) | change


def test_every_cell_has_to_pass_a_gate():
    assert expa.gates([cell(), cell()]) == {"alive": True, "converged": True, "precise": True}
    for gate, change in (
        ("alive", dict(alive_large=0.7)),
        ("converged", dict(moved_large=-0.02)),
        ("precise", dict(se=0.01)),
    ):
        shut = [name for name, passed in expa.gates([cell(), cell(**change)]).items() if not passed]
        assert shut == [gate]
    assert expa.gates([cell(alive_small=0.55, alive_large=0.5)])["alive"]  # equally few


SHUT = dict.fromkeys(("alive", "converged", "precise"), False)
H0_HOLDS = dict(g0=SHUT, equal=True, gap_before=True, h0=True)
H1_HOLDS = dict(gamma_r2=0.1, gamma_r2_lo=0.05, gamma_r2_hi=0.15, same_sign=1.0, in_range=0.2, h1=True)
N_HOLDS = dict(control="cosine", gamma_control_half_b=0.01, gamma_r2_half_b=0.1, normalised_away=True)
EVERYTHING = expa.Evidence(
    previous_budget=10, improved=0.6, cells=[cell()], gamma_controls={}, **H0_HOLDS, **H1_HOLDS, **N_HOLDS
)


def test_the_leaves_have_an_order():
    """Everything holds at once, and then, one after another, not: each leaf wins over all that follow."""

    def leaf(**change: Any) -> tuple[str, str]:
        return expa.leaf_of(dataclasses.replace(EVERYTHING, **change), 3)

    assert leaf()[0] == "undecided" and leaf()[1].startswith("60% of the patches improve CE")
    judged: dict[str, Any] = dict(improved=0.5)
    shut, why = leaf(**judged)
    assert shut == "undertrained" and len(why.split("; ")) == 3
    judged |= dict(g0=dict.fromkeys(EVERYTHING.g0, True))
    not_equal, never = dict(equal=False, h0=False), dict(gap_before=False, h0=False)
    assert leaf(**judged) == ("N", "cosine has less than half of R²'s transfer gap, and CE_rec is equal")
    assert leaf(**judged, **not_equal) == ("N", "cosine has less than half of R²'s transfer gap")
    stays = judged | dict(normalised_away=False)
    assert [leaf(**stays, **how)[0] for how in ({}, not_equal, never)] == ["H0+H1", "H1", "H1"]

    # normalised_away says nothing without H1
    for h1, gone in itertools.product((False, None), (True, False)):
        without = judged | dict(h1=h1, normalised_away=gone)
        reasons = [leaf(**without, **how) for how in ({}, never, not_equal)]
        assert [one for one, _ in reasons] == ["H0", "undecided", "undecided"]
        assert all(("not transferable: only 20%" in why) is (h1 is None) for _, why in reasons)
        assert "there never was a gap" in reasons[1][1] and "about 37 seeds" in reasons[2][1]
    assert set(expa.LEAVES) == {"undecided", "undertrained", "N", "H0+H1", "H0", "H1"}


def test_a_budget_that_cannot_be_judged_stops_the_tree():
    c = planted(np.random.default_rng(0))
    small, depth = c.meta["model"] == "small", c.meta["depth"]
    elsewhere = c.meta | {"depth": np.where(small, "0.33", depth)}
    for stopped, said in (
        (dataclasses.replace(c.only(small), models=["small"]), "one model"),
        (dataclasses.replace(c, meta=elsewhere), "equal depth"),
        (c.only(c.meta["seed"] < 2), "3 seeds"),
        (c.only(c.meta["tokens"] == 30), "no budget before"),
    ):
        found = verdict(stopped)
        assert found["leaf"] == "undecided" and said in found["reason"]
        assert "g0" not in found and ("budget" in found) == (said == "no budget before")


def test_b_star_is_the_largest_budget_with_enough_seeds():
    c = planted(np.random.default_rng(0))
    found = verdict(c.only((c.meta["tokens"] < 30) | (c.meta["seed"] < 2)))
    assert (found["budget"], found["previous_budget"]) == (10, 3)


def test_r2_out_of_the_smaller_models_range_is_not_judged():
    """A clear gap, all of it outside the range where the smaller model calibrates."""
    rng = np.random.default_rng(0)
    for delta, leaf in ((0.05, "undecided"), (0.0, "H0")):
        outside = verdict(planted(rng, gap=0.3, delta=delta))
        assert outside["leaf"] == leaf and "not transferable" in outside["reason"]
        assert outside["h1"] is None and abs(outside["gamma_r2"]) > 0.03


def test_seeds_needed_by_hand():
    # (0.01 / 1.645)^2 - 0.002^2 = 3.2955e-5; 3 x 4e-4 / that = 36.4
    def needed(n: int, *cells: dict) -> str:
        return deltas.more_needed(list(cells), 0.02, n)

    assert "about 37 seeds" in needed(3, cell()) and "about 73 seeds" in needed(6, cell())
    assert "about 37 seeds" in needed(3, cell(seed_variance=1e-6), cell())  # the worst cell
    assert "more evaluation documents" in needed(3, cell(se=0.007))
    assert needed(3, cell(delta_ce_rec=0.03)) == ""  # no number of seeds would
    assert needed(3, cell(seed_variance=1e-5)) == ""  # three do


# ----------------------------------------------------------------------------------------------- intervals
def test_deltas_are_those_planted_and_their_interval_students():
    """No sequence noise: Welch's t interval of the two models' seeds, exactly."""
    c = planted(np.random.default_rng(1), seq_sd=0.0)
    row = next(r for r in deltas.delta_rows(c, *ARM) if r["k"] == 8 and r["tokens"] == 30)
    large, small = (c.values["r2"][0, c.mask(k=8, tokens=30, model=m)] for m in ("large", "small"))
    welch = ttest_ind(large, small, equal_var=False).confidence_interval(0.95)
    assert (row["delta_r2_lo"], row["delta_r2_hi"]) == pytest.approx((welch.low, welch.high))
    one_seed = deltas.delta_rows(planted(np.random.default_rng(0), seeds=1), *ARM)
    undefined = ["delta_r2_lo", "delta_r2_hi", "mismatch_lo", "mismatch_hi", "ratio"]
    assert np.isnan([row[name] for row in one_seed for name in undefined]).all()
    # R^2 up, CE_rec down; of the cells that both models have
    c = planted(np.random.default_rng(0), delta=-0.04, gap=-0.08, before=0.0, seed_sd=0.001, seq_sd=0.0)
    rows = deltas.delta_rows(c.only(~c.mask(model="large", k=4, tokens=3)), *ARM)
    assert len(rows) == len(K) * len(BUDGETS) - 1 and {row["n_seeds"] for row in rows} == {3}
    assert {value for row in rows for value in (row["mismatch"], row["mismatch_published"])} == {1}
    assert [row["delta_r2"] for row in rows] == pytest.approx([0.05] * len(rows), abs=0.01)


@pytest.mark.parametrize("seed_sd, seq_sd", [(0.02, 0.0), (0.0, 0.02), (0.01, 0.01), (0.003, 0.01)])
def test_intervals_cover_the_truth(seed_sd, seq_sd):
    """Where sequences alone make the noise, the four k are right or wrong together, and in 96.7%, not 95%."""
    rng, inside = np.random.default_rng(2), []
    for _ in range(600):
        pair = planted(rng, delta=0.03, gap=0.05, seed_sd=seed_sd, seq_sd=seq_sd).pair(*MODELS)
        for k in K:
            lo, hi = pair.interval(pair.delta("r2", k=k, tokens=30))
            inside.append(lo <= (0.03 - 0.05) / 0.8 <= hi)
    assert 0.95 - 4 * (0.05 * 0.95 / 600) ** 0.5 < np.mean(inside) < 0.967 + 4 * (0.033 * 0.967 / 600) ** 0.5


def test_ratio_is_fiellers_and_undefined_over_zero():
    rng = np.random.default_rng(4)
    sources = {"a": np.arange(1, 4), "documents": np.arange(4, 4004)}

    def draws(mean: float, noise: np.ndarray) -> np.ndarray:
        return np.r_[mean, np.full(3, mean), mean + noise]

    numerator, own = rng.standard_normal((2, 4000))
    denominator = 2 * (0.6 * numerator + 0.8 * own)
    ratio, lo, hi = ratio_interval(draws(6, numerator), draws(10, denominator), sources, 10**6)
    v = np.cov(numerator, denominator)
    # Fieller: the ratios r at which numerator - r denominator is 1.96 standard errors from 0
    for end in (lo, hi):
        se = np.sqrt(v[0, 0] - 2 * end * v[0, 1] + end**2 * v[1, 1])
        assert abs(6 - end * 10) / se == pytest.approx(1.95996, rel=1e-3)
    assert lo < ratio == 0.6 < hi
    assert np.isnan(ratio_interval(draws(6, numerator), draws(1, 2 * own), sources, 10**6)).all()


def test_hooks_are_compared_as_models_are():
    c = planted(np.random.default_rng(5), delta=0.03, gap=0.06)
    c = dataclasses.replace(c, meta=c.meta | {"layer": np.where(c.meta["model"] == "large", 7, 3)})
    hooks = c.by_hook()
    pair = ["small@3", "large@7"]
    ours, theirs = expa.adjudicate(hooks.of(pair), *ARM).record(), verdict(c)
    assert (ours["small"], ours["large"], ours["depths"]) == (*pair, ["paired"])
    assert [ours[key] for key in ("leaf", "reason")] == [theirs[key] for key in ("leaf", "reason")]
    assert ours["gamma_r2_lo"] == theirs["gamma_r2_lo"] and ours["gamma_controls"] == theirs["gamma_controls"]
    names = {"small", "large", "depth"}
    rows, expected = deltas.delta_rows(hooks, *ARM, [pair]), deltas.delta_rows(c, *ARM)
    for row, other in zip(rows, expected, strict=True):
        assert {key: str(value) for key, value in row.items() if key not in names} == {
            key: str(value) for key, value in other.items() if key not in names
        }
    flipped = deltas.delta_rows(hooks, *ARM, [pair[::-1]])
    assert [row["delta_r2"] for row in flipped] == [-row["delta_r2"] for row in rows]


# ------------------------------------------------------------------------------------------------ mismatch
UP, DOWN = np.array([0.5, 0.5]), np.array([0.8, 0.8])  # in the smaller model


def test_mismatch_on_cases_done_by_hand():
    rate, lo, hi = mismatch([UP, UP + 0.1], [DOWN, DOWN - 0.1])
    assert rate == 1 and np.isnan([lo, hi]).all()  # all pairs agree on that
    rate, lo, hi = mismatch([UP[:1], UP[:1] + 0.1], [DOWN[:1], DOWN[:1] + 0.1])
    assert rate == 0 and np.isnan([lo, hi]).all()  # one seed
    three, ce_large = np.full(3, 0.5), np.array([0.9, 0.7, 0.8])  # agree, differ, tie
    rate, lo, hi = mismatch([three, three + 0.1], [np.full(3, 0.8), ce_large])
    assert rate == pytest.approx(0.5) and 0 <= lo < 0.5 < hi <= 1
