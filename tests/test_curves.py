"""k*, the sparsity tax and the power law on cases done by hand; a bootstrap that knows what it resamples."""

import itertools

from transport_geometry.reporting.expa_learning import k_star_section, law_section
from transport_geometry.statistics.curves import Curves, KStar, k_star, k_stars, laws, power_law
from transport_geometry.statistics.hook_pair import Conditions

import numpy as np
import pytest

K = np.array([8, 16, 32])


def test_k_star_interpolates_on_the_grid():
    ce = np.array([[0.80, 0.84, 0.88], [0.86, 0.9, 0.95], [0.1, 0.2, 0.3], [0.80, 0.85, 0.84]])
    np.testing.assert_allclose(k_star(K, ce, 0.85), [20, -np.inf, np.inf, 16])
    assert np.isnan(k_star(K, np.full((1, 3), np.nan), 0.85)).all()  # one seed: no draws


def star(model: str, draws: list[float]) -> KStar:
    return KStar(model, "0.50", "base", "keep", 10, 0.85, 8, 32, np.array(draws, float))


def test_the_tax_is_the_large_models_k_star_over_the_small_ones():
    """Beyond the grid there is none."""
    assert star("large", [20, 0, 0, 18, 20, np.inf]).words() == (20, 18, "> 32")
    assert star("large", [-np.inf, 0, 0, -np.inf, -np.inf, 9]).words() == ("< 8", "< 8", 9)
    assert np.isnan(star("large", [20, 0, 0, np.nan]).words()[1:]).all()  # one seed
    small, large = star("small", [10.0] * 6), star("large", [20, 0, 0, 18, 20, 22])
    section = k_star_section([small, large], "small", "large")
    assert section.count("2.00 [1.81, 2.19]") == 1
    for other in (star("large", [np.inf] * 6), star("middle", [20, 0, 0, 18, 20, 22])):
        assert "2.00 [" not in k_star_section([small, other], "small", "large")


def test_power_law_finds_the_limit_and_refuses_what_has_none():
    tokens = np.array([1, 3, 10, 30, 100]) * 10**5
    rng = np.random.default_rng(0)
    noise = 0.0005 * rng.standard_normal((50, 5))
    limit, exponent = power_law(tokens, 0.9 - 0.2 * (tokens / 1e5) ** -0.5 + noise)
    assert np.abs(limit - 0.9).max() < 0.01 and np.abs(exponent - 0.5).max() < 0.1
    # a straight line in log tokens
    assert np.isnan(power_law(tokens, 0.5 + 0.05 * np.log(tokens)[None])[0]).all()


def planted(budgets: list[int], seeds: int, seed_sd: float = 0.0) -> Conditions:
    """One model whose CE_rec is 0.9 - 0.2 (tokens / 1e5)^-0.5 at k = 8, and 0.04 more at 16."""
    k, tokens, seed = (np.array(column) for column in zip(*itertools.product([8, 16], budgets, range(seeds))))
    ce = 0.9 - 0.2 * (tokens / 1e5) ** -0.5 + 0.04 * (k == 16)
    ce = ce + seed_sd * np.random.default_rng(0).standard_normal(seeds)[seed]
    names = {"model": np.full(len(k), "m"), "depth": np.full(len(k), "0.50")}
    meta = names | {"k": k, "tokens": tokens, "seed": seed}
    return Conditions({"ce_rec": np.tile(ce, (203, 1))}, meta, np.ones(len(k)), ["m"], 40)


BUDGETS = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]


def test_curves_are_means_over_seeds_and_resample_them():
    c = planted(BUDGETS, seeds=3, seed_sd=0.01)
    curves = Curves.of(c, 200)
    ce = curves.ce["m", "0.50"]
    assert ce.shape == (203, 2, 5)
    here = (c.meta["k"] == 16) & (c.meta["tokens"] == BUDGETS[1])
    assert ce[0, 1, 1] == pytest.approx(c.values["ce_rec"][0, here].mean())
    # a seed is drawn whole: what it does to one budget it does to all
    moved = ce - ce[0]
    assert np.abs(moved - moved[:, :1, :1]).max() < 1e-12 and 0.002 < moved[3:, 0, 0].std() < 0.02
    assert np.isnan(Curves.of(planted(BUDGETS, seeds=1), 200).ce["m", "0.50"][3:]).all()


def test_rows_of_k_star_and_of_the_law():
    curves = Curves.of(planted(BUDGETS, seeds=3), 200)
    (first, *_) = stars = k_stars(curves, "base", "keep")
    assert len(stars) == len(BUDGETS) * 2 and (first.tokens, first.target) == (BUDGETS[0], 0.85)
    assert first.row() == dict(
        model="m", depth="0.50", recipe="base", sinks="keep", tokens=BUDGETS[0], target=0.85
    ) | dict(k_min=8, k_max=16, value="> 16", lo="> 16", hi="> 16")
    rows = laws(curves, "base", "keep", decay=True)
    assert [row["k"] for row in rows] == [8, 16]
    assert rows[0]["limit"] == pytest.approx(0.9, abs=0.01) == rows[1]["limit"] - 0.04
    assert "| 0.50  | base   | keep  | 8 " in law_section(rows) and "other curves" not in law_section(rows)


def test_no_law_without_budgets_that_decay():
    for rows in (
        laws(Curves.of(planted(BUDGETS[:4], seeds=3), 20), "base", "keep", decay=True),
        laws(Curves.of(planted(BUDGETS, seeds=3), 20), "saelens", "keep", decay=False),
    ):
        assert np.isnan([row["limit"] for row in rows]).all()
        assert law_section(rows).startswith("CE_rec at infinite tokens: not identified (5 decayed budgets")
    known = laws(Curves.of(planted(BUDGETS, seeds=3), 20), "base", "keep", decay=True)
    assert "2 other curves: not identified" in law_section(known + rows)
