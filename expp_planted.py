"""Exp-P: does the instrument find what was put there?

    python expp_planted.py                      # twins of an embedded model, five CPU-minutes
    python expp_planted.py --dry-run            # the commands that it runs, and no more
    python expp_planted.py --from outputs/expp_planted

Verdicts on real SAEs say *undertrained*, *rejected*, *undecided*: honest, and no proof that an effect would
be found. Here the effects are planted (`models/plant.py`), in twins of one model and in their
SAEs, and what Exp-A and Exp-B say of them, by their own commands on real text, is held against what must come
out.
A sink at position 0, which owns the variance and changes no logit. Errors turned into directions
that change the logits, so that H2 is true. SAEs that lag behind, and catch up.
"""

import contextlib
import hashlib
import importlib
import io
import json
import math
import pathlib
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import GRID_FLAGS, check_output, dest, parser_of, run_script
from transport_geometry import ranks
from transport_geometry.errors import UserError
from transport_geometry.measuring.dimension import participation_of
from transport_geometry.measuring.evaluate import Activations, activations
from transport_geometry.measuring.gauges import gauge_suite
from transport_geometry.measuring.metrics import BY_NAME, PROXIES
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.models.plant import plants, split
from transport_geometry.models.text import heldout_rows
from transport_geometry.records import store
from transport_geometry.records.results import check_data, load_measurements, open_output
from transport_geometry.records.tables import (
    as_csv,
    as_json,
    estimate,
    markdown,
    percent,
    plain,
    read_table,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting import console as console
from transport_geometry.reporting import published, summary
from transport_geometry.reporting.console import WIDTH, Answer, coloured, columns, conclude, hushed
from transport_geometry.reporting.figures import BLUE, GREEN, ORANGE, SKY, label_ends, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics import claims
from transport_geometry.statistics.hook_pair import mismatch
from transport_geometry.statistics.stats import RESAMPLES, percentiles

import numpy as np
import torch
from matplotlib.figure import Figure

TEXT = blocks("expp_planted")
MODEL, LAYER, BLOCKS, CTX, SEQS = "stdlib-s", 3, 6, 256, 12
LEAST_EXCESS = math.log(1.25)  # of fed_excess, that it is believed to point anywhere
N_RESAMPLES = 1000  # of its interval
NORM = 3700  # SST times 19 here, times 18 between the published models
SINKS = [f"{kind}{NORM}" for kind in ("null", "visible", "relative")]
NORMS = [462, 925, 1850, NORM]
# {part: {twin: the leaf of Exp-A's tree that must come out, and why}}
LEAVES = {
    "leaves": {
        "null900": ("N", "a sink moves R² alone, and little enough to be judged"),
        "turned0.6": ("H1", "its errors are as long at every budget, and felt more"),
    },
    "equal": {
        "starved0.1:50000": ("H0", "its SAEs had a tenth of the first budget, and all of the later ones"),
        "starved0.25+turned-0.6": ("H0+H1", "its errors are longer and felt less, and CE_rec is as before"),
    },
}
AMOUNTS = (0.0, 0.5, 1.0)  # of turning, over the hooks of three twins
SAME = 0.02  # in CE_rec, as in Exp-A's tree
H2 = next(claim for claim in summary.CLAIMS if claim.label == "H2")
MET = 0.005  # how far R² of the null twin may be from the closed form


# ------------------------------------------------------------------------------------------------ the parts
@dataclass(frozen=True)
class Part:
    """A command of Exp-A or Exp-B on planted twins, into a folder of its own."""

    name: str
    script: str
    flags: str

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        return out / self.name

    def command(self) -> str:
        return f"python {self.script}.py {self.flags}"


def with_plants(plants: Sequence[str], flags: str) -> str:
    return (
        f"--models {MODEL}@{LAYER} --plant {','.join(plants)} --eval-seqs {SEQS} --ctx {CTX} --expansion 4 "
        f"--seeds 0,1,2 {flags}"
    )


def twins(amount: float) -> list[str]:
    """Twins whose errors are turned, at the first blocks towards what the model feels and at the last ones
    away from it, while R² falls from block to block; and from twin to twin more towards it. By 0: twins that
    differ in how long their SAEs were trained, so that they are no copies of one another.
    """
    if not amount:
        return [MODEL, f"{MODEL}+starved0.6", f"{MODEL}+starved0.8"]
    return [f"{MODEL}+turned{a * amount:g}:{b * amount:g}" for a, b in ((0.4, -1), (0.7, -0.7), (1, -0.4))]


def at_all_blocks(models: Sequence[str], blocks: int = 6) -> str:
    return ",".join(f"{model}@{layer}" for model in models for layer in range(blocks))


GEOMETRY = "--k 6,32 --tokens 50k --expansion 4 --eval-seqs 16 --ctx 256"
GATE = Part(
    "gate",
    "expa",
    f"--models {','.join(f'{twin}@{LAYER}' for twin in twins(1))} --k 6,32 --tokens 10k,45k,50k "
    "--seeds 0,1,2 --expansion 4 --eval-seqs 16 --ctx 256",
)
PARTS = (
    Part("sinks", "expa", with_plants(SINKS, "--k 8 --tokens 30k,100k --sinks keep,drop")),
    Part("saelens", "expa", with_plants(SINKS[:2], "--k 8 --tokens 200k --recipe saelens")),
    Part("norms", "expa", with_plants([f"null{norm}" for norm in NORMS], "--k 8 --tokens 100k")),
    Part("leaves", "expa", with_plants(list(LEAVES["leaves"]), "--k 8,32 --tokens 10k,90k,100k")),
    Part("equal", "expa", with_plants(list(LEAVES["equal"]), "--k 16,32 --tokens 10k,90k,100k")),
    GATE,
    *(
        Part(f"turned-{amount:g}", "expb", f"--models {at_all_blocks(twins(amount))} {GEOMETRY}")
        for amount in AMOUNTS
    ),
    Part("few-hooks", "expb", f"--models {at_all_blocks(twins(1)[:2], 2)} {GEOMETRY}"),
)


def run_quietly(script: str, arguments: Sequence[str]) -> None:
    """Run a script in this process as its command line would, without what it prints. Raises what it
    raises.
    """
    typed = sys.argv
    try:
        sys.argv = [f"{script}.py", *arguments]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script).main()
    finally:
        sys.argv = typed


