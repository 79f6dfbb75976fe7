"""Exp-A's statistics on planted truths: intervals over seeds and sequences, the tree and its error rates,
mismatch, k*, power law.
"""

import itertools

import expa
from transport_geometry import stats
from transport_geometry.metrics import EUCLIDEAN_CONTROLS

import numpy as np
import pytest
from scipy.stats import ttest_ind

MODELS, K, BUDGETS, SEEDS, N_DOC = ["small", "large"], [4, 8, 16, 32], [3, 10, 30], 3, 40


def grid(seeds=SEEDS, budgets=BUDGETS) -> dict:
    cells = list(itertools.product(MODELS, K, budgets, range(seeds)))
    meta = {name: np.array(column) for name, column in zip(("model", "k", "tokens", "seed"), zip(*cells))}
    return meta | {"depth": np.full(len(cells), "0.50")}


def planted(
    rng,
    delta=0.0,
    gap=0.0,
    control_gap=None,
    moved=0.0,
    before=-0.06,
    seed_sd=0.003,
    seq_sd=0.002,
    n_resamples=100,
    seeds=SEEDS,
):
    """(values, meta) with CE_rec of the larger model `delta` (a number or one per k) above the smaller one's,
    and its R^2 such that the smaller model's curve is `gap` in CE_rec below it; `control_gap` the same for
    the sink-free scores. At the first of three budgets the larger model's is `before` above.
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
    # the common curve: CE_rec = 0.2 + 0.8 R^2; the larger model lies `gap` above it
    score = lambda g: (ce - 0.2 - large * g) / 0.8
    truth = {"ce_rec": ce, "r2": score(gap)} | {
        c: score(gap if control_gap is None else control_gap) for c in EUCLIDEAN_CONTROLS
    }
    truth["nmse_tok"] = 1 - truth["nmse_tok"]

    # seeds, then sequences: halves around the point, resamples too; each model has its own noise
    def measured(value):
        point = value + seed_sd * rng.standard_normal(C) + seq_sd * np.where(large, *rng.standard_normal(2))
        noise = seq_sd * np.where(large, *rng.standard_normal((2, n_resamples + 1, 1)))
        return np.vstack([point, point + noise[0], point - noise[0], point + noise[1:]])

    return {name: measured(v) for name, v in truth.items()}, meta


def leaves(n: int, alive=0.9, **how) -> list[dict]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        values, meta = planted(rng, **how)
        out.append(expa.adjudicate(values, np.broadcast_to(alive, len(meta["k"])), meta, MODELS, N_DOC))
    return out


def share(verdicts: list[dict], leaf: str) -> float:
    return float(np.mean([v["leaf"] == leaf for v in verdicts]))


# ------------------------------------------------------------------------------------------------- the tree
def test_no_gap_at_all_is_h0():
    verdicts = leaves(100)
    assert (
        share(verdicts, "H0") > 0.9
        and share(verdicts, "H1") == share(verdicts, "H0+H1") == share(verdicts, "N") == 0
    )


def test_a_gap_that_never_was_cannot_go():
    verdicts = leaves(60, before=0.0)
    assert share(verdicts, "undecided") > 0.9 and all(
        v["equal"] for v in verdicts if "there never was a gap" in v["reason"]
    )
    assert share(leaves(60, before=0.0, gap=0.06), "H1") > 0.85  # what does not go may still be there


def test_patches_that_improve_ce_decide_nothing():
    """A text far from the models': CE_rec above 1 in most SAEs, whatever the gaps say."""
    rng = np.random.default_rng(0)
    for gap in (0.0, 0.06):
        values, meta = planted(rng, gap=gap)
        values["ce_rec"] = values["ce_rec"] + 0.3
        verdict = expa.adjudicate(values, np.full(len(meta["k"]), 0.9), meta, MODELS, N_DOC)
        assert (
            verdict["leaf"] == "undecided" and "improve CE" in verdict["reason"] and verdict["improved"] > 0.5
        )


def test_r2_defl1_decides_nothing():
    rng = np.random.default_rng(0)
    values, meta = planted(rng, gap=0.06, control_gap=0.055, delta=0.05)
    values["r2_defl1"] = planted(rng, gap=0.0, delta=0.05)[0]["r2_defl1"]
    verdict = expa.adjudicate(values, np.full(len(meta["k"]), 0.9), meta, MODELS, N_DOC)
    assert (
        verdict["leaf"] == "H1"
        and "r2_defl1" in verdict["gamma_controls"]
        and verdict["control"] != "r2_defl1"
    )


def test_h0_is_accepted_wrongly_in_at_most_one_of_twenty():
    """Delta CE_rec at the margin for one k: the worst case that is not equivalence, where 5% is reached."""
    wrong = np.mean([v["h0"] for v in leaves(800, delta=[0.02, 0, 0, 0])])
    assert abs(wrong - 0.05) < 4 * (0.05 * 0.95 / 800) ** 0.5  # standard errors


