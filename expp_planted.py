"""Exp-P: does the instrument find what was put there?

    python expp_planted.py                      # twins of an embedded model, five CPU-minutes
    python expp_planted.py --dry-run            # the commands that it runs, and no more
    python expp_planted.py --from outputs/expp_planted

Verdicts on real SAEs are often *undertrained*, *rejected* or *undecided*. That is honest, but it does not
prove that an effect would be found if there were one. So effects are planted here (`models/plant.py`), in
twins of one model and in their SAEs. Exp-A and Exp-B judge these twins, by their own commands on real text,
and what they say is compared with what must come out.

Three things are planted: a sink at position 0, which owns the variance and changes no logit; errors turned
into directions that change the logits, so that H2 is true; SAEs that lag behind, and catch up.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import GRID_FLAGS, check_output, dest, parser_of, run_script
from transport_geometry import torchrun
from transport_geometry.errors import UserError
from transport_geometry.measuring.gauges import gauge_suite, gauges_of, spectra, stays
from transport_geometry.models.loading import load_model
from transport_geometry.models.plant import plants, split
from transport_geometry.records import store
from transport_geometry.records.results import check_data, load_measurements, open_output
from transport_geometry.records.tables import as_csv, estimate, markdown, percent, read_table
from transport_geometry.reporting import claims_report, summary
from transport_geometry.reporting import expp_report as tables
from transport_geometry.reporting.console import Answer, coloured, print_result, quiet_output
from transport_geometry.reporting.expp_report import Evidence
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, write
from transport_geometry.statistics.intervals import percentiles
from transport_geometry.statistics.resampling import RESAMPLES
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import torch

TEXT = blocks("expp_planted")


# ----------------------------------------------------------------------------------------- what is planted
MODEL, BLOCKS, LAYER, CTX, SEQS = "stdlib-s", range(6), 3, 256, 12
NORM = 3700  # SST times 19 here, times 18 between the published models
SINKS = [f"{kind}{NORM}" for kind in ("null", "visible", "relative")]
NORMS = [462, 925, 1850, NORM]
# {part: {twin: the leaf of Exp-A's tree that must come out, and why}}
LEAVES = {
    "leaves": {
        "null900": ("N", "a sink moves R² alone, and little enough to be judged"),
        "turned0.6": ("H1", "its errors are as long at every budget, and cost more"),
    },
    "equal": {
        "starved0.1:50000": ("H0", "its SAEs had a tenth of the first budget, and all of the later ones"),
        "starved0.25+turned-0.6": ("H0+H1", "its errors are longer and cost less: CE_rec is as before"),
    },
}
AMOUNTS = (0.0, 0.5, 1.0)  # of turning, over the hooks of three twins


@dataclass(frozen=True)
class Part:
    """A command of Exp-A or Exp-B on planted twins; its results folder has the part's name."""

    name: str
    script: str
    flags: str

    def command(self) -> str:
        return f"python {self.script}.py {self.flags}"


def with_plants(plants: Sequence[str], flags: str) -> str:
    return (
        f"--models {MODEL}@{LAYER} --plant {','.join(plants)} --eval-seqs {SEQS} --ctx {CTX} --expansion 4 "
        f"--seeds 0,1,2 {flags}"
    )


def turned_twins(amount: float) -> list[str]:
    """Three twins whose errors are turned, at the first blocks towards directions that change the logits and
    at the last ones away from them, while R² falls from block to block; more so from twin to twin. Where the
    amount is 0, the twins differ in how long their SAEs were trained, so that they are not copies.
    """
    if not amount:
        return [MODEL, f"{MODEL}+starved0.6", f"{MODEL}+starved0.8"]
    return [f"{MODEL}+turned{a * amount:g}:{b * amount:g}" for a, b in ((0.4, -1), (0.7, -0.7), (1, -0.4))]


