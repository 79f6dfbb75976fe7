"""Exp-F: its rule on planted truths, its losses on reconstructions that are known, and the script itself."""

import dataclasses
import itertools
import shutil

import expf_rate
from helpers import ROOT, contents, one_line, script, tiny_model
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.records.tables import read_table
from transport_geometry.statistics import rate_curves
from transport_geometry.statistics.resampling import document_weights

import numpy as np
import pytest
import torch

SMALL = (
    "--models stdlib-s@3,stdlib-s@5,stdlib-m@3 --k 2,4,8 --tokens 3k --expansion 4 --eval-seqs 6 --ctx 64"
).split()


# ----------------------------------------------------------------------------------------------- the losses
def test_nothing_and_everything_lost():
    """1 - R²_Fisher is 0 for h itself and 1 for the mean, as 1 - R² is."""
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (6, 12), generator=torch.Generator().manual_seed(5))
    results = evaluate(
        Hook(model, 1), rows, {"h": lambda h, mean: h, "mean": lambda h, mean: mean.expand_as(h)}, 6
    )
    losses = {}
    for name, result in results.items():
        sums = Sums({q: v[None] for q, v in result.sums.items()}, np.ones((1, 6)), 16)
        losses[name] = {q: v.item() for q, v in computed(sums, expf_rate.LOSSES).items()}
    names = ("1-r2", "1-r2_fisher", "1-cosine", "half_swd", "kl", "dce", "1-ce_rec")
    assert [losses["h"][name] for name in names] == pytest.approx([0] * 7, abs=1e-6)
    assert [losses["mean"][name] for name in names[:2]] == pytest.approx([1, 1], abs=1e-5)


# ------------------------------------------------------------------------------------------------- the rule
def planted(of_r2: np.ndarray, of_ce: np.ndarray, seed: int = 0):
    """(curves, code) of two models of len(of_r2) depths: the large one's losses are the small one's, times
    these factors, at equal bits.
    """
    rng, depths, ks = np.random.default_rng(seed), len(of_r2), (4, 12, 32)
    model, depth, k = (v.ravel() for v in np.meshgrid(["s", "l"], np.arange(depths), ks, indexing="ij"))
    bits = 10 * k + 3.0
    level = rng.uniform(0.5, 1, depths)[depth]
    large = model == "l"
    factors = dict.fromkeys(expf_rate.NAMES, np.ones(depths)) | {"1-r2": of_r2, "1-ce_rec": of_ce}
    losses = {name: level * bits**-0.5 * np.where(large, of[depth], 1.0) for name, of in factors.items()}
    at = itertools.product("sl", range(depths))
    hooks = {(m, str(i)): {n: (model == m) & (depth == i) & (k == n) for n in ks} for m, i in at}
    pairs = {str(i): (("s", str(i)), ("l", str(i))) for i in range(depths)}
    lines = rate_curves.RateCurves(["s", "l"], hooks, np.ones((23, len(k))), pairs)
    tiled = {name: np.tile(v, (23, 1)) for name, v in losses.items()}
    return lines, rate_curves.Coded("0.5σ", np.tile(bits, (23, 1)), tiled)


def said(of_r2, of_ce) -> tuple[str, dict]:
    lines, code = planted(np.asarray(of_r2, float), np.asarray(of_ce, float))
    of = expf_rate.by_geometry(expf_rate.ratio_rows(lines, [code]), "0.5σ")
    return expf_rate.leaf_f(of["1-r2"]["apart"]), of


def test_every_leaf():
    leaf, of = said(np.ones(6), np.ones(6))  # one model twice
    assert leaf == "same"
    assert all(loss["ratio"]["factor"] == 1 == loss["apart"]["factor"] for loss in of.values())
    spread = np.array([1, 1.02, 0.98, 1.05, 0.95, 1.0])
    leaf, of = said(1.5 * spread, spread)
    assert leaf == "differs" and of["1-r2"]["apart"]["factor"] == pytest.approx(1.5)
    assert of["1-r2"]["apart"]["p"] == 2 / 64
    assert said(1.5 * spread, 1.4 * spread)[0] == "same"  # both lose more: the same answer
    assert said(spread / 1.5, spread)[0] == "differs"
    assert said(1.5 * spread[:5], spread[:5])[0] == "undecided"  # 5 pairs
    for wild in ([3, 0.4, 1.1, 2.5, 0.5, 1.0], [3, 0.8, 1.8, 2.5, 0.8, 1.2]):  # the second 1.45 in the mean
        assert said(wild, np.ones(6))[0] == "undecided"


