"""Every figure of README's result sections comes from the committed reference folders: each sentence is made
from them here, and no other figure stands there.
"""

import csv
import json
import pathlib
import re

from transport_geometry.tables import signed, span

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs/reference"
SECTIONS = ("What you will see", "Does the gap survive training?", "Beyond SWD: the pullback Fisher")


def table(folder: str, name: str) -> list[dict]:
    with open(REFERENCE / folder / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdict(folder: str) -> dict:
    return json.loads((REFERENCE / folder / "verdict.json").read_text(encoding="utf-8"))


def of(row: dict, name: str, digits: int = 2) -> str:
    """+0.12 [−0.10, +0.14], as README prints it."""
    number = lambda end: float(row[name + end]) if row[name + end] not in ("", "undefined") else None
    return span(number(""), number("_lo"), number("_hi"), digits).replace("-", "−")


def leaderboard(folder: str) -> dict[str, dict]:
    return {
        row["proxy"]: row
        for row in table(folder, "leaderboard.csv")
        if row["target"] == "ce_rec" and row["stratum"] == "pooled"
    }


def plain(text: str) -> str:
    """Without line breaks and the spaces that align a table."""
    return re.sub(r"\s+", " ", text)


def section(name: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return plain(re.split(r"\n## ", text.split(f"\n## {name}\n")[1])[0])


FIGURES: dict[str, callable] = {}


def figures(name: str):
    return lambda make: FIGURES.setdefault(name, make)


def p_of(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.3f}" if p >= 0.0005 else f"{p:.4f}"


def minus(value: float, digits: int = 2) -> str:
    return signed(value, digits).replace("-", "−")


def flags(folder: str) -> list[tuple[str, str]]:
    """(model, flag) of every SAE, as the report's table has them."""
    text = (
        (REFERENCE / folder / "report.md")
        .read_text(encoding="utf-8")
        .split("## Every SAE")[1]
        .split("\n## ")[0]
    )
    return [
        (line.split("|")[1].strip(), line.split("|")[-2].strip())
        for line in text.splitlines()
        if line.startswith("| stdlib")
    ]


@figures("What you will see")
def what_exp_b_says() -> list[str]:
    board, v = leaderboard("expb"), verdict("expb")
    flagged = [model for model, flag in flags("expb") if flag == "R² flatters this SAE"]
    small, medium, large = (flagged.count(f"stdlib-{size}") for size in "sml")
    loho = lambda name: float(board[name]["loho"])
    off = lambda name: f"{10 ** loho(name) - 1:.0%}"
    return [
        f"{v['n_clusters']} hooks, {v['n_conditions']} SAEs",
        *(
            f"| {name} | {of(board[name], 'partial')} | {'0' if name == 'r2' else of(board[name], 'diff_r2')} | {loho(name):.3f} |"
            for name in (
                "cosine",
                "nmse_tok",
                "gd_abs",
                "r2",
                "r2_nosink",
                "swd_tok",
                "swd_sampled",
                "swd_seq",
            )
        ),
        f"ungated it would read *{v['leaf_if_ungated']}*: {v['a_control']} leaves {v['room']:.2f} to gain in partial Spearman, and the claim is about {v['min_difference']:.2f}.",
        f"SWD ranks by {minus(v['diff_control'])} below it (p = {p_of(v['p_control'])}), and predicts the size of dCE no better ({minus(v['diff_loho_control'], 3)}, "
        f"p = {p_of(v['p_loho'])})",
        f"off by {off('r2')} from R², by {off('cosine')} from cosine, by {off('swd_tok')} from swd_tok",
        f"flags {len(flagged)} of the {v['n_conditions']} SAEs ({large} of stdlib-l, {medium} of stdlib-m, {small} of stdlib-s)",
        f"of {v['smallest_detectable']:.2f} at 80% power",
    ]


@figures("Does the gap survive training?")
def what_exp_a_says() -> list[str]:
    v, long = verdict("expa"), verdict("expa-long")
    moved = max(abs(cell[f"moved_{end}"]) for cell in v["cells"] for end in ("small", "large"))
    rows = {(int(row["k"]), int(row["tokens"])): row for row in table("expa-long", "deltas.csv")}
    budgets = (10_000, 100_000, long["budget"])
    text = [
        f"says *{v['leaf']}*: CE_rec still moves by up to {moved:.2f} between 30k and 100k tokens",
        f"the leaf is *{long['leaf']}*",
    ]
    for k in (4, 8, 16, 32):
        cells = []
        for name in ("delta_r2", "delta_ce_rec"):
            first, second, last = (rows[k, b] for b in budgets)
            cells.append(f"{minus(float(first[name]))} → {minus(float(second[name]))} → {of(last, name, 3)}")
        text.append(f"| {k} | {cells[0]} | {cells[1]} |")
    text.append(
        f"the transfer gap of R² is {of_verdict(long, 'gamma_r2')} where the tree asks for {long['thresholds']['gamma']}."
    )
    text.append(
        f"`{long['control']}` has {minus(long['gamma_control_half_b'], 3)} where R² has {minus(long['gamma_r2_half_b'], 3)}"
    )
    worst = max(abs(float(row["delta_r2"]) - float(row["delta_r2_nosink"])) for row in rows.values())
    text.append(f"ΔR² without them is the same to {worst:.3f}")
    return text


def of_verdict(v: dict, name: str, digits: int = 3) -> str:
    return span(v[name], v[f"{name}_lo"], v[f"{name}_hi"], digits).replace("-", "−")


@figures("Beyond SWD: the pullback Fisher")
def what_exp_c_says() -> list[str]:
    v = verdict("expc_fisher")
    rungs = {row["rung"]: row for row in v["ladder"]}
    text = [
        f"partial Spearman with CE_rec is {minus(v['added'])} (p = {p_of(v['p'])}; ungated: *{v['leaf_if_ungated']}*)",
        f"KL is {v['locality']['1']:.2f} times as large (median)",
        f"{v['h2']['n_clusters']} hooks",
    ]
    first, second = rungs["½δᵀGδ"], rungs["½Var_p(Δz)"]
    text.append(
        f"is {first['rho']:.2f} for the form and {second['rho']:.2f} once the real logit change takes the place of Jδ "
        f"(step {span(second['step'], second['step_lo'], second['step_hi']).replace('-', '−')})"
    )
    # else it is to be read instead of the report
    assert not (REFERENCE / "expc_fisher/calibration.csv").exists()
    slopes = calibration_slopes()
    text.append(
        f"At 0.1 δ half of it is the measured KL within {max(abs(s - 1) for s, _ in slopes):.0%} at every hook, {np.median([abs(s - 1) for s, _ in slopes]):.1%} in the median "
        f"(R² {min(r for _, r in slopes):.2f} to {max(r for _, r in slopes):.2f} over SAEs and sequences)"
    )
    errors = [float(row["error"]) for row in table("expc_fisher", "path.csv") if row["nodes"] == "2"]
    text.append(f"Two gradients along that line already give ΔCE within {max(errors):.1%}")
    return text


def calibration_slopes() -> list[tuple[float, float]]:
    """(kl_slope, kl_r2) at alpha = 0.1 of every hook, from the report's table."""
    lines = (
        (REFERENCE / "expc_fisher/report.md")
        .read_text(encoding="utf-8")
        .split("## Calibration")[1]
        .split("\n## ")[0]
        .splitlines()
    )
    head = next([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| model"))
    cells = [
        dict(zip(head, (cell.strip() for cell in line.split("|"))))
        for line in lines
        if line.startswith("| stdlib")
    ]
    return [(float(row["kl_slope"]), float(row["kl_r2"])) for row in cells if row["alpha"] == "0.1"]


# --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SECTIONS)
def test_every_figure_is_the_reference_folders(name):
    text = section(name)
    for sentence in map(plain, FIGURES[name]()):
        assert sentence in text, f"README lacks: {sentence}"
        text = text.replace(sentence, " ", 1)
    text = re.sub(r"`[^`]*`", " ", text)  # flags and file names
    assert not re.findall(r"\d*\.\d+|\d+ ?%", text), "figures that come from nowhere"