def run_parts(out: pathlib.Path, args: Any) -> None:
    """Every part by its own command; what a folder holds already is kept, and an interrupted one goes on."""
    for number, part in enumerate(PARTS, 1):
        print(f"[{number}/{len(PARTS)}] {part.command()}", flush=True)
        flags = [*shlex.split(part.flags), "--out", str(part.folder(out)), "--cache", str(args.cache)]
        flags += ["--device", args.device, *["--fresh"] * args.fresh]
        run_quietly(part.script, flags)


# --------------------------------------------------------------------- the models, and what they compute
def planted_models() -> list[str]:
    """The plain model, and every twin with a sink that a part trains SAEs on."""
    sinks = dict.fromkeys([*SINKS, *(f"null{norm}" for norm in NORMS)])
    return [MODEL, *(f"{MODEL}+{sink}" for sink in sinks)]


def evaluation_rows(ctx: int, n: int) -> torch.Tensor:
    """input_ids [n,ctx], those of the parts: twins have their model's tokenizer."""
    _, tokenizer = load_model(MODEL, torch.device("cpu"))
    return heldout_rows("stdlib", tokenizer, ctx, n).input_ids


def canyon() -> list[dict]:
    """What the sinks do to the hook: participation ratio of the covariance with and without sink positions,
    SST over the plain model's, and the largest change of a logit. On the parts' evaluation text.
    """
    rows: list[dict] = []
    input_ids = evaluation_rows(CTX, SEQS)
    for name in planted_models():
        model, _ = load_model(name, torch.device("cpu"))
        shared = activations(Hook(model, LAYER), input_ids, 8)
        with torch.no_grad():
            logits = model(input_ids[:4], use_cache=False).logits
        h = evaluated(shared, without_sinks=False)
        sst = h.double().var(0, correction=0).sum().item()
        if not rows:
            plain_logits, plain_sst = logits, sst
        rows.append(
            {
                "model": name,
                "layer": LAYER,
                "pr": participation_of(h),
                "pr_nosink": participation_of(evaluated(shared, without_sinks=True)),
                "sst_ratio": sst / plain_sst,
                "logits": (logits - plain_logits).abs().max().item(),
            }
        )
    return rows


def evaluated(shared: Activations, without_sinks: bool) -> torch.Tensor:
    """h [N,d] at the evaluated positions."""
    h = shared.h[:, :-1]
    return h[~shared.sink] if without_sinks else h.flatten(0, 1)


