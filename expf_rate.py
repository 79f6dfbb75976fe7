"""Exp-F: at equal bits, does the larger model's SAE lose more or less than the smaller one's, and does the
answer depend on the geometry in which the loss is measured?

    python expf_rate.py                                   # embedded models, four CPU-minutes
    python expf_rate.py --models stdlib-s@1,stdlib-s@3,stdlib-m@1,stdlib-m@3,stdlib-l@1,stdlib-l@3
    python expf_rate.py --models smollm2-135m --pairs 10:11,10:16    # layers of one model
    python expf_rate.py --from outputs/expf_rate          # tables, verdict and plots again, without a model
    python expf_rate.py --from outputs/expb               # what another script's rows say at 8 bits a value

An SAE is a lossy code, and k is no price, since models differ in width. Its rate is the ideal cross-fitted
length of the active indices and of the values on a uniform grid (`measuring/rate.py`); every loss is measured
in a patched run of the quantised code. Two descriptions stand beside it, of each hook's middle SAE: which
scores notice a short finish through the model (`saes/kl_finetune.py`), and how much less of the next token
one bounded observer knows from h_hat than from h (`measuring/prequential_probe.py`).

Question: at equal bits and equal depth, is the ratio of the losses, largest model over smallest, the same in
1 - R^2 as in dCE / L_orig = 1 - CE_rec? With --pairs: the second hook of a pair over the first, each pair by
itself, and about these SAEs only. Both rules stand below; the first was fixed before any result, the second
after Exp-B had looked at SmolLM2.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.measuring import prequential_probe, rate
from transport_geometry.measuring.metrics import Metric, mean
from transport_geometry.records import store
from transport_geometry.records.condition import Condition, hook_of
from transport_geometry.records.results import (
    Measured,
    finished_run,
    load_measurements,
)
from transport_geometry.records.tables import as_csv, markdown, read_table
from transport_geometry.reporting import expf_report
from transport_geometry.reporting.console import Answer, hooks_in_words
from transport_geometry.reporting.figures import sae_name
from transport_geometry.reporting.leaderboard_report import scope
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.grid import Command, EvalSet
from transport_geometry.running.pairs_flag import FLAGS, with_pairs
from transport_geometry.running.run import Experiment, eval_batch, load
from transport_geometry.saes import kl_finetune
from transport_geometry.saes.sae import SAE, TopKSAE
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.hook_tests import p_value, sign_patterns
from transport_geometry.statistics.intervals import ALPHA, interval
from transport_geometry.statistics.rate_curves import (
    CE,
    QUANTISED,
    R2,
    Coded,
    RateCurves,
    at_eight_bits,
    quantised,
    reached,
)
from transport_geometry.statistics.resampling import RESAMPLES
from transport_geometry.text import heldout

import numpy as np
import scipy
import torch

# 6 depths of two models, the pairs of hooks that the verdict counts; SAEs as in Exp-B
GRID: dict[str, Any] = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sm" for layer in range(6)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=24,
    ctx=256,
)
N_RESAMPLES = 500
TEXT = blocks("expf_rate")


# --------------------------------------------------------------------------------- what is measured per patch
STEPS = (0.25, 0.5, 1.0)  # of the grid of values, in standard deviations of an SAE's values
TRAINING_ROWS = 8  # sequences of the training side that say what a standard deviation is
TABLES = ("spectra.csv", "directions.csv", "units.csv", "finish.csv", "observer.csv")

LOSSES = (
    Metric(R2, lambda s: s["sse"] / s["sst"]),
    Metric("1-r2_nosink", lambda s: s["sse_nosink"] / s["sst_nosink"]),
    Metric("1-cosine", lambda s: 1 - s.per_token("cosine")),
    Metric("1-r2_fisher", lambda s: s["fisher"] / s["fisher_h"]),
    Metric("half_swd", lambda s: s["gd_sampled_seq"] / s["n"] / 2),
    Metric("kl", mean("kl")),
    Metric("dce", lambda s: s.per_token("ce_recon") - s.per_token("ce_orig")),
    Metric(CE, lambda s: s["ce_recon"] / s["ce_orig"] - 1),
)
NAMES = [loss.name for loss in LOSSES]
OWN = (Metric("r2_fisher", lambda s: 1 - s["fisher"] / s["fisher_h"]),)


def study(eval_set: EvalSet, sae: SAE, device: torch.device, *, command: Command) -> dict[str, list[dict]]:
    """Once per hook, {table: rows}: its SAEs quantised, spectra, where the error lies; a short finish of the
    middle SAE through the model, and what a bounded observer has of it.
    """
    saes = {}
    for one in eval_set.candidates:
        loaded = load(one, command.cache)
        assert isinstance(loaded, TopKSAE)
        saes[one.condition] = loaded.to(device)
    ctx = eval_set.held.input_ids.shape[1]
    source, tokenizer, split = eval_set.source, eval_set.tokenizer, command.grid.split
    rows = heldout.train_rows(source.data, tokenizer, ctx, TRAINING_ROWS, split, bos=eval_set.bos)
    return rate.study(eval_set, saes, next(rows), STEPS, eval_batch(eval_set.hook, ctx), device) | {
        "finish.csv": kl_finetune.study(eval_set, sae, device),
        "observer.csv": prequential_probe.study(eval_set, sae, device),
    }


# ------------------------------------------------------------------------ the rule, fixed before any result
STEP = 0.5  # that the verdict is about
CODE = f"{STEP:g}σ"
FACTOR = 1.25  # by which two ratios must differ, or be shown not to


def leaf_f(apart: dict[str, float]) -> str:
    """The pre-registered rule. apart: `over_pairs` of the ratio in 1 - R^2 over the ratio in 1 - CE_rec.

    The unit is a pair of hooks of one depth. `differs`: the two ratios are a factor of 1.25 or more apart in
    the geometric mean over pairs, and signs flipped over pairs give p < .05. `same`: the 90% Student interval
    over pairs lies inside that factor. Else, and below 6 pairs, `undecided`.
    """
    if apart["pairs"] < MIN_EFFECTIVE_HOOKS:
        return "undecided"
    return leaf_by(apart, apart["p"] < ALPHA)


def leaf_of_pair(apart: dict[str, float]) -> str:
    """The same about these SAEs of two hooks, with --pairs. apart: `over_documents`. `differs` needs a 95%
    Student interval over documents without 1. Undefined wherever a resample is: `undecided`.
    """
    return leaf_by(apart, apart["lo"] > 1 or apart["hi"] < 1)


def leaf_by(apart: dict[str, float], shown: bool) -> str:
    """shown: that the two ratios are apart at all."""
    if max(apart["factor"], 1 / apart["factor"]) >= FACTOR and shown:
        return "differs"
    if apart["lo90"] > 1 / FACTOR and apart["hi90"] < FACTOR:
        return "same"
    return "undecided"


def over_pairs(logs: np.ndarray) -> dict[str, float]:
    """Geometric mean over pairs of hooks of a factor given by its logs [G], with Student intervals, and p by
    flipping signs: nan below 6 pairs. (No proxy was put on a scale of its own, so no degree is spent.)
    """
    logs = logs[np.isfinite(logs)]
    G = len(logs)
    out = {"pairs": G, "factor": float(np.exp(logs.mean())) if G else np.nan}
    out |= student(out["factor"], logs.std(ddof=1) / G**0.5 if G > 1 else np.nan, G - 1)
    p = np.nan
    if G >= MIN_EFFECTIVE_HOOKS:
        p = p_value(sign_patterns(G) @ logs / max(np.abs(logs).sum(), 1e-300))
    return out | {"p": p}


def student(factor: float, se: float, df: int) -> dict[str, float]:
    """Ends of the 95% and the 90% interval of a factor whose log has this standard error."""
    out: dict[str, float] = {}
    for level, ends in ((0.95, ("lo", "hi")), (0.90, ("lo90", "hi90"))):
        reach = scipy.stats.t.ppf((1 + level) / 2, df) * se if df > 0 else np.nan
        out |= dict(zip(ends, map(float, np.exp(np.array([-reach, reach])) * factor)))
    return out


def over_documents(logs: np.ndarray, units: int) -> dict[str, float]:
    """Of one pair of hooks, a factor given by its logs [W], with Student intervals over documents and seeds.
    None where one resample has no ratio: those that are left would not reach as far. units: documents, or
    seeds where there are several and fewer.
    """
    draws, factor = logs[RESAMPLES], float(np.exp(logs[0]))
    return {"factor": factor} | student(factor, draws.std(ddof=1), units - 1)


def over_resamples(logs: np.ndarray) -> dict[str, float]:
    """A factor given by its logs [W], with a percentile interval."""
    factor, lo, hi = map(float, np.exp([logs[0], *interval(logs[RESAMPLES])]))
    return {"factor": factor, "lo": lo, "hi": hi}


# ------------------------------------------------------------------------------------- tables and verdict
def ratio_rows(
    lines: RateCurves, codes: list[Coded], spread: Callable[[np.ndarray], dict[str, float]] = over_resamples
) -> list[dict]:
    """Every ratio, largest model over smallest or second hook over first, at a pair of hooks: rows of
    ratios.csv, with the interval over documents (and seeds) that `spread` gives.
    """
    rows = []
    for code in codes:
        for at in ("bits", "kl", CE) if code.name in (CODE, "8 bits") else ("bits",):
            for of in ("bits", *NAMES):
                for pair in lines.pairs if at != of else []:
                    found = spread(lines.log_ratio(code, at, of, pair))
                    row = {lines.unit: pair, "code": code.name, "at_equal": at, "of": of}
                    rows.append(row | {"ratio": found["factor"], "lo": found["lo"], "hi": found["hi"]})
    return rows


def by_geometry(rows: list[dict], code: str) -> dict[str, dict]:
    """{loss: its ratio at equal bits over pairs, and how far that stands from the ratio of 1 - CE_rec}."""

    def logs(of: str) -> np.ndarray:
        here = [row for row in rows if (row["code"], row["at_equal"], row["of"]) == (code, "bits", of)]
        return np.log([row["ratio"] for row in here])

    return {
        name: {"ratio": over_pairs(logs(name)), "apart": over_pairs(logs(name) - logs(CE))} for name in NAMES
    }


def of_pair(pair: str, lines: RateCurves, code: Coded, units: int) -> dict[str, dict]:
    """The same of one pair of hooks, over documents."""
    logs = {name: lines.log_ratio(code, "bits", name, pair) for name in NAMES}
    return {
        name: {"ratio": over_documents(draws, units), "apart": over_documents(draws - logs[CE], units)}
        for name, draws in logs.items()
    }


def rate_rows(found: Measured, codes: list[Coded], spectra: list[dict]) -> list[dict]:
    """Every SAE under every code: bits, losses, how far it stands above the Gaussian bound of its hook, and
    whether it is on its hook's front of CE against L0. Rows of rates.csv.
    """
    hooks = np.array([hook_of(row) for row in found.saes])
    l0, on_front = np.array([row["l0"] for row in found.saes]), np.zeros(len(hooks), bool)
    for hook in set(hooks):
        on_front[hooks == hook] = rate.front(l0[hooks == hook], found.values["dce"][0, hooks == hook])
    rows = []
    for i, sae in enumerate(found.saes):
        of_hook = [row for row in spectra if hook_of(row) == hooks[i]]
        for code in codes:
            row = vars(Condition.of(sae)) | {"code": code.name, "bits": float(code.bits[0, i])}
            row |= {name: float(code.losses[name][0, i]) for name in NAMES}
            for name, column in ((R2, "sigma"), ("1-r2_nosink", "sigma_nosink"), ("1-r2_fisher", "fisher")):
                spectrum = np.array([row[column] for row in of_hook])
                bound = rate.share_left(spectrum, code.bits[0, i]) if of_hook else np.nan
                row[f"above_{column}"] = float(row[name] / bound)
            rows.append(row | {"l0": sae["l0"], "front": int(on_front[i])})
    return rows


def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """Everything after the rows: a pure function of the folder's saved tables."""
    found, record = load_measurements(out, settings, N_RESAMPLES, LOSSES), out / store.RUN
    codes = [at_eight_bits(found, LOSSES), *quantised(out, found, LOSSES, N_RESAMPLES)]
    lines = RateCurves.of(found, settings, N_RESAMPLES)
    tables = {name: read_table(store.checked(record, name)) for name in TABLES}
    softmax = "softmax.csv" in store.written(record)
    tables["softmax.csv"] = read_table(store.checked(record, "softmax.csv")) if softmax else []
    rates = rate_rows(found, codes, tables["spectra.csv"])
    pairs, small, large = settings.get("pairs", []), settings["models"][0], settings["models"][-1]
    if pairs:
        small, large = pairs[0]
        several = [len(settings["seeds"])] if len(settings["seeds"]) > 1 else []
        units = min([*settings["documents"], *several])
        ratios = ratio_rows(lines, codes, functools.partial(over_documents, units=units))
        by_code = {
            code.name: {pair: of_pair(pair, lines, code, units) for pair in lines.pairs} for code in codes
        }
    else:
        ratios = ratio_rows(lines, codes)
        by_code = {code.name: {expf_report.ALL: by_geometry(ratios, code.name)} for code in codes}
    contrasts, rule = by_code[CODE], leaf_of_pair if pairs else leaf_f
    first, by_loss = next(iter(contrasts.items()))
    leaves = {pair: rule(of[R2]["apart"]) for pair, of in contrasts.items()}
    verdict = {
        "leaf": leaves[first],
        "contrast": by_loss[R2]["apart"],
        "by_loss": by_loss,
        "by_code": {name: of[first][R2]["apart"] for name, of in by_code.items()},
        "models": [small, large],
        "reached": reached(lines, codes),
        "softmax": tables["softmax.csv"],
        "finish": kl_finetune.moves(tables["finish.csv"]),
        "thresholds": dict(
            factor=FACTOR,
            alpha=ALPHA,
            **({} if pairs else {"min_pairs": MIN_EFFECTIVE_HOOKS}),
            step=STEP,
            code="ideal length",
        ),
        "quantised_sha256": store.sha256(store.checked(record, QUANTISED)),
    }
    if pairs:
        verdict["by_pair"] = {pair: {"leaf": leaves[pair], "by_loss": of} for pair, of in contrasts.items()}
    said = answer_of_pairs(leaves, contrasts, settings) if pairs else answer(leaves[first], by_loss, settings)
    spectra = {
        hook: [row for row in tables["spectra.csv"] if lines.place(row, settings["hooks"]) == hook]
        for hook in lines.hooks
    }
    return Findings(
        answer=said,
        verdict=verdict,
        short_verdict=verdict["leaf"],
        report=expf_report.report(
            found, rates, ratios, contrasts, verdict, said, tables, settings, CODE, TRAINING_ROWS
        ),
        figures={
            "rate.png": expf_report.rate_figure(lines, codes, spectra, CODE),
            "ratios.png": expf_report.ratio_figure(ratios, contrasts, CODE, f"{large} over {small}", FACTOR),
            "front.png": expf_report.front_figure(rates, lines.models, settings["k"]),
            "directions.png": expf_report.direction_figure(tables["directions.csv"], lines.models),
        },
        table=lambda colour: expf_report.equal_bits_in_short(by_loss, small, large, bool(pairs), colour),
        tables={
            "rates.csv": as_csv(rates, list(rates[0])),
            "ratios.csv": as_csv(ratios, f"{lines.unit} code at_equal of ratio lo hi".split()),
        },
    )


