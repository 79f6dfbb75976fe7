"""Every figure of README's result sections comes from the committed reference folders: each sentence is made
from them here, and no other figure stands there.
"""

import csv
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from transport_geometry.tables import percent, signed, span

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs/reference"


# ----------------------------------------------------------------------------------- what the folders hold
def table(folder: str, name: str) -> list[dict[str, str]]:
    with open(REFERENCE / folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdict(folder: str) -> dict[str, Any]:
    return json.loads((REFERENCE / folder / "verdict.json").read_text(encoding="utf-8"))


def leaderboard(folder: str) -> dict[str, dict[str, str]]:
    rows = table(folder, "leaderboard.csv")
    return {r["proxy"]: r for r in rows if r["target"] == "ce_rec" and r["stratum"] == "pooled"}


def report_table(folder: str, title: str) -> list[dict[str, str]]:
    """The rows of stdlib models in the table of a section of the report."""
    text = (REFERENCE / folder / "report.md").read_text(encoding="utf-8")
    lines = text.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return [dict(zip(cells[0], row)) for row in cells[1:] if row[0].startswith("stdlib")]


# -------------------------------------------------------------------------------- as README prints numbers
def minus(value: float, digits: int = 2) -> str:
    return signed(value, digits).replace("-", "−")


def spanned(row: dict[str, Any], name: str, digits: int = 2) -> str:
    """+0.12 [−0.10, +0.14]"""
    ends = (row[name], row[f"{name}_lo"], row[f"{name}_hi"])
    value, lo, hi = (None if end in ("", "undefined") else float(end) for end in ends)
    return span(value, lo, hi, digits).replace("-", "−")


def p_of(p: float) -> str:
    if p >= 0.095:
        return f"{p:.2f}"
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.4f}"


# -------------------------------------------------------------------------------------- README's sentences
WHAT_YOU_WILL_SEE = (
    "{v[n_clusters]} hooks, {v[n_conditions]} SAEs",
    "ungated it would read *{v[leaf_if_ungated]}*: {v[a_control]} leaves {v[room]:.2f} to gain in partial "
    "Spearman, and the claim is about {v[min_difference]:.2f}.",
    "SWD ranks by {diff_control} below it (p = {p_control}), and predicts the size of dCE no better "
    "({diff_loho_control}, p = {p_loho})",
    "off by {off[r2]} from R², by {off[cosine]} from cosine, by {off[swd_tok]} from swd_tok",
    "flags {n} of the {v[n_conditions]} SAEs ({l} of stdlib-l, {m} of stdlib-m, {s} of stdlib-s)",
    "of {v[smallest_detectable]:.2f} at 80% power",
)
PROXY_ROW = "| {name} | {partial} | {diff_r2} | {loho:.3f} |"
PROXIES = "cosine nmse_tok gd_abs r2 r2_nosink swd_tok swd_sampled swd_seq".split()

SURVIVES = (
    "says *{short[leaf]}*: CE_rec still moves by up to {moved:.2f} between 30k and 100k tokens",
    "the leaf is *{v[leaf]}*",
    "the transfer gap of R² is {gamma} where the tree asks for {v[thresholds][gamma]}.",
    "`{v[control]}` has {of_control} where R² has {of_r2}",
    "ΔR² without them is the same to {worst:.3f}",
)
DELTA_ROW = "| {k} | {delta_r2} | {delta_ce_rec} |"

FISHER = (
    "partial Spearman with CE_rec is {added} (p = {p}; ungated: *{v[leaf_if_ungated]}*)",
    "KL is {locality:.2f} times as large (median)",
    "{v[h2][n_clusters]} hooks",
    "is {first[rho]:.2f} for the form and {second[rho]:.2f} once the real logit change takes the place of Jδ "
    "(step {step})",
    "At 0.1 δ half of it is the measured KL within {most:.0%} at every hook, {median:.1%} in the median "
    "(R² {r2_least:.2f} to {r2_most:.2f} over SAEs and sequences)",
    "Two gradients along that line already give ΔCE within {two_gradients:.1%}",
)


def what_exp_b_says() -> list[str]:
    board, v = leaderboard("expb"), verdict("expb")
    saes = report_table("expb", "Every SAE")
    flagged = [row["model"] for row in saes if row["flag"] == "R² flatters this SAE"]
    loho = {name: float(row["loho"]) for name, row in board.items()}
    numbers = {
        "v": v,
        "diff_control": minus(v["diff_control"]),
        "p_control": p_of(v["p_control"]),
        "diff_loho_control": minus(v["diff_loho_control"], 3),
        "p_loho": p_of(v["p_loho"]),
        "off": {name: percent(10**error - 1) for name, error in loho.items()},
        "n": len(flagged),
        **{size: flagged.count(f"stdlib-{size}") for size in "sml"},
    }
    rows = []
    for name in PROXIES:
        diff = "0" if name == "r2" else spanned(board[name], "diff_r2")
        partial = spanned(board[name], "partial")
        rows.append(PROXY_ROW.format(name=name, partial=partial, diff_r2=diff, loho=loho[name]))
    return [sentence.format(**numbers) for sentence in WHAT_YOU_WILL_SEE] + rows