def test_the_rule_rarely_invents_a_difference():
    """No difference between the geometries, hooks that vary by a third: `differs` in at most 5% of 400."""
    rng = np.random.default_rng(0)
    leaves = [expf_rate.leaf_f(expf_rate.over_pairs(rng.normal(0, 0.3, 6))) for _ in range(400)]
    assert leaves.count("differs") / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    for edge in (1.25, 1 / 1.25):  # at the margin itself `same` is wrong
        at = [expf_rate.leaf_f(expf_rate.over_pairs(rng.normal(np.log(edge), 0.1, 6))) for _ in range(400)]
        assert at.count("same") / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_every_leaf_of_a_pair():
    """Two hooks by themselves: factors that documents agree about, or not."""
    lines, code = planted(np.array([1.5, 1.1, 1.5]), np.ones(3))
    of = {pair: expf_rate.of_pair(pair, lines, code, units=12) for pair in lines.pairs}
    apart = of["0"]["1-r2"]["apart"]
    assert (apart["factor"], apart["lo"], apart["hi"]) == pytest.approx((1.5, 1.5, 1.5))
    leaves = [expf_rate.leaf_of_pair(of[pair]["1-r2"]["apart"]) for pair in lines.pairs]
    assert leaves == ["differs", "same", "differs"]


def test_a_pair_is_not_judged_on_what_is_left_of_its_documents():
    """Documents that disagree; two documents; and resamples of which some have no ratio."""

    def leaf(centre, sd, units, undefined=0):
        logs = np.log(centre) + np.r_[0, 0, 0, np.random.default_rng(0).normal(0, sd, 500)]
        logs[3 : 3 + undefined] = np.nan
        return expf_rate.leaf_of_pair(expf_rate.over_documents(logs, units))

    assert (leaf(1.5, 0.1, 24), leaf(1.0, 0.1, 24)) == ("differs", "same")
    assert leaf(1.5, 0.5, 24) == leaf(1.0, 0.5, 24) == "undecided"
    assert leaf(1.5, 0.1, 2) == leaf(1.0, 0.1, 2) == "undecided"
    assert leaf(1.5, 0.1, 24, undefined=1) == leaf(1.0, 0.1, 24, undefined=500) == "undecided"
    assert expf_rate.leaf_of_pair(expf_rate.over_documents(np.full(23, np.nan), 24)) == "undecided"


def test_of_documents_drawn_alike_a_pair_differs_once_in_twenty():
    """The interval of the ratio of two means over 12 documents, truly 1, holds 1 in 95%, within 3 standard
    errors of 600 draws.
    """
    rng = np.random.default_rng(3)
    weights = document_weights(12, 300, seed=0)
    covered = []
    for _ in range(600):
        of = np.exp(rng.normal(0, 0.4, (2, 12)))
        first, second = (weights @ of.T / weights.sum(1, keepdims=True)).T
        found = expf_rate.over_documents(np.log(second / first), 12)
        covered.append(found["lo"] < 1 < found["hi"])
    assert abs(np.mean(covered) - 0.95) < 3 * (0.05 * 0.95 / 600) ** 0.5


def test_ratios_at_equal_behaviour():
    """The large model loses twice in R² and nothing in CE: at equal CE it takes as many bits, and its R² is
    twice as bad.
    """
    lines, code = planted(2 * np.ones(2), np.ones(2))
    rows = {(row["at_equal"], row["of"], row["depth"]): row for row in expf_rate.ratio_rows(lines, [code])}
    assert rows["1-ce_rec", "bits", "0"]["ratio"] == pytest.approx(1)
    assert rows["1-ce_rec", "1-r2", "1"]["ratio"] == pytest.approx(2)
    assert rows["bits", "1-r2", "0"]["lo"] == pytest.approx(2)


def test_bits_star_says_what_lies_beyond_the_grid():
    """CE_rec .80, .88, .94 at 4, 12, 32: below, on and beyond the grid, and half-way between two points."""
    lines, code = planted(np.ones(1), np.ones(1))
    lost = np.tile([0.2, 0.12, 0.06], (23, 2))
    code = dataclasses.replace(code, losses=code.losses | {"1-ce_rec": lost})
    eight = dataclasses.replace(code, name="8 bits", bits=2 * code.bits)
    rows = {row["CE_rec"]: row for row in rate_curves.reached(lines, [eight, code]) if row["model"] == "s"}
    assert rows[0.85]["k*"] == "9.0 [9.0, 9.0]" and rows[0.85]["bits*"] == "93.0 [93.0, 93.0]"
    assert rows[0.85]["bits* at 8 bits"] == "186.0 [186.0, 186.0]"
    assert rows[0.95]["k*"] == "> 32 [> 32, > 32]" and rows[0.95]["bits*"] == "> 323 [> 323, > 323]"
    all_above = dataclasses.replace(code, losses=code.losses | {"1-ce_rec": lost / 10})
    low = rate_curves.reached(lines, [dataclasses.replace(all_above, name="8 bits"), all_above])[0]
    assert low["k*"].startswith("< 4") and low["bits*"].startswith("< 43")


