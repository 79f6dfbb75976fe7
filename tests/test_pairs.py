"""What is said of pairs of SAEs, on planted numbers."""

from transport_geometry.records.tables import as_csv
from transport_geometry.reporting.audit_report import (
    answer,
    console,
    pair_lines,
    pair_report,
    pair_sentence,
    short_names,
    warnings,
)
from transport_geometry.statistics import sae_pairs
from transport_geometry.statistics.sae_pairs import (
    AT_ONE_K,
    HOOK_AND_TOKENS,
    PAIRS,
    comparable,
    counted,
    dominated,
    kind,
    pairs,
    residuals,
)

import numpy as np
import pytest
from matplotlib.text import Text


def planted(r2, ce_rec, noise=0.0, shared=0.1, l0=None, ks=None, places=None, resamples=400):
    """(rows, values, settings) of SAEs whose R² and CE_rec are these, their resamples moving together by
    `shared` and apart by `noise` (SD).
    """
    C = len(r2)
    rng, values = np.random.default_rng(0), {}
    for name, point in (("r2", r2), ("ce_rec", ce_rec)):
        moved = shared * rng.standard_normal((resamples, 1)) + noise * rng.standard_normal((resamples, C))
        values[name] = np.vstack([np.tile(point, (3, 1)), point + moved])
    places = places or [("m", 3, 64, False)] * C
    ks, l0 = ks or [0] * C, l0 or [16.0] * C
    rows = [
        dict(sae=f"sae{i}", model=p[0], layer=p[1], k=ks[i], l0=l0[i], r2=r2[i], ce_rec=ce_rec[i])
        for i, p in enumerate(places)
    ]
    saes = {row["sae"]: {"ctx": p[2], "bos": p[3]} for row, p in zip(rows, places)}
    return rows, values, {"documents": [48], "cut": False, "saes": saes}


def test_every_kind_from_its_intervals():
    up, down, both, none, nan = (0.01, 0.02), (-0.02, -0.01), (-0.01, 0.02), (0.01, 0.01), (np.nan, np.nan)
    for r2, ce, says in (
        (up, up, "orders"),
        (down, down, "orders"),
        (up, down, "inverts"),
        (down, up, "inverts"),
        (up, both, "claims"),
        (down, both, "claims"),
        (both, up, "misses"),
        (both, down, "misses"),
        (both, both, "neither"),
        (none, up, "undefined"),
        (up, none, "undefined"),
        (nan, up, "undefined"),
        (up, nan, "undefined"),
        ((0, 0), (0, 0), "neither"),
        ((2e-8, 3e-8), (1e-7, 2e-6), "neither"),
    ):
        assert kind(r2, ce) == says, (r2, ce)


def test_planted_pairs_are_found_and_paired():
    """The common part of the resamples, ten times the differences, must not hide them."""
    rows, values, settings = planted(
        r2=[0.80, 0.90, 0.85, 0.850001], ce_rec=[0.90, 0.95, 0.97, 0.90], noise=0.002
    )
    found = {(row["sae_a"], row["sae_b"]): row for row in pairs(rows, values, settings)}
    assert {names: row["kind"] for names, row in found.items()} == {
        ("sae1", "sae0"): "orders",
        ("sae2", "sae0"): "orders",
        ("sae3", "sae0"): "claims",
        ("sae1", "sae2"): "inverts",
        ("sae1", "sae3"): "orders",
        ("sae3", "sae2"): "misses",
    }
    row = found["sae1", "sae2"]
    assert (row["delta_r2"], row["delta_ce_rec"]) == pytest.approx((0.05, -0.02))
    assert row["delta_ce_rec_lo"] < -0.02 < row["delta_ce_rec_hi"] < 0
    assert row["delta_r2_hi"] - row["delta_r2_lo"] == pytest.approx(2 * 1.96 * 0.002 * 2**0.5, rel=0.15)
    # the inverted one first; what is not told apart comes behind what is ordered
    assert list(found)[0] == ("sae1", "sae2") and list(found)[-2:] == [("sae3", "sae0"), ("sae3", "sae2")]


def test_how_many_documents_would_tell_two_apart():
    """A difference of one and a half standard errors: (1.96 / 1.5)^2 times as many."""
    rows, values, settings = planted(
        r2=[0.8, 0.9], ce_rec=[0.9, 0.915], noise=0.01 / 2**0.5, resamples=20_000
    )
    (row,) = pairs(rows, values, settings)
    assert row["kind"] == "claims"
    assert row["documents_to_tell"] == pytest.approx(48 * (1.96 / 1.5) ** 2, rel=0.05)
    told = pairs(*planted(r2=[0.8, 0.9], ce_rec=[0.9, 0.95], noise=0.001))[0]
    alike = pairs(*planted(r2=[0.8, 0.9], ce_rec=[0.9, 0.9], noise=0.001))[0]
    assert told["documents_to_tell"] == 48 and np.isnan(alike["documents_to_tell"])


