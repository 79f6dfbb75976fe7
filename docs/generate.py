"""The parts of README.md and docs/*.md that are made from the reference runs and from the code.

    python docs/generate.py

writes each of them anew between `<!-- generated: NAME -->` and `<!-- end -->`. NAME's function below returns
what stands there: a pure function of outputs/reference, of the experiments' docstrings, grids and thresholds,
and of the planted arrays of `every_r2`. tests/test_readme.py compares, and compares
every other figure with what it is about.
"""
# ruff: noqa: E501 (sentences of pages)

import ast
import functools
import importlib
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import expb  # noqa: E402
from common import DEFAULTS, PRESETS  # noqa: E402
from transport_geometry.measuring import metrics, r2_by_library  # noqa: E402
from transport_geometry.records.condition import without_sinks  # noqa: E402
from transport_geometry.records.results import Measured, load_measurements  # noqa: E402
from transport_geometry.records.tables import estimate, percent, read_table, readable_count, signed  # noqa: E402
from transport_geometry.reporting import (  # noqa: E402
    claims_report,
    glossary,
    leaderboard_report,
    published,
    sae_words,
    summary,
)
from transport_geometry.statistics import claims  # noqa: E402
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS  # noqa: E402
from transport_geometry.statistics.intervals import ALPHA, interval  # noqa: E402
from transport_geometry.statistics.resampling import ALL, RESAMPLES  # noqa: E402
from transport_geometry.statistics.transfer import MIN_IN_RANGE  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

REFERENCE = ROOT / "outputs/reference"
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SCRIPTS = ("expa", "expb", "expc_fisher", "expd_mi", "expe_attention", "expf_rate", "expp_planted")
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


# ----------------------------------------------------------------------------------- what the folders hold
@functools.cache
def runs() -> dict[str, summary.Run]:
    """{folder: its run}. Fails where one is not as its run wrote it."""
    found = {run.name: run for run in summary.read(REFERENCE)}
    assert not [run.missing for run in found.values() if run.missing], found
    return found


def verdict(folder: str) -> dict[str, Any]:
    return runs()[folder].verdict


def rows(folder: str, name: str) -> list[dict[str, Any]]:
    return read_table(REFERENCE / folder / name)


@functools.cache
def measured(folder: str) -> Measured:
    """Its SAEs under the resamples of Exp-B."""
    return load_measurements(REFERENCE / folder, runs()[folder].settings, expb.N_RESAMPLES)


def change(found: Measured, first: int, then: int) -> dict[str, Any]:
    """CE_rec of the SAE number `then` less that of `first`, with its interval over documents."""
    of_each = np.diff(found.values["ce_rec"][:, [first, then]])[:, 0]
    lo, hi = interval(of_each[RESAMPLES])
    return {"change": of_each[ALL], "change_lo": lo, "change_hi": hi}


def board(folder: str) -> dict[str, dict[str, Any]]:
    """{proxy: its row for CE_rec over all conditions}."""
    return of_stratum(folder, "pooled")


def of_stratum(folder: str, stratum: str) -> dict[str, dict[str, Any]]:
    """{proxy: its row for CE_rec there}."""
    found = rows(folder, "leaderboard.csv")
    return {r["proxy"]: r for r in found if (r["target"], r["stratum"]) == ("ce_rec", stratum)}