def at_blocks(models: Sequence[str], blocks: Sequence[int]) -> str:
    return ",".join(f"{model}@{layer}" for model in models for layer in blocks)


ON_TEXT = "--expansion 4 --eval-seqs 16 --ctx 256"
GEOMETRY = f"--k 6,32 --tokens 50k {ON_TEXT}"
# Exp-A on the same twins and text, since H2 comes after it
GATE = f"--models {at_blocks(turned_twins(1), [LAYER])} --k 6,32 --tokens 10k,45k,50k --seeds 0,1,2 {ON_TEXT}"
PARTS = (
    Part("sinks", "expa", with_plants(SINKS, "--k 8 --tokens 30k,100k --sinks keep,drop")),
    Part("saelens", "expa", with_plants(SINKS[:2], "--k 8 --tokens 200k --recipe saelens")),
    Part("norms", "expa", with_plants([f"null{norm}" for norm in NORMS], "--k 8 --tokens 100k")),
    Part("leaves", "expa", with_plants(list(LEAVES["leaves"]), "--k 8,32 --tokens 10k,90k,100k")),
    Part("equal", "expa", with_plants(list(LEAVES["equal"]), "--k 16,32 --tokens 10k,90k,100k")),
    Part("gate", "expa", GATE),
    *(
        Part(f"turned-{a:g}", "expb", f"--models {at_blocks(turned_twins(a), BLOCKS)} {GEOMETRY}")
        for a in AMOUNTS
    ),
    Part("few-hooks", "expb", f"--models {at_blocks(turned_twins(1)[:2], BLOCKS[:2])} {GEOMETRY}"),
)
SETTINGS = {"script": "expp_planted", "models": [MODEL], "parts": {p.name: p.command() for p in PARTS}}


def run_parts(out: pathlib.Path, args: Any) -> None:
    """Every part by its own command, in this process and without what it prints. What a folder holds already
    is kept, and an interrupted part goes on.
    """
    typed = sys.argv
    for number, part in enumerate(PARTS, 1):
        print(f"[{number}/{len(PARTS)}] {part.command()}", flush=True)
        flags = [*shlex.split(part.flags), "--out", str(out / part.name), "--cache", str(args.cache)]
        flags += ["--device", args.device, *["--fresh"] * args.fresh]
        try:
            sys.argv = [f"{part.script}.py", *flags]
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(part.script).main()
        finally:
            sys.argv = typed


def evaluation_rows(ctx: int, n: int) -> torch.Tensor:
    """input_ids [n,ctx], those of the parts: twins have their model's tokenizer."""
    _, tokenizer = load_model(MODEL, torch.device("cpu"))
    return heldout_rows("stdlib", tokenizer, ctx=ctx, n=n).input_ids


def measure(out: pathlib.Path, args: Any) -> None:
    """The parts, and two tables of what is planted in the models: canyon.csv and gauges.csv."""
    start = time.time()
    open_output(out, SETTINGS, args.fresh)
    run_parts(out, args)
    twins = dict.fromkeys([*SINKS, *(f"null{norm}" for norm in NORMS)])
    of_sinks = spectra([MODEL, *(f"{MODEL}+{twin}" for twin in twins)], LAYER, evaluation_rows(CTX, SEQS))
    rows = {"canyon.csv": of_sinks, "gauges.csv": gauge_suite(MODEL, LAYER, evaluation_rows(64, 8))}
    files = {name: as_csv(table, list(table[0])) for name, table in rows.items()}
    store.put(out / store.RUN, files, seconds=round(time.time() - start, 1))


# ------------------------------------------------------------------------------------- what must come out
SAME = 0.02  # CE_rec is the same within this, as in Exp-A's tree
MET = 0.005  # how far R² of the null twin may be from the closed form
MUCH_TURNED = 0.4  # SAEs whose errors are turned so far must be pointed to by fed_excess, ...
LEAST_EXCESS = math.log(1.25)  # ... which points where its interval lies beyond this
N_RESAMPLES = 1000  # of that interval
MUST_STAY = ("r2_ln", "kl", "ce_recon")  # in every gauge
MUST_MOVE = ("r2", "cosine", "nmse_tok")  # under the shift
H2 = next(claim for claim in summary.CLAIMS if claim.label == "H2")