def answer(leaf: str, by_loss: dict[str, dict], settings: dict) -> Answer:
    apart, least = by_loss[R2]["apart"], MIN_EFFECTIVE_HOOKS
    models = {"small": settings["models"][0], "large": settings["models"][-1]}
    numbers = TEXT["no numbers"]
    if apart["pairs"]:
        text = TEXT["numbers"].format(
            **models,
            r2=expf_report.factor(by_loss[R2]["ratio"]),
            ce=expf_report.factor(by_loss[CE]["ratio"]),
            apart=expf_report.factor(apart),
            pairs=apart["pairs"],
            few=f"; {least} needed" if apart["pairs"] < least else "",
            p="" if np.isnan(apart["p"]) else f", p = {apart['p']:.3f}",
        )
        numbers = text.replace("[undefined]", "(no interval)")
    return Answer(
        TEXT["question"].format(**models),
        TEXT[leaf].format(**models, factor=FACTOR, numbers=numbers),
        TEXT["limits"].format(scope=scope(settings)),
    )


def answer_of_pairs(leaves: dict[str, str], contrasts: dict[str, dict[str, dict]], settings: dict) -> Answer:
    """The verdict is about the first pair."""
    said = []
    for (a, b), leaf, of in zip(settings["pairs"], leaves.values(), contrasts.values()):
        numbers = of[R2]["ratio"], of[CE]["ratio"], of[R2]["apart"]
        r2, ce, apart = (expf_report.factor(one) for one in numbers)
        two = hooks_in_words(b, f"loses {r2} times what", a)
        text = TEXT[f"{leaf} of a pair"].format(two=two, ce=ce, apart=apart, factor=FACTOR)
        said.append(text.replace("[undefined]", "(no interval)"))
    (small, large), seeds = settings["pairs"][0], " and seeds" if len(settings["seeds"]) > 1 else ""
    return Answer(
        TEXT["question of a pair"].format(two=hooks_in_words(large, "than", small)),
        " ".join(said),
        TEXT["limits of a pair"].format(scope=scope(settings), seeds=seeds),
    )