# --------------------------------------------------------------------------------------- as pages print them
def dashed(text: str) -> str:
    """Minus signs for hyphens before figures."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)


def number(value: float, digits: int = 2) -> str:
    return dashed(signed(value, digits))


def spanned(row: dict[str, Any], name: str, digits: int = 2) -> str:
    """+0.12 [−0.10, +0.14]; an interval that is `undefined` in a table is none."""
    known = {key: None if value == "undefined" else value for key, value in row.items()}
    return dashed(estimate(known, name, digits))


def p_of(p: float) -> str:
    if p >= 0.095:
        return f"{p:.2f}"
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.4f}"


def tested(p: float | None) -> str:
    """p = 0.03; a test over too few effective hooks has none."""
    return "not tested in general" if p is None else f"p = {p_of(p)}"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


# ------------------------------------------------------------------------------------------------ README.md
REAL, GEMMA = "expb-smollm2", "expb-gemma3"


def picture() -> str:
    """Exp-B's pictures of a real model, and what they show."""
    before, after = flipped(32)
    of_arm: dict[bool, dict[int, dict]] = {without: {} for without in (False, True)}
    for row in rows(REAL, "conditions.csv"):
        if row["k"] == before["k"] and row["recipe"] != "null":
            of_arm[without_sinks(row["sae"])][row["layer"]] = row
    kept, dropped = of_arm[False], of_arm[True]
    ruined = {
        layer: row["ce_rec"] for layer, row in dropped.items() if row["ce_rec"] < kept[layer]["ce_rec"] - 0.5
    }
    clean = [dropped[layer]["ce_rec_sinkclean"] for layer in ruined]
    together, trained_on_all = board(REAL), of_stratum(REAL, claims.ARMS["keep"])
    right, on_all = (
        {name: percent(row["right"]) for name, row in of.items()} for of in (together, trained_on_all)
    )
    saes, gemma = sum(verdict(REAL)["saes"]["words"].values()), board(GEMMA)
    return f"""\
![R², R² without sinks and CE_rec by layer](outputs/reference/{REAL}/layers.png)

*SmolLM2-135M, SAEs of {before["k"]} active latents, {readable_count(before["tokens"])} training tokens each. Left: trained on every position. Block 11 gives one position of each text \
more than 100 times the median norm (an attention sink). From block 10 to block 11 R² rises from {before["r2"]:.3f} to {after["r2"]:.3f}, and CE_rec, 2 − (patched CE / clean CE), falls from \
{before["ce_rec"]:.3f} to {after["ce_rec"]:.3f} (by {-after["change"]:.3f} [{-after["change_hi"]:.3f}, {-after["change_lo"]:.3f}]). Right, on another scale: trained without sinks. In \
blocks {min(ruined)} to {max(ruined)} these SAEs ruin the sink and with it the model's prediction (CE_rec {number(min(ruined.values()))} to {number(max(ruined.values()))}; with the model's own \
activation left at sinks {number(min(clean))} to {number(max(clean))}). R² without sinks does not show it.*

![R² and SWD against CE_rec](outputs/reference/{REAL}/swd_r2.png)

*Each mark is one of {saes} SAEs; diamonds were trained without sinks. Of {trained_on_all["r2"]["pairs"]:.0f} pairs trained on every position, of one k, that differ by {claims.MARGIN:.2f} or more in CE_rec, R² orders {on_all["r2"]} as CE_rec does: fewer than a coin. \
Of all {together["r2"]["pairs"]:.0f} such pairs R² orders {right["r2"]} rightly, R² without sinks {right["r2_nosink"]}, and two scores order {right["swd_tok"]} and {right["r2_defl1"]}: SWD, the mean of (gradient of CE · error)², and R² without the first principal direction, \
which needs no gradient.*

*The same of Gemma 3 270M ({sum(verdict(GEMMA)["saes"]["words"].values())} SAEs, nine layers, all of which have sinks; [report](outputs/reference/{GEMMA}/report.md)): of {gemma["r2"]["pairs"]:.0f} pairs R² orders \
{percent(gemma["r2"]["right"])} rightly, R² without sinks {percent(gemma["r2_nosink"]["right"])}, R² without the first principal direction {percent(gemma["r2_defl1"]["right"])}, SWD {percent(gemma["swd_tok"]["right"])}.*"""


def flipped(k: int) -> list[dict[str, Any]]:
    """The rows of SmolLM2's blocks 10 and 11, trained on every position; the second with the difference of
    CE_rec, `change`, and its interval over documents.
    """
    found = measured(REAL)
    first, then = (
        next(
            i
            for i, row in enumerate(found.saes)
            if (row["layer"], row["k"]) == (layer, k) and not without_sinks(row["sae"])
        )
        for layer in (10, 11)
    )
    return [found.saes[first], found.saes[then] | change(found, first, then)]