# --------------------------------------------------------------------- what must come out, and did
@dataclass(frozen=True)
class Check:
    """One planted truth: what was put there, what the instrument must say of it, and what it says."""

    planted: str
    must: str
    says: str
    found: bool


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the parts left behind, read again. Nothing of a part is computed a second time."""

    verdicts: dict[str, dict]  # {part: verdict.json}
    deltas: dict[str, list[dict]]  # {part of Exp-A: deltas.csv}
    saes: dict[str, list[dict]]  # {part: rows of conditions.csv, without null rows}
    points: dict[str, list[int]]  # {part of Exp-B: which way fed_excess points, of each SAE}
    partials: dict[str, dict[str, float]]  # {part of Exp-B: {proxy: partial Spearman with CE_rec}}
    joined: dict[str, str]  # {part of Exp-B: what `common.py report` says of H2}
    canyon: list[dict]
    gauges: list[dict]

    def arms(self, part: str) -> list[dict]:
        """All verdicts of a part of Exp-A."""
        return [self.verdicts[part], *self.verdicts[part]["other_arms"]]

    def leaf(self, part: str, twin: str, sinks: str = "keep") -> str:
        """Exp-A's leaf on the plain model against a twin."""
        large = f"{MODEL}+{twin}"
        return next(v["leaf"] for v in self.arms(part) if (v["large"], v["sinks"]) == (large, sinks))

    def delta(self, part: str, twin: str, **cell: Any) -> dict:
        """The row of deltas.csv, plain model against twin, at the largest budget unless said."""
        pair = {"small": MODEL, "large": f"{MODEL}+{twin}"}
        here = [row for row in self.deltas[part] if (pair | cell).items() <= row.items()]
        return max(here, key=lambda row: row["tokens"])


def evidence(out: pathlib.Path) -> Evidence:
    """Raises UserError where a part is not finished, Damaged where a file is not as it was written."""
    verdicts, deltas, saes, points, partials = {}, {}, {}, {}, {}
    runs = [summary.read_run(out, part.folder(out)) for part in PARTS]
    if missing := [f"{run.name}: {run.missing}" for run in runs if run.missing]:
        raise UserError(f"--from {out}: {missing[0]}")
    joined = {run.name: summary.word(H2, run, runs) for run in runs if run.script == "expb"}
    for part in PARTS:
        record = part.folder(out) / store.RUN
        verdicts[part.name] = json.loads(store.checked(record, "verdict.json").read_text(encoding="utf-8"))
        rows = read_table(store.checked(record, "conditions.csv"))
        saes[part.name] = [row for row in rows if row["recipe"] != "null"]
        if part.script == "expa":
            deltas[part.name] = read_table(store.checked(record, "deltas.csv"))
        else:
            found = load_measurements(part.folder(out), verdicts[part.name]["settings"], N_RESAMPLES)
            lo, hi = percentiles(found.values["fed_excess"][RESAMPLES])
            points[part.name] = [int(a > LEAST_EXCESS) - int(b < -LEAST_EXCESS) for a, b in zip(lo, hi)]
            board = read_table(store.checked(record, "leaderboard.csv"))
            pooled = [row for row in board if (row["target"], row["stratum"]) == ("ce_rec", "pooled")]
            partials[part.name] = {row["proxy"]: row["partial"] for row in pooled}
    tables = [read_table(store.checked(out / store.RUN, name)) for name in ("canyon.csv", "gauges.csv")]
    return Evidence(verdicts, deltas, saes, points, partials, joined, *tables)


def checks(f: Evidence) -> list[Check]:
    """Every planted truth, in the order of the report."""
    return [*of_sinks(f), *of_leaves(f), *of_geometry(f), *of_gauges(f)]