def test_the_order_of_the_saes_leaves_no_trace():
    rows, values, settings = planted(r2=[0.80, 0.90, 0.80], ce_rec=[0.90, 0.95, 0.97], noise=0.002)
    turned = {name: v[:, ::-1] for name, v in values.items()}
    assert as_csv(pairs(rows, values, settings), PAIRS) == as_csv(pairs(rows[::-1], turned, settings), PAIRS)


def test_only_saes_of_one_k_that_saw_the_same_tokens_are_compared():
    """At one hook or at two; those without a k by their L0, to the nearest power of two."""
    places = [("m", 3, 64, False), ("m", 3, 64, False), ("m", 3, 48, False)]
    places += [("m", 3, 64, True), ("m", 4, 64, False), ("n", 3, 64, False)]
    growing = np.linspace(0.5, 0.9, 6)
    rows, values, settings = planted(growing, growing, places=places)
    assert sorted(comparable(rows, settings, HOOK_AND_TOKENS).values()) == [[0, 1], [2], [3], [4], [5]]
    assert sorted((row["sae_a"], row["sae_b"]) for row in pairs(rows, values, settings)) == [
        ("sae1", "sae0"),
        ("sae4", "sae0"),
        ("sae4", "sae1"),
    ]
    l0 = [8, 16, 16, 14.0, 22.0, 23.0]
    rows, values, settings = planted(growing, growing[::-1], noise=0.001, ks=[8, 16, 16, 0, 0, 0], l0=l0)
    groups = {group[1]: members for group, members in comparable(rows, settings, AT_ONE_K).items()}
    assert groups == {8: [0], 16: [1, 2, 3, 4], 32: [5]}
    assert len(pairs(rows, values, settings)) == 6
    assert [*comparable(rows, settings, HOOK_AND_TOKENS).values()] == [[0, 1, 2, 3, 4, 5]]


def with_ends(rows, values, settings, word="as it reads"):
    """As `audit_rows` gives them, as far as text is made of them."""
    for i, row in enumerate(rows):
        for name in ("r2", "ce_rec"):
            row[f"{name}_lo"], row[f"{name}_hi"] = np.percentile(values[name][3:, i], [2.5, 97.5])
        row |= dict(word=word, says="No sink.", read="Read R².", trained_on="not said", unseen=())
        row |= dict(k=row["k"] or "none", ctx=64, bos=False)
    return rows


def test_one_sequence_shows_nothing():
    rows, values, settings = planted(r2=[0.8, 0.9], ce_rec=[0.9, 0.95], noise=0, shared=0)
    found = pairs(rows, values, settings)
    assert found[0]["kind"] == "undefined" and "1 cannot be judged" in pair_sentence(found)
    said = answer(with_ends(rows, values, settings, "cannot be judged"), found, settings).found
    assert said == "Cannot be judged: 2. None of 1 pair of one k can be judged: there is no interval."


def test_the_report_counts_all_pairs_and_names_the_inverted_ones():
    """By the CE_rec that is surely lost, ten at most."""
    n = 8  # R² up, CE_rec down: all 28 inverted, the ends the furthest
    found = pairs(*planted(np.linspace(0.8, 0.9, n), np.linspace(0.95, 0.9, n), noise=0.001))
    assert "R² orders 0 as CE_rec does and inverts 28." in pair_sentence(found)
    lines = pair_lines(found)
    assert lines[0].startswith("- R² inverts sae7 over sae0 (m, block 3, k = 16, 64 tokens): R² +0.100 [")
    assert len(lines) == 11 and lines[-1] == "- and 18 more in pairs.csv"
    surely = [row["delta_ce_rec_hi"] for row in found]
    assert surely == sorted(surely) and surely[-1] < 0
    places = [("m", layer, 64, False) for layer in (3, 3, 5, 5, 5)]
    numbers = [0.8, 0.9, 0.7, 0.8, 0.9], [0.9, 0.8, 0.7, 0.8, 0.9]
    rows, values, settings = planted(*numbers, noise=0.001, places=places)
    report = pair_report(pairs(rows, values, settings), settings)
    table = "".join(report).replace(" ", "")
    assert "|m|16|betweenblocks|6|0|2|2|2|0|0|" in table and "|m|16|block5|3|0|3|0|0|0|0|" in table
    assert "|m|16|block3|1|1|0|0|0|0|0|" in table and "48 documents" in "".join(report)
    assert "nothing is said" in pair_sentence([]) and len(pair_report([], settings)) == 2