def planted_picture() -> str:
    """The planted run's picture of what was published and what was planted, and what it shows."""
    twins = [row for row in rows("expp_planted/sinks", "deltas.csv") if row["sinks"] == "keep"]
    twin = max((row for row in twins if row["large"] == "stdlib-s+null3700"), key=lambda row: row["tokens"])
    theirs = published.DELTAS[published.S, published.L, 8, 10**7]
    return f"""\
![R² up, patched cross-entropy down: published, and planted](../outputs/reference/expp_planted/signature.png)

*Left, published by others (8 active latents, 10M training tokens): the SAE of Pythia-410m has an R² higher by \
{number(theirs.delta_r2, 3)} than that of Pythia-70m, and patching it in is worse ({number(theirs.delta_ce_rec, 3)} in CE_rec). Right, planted \
here: a huge activation at position 0, which changes no output of the model, does the same: R² \
{spanned(twin, "delta_r2", 3)}, CE_rec {spanned(twin, "delta_ce_rec", 3)}.*"""


PROXIES = "cosine nmse_tok gd_abs r2 r2_nosink r2_defl1 swd_tok swd_sampled swd_seq".split()
AT_FIRST = "nmse_tok cosine gd_abs r2 swd_tok".split()  # of them, in README.md


def scores(names: list[str], folder: str = "expb") -> str:
    ranked = board(folder)
    lines = [
        [
            f"`{name}`",
            spanned(claims_report.as_here(ranked[name], "partial"), "partial"),
            "0" if name == "r2" else spanned(claims_report.as_here(ranked[name], "diff_r2"), "diff_r2"),
            percent(10 ** ranked[name]["loho"] - 1),
        ]
        for name in names
    ]
    return table(["score", "partial ρ with CE_rec given k", "minus R²'s", "error in dCE"], lines)


def said_of_each() -> str:
    """How many SAEs have which word, and what their errors cost beside a random one."""
    saes = verdict("expb")["saes"]
    counted = ", ".join(f"{n} *{word}*" for word, n in saes["words"].items())
    least, most = saes["kl_ratio"]
    return (
        f"Of the {sum(saes['words'].values())} SAEs: {counted}. Their errors change the output (in KL) {least:.1f} to {most:.1f} "
        "times as much as random errors of the same length."
    )


def twenty_words() -> str:
    return table(["word", "means"], [[f"**{word}**", means] for word, means in glossary.FIRST.items()])


def exp_b() -> str:
    """What the run prints, shortened."""
    v, every = verdict("expb"), rows("expb", "leaderboard.csv")
    head, *lines = leaderboard_report.board_in_short(every).splitlines()
    some = [line for line in lines if line.split()[:1] and line.split()[0] in AT_FIRST]
    said = [*runs()["expb"].answer.lines(), "", head, *some, "..."]
    said += ["---", f"verdict: H2: {v['leaf']}; here: {v['here']['leaf']}"]
    return f"```\n{chr(10).join(said)}\n```\n\n{said_of_each()}"


def ladder() -> str:
    """The claims in the order in which they may be interpreted, and what came of each: on the embedded
    models, on two real ones, and where it was planted.
    """
    real = {"SmolLM2-135M": "smollm2", "Gemma 3 270M": "gemma3"}
    head = ["", "claim", "decided by", "embedded models", *real, "planted control"]
    lines = []
    for claim in summary.CLAIMS:
        if claim.script == "expp_planted":
            continue
        folders = ("expa", "expa-long") if claim.script == "expa" else (claim.script,)
        came = [
            came_of(claim, *folders),
            *(came_of(claim, f"{claim.script}-{name}") for name in real.values()),
        ]
        lines.append([claim.label, claim.words, f"`{claim.script}.py`", *came, planted(claim.label)])
    return table(head, lines)