def of_sinks(f: Evidence) -> list[Check]:
    moved = max(row["logits"] for row in f.canyon)
    at_norm = {row["model"]: row for row in f.canyon}
    plain_pr, planted = at_norm[MODEL]["pr"], at_norm[f"{MODEL}+null{NORM}"]
    pr = f"{plain_pr:.1f} → {planted['pr']:.2f}; without sinks {planted['pr_nosink']:.1f}"
    kept = abs(planted["pr_nosink"] / at_norm[MODEL]["pr_nosink"] - 1) < 0.02
    off = closed_form(f)
    out = [
        Check("sinks", "every logit within 1e-4", f"{moved:.0e}", moved <= 1e-4),
        Check("a sink", "PR falls below 2, and not without sinks", pr, planted["pr"] < 2 and kept),
        Check(f"null{NORM}", f"R² = 1 − SSE/SST′ within {MET}", f"off by {off:.4f}", abs(off) <= MET),
    ]
    for sink in SINKS:
        row = f.delta("sinks", sink, sinks="keep")
        says = f"ΔR² {estimate(row, 'delta_r2', 3)}, ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}"
        found = row["delta_r2_lo"] > 0 and row["delta_ce_rec_hi"] < 0
        out.append(Check(sink, "R² up, CE_rec down", says, bool(found)))
    row = f.delta("sinks", SINKS[0], sinks="drop")
    says = f"ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}"
    found = -SAME < row["delta_ce_rec_lo"] and row["delta_ce_rec_hi"] < SAME
    must = f"CE_rec as without it, within {SAME}"
    out.append(Check(f"{SINKS[0]}, dropped in training", must, says, bool(found)))
    return out


def closed_form(f: Evidence) -> float:
    """R² of the null twin less 1 − SSE / SST′, of the plain model's errors under the twin's variance."""
    r2 = {twin: mean_at_end(f.saes["sinks"], f"{MODEL}{twin}", "r2") for twin in ("", f"+null{NORM}")}
    ratio = next(row["sst_ratio"] for row in f.canyon if row["model"] == f"{MODEL}+null{NORM}")
    return r2[f"+null{NORM}"] - (1 - (1 - r2[""]) / ratio)


def mean_at_end(saes: list[dict], model: str, metric: str) -> float:
    """Mean over seeds at the largest budget, sinks kept in training."""
    return float(np.mean([row[metric] for row in at_end(saes, model)]))


def at_end(saes: list[dict], model: str) -> list[dict]:
    """A model's SAEs of the largest budget, sinks kept in training, by seed."""
    here = [row for row in saes if row["model"] == model and not row["sae"].endswith("nosinks")]
    return [row for row in here if row["tokens"] == max(other["tokens"] for other in here)]


def of_leaves(f: Evidence) -> list[Check]:
    expected = [("sinks", SINKS[0], "undertrained", "30k and 100k tokens are too few")]
    expected += [(part, twin, *LEAVES[part][twin]) for part in LEAVES for twin in LEAVES[part]]
    out = []
    for part, twin, leaf, why in expected:
        says = f.leaf(part, twin)
        out.append(Check(twin, f"Exp-A: {leaf} ({why})", says, says == leaf))
    says = f.verdicts["gate"]["leaf"]
    return [*out, Check("turned twins", "Exp-A: H1", says, says == "H1")]


def of_geometry(f: Evidence) -> list[Check]:
    whole, none = f.verdicts[f"turned-{AMOUNTS[-1]:g}"], f.verdicts["turned-0"]
    few = f.verdicts["few-hooks"]
    part = f"turned-{AMOUNTS[-1]:g}"
    right, wrong = pointing(f.saes[part], f.points[part])
    joined = f.joined[part]
    says = f"{percent(right)} of those turned by 0.4 or more point there, {percent(wrong)} the other way"
    return [
        Check(
            "errors turned",
            "H2 here: beats all; to be interpreted, since Exp-A has judged these models",
            f"{whole['here']['leaf']}; in general {joined}",
            whole["here"]["leaf"] == "beats-all" and joined == whole["leaf"],
        ),
        Check("errors turned", "fed_excess points that way", says, right >= 0.5 and wrong == 0),
        Check(
            "errors turned by 0",
            "H2 here: does not beat R²",
            (leaf := none["here"]["leaf"]),
            "beats" not in leaf,
        ),
        Check("too few hooks", "H2 in general: undecided", few["leaf"], few["leaf"] == "undecided"),
    ]


def pointing(saes: list[dict], points: list[int]) -> tuple[float, float]:
    """(share that points the right way, the wrong way) of the SAEs whose errors are turned by 0.4 or more."""
    turns = [sum(one.turn(row["layer"], BLOCKS) for one in plants(row["model"])) for row in saes]
    judged = [(np.sign(turn), point) for turn, point in zip(turns, points) if abs(turn) >= 0.4]
    right, wrong = ([turn == sign * point for turn, point in judged] for sign in (1, -1))
    return float(np.mean(right)), float(np.mean(wrong))


MUST_PASS = ("r2_ln", "kl", "ce_recon")  # every gauge
MUST_FAIL = ("r2", "cosine", "nmse_tok")  # the shift