# ---------------------------------------------------------------------------------- another script's rows
SAVED_ROWS = ("expb", "expc_fisher")  # scripts whose folders serve, at 8 bits a value


def of_saved_rows(out: pathlib.Path, settings: dict) -> str:
    """What needs no quantised forward, from a folder of another script."""
    found = load_measurements(out, settings, N_RESAMPLES, LOSSES)
    lines, codes = RateCurves.of(found, settings, N_RESAMPLES), [at_eight_bits(found, LOSSES)]
    ratios, rates = ratio_rows(lines, codes), rate_rows(found, codes, [])
    beaten = [f"{sae_name(row)}, {row['recipe']}" for row in rates if not row["front"]]
    return TEXT["saved rows"].format(
        script=settings["script"],
        large=settings["models"][-1],
        small=settings["models"][0],
        equal_bits=expf_report.equal_bits(ratios, {expf_report.ALL: by_geometry(ratios, "8 bits")}, "8 bits"),
        reached=markdown(reached(lines, codes)),
        on_front=len(rates) - len(beaten),
        n_saes=len(rates),
        beaten="; ".join(beaten) or "none",
    )


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = with_pairs(parse_args(__doc__, GRID, flags=FLAGS), GRID["models"])
    if command.grid.saes:
        raise UserError("--sae: Exp-F quantises the codes of SAEs that it trains itself")
    if command.finished:
        script = (store.load(command.finished / store.RUN).get("settings") or {}).get("script")
        if script in SAVED_ROWS:
            if command.quiet or command.json:
                raise UserError(
                    f"--from {command.finished}: rows of {script}.py have no verdict here to print"
                )
            print(of_saved_rows(*finished_run(command.finished, script)))
            return
    # more_passes: those of the quantised codes through the tail, for every SAE
    of_hooks = functools.partial(study, command=command)
    experiment = Experiment("expf_rate", None, OWN, of_hooks, more_passes=len(STEPS), study_patches=True)
    run_and_report(command, experiment, analyse)


if __name__ == "__main__":
    run_script(main)