def test_the_three_lines_and_what_is_printed():
    """What came out with its interval; no line above 80 columns, the SAEs in the order of CE_rec."""
    numbers = dict(r2=[0.80, 0.90, 0.85], ce_rec=[0.90, 0.90, 0.95])
    rows, values, settings = planted(**numbers, noise=0.001, shared=0.01)
    found = pairs(rows, values, settings)
    assert counted(found) == dict(orders=1, inverts=1, claims=1, misses=0, neither=0, undefined=0)
    settings["refused"] = {"org/broken": "no SAE in it"}
    rows = with_ends(rows, values, settings)
    said = answer(rows, found, settings)
    for part in (
        "As it reads: 3. Of 3 pairs of one k (3 at one hook, 0 between layers) R² inverts 1; not told ",
        "furthest: sae1 over sae2, R² +0.050 [+0.0",
        "CE_rec -0.050 [-0.05",
        " 1 other refused.",
    ):
        assert part in said.found
    assert "up to 0.075 inversions would come by chance" in said.limits
    printed = "\n".join([*said.lines(), console(rows, found, settings)])
    assert max(map(len, printed.splitlines())) <= 80
    at = [printed.index(f"\n{name} ") for name in ("sae2", "sae0", "sae1")]
    assert at == sorted(at) and "refused: org/broken: no SAE in it" in printed
    long = [f"org/{'x' * 50}/trainer_{i}-resid_post_layer_3-of-many-others" for i in range(3)]
    for pair in found:
        pair |= {f"sae_{end}": long[int(pair[f"sae_{end}"][3:])] for end in "ab"}
    for row, name in zip(rows, long):
        settings["saes"][name] = settings["saes"][row["sae"]]
        row["sae"] = name
    assert max(map(len, console(rows, found, settings).splitlines())) <= 80
    assert len(set(short_names(long, 26).values())) == 3
    assert answer(rows[:1], [], settings).found.startswith("As it reads: R² 0.800 [0.7")


def test_what_another_sae_of_the_hook_does_better_with_no_more_latents():
    """Over k: the one of k = 16 is worse than that of 8; that of 32 is the best."""
    rows, values, settings = planted(
        r2=[0.7, 0.8, 0.9], ce_rec=[0.90, 0.85, 0.95], noise=0.002, ks=[8, 16, 32], l0=[8.0, 16.0, 32.0]
    )
    assert dominated(rows, values, settings) == ["", "sae0", ""]
    values["ce_rec"][3:, 1] += 0.05 * np.random.default_rng(1).standard_normal(len(values["ce_rec"]) - 3)
    assert dominated(rows, values, settings) == ["", "", ""]


def test_the_picture_names_every_sae_and_no_name_lies_on_another():
    """24 that are almost one, at two hooks, with names that are too long, and one worse than the mean."""
    from audit import picture

    n = 25
    places = [("EleutherAI/pythia-70m-deduped", 3 + (i > 12), 64, i > 12) for i in range(n)]
    r2 = np.r_[-0.5, np.linspace(0.80, 0.802, n - 1)]
    rows, values, settings = planted(r2, 0.9 - (r2 - 0.8), noise=0.001, shared=0.001, places=places)
    rows = with_ends(rows, values, settings)
    found = pairs([row | {"k": 0} for row in rows], values, settings)
    for row in rows:
        name = f"org/of-a-sweep-over-very-many-things-{row['sae']}/layers.3"
        row |= dict(ctx=64, bos=row["layer"] > 3, sae=name)
    figure = picture(rows, found)
    figure.canvas.draw()
    said = [text for axis in figure.axes for text in axis.texts]
    assert len({text.get_text() for text in said}) == n
    assert sum("not drawn" in text.get_text() for text in said) == 1
    boxes = [Text.get_window_extent(text) for text in said]  # without the line to its point
    for i, box in enumerate(boxes):
        assert box.x0 > 0 and box.x1 < figure.bbox.x1 and box.y0 > 0 and box.y1 < figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i]), said[i].get_text()


def test_the_residual_is_from_the_curve_of_the_others():
    r2, ce_rec = np.array([0.5, 0.6, 0.7, 0.8, 0.9]), np.array([0.5, 0.6, 0.75, 0.8, 0.9])
    value, lo, hi = residuals(*planted(r2, ce_rec, noise=0.004, shared=0.0)).T
    # between the neighbours' (.6, .8), ...
    assert value[1:4] == pytest.approx([-0.025, 0.05, -0.025], abs=1e-9)
    assert np.isnan(value[[0, 4]]).all()  # nobody beyond them
    assert (lo[1:4] < value[1:4]).all() and (value[1:4] < hi[1:4]).all() and lo[2] > 0
    assert np.isnan(residuals(*planted(r2[:3], ce_rec[:3], noise=0.004))).all() and sae_pairs.CURVE_OF == 3


@pytest.mark.parametrize(
    "r2, nosink, doubted", [(-0.7, -0.2, 1), (-0.7, 0.7, 0), (0.9, -0.2, 0), (-1, np.nan, 1)]
)
def test_a_sink_that_is_left_out_does_not_look_like_another_layer(r2, nosink, doubted):
    """R² below 0 by the sink alone: the SAE's word says so, and nothing else is wrong with it."""
    row = dict(sae="a", trained_on="m", model="m", r2=r2, r2_nosink=nosink, unseen=[])
    assert len([line for line in warnings([row]) if "the wrong model" in line]) == doubted


def test_what_is_not_patched_is_not_said_to_be():
    """An SAE that was trained without sinks is patched there too, but for --leave-sinks."""
    row = dict(sae="a", trained_on="m", model="m", r2=0.9, r2_nosink=0.9, unseen=["sinks"])
    assert "is patched there too" in warnings([row])[0] and warnings([row], leave_sinks=True) == []