def passes(row: dict, gauge: str) -> bool:
    """Is a metric the same in this gauge, to 1e-3 of its size?"""
    return bool(abs(row[gauge]) <= 1e-3 * max(abs(row["as it is"]), 1e-2))


def of_gauges(f: Evidence) -> list[Check]:
    rows = {row["metric"]: row for row in f.gauges}
    names = [name for name in f.gauges[0] if name not in ("metric", "as it is")]
    kept = [m for m in MUST_PASS if all(passes(rows[m], name) for name in names)]
    moved = [m for m in MUST_FAIL if not passes(rows[m], names[0])]
    return [
        Check("three gauges", f"{', '.join(MUST_PASS)} stay", ", ".join(kept), len(kept) == len(MUST_PASS)),
        Check("the shift", f"{', '.join(MUST_FAIL)} move", ", ".join(moved), len(moved) == len(MUST_FAIL)),
    ]


# ----------------------------------------------------------------------------------------------- report.md
SMALL, LARGE, K = published.S, published.L, 8  # what is planted is held against, after published.TOKENS
GAP, CE_REC_ENDS = published.DELTAS[SMALL, LARGE, K, published.TOKENS], (-0.117, -0.082)
COSINES = [published.SAES[model, K].cosine for model in (SMALL, LARGE)]
PUBLISHED = {
    "": "published",
    "PR": "3.96 → 1.18",
    "SST ×": 18.2,
    "ΔR²": signed(GAP.delta_r2, 3),
    "ΔR² no sink": "not published",
    "Δcosine": signed(COSINES[1] - COSINES[0], 3),
    "ΔCE_rec": span(GAP.delta_ce_rec, *CE_REC_ENDS, 3),
    "mismatch": percent(GAP.mismatch_published),
    "leaf": "",
}
WORDS = (
    "supported",
    "beats-r2-only",
    "rejected",
    "not-transferable",
    "cannot be shown here",
    "undecided",
)
OF_THE_TREE = ("undertrained", "N", "H0+H1", "H0", "H1", "undecided")


def sentence(found: Sequence[Check]) -> str:
    missed = [f"{check.planted} ({check.must}): {check.says}" for check in found if not check.found]
    if not missed:
        return f"All {len(found)} planted truths were found."
    n = len(found)
    return f"{n - len(missed)} of {n} planted truths were found. Not found: {'; '.join(missed)}."


def answer(f: Evidence, found: Sequence[Check]) -> Answer:
    delta = f.delta("sinks", SINKS[0], sinks="keep")
    moved = TEXT["signature"].format(
        r2=estimate(delta, "delta_r2", 3),
        ce=estimate(delta, "delta_ce_rec", 3),
        published_r2=PUBLISHED["ΔR²"],
        published_ce=PUBLISHED["ΔCE_rec"],
    )
    return Answer(TEXT["question"], f"{sentence(found)} {moved}", TEXT["limits"])


def sink_rows(f: Evidence) -> list[dict]:
    """The planted table, with the published numbers last."""
    at = {row["model"]: row for row in f.canyon}
    arms = [("sinks", twin, sinks) for sinks in ("keep", "drop") for twin in SINKS]
    arms += [("saelens", twin, "keep") for twin in SINKS[:2]]
    rows = []
    for part, twin, sinks in arms:
        delta, of_model = f.delta(part, twin, sinks=sinks), at[f"{MODEL}+{twin}"]
        rows.append(
            {
                "": f"{twin}, {part if part == 'saelens' else 'base'}{', dropped' * (sinks == 'drop')}",
                "PR": f"{at[MODEL]['pr']:.1f} → {of_model['pr']:.2f}",
                "SST ×": of_model["sst_ratio"],
                "ΔR²": estimate(delta, "delta_r2", 3),
                "ΔR² no sink": estimate(delta, "delta_r2_nosink", 3),
                "Δcosine": estimate(delta, "delta_cosine", 3),
                "ΔCE_rec": estimate(delta, "delta_ce_rec", 3),
                "mismatch": percent(delta["mismatch"]),
                "leaf": f.leaf(part, twin, sinks),
            }
        )
    return [*rows, PUBLISHED]


def budget_rows(f: Evidence) -> list[dict]:
    """What each budget says of the null twin."""
    pair = {"small": MODEL, "large": f"{MODEL}+{SINKS[0]}", "sinks": "keep"}
    return [
        {
            "tokens": readable_count(row["tokens"]),
            "ΔR²": estimate(row, "delta_r2", 3),
            "ΔCE_rec": estimate(row, "delta_ce_rec", 3),
            "mismatch": percent(row["mismatch"]),
        }
        for row in f.deltas["sinks"]
        if pair.items() <= row.items()
    ]


