"""The rule of H2 in expb.py: which leaf applies first. (Planted studies that reach them: test_stats.py.)"""

import dataclasses

import expb
from transport_geometry.statistics.leaderboard import Contest

import numpy as np
import pytest

# evidence of which every claim holds
ALL_HOLD = Contest(
    proxy="swd_tok",
    target="ce_rec",
    n_conditions=54,
    n_cells=54,
    n_clusters=18,
    phi=0.0,
    n_effective=18.0,
    in_general=True,
    here={},
    n_proxies=14,
    n_proxies_distinct=13,
    order_control="c",
    room=0.3,
    p_perfect=0.01,
    smallest_detectable=0.1,
    of_the_proxy=dict(
        diff_control=0.2, p_control=0.01, diff_r2=0.2, p_r2=0.01, diff_loho_control=0.1, p_loho=0.01
    ),
    size_control="c",
    transfer_control="c",
    gamma_proxy=0.1,
    gamma_control=0.4,
    gamma_gain=0.3,
    gamma_gain_lo=0.1,
    gamma_gain_hi=0.5,
    in_range_proxy=0.5,
    in_range_control=0.9,
    ceiling={},
    n_resamples=0,
    seed=0,
)
NOT_A, WORSE, AS_R2 = {"diff_control": 0.09}, {"diff_control": -0.2}, {"p_r2": 0.05}
NO_SIZE = {"p_loho": 0.05}  # smaller, and not shown to be
NO_TRANSFER = {"gamma_proxy": np.nan}


def contest(new: dict) -> Contest:
    of_the_proxy = ALL_HOLD.of_the_proxy | {k: v for k, v in new.items() if k in ALL_HOLD.of_the_proxy}
    rest = {k: v for k, v in new.items() if k not in ALL_HOLD.of_the_proxy}
    return dataclasses.replace(ALL_HOLD, of_the_proxy=of_the_proxy, **rest)


@pytest.mark.parametrize(
    "new, leaf, why",
    [
        ({}, "supported", "transfers across scale better"),
        ({"diff_control": 0.10}, "supported", "transfers across scale better"),
        ({"diff_control": 0.10, "p_control": 0.05} | NO_SIZE, "beats-r2-only", "not shown to rank better"),
        ({"p_control": np.nan, "diff_loho_control": np.nan}, "undecided", "best control is undefined"),
        (NO_TRANSFER | {"diff_loho_control": np.nan}, "undecided", "no logarithm"),
        (NO_TRANSFER | {"diff_loho_control": 0.0}, "undecided", "disagree: it ranks better"),
        ({"in_range_proxy": 0.1, "diff_loho_control": -0.1}, "undecided", "disagree: it ranks better"),
        (NOT_A | {"room": 0.01}, "undecided", "disagree: it predicts the size"),
        (WORSE, "undecided", "disagree: it predicts the size"),
        (NOT_A | NO_SIZE | {"room": 0.01}, "beats-r2-only", "better than r2"),
        ({"p_control": 0.05, "diff_loho_control": np.nan}, "beats-r2-only", "better than r2"),
        (WORSE | AS_R2 | NO_SIZE | {"room": 0.01}, expb.CANNOT, "0.10; and it ranks worse"),
        (NOT_A | AS_R2 | NO_SIZE | {"p_perfect": 0.05}, expb.CANNOT, "would be 0.05 for the target"),
        (NOT_A | AS_R2 | NO_SIZE | {"smallest_detectable": 0.4}, expb.CANNOT, "the 0.40 that shows here"),
        (WORSE | AS_R2 | NO_SIZE | {"smallest_detectable": 0.4}, "rejected", "ranks worse"),
        (NOT_A | AS_R2 | NO_SIZE | NO_TRANSFER, "rejected", "nor than r2"),
        (WORSE | AS_R2 | NO_SIZE | {"p_control": 0.05}, "rejected", "nor than r2"),
        (NO_TRANSFER | {"in_range_proxy": np.nan}, "undecided", "scale undefined"),
        ({"gamma_control": np.nan}, "undecided", "scale undefined"),
        ({"in_range_proxy": 0.49}, "not-transferable", "too few"),
        ({"in_range_control": 0.49}, "not-transferable", "too few"),
        ({"gamma_proxy": -0.21}, "rejected", "not shown to transfer better"),
        ({"gamma_gain_lo": 0.0}, "rejected", "not shown to transfer better"),
        ({"gamma_gain_lo": np.nan}, "rejected", "not shown to transfer better"),
    ],
)
def test_the_first_leaf_that_applies(new, leaf, why):
    """Changes to evidence of which every claim holds; most of them let several leaves apply."""
    said, reason = expb.leaf_h2(contest(new))
    assert said == leaf and why in reason and leaf in expb.TEXT
    assert expb.leaf_h2(contest(new | {"n_clusters": 5})) == ("undecided", "5 hooks, 6 needed")
    said, reason = expb.leaf_h2(contest(new | {"n_effective": 5.9}))
    assert said == "undecided" and "18 say as much as 5.9 independent ones, 6 needed" in reason