def what_exp_a_says() -> list[str]:
    short, v = verdict("expa"), verdict("expa-long")
    deltas = {(int(row["k"]), int(row["tokens"])): row for row in table("expa-long", "deltas.csv")}
    numbers = {
        "short": short,
        "v": v,
        "moved": max(abs(row[f"moved_{end}"]) for row in short["cells"] for end in ("small", "large")),
        "gamma": spanned(v, "gamma_r2", 3),
        "of_control": minus(v["gamma_control_half_b"], 3),
        "of_r2": minus(v["gamma_r2_half_b"], 3),
        "worst": max(abs(float(row["delta_r2"]) - float(row["delta_r2_nosink"])) for row in deltas.values()),
    }
    rows = []
    for k in (4, 8, 16, 32):
        course = {}
        for name in ("delta_r2", "delta_ce_rec"):
            first, second = (minus(float(deltas[k, tokens][name])) for tokens in (10_000, 100_000))
            course[name] = f"{first} → {second} → {spanned(deltas[k, v['budget']], name, 3)}"
        rows.append(DELTA_ROW.format(k=k, **course))
    return [sentence.format(**numbers) for sentence in SURVIVES] + rows


def what_exp_c_says() -> list[str]:
    v = verdict("expc_fisher")
    rungs = {row["rung"]: row for row in v["ladder"]}
    # else it is to be read instead of the report
    assert not (REFERENCE / "expc_fisher/calibration.csv").exists()
    at = [row for row in report_table("expc_fisher", "Calibration") if row["alpha"] == "0.1"]
    off = [abs(float(row["kl_slope"]) - 1) for row in at]
    r2 = [float(row["kl_r2"]) for row in at]
    path = [row for row in table("expc_fisher", "path.csv") if row["nodes"] == "2"]
    numbers = {
        "v": v,
        "locality": v["locality"]["1"],
        "added": minus(v["added"]),
        "p": p_of(v["p"]),
        "first": rungs["½δᵀGδ"],
        "second": rungs["½Var_p(Δz)"],
        "step": spanned(rungs["½Var_p(Δz)"], "step"),
        "most": max(off),
        "median": np.median(off),
        "r2_least": min(r2),
        "r2_most": max(r2),
        "two_gradients": max(float(row["error"]) for row in path),
    }
    return [sentence.format(**numbers) for sentence in FISHER]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "What you will see": what_exp_b_says,
    "Does the gap survive training?": what_exp_a_says,
    "Beyond SWD: the pullback Fisher": what_exp_c_says,
}


# ---------------------------------------------------------------------------------------------------------
def plain(text: str) -> str:
    """Without line breaks and the spaces that align a table."""
    return re.sub(r"\s+", " ", text)


def section(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return plain(re.split(r"\n## ", text.split(f"\n## {name}\n")[1])[0])


@pytest.mark.parametrize("name", SECTIONS)
def test_every_figure_is_the_reference_folders(name):
    text = section(name)
    for sentence in map(plain, SECTIONS[name]()):
        assert sentence in text, f"README lacks: {sentence}"
        text = text.replace(sentence, " ", 1)
    text = re.sub(r"`[^`]*`", " ", text)  # flags and file names
    assert not re.findall(r"\d*\.\d+|\d+ ?%", text), "figures that come from nowhere"


# figures stand in the reports of these, and README says what they say in words
IN_WORDS = ("Does the instrument find what is there?", "Dimension, attention, rate")


@pytest.mark.parametrize("name", IN_WORDS)
def test_what_is_said_in_words_has_no_figures(name):
    assert not re.findall(r"\d*\.\d+|\d+ ?%", re.sub(r"`[^`]*`|\S+\.py.*?minutes", " ", section(name)))


def test_the_words_are_the_verdicts():
    """What README's words rest on, so that they change with the references."""
    planted, rate = verdict("expp_planted"), verdict("expf_rate")
    assert planted["leaf"] == "found" and len(planted["checks"]) > 15
    assert verdict("expd_mi")["leaf_if_ungated"] == "rejected"
    assert verdict("expe_attention")["leaf_if_ungated"] == "rejected"
    assert 0.18 < verdict("expe_attention")["mediated"]["value"] < 0.22  # a fifth
    assert rate["leaf"] == "same" and rate["by_loss"]["1-r2_fisher"]["ratio"]["lo"] < 1
    says = {row["metric"]: row["says"] for row in rate["finish"]}
    assert says["swd_tok"] == "notices" and all(
        says[name] in ("fooled", "not shown") for name in ("r2", "r2_ln", "nmse_tok", "cosine")
    )