def norm_rows(f: Evidence) -> list[dict]:
    """Means over seeds, by norm of the null sink, 0 first."""
    shown = ("r2", "r2_nosink", "r2_defl1", "r2_ln", "nmse_tok", "cosine", "swd_tok", "ce_rec")
    at = {row["model"]: row for row in f.canyon}
    rows = []
    for norm in (0, *NORMS):
        name = f"{MODEL}+null{norm}" if norm else MODEL
        means = {metric: mean_at_end(f.saes["norms"], name, metric) for metric in shown}
        rows.append({"norm": norm, "SST ×": at[name]["sst_ratio"], "PR": at[name]["pr"]} | means)
    return rows


def proxy_rows(f: Evidence) -> list[dict]:
    """How often every score disagrees with CE_rec about plain and twin."""
    plain_saes, rows = at_end(f.saes["sinks"], MODEL), []
    for proxy in (*PROXIES, BY_NAME["kl"]):
        row: dict[str, Any] = {"score": proxy.name}
        for twin in SINKS:
            sides = plain_saes, at_end(f.saes["sinks"], f"{MODEL}+{twin}")
            score, ce = (
                [of(np.array([sae[name] for sae in side])) for side in sides]
                for of, name in ((proxy.score, proxy.name), (np.asarray, "ce_rec"))
            )
            row[twin] = percent(mismatch(score, ce)[0])
        rows.append(row)
    return rows


def geometry_rows(f: Evidence) -> list[dict]:
    rows = []
    for amount in AMOUNTS:
        part = f"turned-{amount:g}"
        verdict, saes = f.verdicts[part], f.saes[part]
        right, wrong = pointing(saes, f.points[part]) if amount else (np.nan, np.nan)
        gammas = (signed(verdict[f"gamma_{name}"], 3) for name in ("proxy", "control"))
        rows.append(
            {
                "turned by": f"{amount:g}",
                "SWD": signed(verdict["partial"]),
                "minus R²": estimate(verdict, "diff_r2"),
                "p_r2": verdict["p_r2"],
                "minus best control": estimate(verdict, "diff_control"),
                "p_ctl": verdict["p_control"],
                "loho gain": signed(verdict["diff_loho_control"], 3),
                "p_loho": verdict["p_loho"],
                "Γ, SWD / control": " / ".join(gammas),
                "H2 here": verdict["here"]["leaf"],
                "in general": verdict["leaf"],
                "excess right": percent(right),
                "excess wrong": percent(wrong),
            }
        )
    return rows


def word_rows(f: Evidence) -> list[dict]:
    """Where each leaf of Exp-A's tree and each word of H2 was reached."""
    reached: dict[tuple[str, str], list[str]] = {}
    for part in PARTS:
        verdict = f.verdicts[part.name]
        if part.script == "expa":
            for one in f.arms(part.name):
                where = f"{part.name}: {split(one['large'])[1]}"
                reached.setdefault(("H0/H1", one["leaf"]), []).append(where)
        else:
            reached.setdefault(("H2 here", verdict["here"]["leaf"]), []).append(part.name)
            reached.setdefault(("H2 in general", verdict["leaf"]), []).append(part.name)
    rows = []
    for about, words in (("H0/H1", OF_THE_TREE), ("H2 here", claims.LEAVES), ("H2 in general", WORDS)):
        for word in words:
            parts = dict.fromkeys(reached.get((about, word), ["not reached here"]))
            rows.append({"": about, "word": word, "reached by": ", ".join(parts)})
    return rows


def gauge_rows(f: Evidence) -> list[dict]:
    names = [name for name in f.gauges[0] if name not in ("metric", "as it is")]
    return [
        {"metric": row["metric"], "as it is": row["as it is"]}
        | {name: "stays" if passes(row, name) else signed(row[name], 3) for name in names}
        for row in f.gauges
        if row["metric"] in BY_NAME and (BY_NAME[row["metric"]].family or row["metric"] in SHOWN_TOO)
    ]


SHOWN_TOO = ("ce_rec", "kl", "ce_recon", "fed", "fed_excess", "rho")