def came_of(claim: summary.Claim, *folders: str) -> str:
    """The verdict of the first of the folders, then of the others at their budgets."""
    every, said = list(runs().values()), []
    for folder in folders:
        if (run := runs().get(folder)) is None:
            return "not run"
        leaf, first = summary.leaf_of(claim, run), summary.comes_first(claim, run, every)
        if claim.label == "N" and first:
            return f"comes after {first}"
        at = f"at {readable_count(run.verdict['budget'])} tokens " if said else ""
        if here := run.verdict.get("here"):
            at = f"{claims_report.OF_LEAF[here['leaf']]}; in general "
        said.append(f"{at}*{leaf}*" + f", not to be interpreted before {first}" * bool(first))
    return "; ".join(said)


# what Exp-P plants for a claim: (planted, how its `must` begins); of the others nothing is planted
PLANTED = {
    "H0": ("starved0.1:50000", "Exp-A"),
    "H1": ("turned0.6", "Exp-A"),
    "N": ("null900", "Exp-A"),
    "H2": ("errors turned", "H2 here"),
}


def planted(label: str) -> str:
    """What came out where this claim is true by construction."""
    if label not in PLANTED:
        return "not planted"
    name, begins = PLANTED[label]
    (check,) = (
        check for check in verdict("expp_planted")["checks"]
        if check["planted"] == name and check["must"].startswith(begins)
    )  # fmt: skip
    return f"{'found' if check['found'] else 'not found'}: *{check['says'].split(';')[0]}*"


# ---------------------------------------------------------------------------------------- docs/experiments.md
def answers(folder: str) -> str:
    """What the run found, and its limits."""
    said = runs()[folder].answer
    return f"> {dashed(f'{said.found}{chr(10)}>{chr(10)}> Limits: {said.limits}')}\n\n[The whole report](../outputs/reference/{folder}/report.md)."


def exp_b_sizes() -> str:
    v, ranked = verdict("expb"), board("expb")
    off = {name: percent(10 ** ranked[name]["loho"] - 1) for name in PROXIES}
    return f"""\
{answers("expb")}

Predicting dCE at a hook that the fit has not seen, R² is off by {off["r2"]}, cosine by {off["cosine"]}, `swd_tok` by \
{off["swd_tok"]}. The verdict in general: *{v["leaf"]}* ({v["reason"]}). Here, with intervals over \
documents:

{scores(PROXIES)}"""


def exp_b_real(folder: str) -> str:
    """On the SAEs of a real model, the better scores first; and what is said of each SAE."""
    ranked = board(folder)
    said = "; ".join(f"{n} *{word}*" for word, n in verdict(folder)["saes"]["words"].items())
    names = sorted(PROXIES, key=lambda name: -ranked[name]["partial"])
    return f"{answers(folder)}\n\n{scores(names, folder)}\n\nOf its SAEs: {said}."


def short_norms() -> str:
    """A real model and its twin whose sinks are short: what R² and CE_rec of their SAEs are."""
    found = measured("expb-short")
    at = {(row["model"], row["layer"], row["k"]): i for i, row in enumerate(found.saes)}
    assert len(at) == len(found.saes)
    lines = []
    for (model, layer, k), i in at.items():
        if "+" in model:
            continue
        pair = [i, at[f"{model}+short300", layer, k]]
        cells = [
            " → ".join(number(found.saes[j][name], 3).removeprefix("+") for j in pair)
            for name in ("sink_share", "r2", "r2_nosink", "ce_rec")
        ]
        lines.append([str(layer), str(k), *cells, spanned(change(found, *pair), "change", 3)])
    head = ["block", "k", "sinks' share of the variance", "R²", "R² without sinks", "CE_rec", "its change"]
    return table(head, lines)