def test_h1_is_accepted_wrongly_in_at_most_one_of_twenty():
    """No gap, under noise that makes estimates of 0.03 common: only the interval protects."""
    verdicts = leaves(300, delta=0.05, seed_sd=0.03, seq_sd=0.02)
    large = np.mean([abs(v["gamma_r2"]) >= 0.03 for v in verdicts])
    assert large > 0.2 and np.mean([v["h1"] is True for v in verdicts]) <= 0.07


def test_a_gap_is_found():
    assert share(leaves(60, gap=0.06), "H0+H1") > 0.85
    assert share(leaves(60, gap=0.06, delta=0.05), "H1") > 0.85
    assert share(leaves(60, gap=-0.06, delta=-0.05), "H1") > 0.85


def test_a_gap_of_normalisation_is_called_that():
    verdicts = leaves(60, gap=0.06, control_gap=0.0, delta=0.05)
    assert share(verdicts, "N") > 0.9 and {v["control"] for v in verdicts} <= set(expa.SINK_FREE)
    assert share(leaves(60, gap=0.06, control_gap=0.055, delta=0.05), "N") < 0.1


def test_gates_stop_what_is_not_trained():
    moving = leaves(20, moved=0.05)
    assert share(moving, "undertrained") == 1 and "still moves" in moving[0]["reason"]
    alive = np.where(grid()["model"] == "small", 0.9, 0.5)
    assert (
        share(leaves(20, alive=alive), "undertrained") == 1
        and share(leaves(20, alive=np.where(grid()["model"] == "small", 0.55, 0.5)), "H0") > 0.8
    )
    noisy = leaves(20, seq_sd=0.02)
    assert share(noisy, "undertrained") > 0.9 and "evaluation set" in noisy[0]["reason"]


def test_what_cannot_be_judged_is_undecided():
    rng = np.random.default_rng(0)
    values, meta = planted(rng)
    verdict = lambda keep, models=MODELS, **change: expa.adjudicate(
        {m: v[:, keep] for m, v in values.items()},
        np.full(keep.sum(), 0.9),
        {name: v[keep] for name, v in (meta | change).items()},
        models,
        N_DOC,
    )
    everything = np.ones(len(meta["k"]), bool)
    for said, args in (
        ("one model", (meta["model"] == "small", ["small"])),
        ("3 seeds", (meta["seed"] < 2,)),
        ("no budget before", (meta["tokens"] == 30,)),
    ):
        assert verdict(*args)["leaf"] == "undecided" and said in verdict(*args)["reason"]
    elsewhere = verdict(everything, depth=np.where(meta["model"] == "small", "0.33", "0.50"))
    assert elsewhere["leaf"] == "undecided" and "equal depth" in elsewhere["reason"]
    # a clear gap, all of it outside the range where the smaller model calibrates
    for delta, leaf in ((0.05, "undecided"), (0.0, "H0")):
        values, _ = planted(rng, gap=0.3, delta=delta)
        outside = verdict(everything)
        assert (
            outside["leaf"] == leaf
            and "not transferable" in outside["reason"]
            and outside["h1"] is None
            and abs(outside["gamma_r2"]) > 0.03
        )
    # neither equal nor different: the number of seeds that would tell
    said = [v["reason"] for v in leaves(40, seed_sd=0.012, seq_sd=0.001) if v["leaf"] == "undecided"]
    assert any("seeds in each model would show equality" in reason for reason in said)  # in half of the 40


def test_seeds_needed_by_hand():
    # (0.01 / 1.645)^2 - 0.002^2 = 3.2955e-5; 3 x 4e-4 / that = 36.4
    row = dict(delta_ce_rec=0.01, seed_variance=4e-4, se=0.002)
    assert "about 37 seeds" in expa.n_needed([row], 0.02, 3) and "about 73 seeds" in expa.n_needed(
        [row], 0.02, 6
    )
    assert (
        "more evaluation documents" in expa.n_needed([row | {"se": 0.007}], 0.02, 3)
        and expa.n_needed([row | {"delta_ce_rec": 0.03}], 0.02, 3) == ""
    )


# ----------------------------------------------------------------------------------------------- intervals
def test_the_interval_of_a_delta_is_students():
    """No sequence noise: Welch's t interval of the two models' seeds, exactly."""
    rng = np.random.default_rng(1)
    values, meta = planted(rng, seq_sd=0.0)
    row = next(
        r
        for r in expa.delta_rows(values_for_deltas(values), meta, MODELS, {}, N_DOC)
        if r["k"] == 8 and r["tokens"] == 30
    )
    cell = (meta["k"] == 8) & (meta["tokens"] == 30)
    welch = ttest_ind(
        *(values["r2"][0, cell & (meta["model"] == m)] for m in ("large", "small")), equal_var=False
    ).confidence_interval(0.95)
    assert (row["delta_r2_lo"], row["delta_r2_hi"]) == pytest.approx((welch.low, welch.high))