# ------------------------------------------------------------------------------------------------ the script
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The results folder of one small run."""
    folder = tmp_path_factory.mktemp("expf")
    script("expf_rate.py", *SMALL, "--out", folder / "out", "--cache", folder / "cache")
    return folder / "out"


@pytest.mark.slow
def test_what_a_run_leaves_behind(run):
    out = run
    assert " ".join(sorted(p.name for p in out.iterdir())) == (
        "conditions.csv directions.csv directions.png finish.csv front.png observer.csv quantised.csv "
        "rate.png rates.csv ratios.csv ratios.png report.html report.md run.json sequences.npz softmax.csv "
        "spectra.csv units.csv verdict.json"
    )
    report = (out / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# Exp-F") and "**This grid cannot decide" in report
    rates = read_table(out / "rates.csv")
    assert len(rates) == 9 * 4
    of = {(row["model"], row["layer"], row["k"]): row for row in read_table(out / "conditions.csv")}
    for row in rates:
        if row["code"] == "8 bits":
            plain = of[row["model"], row["layer"], row["k"]]
            assert row["bits"] == plain["bits"] and row["1-r2"] == pytest.approx(1 - plain["r2"], rel=1e-4)
    # a coarser grid costs fewer bits and loses no less
    by_code = {(r["model"], r["layer"], r["k"], r["code"]): r for r in rates}
    for model, layer, k, code in by_code:
        if code == "0.25σ":
            fine, coarse, whole = (by_code[model, layer, k, c] for c in ("0.25σ", "1σ", "8 bits"))
            assert coarse["bits"] < fine["bits"] < whole["bits"]
            # a fine grid's error may happen to help, by a part in thousands
            assert 0.998 * whole["1-r2"] < fine["1-r2"] < coarse["1-r2"]
    (softmax,) = read_table(out / "softmax.csv")
    assert max(softmax["sequence"], softmax["same"]) < 1e-4


@pytest.mark.slow
def test_pairs_of_layers_have_the_curves_of_their_hooks(run, tmp_path):
    """The pair 3:5 of stdlib-s, from the SAEs of the run above: bits and losses are those of its hooks."""
    out = tmp_path / "pairs"
    cache = run.parent / "cache"
    models = SMALL.index("--models")
    grid = [*SMALL[:models], "--models", "stdlib-s", "--pairs", "3:5", *SMALL[models + 2 :]]
    done = script("expf_rate.py", *grid, "--out", out, "--cache", cache)
    assert "is lost at block 5 than block 3 of stdlib-s?" in " ".join(done.stdout.split())
    rates = {(r["layer"], r["k"], r["code"]): r for r in read_table(out / "rates.csv")}
    whole = [row for row in read_table(run / "rates.csv") if row["model"] == "stdlib-s"]
    assert len(rates) == len(whole) == 6 * 4
    for row in whole:
        of = rates[row["layer"], row["k"], row["code"]]
        assert (of["bits"], of["1-r2"]) == (row["bits"], row["1-r2"])

    def along(name):  # bits, and ln 1 - R², at 0.5σ of the hook's three k
        rows = [rates[layer, k, "0.5σ"] for layer in (3, 5) for k in (2, 4, 8)]
        return np.array([row[name] for row in rows]).reshape(2, 3)

    bits, loss = along("bits"), np.log(along("1-r2"))
    at = np.linspace(bits[:, 0].max(), bits[:, 2].min(), 1000)
    ratio = np.exp((np.interp(at, bits[1], loss[1]) - np.interp(at, bits[0], loss[0])).mean())
    (row,) = (
        r
        for r in read_table(out / "ratios.csv")
        if (r["code"], r["at_equal"], r["of"]) == ("0.5σ", "bits", "1-r2")
    )
    assert row["pair"] == "stdlib-s@5 over stdlib-s@3" and row["ratio"] == pytest.approx(ratio, rel=1e-3)
    before = contents(out)
    script("expf_rate.py", "--from", out)
    assert contents(out) == before
    summary = script("common.py", "report", tmp_path).stdout
    assert "(stdlib-s@5 over stdlib-s@3)" in " ".join(summary.split())


@pytest.mark.slow
def test_from_gives_the_same_bytes(run):
    before = contents(run)
    for name in ("report.md", "verdict.json", "ratios.csv", "rate.png"):
        (run / name).unlink()
    script("expf_rate.py", "--from", run)
    assert contents(run) == before


@pytest.mark.slow
def test_rows_of_another_script_serve_at_8_bits(tmp_path):
    """The committed folder of Exp-B: its tables are printed, and nothing in it changes."""
    out = tmp_path / "expb"
    shutil.copytree(ROOT / "outputs/reference/expb", out)
    before = contents(out)
    done = script("expf_rate.py", "--from", out)
    assert "From the rows of expb.py" in done.stdout and "No verdict" in done.stdout
    assert "54 of 54 SAEs" in done.stdout and contents(out) == before


def test_files_of_saes_are_refused():
    done = script("expf_rate.py", "--sae", "somewhere", "--models", "stdlib-s@3", check=2)
    assert one_line(done).endswith("--sae: Exp-F quantises the codes of SAEs that it trains itself")