def exp_a() -> str:
    short, v = verdict("expa"), verdict("expa-long")
    gates = ", ".join(f"{name} {'met' if passed else 'not met'}" for name, passed in v["g0"].items())
    moved = max(abs(row[f"moved_{end}"]) for row in short["cells"] for end in ("small", "large"))
    return f"""\
{answers("expa")}

There CE_rec changes by up to {moved:.2f} between the last two budgets, where the rule allows {short["thresholds"]["converged"]}. With more tokens:

{answers("expa-long")}

Preconditions of the rule: {gates}. {v["large"]} minus {v["small"]}, by training tokens:

{course()}

The transfer gap of R² is {spanned(v, "gamma_r2", 3)} where the rule asks for {v["thresholds"]["gamma"]}. \
`{v["control"]}`, the best score without sinks (chosen on one half of the documents), has {number(v["gamma_control_half_b"], 3)} where R² has \
{number(v["gamma_r2_half_b"], 3)}, on the other half. Leaving sink positions out changes ΔR² \
by at most {max(worst_sink(), 0.0005):.4f}."""


def deltas() -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["k"], row["tokens"]): row for row in rows("expa-long", "deltas.csv")}


def worst_sink() -> float:
    return max(abs(row["delta_r2"] - row["delta_r2_nosink"]) for row in deltas().values())


def course() -> str:
    """Delta over budget: the first, a middle and the last one with its interval."""
    found, last = deltas(), verdict("expa-long")["budget"]
    shown = [tokens for tokens in (10_000, 100_000, last) if (4, tokens) in found]
    steps = " → ".join(map(readable_count, shown))
    lines = []
    for k in sorted({k for k, _ in found}):
        cells = []
        for name in ("delta_r2", "delta_ce_rec"):
            early = [number(found[k, tokens][name]) for tokens in shown[:-1]]
            cells.append(" → ".join([*early, spanned(found[k, last], name, 3)]))
        lines.append([str(k), *cells, at_the_end(found[k, last])])
    return table(["k", f"ΔR², {steps}", f"ΔCE_rec, {steps}", "at the end"], lines)


def at_the_end(row: dict[str, Any]) -> str:
    """Which model's SAE the two scores prefer, where their intervals leave out 0."""
    r2, ce = (
        int(row[f"{name}_lo"] > 0) - int(row[f"{name}_hi"] < 0) for name in ("delta_r2", "delta_ce_rec")
    )
    if r2 and ce:
        return "they agree" if r2 == ce else "they disagree"
    return "only R² shows a difference" if r2 else "only CE_rec shows one" if ce else "neither shows one"


def exp_c() -> str:
    v = verdict("expc_fisher")
    rungs = {row["rung"]: row for row in v["ladder"]}
    form, variance = rungs["½δᵀGδ"], rungs["½Var_p(Δz)"]
    at = [row for row in v["calibration"] if row["alpha"] == 0.1]
    off = [abs(row["kl_slope"] - 1) for row in at]
    path = max(row["error"] for row in rows("expc_fisher", "path.csv") if row["nodes"] == 2)
    return f"""\
{answers("expc_fisher")}

How far the second order holds: for errors scaled to a tenth, half of δᵀGδ is the measured KL within \
{percent(max(off))} at every hook (median {np.median(off):.1%}). At δ itself KL is {v["locality"]["1"]:.2f} times as \
large (median). Its rank correlation with dCE given k is {form["rho"]:.2f}; with the true change of the logits instead \
of the linear one it is {variance["rho"]:.2f} (difference {spanned(variance, "step")}). The gradient at two points \
between h and ĥ gives dCE within {path:.1%}."""


def exp_d() -> str:
    v = verdict("expd_mi")
    h3 = v["h3"]
    refused = {name: sum(counts.values()) - counts["not refused"] for name, counts in v["refused"].items()}
    of = {name: sum(counts.values()) for name, counts in v["refused"].items()}
    return f"""\
{answers("expd_mi")}

Pooled over models the same correlation is {number(h3["pooled"]["rho"])} (p = {p_of(h3["pooled"]["p"])}); it reflects \
model size, so disregard it. The rules rejected {refused["canonical"]} of {of["canonical"]} estimates by canonical \
correlations and {refused["critics"]} of {of["critics"]} by trained critics."""