@dataclass(frozen=True)
class Check:
    """One planted truth: what was put there, what the instrument must say of it, and what it says."""

    planted: str
    must: str
    says: str
    found: bool


def checks(f: Evidence) -> list[Check]:
    """Every planted truth, in the order of the report."""
    return [*of_sinks(f), *of_leaves(f), *of_turned_errors(f), *of_gauges(f)]


def of_sinks(f: Evidence) -> list[Check]:
    """A sink owns the variance and changes no logit; R² rises and CE_rec falls, unless training drops it."""
    null, without, planted = SINKS[0], f.at_hook(), f.at_hook(SINKS[0])
    moved, off = max(row["logits"] for row in f.canyon), f.mean("sinks", null, "r2") - predicted_r2(f)
    pr = f"{without['pr']:.1f} → {planted['pr']:.2f}; without sinks {planted['pr_nosink']:.1f}"
    canyon = planted["pr"] < 2 and abs(planted["pr_nosink"] / without["pr_nosink"] - 1) < 0.02
    out = [
        Check("sinks", "every logit within 1e-4", f"{moved:.0e}", moved <= 1e-4),
        Check("a sink", "PR falls below 2, and not without sinks", pr, canyon),
        Check(null, f"R² = 1 − SSE/SST′ within {MET}", f"off by {off:.4f}", abs(off) <= MET),
    ]
    for sink in SINKS:
        row = f.delta("sinks", sink)
        says = f"ΔR² {estimate(row, 'delta_r2', 3)}, ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}"
        found = row["delta_r2_lo"] > 0 > row["delta_ce_rec_hi"]
        out.append(Check(sink, "R² up, CE_rec down", says, found))
    row = f.delta("sinks", null, "drop")
    says, must = f"ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}", f"CE_rec as without it, within {SAME}"
    found = -SAME < row["delta_ce_rec_lo"] and row["delta_ce_rec_hi"] < SAME
    return [*out, Check(f"{null}, dropped in training", must, says, found)]


def predicted_r2(f: Evidence) -> float:
    """R² of the null twin if its SAEs made the plain model's errors: 1 − SSE / SST′, SST′ the twin's."""
    return 1 - (1 - f.mean("sinks", "", "r2")) / f.at_hook(SINKS[0])["sst_ratio"]


def of_leaves(f: Evidence) -> list[Check]:
    """Every leaf of Exp-A's tree comes out where it is planted."""
    expected = [("sinks", SINKS[0], "undertrained", "30k and 100k tokens are too few")]
    expected += [(part, twin, *LEAVES[part][twin]) for part in LEAVES for twin in LEAVES[part]]
    out = []
    for part, twin, leaf, why in expected:
        says = f.leaf(part, twin)
        out.append(Check(twin, f"Exp-A: {leaf} ({why})", says, says == leaf))
    says = f.verdicts["gate"]["leaf"]
    return [*out, Check("turned twins", "Exp-A: H1", says, says == "H1")]


def of_turned_errors(f: Evidence) -> list[Check]:
    """H2 comes out where it is true by construction, and not elsewhere."""
    most = f"turned-{AMOUNTS[-1]:g}"
    whole, none, few = (f.verdicts[part] for part in (most, "turned-0", "few-hooks"))
    (right, wrong), here, joined = f.pointing[most], whole["here"]["leaf"], f.joined[most]
    points = f"{percent(right)} of those turned by {MUCH_TURNED} or more point there, "
    points += f"{percent(wrong)} the other way"
    must = "H2 here: beats all; to be interpreted, since Exp-A has judged these models"
    beats = here == "beats-all" and joined == whole["leaf"]
    of_none = none["here"]["leaf"]
    return [
        Check("errors turned", must, f"{here}; in general {joined}", beats),
        Check("errors turned", "fed_excess points that way", points, right >= 0.5 and wrong == 0),
        Check("errors turned by 0", "H2 here: does not beat R²", of_none, "beats" not in of_none),
        Check("too few hooks", "H2 in general: undecided", few["leaf"], few["leaf"] == "undecided"),
    ]