def report(f: Evidence, found: Sequence[Check], said: Answer) -> str:
    of_checks = [
        {
            "planted": c.planted,
            "must come out": c.must,
            "says": c.says,
            "": "found" if c.found else "NOT FOUND",
        }
        for c in found
    ]
    at = {row["model"]: row for row in f.canyon}
    measured_r2 = mean_at_end(f.saes["sinks"], f"{MODEL}+null{NORM}", "r2")
    return TEXT["report"].format(
        answer=said.markdown(),
        checks=markdown(of_checks),
        norm=NORM,
        model=MODEL,
        layer=LAYER,
        sinks=markdown(sink_rows(f)),
        pr=at[MODEL]["pr"],
        predicted=measured_r2 - closed_form(f),
        measured=measured_r2,
        budgets=markdown(budget_rows(f)),
        norms=markdown(norm_rows(f)),
        proxies=markdown(proxy_rows(f)),
        geometry=markdown(geometry_rows(f)),
        words=markdown(word_rows(f)),
        gauges=markdown(gauge_rows(f)),
        parts="\n\n".join(f"[{part.name}]({part.name}/report.md)\n\n    {part.command()}" for part in PARTS),
    )


# --------------------------------------------------------------------------------------------------- plots
TITLES = {
    True: "One sink at position 0 makes R² rise and CE_rec fall, as in what was published",
    False: "What a sink at position 0 does to R² and CE_rec, beside what was published",
}
KINDS = {  # of sinks, as a reader may call them
    "null": "LayerNorm does\nnot see it",
    "visible": "a patch has to\nrebuild it",
    "relative": "an error beside it\nis felt less",
}


def signature(f: Evidence) -> Figure:
    """Delta R^2 above, Delta CE_rec below: as published on the left, as planted on the right."""
    of_published = dict(delta_r2=GAP.delta_r2, delta_r2_lo=np.nan, delta_r2_hi=np.nan)
    of_published |= dict(
        zip(("delta_ce_rec", "delta_ce_rec_lo", "delta_ce_rec_hi"), (GAP.delta_ce_rec, *CE_REC_ENDS))
    )
    planted = [
        (f"{twin}:\n{KINDS[twin.removesuffix(str(NORM))]}", f.delta("sinks", twin, sinks="keep"))
        for twin in SINKS
    ]
    sides = [
        ("published: pythia-410m − pythia-70m", [("10M tokens, k = 8", of_published)]),
        ("planted: one model, with a sink − without", planted),
    ]
    figure, axes = pyplot().subplots(
        1, 2, figsize=(8, 3.6), sharey=True, width_ratios=(1.3, len(SINKS)), layout="constrained"
    )
    for axis, (title, rows) in zip(axes, sides):
        for name, colour, marker in (("delta_r2", BLUE, "s"), ("delta_ce_rec", ORANGE, "o")):
            value, lo, hi = (np.array([row[f"{name}{end}"] for _, row in rows]) for end in ("", "_lo", "_hi"))
            at = np.arange(len(rows))
            axis.vlines(at, lo, hi, color=colour, linewidth=2)
            axis.plot(at, value, marker, color=colour, markersize=7)
            for x, y in zip(at, value):
                axis.annotate(
                    signed(y, 3),
                    (x, y),
                    (9, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=colour,
                )
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_xticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axis.set(xlim=(-0.5, len(rows) - 0.3))
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="y", labelsize=8)
    for name, colour, y in (("ΔR²", BLUE, 0.75), ("ΔCE_rec", ORANGE, 0.25)):
        axes[0].annotate(name, (0.06, y), xycoords="axes fraction", color=colour, fontsize=10)
    as_published = all(row["delta_r2_lo"] > 0 > row["delta_ce_rec_hi"] for _, row in planted)
    figure.suptitle(TITLES[as_published], fontsize=10)
    return figure


def by_norm(f: Evidence) -> Figure:
    figure, axis = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    rows = norm_rows(f)
    norms = [row["norm"] for row in rows]
    styles = (
        ("r2", "s-", BLUE),
        ("r2_nosink", "^--", SKY),
        ("cosine", "v:", GREEN),
        ("ce_rec", "o-", ORANGE),
    )
    for metric, style, colour in styles:
        axis.plot(norms, [row[metric] for row in rows], style, color=colour)
    axis.set(xlabel="norm of the sink", ylabel="score")
    axis.set_title("One position moves R² to where it says nothing", fontsize=10)
    axis.grid(alpha=0.3)
    label_ends(axis, [(rows[-1][metric], metric, colour) for metric, _, colour in styles])
    return figure