def exp_e() -> str:
    v = verdict("expe_attention")
    share = [f"{percent(v[name]['value'])} [{percent(v[name]['lo'])}, {percent(v[name]['hi'])}]" for name in
             ("mediated", "plan_only")]  # fmt: skip
    return f"""\
{answers("expe_attention")}

Freezing the attention weights takes away {share[0]} of dCE, and changing nothing but them causes {share[1]} of it \
({v["mediated"]["n"]} hooks)."""


def exp_f() -> str:
    v = verdict("expf_rate")
    names = {"1-r2": "1 − R²", "1-r2_fisher": "the same in Fisher geometry", "1-ce_rec": "dCE / L_orig"}
    ratios = {name: v["by_loss"][name]["ratio"] for name in names}
    said = "; ".join(
        f"{names[name]}: {ratio['factor']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]"
        for name, ratio in ratios.items()
    )
    noticed = [row["metric"] for row in v["finish"] if row["says"] == "notices"]
    listed = ", ".join(f"`{name}`" for name in noticed)
    return f"""\
{answers("expf_rate")}

At equal bits, the larger model's loss over the smaller one's: {said}. Brief fine-tuning through the model is noticed \
by {listed}."""


def exp_p() -> str:
    v = verdict("expp_planted")
    lines = [[check["planted"], check["must"], dashed(check["says"])] for check in v["checks"]]
    return f"{answers('expp_planted')}\n\n{table(['planted', 'must come out', 'came out'], lines)}"


def published_numbers() -> str:
    lines = [
        [str(k), readable_count(tokens), number(d.delta_r2, 3), number(d.delta_ce_rec, 3),
         percent(d.mismatch_published)]
        for (_, _, k, tokens), d in published.DELTAS.items()
    ]  # fmt: skip
    return table(["k", "tokens", "ΔR²", "ΔCE_rec", "R² up, CE_rec down"], lines)


# ------------------------------------------------------------------------------------ docs/choosing-a-score.md
CHEAP = "r2 r2_nosink r2_ln r2_defl1 nmse_tok cosine mse gd_abs swd_tok swd_sampled".split()


def rightly(folder: str, others: dict[str, str]) -> str:
    """Of pairs of SAEs of one k that clearly differ in CE_rec, how many each score orders rightly: of the
    SAEs of a real model's folder, and of all of other folders {title: folder}.
    """
    found = {title: of_stratum(other, "pooled") for title, other in others.items()}
    found |= {arm: of_stratum(folder, arm) for arm in claims.ARMS.values()}
    found |= {"the same layer": same_layer(folder), "all": of_stratum(folder, "pooled")}
    head = ["score", *(f"{title} ({board['r2']['pairs']:.0f} pairs)" for title, board in found.items())]
    return table(
        head, [[f"`{name}`", *(claims_report.share(b[name]) for b in found.values())] for name in CHEAP]
    )


def same_layer(folder: str) -> dict[str, dict[str, Any]]:
    """{proxy: row} of the pairs within a layer, which are an SAE of each arm of --sinks."""
    found = measured(folder)
    ce, of = found.values["ce_rec"], runs()[folder].settings["documents"]
    pairs = claims.clear_pairs(ce, found.meta)
    within = found.meta["layer"][pairs.a] == found.meta["layer"][pairs.b]
    pairs = claims.SAEPairs(pairs.a[within], pairs.b[within])
    assert all(
        without_sinks(found.saes[i]["sae"]) != without_sinks(found.saes[j]["sae"])
        for i, j in zip(pairs.a, pairs.b)
    )
    scores = {name: metrics.BY_NAME[name].score(found.values[name]) for name in CHEAP}
    return claims.document_columns(scores, ce, found.meta, min(of), pairs)