def values_for_deltas(values: dict) -> dict:
    return {m: values.get(m, values["ce_rec"]) for m in expa.DELTAS + expa.MORE_DELTAS}


@pytest.mark.parametrize("seed_sd, seq_sd", [(0.02, 0.0), (0.0, 0.02), (0.01, 0.01), (0.003, 0.01)])
def test_intervals_cover_the_truth(seed_sd, seq_sd):
    """Where sequences alone make the noise, the four k are right or wrong together, and in 96.7%, not 95%."""
    rng, inside = np.random.default_rng(2), []
    for _ in range(600):
        values, meta = planted(rng, delta=0.03, gap=0.05, seed_sd=seed_sd, seq_sd=seq_sd)
        at, w, sources = stats.seed_draws(meta, len(values["r2"]))
        for k in K:
            cell = (meta["k"] == k) & (meta["tokens"] == 30)
            r2 = {m: expa.mean_over(values["r2"][at], w, cell & (meta["model"] == m)) for m in MODELS}
            lo, hi = stats.t_interval(r2["large"] - r2["small"], sources, N_DOC)
            inside.append(lo <= (0.03 - 0.05) / 0.8 <= hi)
    assert 0.95 - 4 * (0.05 * 0.95 / 600) ** 0.5 < np.mean(inside) < 0.967 + 4 * (0.033 * 0.967 / 600) ** 0.5


def test_a_percentile_bootstrap_over_three_seeds_would_not():
    """Why the interval is Student's: resampling three seeds knows nothing of degrees of freedom."""
    rng, inside = np.random.default_rng(3), []
    for _ in range(2000):
        x, y = rng.standard_normal((2, 3))
        draws = [(rng.multinomial(2, [1 / 3] * 3, 400) / 2) @ v for v in (x, y)]
        lo, hi = np.quantile(draws[0] - draws[1], [0.025, 0.975])
        inside.append(lo <= 0 <= hi)
    assert np.mean(inside) < 0.90  # it is 0.857, 5 standard errors below


def test_one_seed_gives_no_interval():
    values, meta = planted(np.random.default_rng(0), seeds=1)
    for row in expa.delta_rows(values_for_deltas(values), meta, MODELS, {}, N_DOC):
        assert (
            np.isfinite(row["delta_r2"])
            and np.isnan([row["delta_r2_lo"], row["delta_r2_hi"], row["mismatch_lo"], row["ratio"]]).all()
        )
        assert expa.of(row, "delta_r2").endswith(" [undefined]")


def test_ratio_is_fiellers_and_undefined_over_zero():
    rng = np.random.default_rng(4)
    sources = {"a": np.arange(1, 4), "documents": np.arange(4, 4004)}
    draw = lambda mean, sd, noise: np.r_[mean, np.full(3, mean), mean + sd * noise]
    shared, own = rng.standard_normal((2, 4000))
    ratio, lo, hi = stats.ratio_interval(
        draw(6, 1, shared), draw(10, 2, 0.6 * shared + 0.8 * own), sources, 10**6
    )
    v11, v12, v22 = (
        np.cov(shared)[()],
        2 * np.cov(shared, 0.6 * shared + 0.8 * own)[0, 1],
        4 * np.var(0.6 * shared + 0.8 * own, ddof=1),
    )
    # Fieller: the ratios r at which numerator - r denominator is 1.96 standard errors from 0
    for end in (lo, hi):
        assert abs(6 - end * 10) / np.sqrt(v11 - 2 * end * v12 + end**2 * v22) == pytest.approx(
            1.95996, rel=1e-3
        )
    assert lo < ratio == 0.6 < hi
    assert np.isnan(stats.ratio_interval(draw(6, 1, shared), draw(1, 2, own), sources, 10**6)).all()