def of_gauges(f: Evidence) -> list[Check]:
    """Metrics of the logits do not depend on how a hook is written; Euclidean ones do."""
    rows, gauges = {row["metric"]: row for row in f.gauges}, gauges_of(f.gauges)
    kept = [m for m in MUST_STAY if all(stays(rows[m], gauge) for gauge in gauges)]
    moved = [m for m in MUST_MOVE if not stays(rows[m], gauges[0])]
    return [
        Check("three gauges", f"{', '.join(MUST_STAY)} stay", ", ".join(kept), len(kept) == len(MUST_STAY)),
        Check("the shift", f"{', '.join(MUST_MOVE)} move", ", ".join(moved), len(moved) == len(MUST_MOVE)),
    ]


# ------------------------------------------------------------------------------ what the parts left behind
def evidence(out: pathlib.Path) -> Evidence:
    """Raises UserError where a part is not finished, Damaged where a file is not as it was written."""
    runs = [summary.read_run(out, out / part.name) for part in PARTS]
    if missing := [f"{run.name}: {run.missing}" for run in runs if run.missing]:
        raise UserError(f"--from {out}: {missing[0]}")
    joined = {run.name: summary.short_verdict(H2, run, runs) for run in runs if run.script == "expb"}
    verdicts, deltas, saes, points, partials = {}, {}, {}, {}, {}
    for part in PARTS:
        name, record = part.name, out / part.name / store.RUN
        verdicts[name] = json.loads(store.checked(record, "verdict.json").read_text(encoding="utf-8"))
        rows = read_table(store.checked(record, "conditions.csv"))
        saes[name] = [row for row in rows if row["recipe"] != "null"]
        if part.script == "expa":
            deltas[name] = read_table(store.checked(record, "deltas.csv"))
            continue
        found = load_measurements(out / name, verdicts[name]["settings"], N_RESAMPLES)
        points[name] = pointing(saes[name], found.values["fed_excess"][RESAMPLES])
        board = read_table(store.checked(record, "leaderboard.csv"))
        pooled = [row for row in board if (row["target"], row["stratum"]) == ("ce_rec", "pooled")]
        partials[name] = {row["proxy"]: row["partial"] for row in pooled}
    own = [read_table(store.checked(out / store.RUN, name)) for name in ("canyon.csv", "gauges.csv")]
    return Evidence(verdicts, deltas, saes, points, partials, joined, *own)


def pointing(saes: list[dict], fed_excess: np.ndarray) -> tuple[float, float]:
    """Of the SAEs whose errors are much turned: the share for which fed_excess [resamples, SAEs] points the
    way they are turned, and the share for which it points the other way. nan where there are none.
    """
    lo, hi = percentiles(fed_excess)
    right = []
    for row, a, b in zip(saes, lo, hi):
        turn = sum(one.turn(row["layer"], len(BLOCKS)) for one in plants(row["model"]))
        if abs(turn) >= MUCH_TURNED:
            right.append(np.sign(turn) * (int(a > LEAST_EXCESS) - int(b < -LEAST_EXCESS)))
    return (right.count(1) / len(right), right.count(-1) / len(right)) if right else (np.nan, np.nan)


# -------------------------------------------------------------------------------------- tables and verdict
OF_THE_TREE = ("undertrained", "N", "H0+H1", "H0", "H1", "undecided")
OF_H2 = ("supported", "beats-r2-only", "rejected", "not-transferable", "cannot be shown here", "undecided")