# -------------------------------------------------------------------------------------------- docs/running.md
def defaults() -> str:
    lines = []
    for script in SCRIPTS[:-1]:
        grid: dict[str, Any] = DEFAULTS | importlib.import_module(script).GRID
        layers: dict[str, list[str]] = {}
        for part in grid["models"].split(","):
            name, _, layer = part.partition("@")
            layers.setdefault(name, []).append(layer)
        at = sorted({"@" + ",".join(found) if found[0] else "the middle block" for found in layers.values()})
        models = f"`{'`, `'.join(layers)}` {'; '.join(at)}"
        lines.append([f"`{script}.py`", models, *(str(grid[name]) for name in
                      ("k", "tokens", "seeds", "expansion", "eval_seqs", "ctx"))])  # fmt: skip
    head = ["", "models", "`--k`", "`--tokens`", "`--seeds`", "`--expansion`", "`--eval-seqs`", "`--ctx`"]
    return table(head, lines)


def presets() -> str:
    """A model's hooks in one word, and what stands where a preset says nothing."""
    lines = []
    for name, grid in PRESETS.items():
        models: dict[str, list[str]] = {}
        for model, _, layer in (one.partition("@") for one in grid["models"].split(",")):
            models.setdefault(model, []).append(layer)
        hooks = ", ".join(
            f"`{model}@{','.join(found)}`".replace("@`", "`") for model, found in models.items()
        )
        keys = ("k", "tokens", "seeds", "sinks", "expansion", "eval_seqs", "ctx")
        said = [(DEFAULTS | grid)[key] for key in keys]
        lines.append([f"`{name}`", hooks, *(f"`{one}`" for one in said)])
    return table(["", "models", "k", "tokens", "seeds", "sinks", "expansion", "eval-seqs", "ctx"], lines)


# ----------------------------------------------------------------------------------------- docs/statistics.md
def tree_of_exp_a() -> str:
    expa = importlib.import_module("expa")
    t = expa.THRESHOLDS
    lines = [
        ["B*, the budget that is judged", f"the largest with {t.min_seeds} seeds in both models"],
        ["latents alive in both models", f"{percent(t.alive)}, or no more than {percent(t.alive_gap)} apart"],
        ["CE_rec has moved since the budget before", f"less than {t.converged:g}"],
        ["standard error of ΔCE_rec over documents", f"at most {t.se:g}"],
        ["H0: 90% interval of ΔCE_rec, for every k", f"inside ±{t.margin:g}"],
        ["H1: transfer gap of R²", f"{t.gamma:g} or more, its 95% interval without 0, of one sign for "
         f"{percent(t.same_sign)} of k"],
        ["... is judged", f"where {percent(t.in_range)} of the larger model's R² lie in the smaller one's range"],
        ["N: a sink-free score's transfer gap", f"less than {percent(t.normalisation)} of R²'s "
         f"({', '.join(f'`{name}`' for name in expa.SINK_FREE)})"],
    ]  # fmt: skip
    words = [[f"*{leaf}*", text] for leaf, text in expa.LEAVES.items()]
    return f"{table(['', 'asked for'], lines)}\n\n{table(['leaf', 'says'], words)}"


def tree_of_h2() -> str:
    expb = importlib.import_module("expb")
    controls = ", ".join(f"`{name}`" for name in metrics.EUCLIDEAN_CONTROLS)
    lines = [
        ["effective hooks", f"{MIN_EFFECTIVE_HOOKS} or more"],
        ["partial Spearman given k, SWD minus the best control", f"{expb.MIN_DIFFERENCE:.2f} or more, and "
         f"p < {ALPHA}"],
        ["error of log10 dCE at a hook left out", "smaller than the best control's"],
        ["transfer gap", f"at most {expb.MAX_GAMMA_RATIO:g} of the smallest one of a control, the 95% "
         f"interval of what is gained above 0, {percent(MIN_IN_RANGE)} of the larger model's values in range"],
        ["the controls", controls],
    ]  # fmt: skip
    return table(["H2 is *supported* by", "asked for"], lines)