def power(f: Evidence) -> Figure:
    figure, axis = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    # side by side, as three of them come out alike
    styles = (
        ("swd_tok", "o-", ORANGE, 0.0),
        ("r2", "s--", BLUE, -0.015),
        ("nmse_tok", "^:", SKY, 0.0),
        ("cosine", "v:", GREEN, 0.015),
    )
    ends = []
    for name, style, colour, aside in styles:
        partials = [f.partials[f"turned-{amount:g}"][name] for amount in AMOUNTS]
        axis.plot(np.array(AMOUNTS) + aside, partials, style, color=colour)
        ends.append((partials[-1], name, colour))
    words = [f.verdicts[f"turned-{amount:g}"]["here"]["leaf"] for amount in AMOUNTS]
    axis.set_xticks(AMOUNTS, [f"{amount:g}\n{word}" for amount, word in zip(AMOUNTS, words)])
    axis.set(xlim=(-0.15, 1.05), xlabel="how far errors are turned, and what H2 reads here")
    axis.set_ylabel("partial Spearman with CE_rec")
    axis.set_title("H2 is true by construction, the more to the right", fontsize=10)
    axis.grid(alpha=0.3)
    label_ends(axis, ends)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def analyse(out: pathlib.Path) -> tuple[Answer, list[Check]]:
    """verdict.json, report.md, figures: a pure function of what the parts left and of the two tables."""
    f = evidence(out)
    found = checks(f)
    said = answer(f, found)
    hashes = "".join(verdict["rows_sha256"] for verdict in f.verdicts.values())
    verdict = dict(
        leaf="found" if all(check.found for check in found) else "not all found",
        answer=vars(said),
        checks=[vars(check) for check in found],
        words=word_rows(f),
        thresholds=dict(closed_form=MET, same=SAME, norm=NORM, amounts=AMOUNTS),
        settings=settings(),
        rows_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    figures = {"signature.png": signature(f), "norms.png": by_norm(f), "power.png": power(f)}
    files: dict[str, store.Content | None] = {
        "verdict.json": as_json(plain(verdict)),
        "report.md": report(f, found, said).encode(),
    }
    store.put(out / store.RUN, with_page(out, files, figures))
    return said, found


def settings() -> dict[str, Any]:
    return {"script": "expp_planted", "models": [MODEL], "parts": {p.name: p.command() for p in PARTS}}


def checks_in_short(found: Sequence[Check], colour: bool) -> str:
    """For a terminal of 80 columns; what was said of each stands in the report."""
    rows = [
        {"": "found" if check.found else "NOT FOUND", "planted": check.planted, "must come out": check.must}
        for check in found
    ]
    room = WIDTH - 4 - sum(max(len(row[name]) for row in rows) for name in ("", "planted"))
    for row in rows:
        row["must come out"] = textwrap.shorten(row["must come out"], room, placeholder=" …")
    return columns(rows, ["" if check.found else console.ORANGE for check in found], colour)


def main() -> None:
    args = parser_of(__doc__).parse_args()
    check_output(args)
    own = [flag for flag, how in GRID_FLAGS if getattr(args, dest(flag)) != how.get("default")]
    if own or args.save_tokens:
        typed = ", ".join([*own, *["--save-tokens"] * args.save_tokens])
        raise UserError(f"{typed}: its grids are planted; expa.py --plant plants in other models")
    if args.dry_run:
        print("\n".join(part.command() for part in PARTS))
        return
    if ranks.WORLD > 1:
        raise UserError("one process, please: it runs several commands after one another")
    out = args.finished or args.out
    with hushed(args):
        if args.finished:
            if check_data(out / store.RUN).get("settings") != settings():
                raise UserError(f"--from {out}: no finished run of expp_planted.py there")
            store.claim(out)
        else:
            start = time.time()
            open_output(out, settings(), args.fresh)
            run_parts(out, args)
            tables = {"canyon.csv": canyon(), "gauges.csv": gauge_suite(MODEL, LAYER, evaluation_rows(64, 8))}
            files = {name: as_csv(rows, list(rows[0])) for name, rows in tables.items()}
            store.put(out / store.RUN, files, seconds=round(time.time() - start, 1))
        said, found = analyse(out)
    words = f"{sum(check.found for check in found)} of {len(found)} planted truths found"
    conclude(args, out, said, checks_in_short(found, coloured(sys.stdout)), words)


if __name__ == "__main__":
    run_script(main)