def word_rows(f: Evidence) -> list[dict]:
    """Where each leaf of Exp-A's tree, and each verdict on H2, was reached."""
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
    for about, words in (
        ("H0/H1", OF_THE_TREE),
        ("H2 here", claims_report.OF_LEAF),
        ("H2 in general", OF_H2),
    ):
        for word in words:
            parts = dict.fromkeys(reached.get((about, word), ["not reached here"]))
            rows.append({"": about, "word": word, "reached by": ", ".join(parts)})
    return rows


def analyse(out: pathlib.Path) -> Findings:
    """A pure function of what the parts left and of the two tables."""
    f = evidence(out)
    found = checks(f)
    missed = [f"{check.planted} ({check.must}): {check.says}" for check in found if not check.found]
    n_found, rows = len(found) - len(missed), [vars(check) for check in found]
    said, words = answer(f, len(found), missed), word_rows(f)
    hashes = "".join(verdict["rows_sha256"] for verdict in f.verdicts.values())
    verdict = dict(
        leaf="not all found" if missed else "found",
        checks=rows,
        words=words,
        thresholds=dict(closed_form=MET, same=SAME, norm=NORM, amounts=AMOUNTS),
        rows_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    norms = tables.norm_rows(f, NORMS)
    report = TEXT["report"].format(
        answer=said.markdown(),
        checks=tables.check_table(rows),
        norm=NORM,
        model=MODEL,
        layer=LAYER,
        sinks=tables.sink_table(f, SINKS),
        pr=f.at_hook()["pr"],
        predicted=predicted_r2(f),
        measured=f.mean("sinks", SINKS[0], "r2"),
        budgets=tables.budget_table(f, SINKS[0]),
        norms=markdown(norms),
        proxies=tables.proxy_table(f, SINKS),
        geometry=tables.geometry_table(f, AMOUNTS),
        words=markdown(words),
        gauges=tables.gauge_table(f),
        parts="\n\n".join(f"[{part.name}]({part.name}/report.md)\n\n    {part.command()}" for part in PARTS),
    )
    figures = {
        "signature.png": tables.signature(f, SINKS),
        "norms.png": tables.by_norm(norms),
        "power.png": tables.power(f, AMOUNTS),
    }
    short = f"{n_found} of {len(found)} planted truths found"
    return Findings(said, verdict, short, report, figures, lambda colour: tables.in_short(rows, colour))


def answer(f: Evidence, n: int, missed: Sequence[str]) -> Answer:
    """n: planted truths; missed: those that were not found, and what was said instead."""
    counted = TEXT["not all found" if missed else "found"]
    counted = counted.format(n=n, n_found=n - len(missed), missed="; ".join(missed))
    delta, published = f.delta("sinks", SINKS[0]), tables.PUBLISHED
    r2, ce = (estimate(delta, f"delta_{name}", 3) for name in ("r2", "ce_rec"))
    of_published = dict(published_r2=published["ΔR²"], published_ce=published["ΔCE_rec"])
    moved = TEXT["signature"].format(r2=r2, ce=ce, **of_published)
    return Answer(TEXT["question"], f"{counted} {moved}", TEXT["limits"])


# ---------------------------------------------------------------------------------------------------- main
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
    if torchrun.WORLD > 1:
        raise UserError("one process, please: it runs several commands after one another")
    out = args.finished or args.out
    with quiet_output(args):
        if not args.finished:
            measure(out, args)
        elif check_data(out / store.RUN).get("settings") != SETTINGS:
            raise UserError(f"--from {out}: no finished run of expp_planted.py there")
        else:
            store.claim(out)
        found = analyse(out)
        write(out, SETTINGS, found)
    print_result(args, out, found.answer, found.table(coloured(sys.stdout)), found.short_verdict)


if __name__ == "__main__":
    run_script(main)