def rule_of_the_words() -> str:
    lines = [
        [f"*{one.word}*", f"{sae_words.NAMED[one.column]} above {one.margin:.2f}", one.read]
        for one in sae_words.FINDINGS
    ]
    lines.append(
        [f"*{sae_words.AS_IT_READS}*", "none of these, and each shown not to be", "R² may be read as it is"]
    )
    lines.append([f"*{sae_words.UNJUDGED}*", "else", "the reason says what is missing"])
    return table(["word", "95% interval over documents of", "what to do"], lines)


# -------------------------------------------------------------------------------------------- docs/formats.md
def every_r2() -> str:
    """Four reconstructions of planted activations under every library's definition."""
    draw = np.random.default_rng(0)
    S, T, d = 32, 128, 64
    h = draw.standard_normal((S, T, d))
    h[:, :, :2] = 8 * h[:, :, :2] + 12  # two dimensions that vary more, about a mean
    h[:, 0] *= 6  # a sink at position 0
    error = 0.5 * h[:, 1:].std() * draw.standard_normal((S, T, d)) * np.sqrt(0.5)
    h, error = (torch.tensor(x) for x in (h, error))
    mean = h.mean((0, 1))
    made = {
        "h itself": h,
        "h and noise": h + error,
        "h + 2 in every dimension": h + 2,
        "the mean of h": mean.expand_as(h),
    }
    everywhere = torch.ones(S, T, dtype=torch.bool)
    names = ["r2", *r2_by_library.LIBRARIES]
    lines = []
    for what, h_hat in made.items():
        r2 = 1 - (h_hat - h).square().sum() / (h - mean).square().sum()
        values = {"r2": r2.item()} | r2_by_library.definitions(h, h_hat, everywhere)
        lines.append(
            [what, *(dashed(f"{values[name] + 0.0:.2f}").replace("−0.00", "0.00") for name in names)]
        )
    return table(["ĥ", *(f"`{name.removeprefix('r2_')}`" for name in names)], lines)


# ----------------------------------------------------------------------------------------------- docs/code.md
def modules() -> str:
    """Every folder and module of the package, with the first sentence of its docstring."""
    package, lines = ROOT / "transport_geometry", []
    folders = sorted(path.parent for path in package.glob("*/__init__.py"))
    for folder in [package, *folders]:
        name = folder.relative_to(ROOT).as_posix() + "/"
        lines.append(
            f"- **`{name}`** {'' if folder == package else first_sentence(folder / '__init__.py')}".rstrip()
        )
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("__"):
                lines.append(f"  - `{path.name}` {first_sentence(path)}")
    return "\n".join(lines)


def first_sentence(path: pathlib.Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


PARTS: dict[str, Callable[[], str]] = {
    "modules": modules,
    "picture": picture,
    "planted": planted_picture,
    "exp-b": exp_b,
    "glossary": twenty_words,
    "ladder": ladder,
    "exp-a-says": exp_a,
    "exp-b-says": exp_b_sizes,
    "exp-b-real": lambda: exp_b_real(REAL),
    "exp-b-gemma": lambda: exp_b_real(GEMMA),
    "short-norms": short_norms,
    "exp-c-says": exp_c,
    "exp-d-says": exp_d,
    "exp-e-says": exp_e,
    "exp-f-says": exp_f,
    "exp-p-says": exp_p,
    "published": published_numbers,
    "defaults": defaults,
    "presets": presets,
    "tree": tree_of_exp_a,
    "h2": tree_of_h2,
    "words": rule_of_the_words,
    "every-r2": every_r2,
    "rightly": lambda: rightly(REAL, {"embedded models": "expb"}),
    "rightly-gemma": lambda: rightly(GEMMA, {}),
}


# --------------------------------------------------------------------------------------------------- command
def filled(text: str) -> str:
    """A page with its generated parts as they are today."""
    return PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]()}\n\n{part[3]}", text)


def main() -> None:
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            (ROOT / page).write_text(new, encoding="utf-8")
        print(f"{page}: {len(PART.findall(new))} parts{'' if new == old else ', written'}")


if __name__ == "__main__":
    main()