# -------------------------------------------------------------------------------------- mismatch, k*, power law
def test_mismatch_on_cases_done_by_hand():
    assert expa.mismatch([0.5, 0.5], [0.6, 0.6], [0.8, 0.8], [0.7, 0.7])[0] == 1 and np.isnan(
        expa.mismatch([0.5, 0.5], [0.6, 0.6], [0.8, 0.8], [0.7, 0.7])[1]
    )
    assert expa.mismatch([0.5], [0.6], [0.8], [0.9]) == (
        0.0,
        pytest.approx(np.nan, nan_ok=True),
        pytest.approx(np.nan, nan_ok=True),
    )
    rate, lo, hi = expa.mismatch(
        [0.5, 0.5, 0.5], [0.6, 0.6, 0.6], [0.8, 0.8, 0.8], [0.9, 0.7, 0.8]
    )  # agree, differ, tie
    assert rate == pytest.approx(0.5) and 0 <= lo < 0.5 < hi <= 1
    values, meta = planted(
        np.random.default_rng(0), delta=-0.04, gap=-0.08, before=0.0, seed_sd=0.001, seq_sd=0.0
    )  # R^2 up, CE_rec down
    for row in expa.delta_rows(values_for_deltas(values), meta, MODELS, {}, N_DOC):
        assert (
            row["mismatch"] == 1
            and row["mismatch_published"] == 1
            and row["delta_r2"] == pytest.approx(0.05, abs=0.01)
        )


def test_k_star_interpolates_on_the_grid():
    k = np.array([8, 16, 32])
    ce = np.array([[0.80, 0.84, 0.88], [0.86, 0.9, 0.95], [0.1, 0.2, 0.3], [0.80, 0.85, 0.84]])
    np.testing.assert_allclose(expa.k_star(k, ce, 0.85), [20, -np.inf, np.inf, 16])
    assert np.isnan(expa.k_star(k, np.full((1, 3), np.nan), 0.85)).all()  # one seed: no draws
    row = dict(draws=np.array([20, 0, 0, 18, 20, np.inf]), k_min=8, k_max=32)
    assert expa.k_star_words(row) == (20, 18, "> 32")
    assert (
        expa.tax_lines(
            [
                row
                | dict(model=m, depth="0.50", recipe="base", sinks="keep", tokens=10, target=0.85, draws=d)
                for m, d in (("small", np.full(6, 10.0)), ("large", np.r_[20, 0, 0, 18, 20, 22]))
            ],
            dict(small="small", large="large"),
        )[2].count("2.00 [1.81, 2.19]")
        == 1
    )


def test_power_law_finds_the_limit_and_refuses_what_has_none():
    tokens = np.array([1, 3, 10, 30, 100]) * 10**5
    rng = np.random.default_rng(0)
    ce = np.stack([0.9 - 0.2 * (tokens / 1e5) ** -0.5 + 0.0005 * rng.standard_normal(5) for _ in range(50)])
    limit, exponent = expa.power_law(tokens, ce)
    assert np.abs(limit - 0.9).max() < 0.01 and np.abs(exponent - 0.5).max() < 0.1
    # a straight line in log tokens
    assert np.isnan(expa.power_law(tokens, 0.5 + 0.05 * np.log(tokens)[None])[0]).all()


def test_published_numbers_stand_beside_measured_ones():
    hooks = {f"{expa.S}@3": "0.50", f"{expa.L}@12": "0.50"}
    delta = {
        "small": expa.S,
        "large": expa.L,
        "depth": "0.50",
        "k": 8,
        "tokens": 10**7,
        "recipe": "base",
        "sinks": "keep",
        "delta_ce_rec": -0.05,
        "delta_r2": 0.1,
        "mismatch_published": 1.0,
        "ratio": np.nan,
    }
    sae = {
        "model": expa.L,
        "layer": 12,
        "k": 8,
        "recipe": "base",
        "sae": "topk-x32",
        "tokens": 10**7,
        "r2": 0.95,
        "ce_rec": 0.5,
        "cosine": 0.8,
        "alive": 0.3,
    }
    tax = {
        "model": expa.L,
        "depth": "0.50",
        "recipe": "base",
        "sinks": "keep",
        "tokens": 10**7,
        "target": 0.85,
        "draws": np.array([90.0]),
    }
    table = "\n".join(expa.published_lines([delta], [sae], [tax], {"hooks": hooks}))
    for line in ("delta_ce_rec", "| -0.099 ", "0.049", "0.269", "98"):
        assert line in table
    assert "ratio" not in table and "ratio" in "\n".join(
        expa.published_lines([delta | {"tokens": 10**8}], [], [], {"hooks": hooks})
    )
    never = "\n".join(expa.published_lines([], [], [tax | {"draws": np.array([np.inf])}], {"hooks": hooks}))
    assert "undefined" in never
    saes = [
        sae | {"model": m, "layer": layer, "k": k, "r2": k / 100 + x, "ce_rec": k / 50 - x}
        for m, layer, x in ((expa.S, 3, 0), (expa.L, 12, 0.1))
        for k in (8, 16)
    ]
    assert "correlation" in "\n".join(
        expa.published_lines([], saes, [], {"hooks": hooks})
    ) and "| -1 " in "\n".join(expa.published_lines([], saes, [], {"hooks": hooks}))
    assert expa.published_lines([delta | {"k": 9}], [], [], {"hooks": hooks}) == []
