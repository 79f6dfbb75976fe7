"""Exp-F: at equal bits, does the larger model's SAE lose more or less than the smaller one's, and does the
answer depend on the geometry in which the loss is measured?

    python expf_rate.py                                   # embedded models, four CPU-minutes
    python expf_rate.py --models stdlib-s@1,stdlib-s@3,stdlib-m@1,stdlib-m@3,stdlib-l@1,stdlib-l@3
    python expf_rate.py --from outputs/expf_rate          # tables, verdict and plots again, without a model
    python expf_rate.py --from outputs/expb               # what another script's rows say at 8 bits a value

An SAE is a lossy code, and k is no price: models differ in width. Its rate is the ideal cross-fitted length
of the active indices and of the values on a uniform grid; every distortion is measured after quantisation, in
a patched run of the quantised code. Beside it, of each hook's middle SAE: a short finish through the model,
and which scores notice that; and what one bounded observer knows less of the next token from h_hat than from
h.

Question, fixed before any result: at equal bits and equal depth, is the ratio of the losses, largest model
over smallest, the same in 1 - R^2 as in dCE / L_orig = 1 - CE_rec? The unit is a pair of hooks of one depth.
`differs`: the two ratios are a factor of 1.25 apart or more in the geometric mean over pairs, and signs
flipped over pairs give p < .05. `same`: the 90% Student interval over pairs lies inside that factor. Else,
and below 6 pairs, `undecided`.
"""

import functools
import pathlib
import sys
from dataclasses import dataclass

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.measuring import prequential_probe, rate
from transport_geometry.measuring.metrics import BY_NAME, Metric, Sums, computed, mean
from transport_geometry.models import text
from transport_geometry.records import store
from transport_geometry.records.condition import Condition, hook_of
from transport_geometry.records.results import (
    Measured,
    about_the_run,
    finished_run,
    label_last_block,
    load_measurements,
    load_results,
    rows_hash,
)
from transport_geometry.records.tables import as_csv, as_json, markdown, plain, read_table, short
from transport_geometry.reporting.console import Answer, as_sentence, coloured, columns, conclude, hushed
from transport_geometry.reporting.figures import BLUE, model_colours, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.running.grid import Command, EvalSet, sae_name
from transport_geometry.running.run import Experiment, eval_batch, load, run
from transport_geometry.saes import kl_finetune
from transport_geometry.saes.sae import SAE, TopKSAE
from transport_geometry.statistics import curves, stats
from transport_geometry.statistics.hook_pair import mean_over
from transport_geometry.statistics.leaderboard import about_these

import numpy as np
import scipy
import torch

# 6 depths of two models, the pairs of hooks that the verdict counts; SAEs as in Exp-B
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sm" for layer in range(6)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=24,
    ctx=256,
)
STEPS = (0.25, 0.5, 1.0)  # of the grid of values, in standard deviations of an SAE's values
STEP = 0.5  # that ratios and the verdict are about
TRAINING_ROWS = 8  # sequences of the training side that say what a standard deviation is
N_RESAMPLES = 500
FACTOR = 1.25  # by which two ratios must differ, or be shown not to
TARGETS = (0.85, 0.90, 0.95)  # of CE_rec, for k* and bits*
SAVED_ROWS = ("expb", "expc_fisher")  # scripts whose folders serve, at 8 bits a value
QUANTISED = "quantised.csv"
TABLES = ("spectra.csv", "directions.csv", "units.csv", "finish.csv", "observer.csv")

R2, BEHAVIOUR = "1-r2", "1-ce_rec"
# every loss, under the name and with the normalisation that tables give it
LOSSES = (
    Metric(R2, lambda s: s["sse"] / s["sst"]),
    Metric("1-r2_nosink", lambda s: s["sse_nosink"] / s["sst_nosink"]),
    Metric("1-cosine", lambda s: 1 - s.per_token("cosine")),
    Metric("1-r2_fisher", lambda s: s["fisher"] / s["fisher_h"]),
    Metric("half_swd", lambda s: s["gd_sampled_seq"] / s["n"] / 2),
    Metric("kl", mean("kl")),
    Metric("dce", lambda s: s.per_token("ce_recon") - s.per_token("ce_orig")),
    Metric(BEHAVIOUR, lambda s: s["ce_recon"] / s["ce_orig"] - 1),
)
NAMES = [loss.name for loss in LOSSES]
OWN = (Metric("r2_fisher", lambda s: 1 - s["fisher"] / s["fisher_h"]),)


# ------------------------------------------------------------------------------------------- measurement
def study(eval_set: EvalSet, sae: SAE, device: torch.device, *, command: Command) -> dict[str, list[dict]]:
    """What is measured once per hook, {table: rows}: SAEs quantised, spectra, where the error lies; the
    middle SAE finished through the model, and what a bounded observer has of it.
    """
    saes = {}
    for one in eval_set.candidates:
        loaded = load(one, command.cache)
        assert isinstance(loaded, TopKSAE)
        saes[one.condition] = loaded.to(device)
    ctx = eval_set.held.input_ids.shape[1]
    source, tokenizer, split = eval_set.source, eval_set.tokenizer, command.grid.split
    rows = text.train_rows(source.data, tokenizer, ctx, TRAINING_ROWS, split, bos=eval_set.bos)
    return rate.study(eval_set, saes, next(rows), STEPS, eval_batch(eval_set.hook, ctx), device) | {
        "finish.csv": kl_finetune.study(eval_set, sae, device),
        "observer.csv": prequential_probe.study(eval_set, sae, device),
    }


# ---------------------------------------------------------------------------------------------- analysis
@dataclass(frozen=True, eq=False)
class Coded:
    """C SAEs as codes, under W weightings of the documents."""

    name: str
    bits: np.ndarray  # [W,C], a token
    of: dict[str, np.ndarray]  # {loss: [W,C]}


def eight_bits(found: Measured) -> Coded:
    """Indices as `metrics.index_bits` has them and 8 bits a value, which is charged but not rounded."""
    bits = np.array([row["bits"] for row in found.saes])
    W = len(found.values[R2])
    return Coded("8 bits", np.tile(bits, (W, 1)), {name: found.values[name] for name in NAMES})


def quantised(out: pathlib.Path, found: Measured) -> list[Coded]:
    """The SAEs after quantisation, one for each step."""
    rows, sums = load_results(out)
    place = {Condition.of(row): i for i, row in enumerate(rows)}
    table = read_table(store.checked(out / store.RUN, QUANTISED))
    n_doc = int(sums["document"].max()) + 1
    weights = stats.document_weights(n_doc, N_RESAMPLES, seed=0)
    saes = {Condition.of(row): i for i, row in enumerate(found.saes)}
    clean = {q: np.zeros((len(saes), n_doc)) for q in ("sst", "sst_nosink", "fisher_h", "ce_orig")}
    for one, i in saes.items():
        for q, of_documents in clean.items():
            of_documents[i] = np.bincount(sums["document"][place[one]], sums[q][place[one]], n_doc)
    codes = []
    for step in sorted({row["step"] for row in table}):
        after = {q: np.zeros((len(saes), n_doc)) for q in rate.CODED}
        for row in table:
            if row["step"] == step:
                for q, of_documents in after.items():
                    of_documents[saes[Condition.of(row)], row["document"]] = row[q]
        both = Sums(clean | after, weights, 0)
        bits = both.per_token("bits_idx") + both.per_token("bits_val")
        codes.append(Coded(f"{step:g}σ", bits, computed(both, LOSSES)))
    return codes


@dataclass(frozen=True, eq=False)
class Curves:
    """SAEs of one arm (recipe, sinks, budget) along k: what is read off a code at a hook, mean over seeds."""

    found: Measured
    models: list[str]
    arm: np.ndarray  # [C] bool
    weights: np.ndarray  # [W,C], of seeds

    @classmethod
    def of(cls, found: Measured, settings: dict) -> "Curves":
        if settings["recipe"] is None:
            raise UserError("SAEs from files have no curve over k")
        meta = found.meta
        arm = (
            (meta["recipe"] == settings["recipe"][0])
            & (meta["tokens"] == settings["tokens"][-1])
            & (meta["sae"] == sae_name(settings["expansion"], settings["sinks"][0]))
        )
        weights = np.ones_like(found.values[R2])
        if len(settings["seeds"]) > 1:
            by = ("model", "seed")
            weights = stats.bootstrap_weights(meta, N_RESAMPLES, 0, clusters=by, least=2)
        return cls(found, settings["models"], arm, weights)

    def hooks(self) -> list[tuple[str, str]]:
        """(model, depth), in the order of models."""
        meta = self.found.meta
        there = set(zip(meta["model"][self.arm].tolist(), meta["depth"][self.arm].tolist()))
        return [
            (model, depth) for model in self.models for depth in sorted(d for m, d in there if m == model)
        ]

    def k(self, model: str, depth: str) -> np.ndarray:
        meta = self.found.meta
        return np.unique(meta["k"][self.arm & (meta["model"] == model) & (meta["depth"] == depth)])

    def along_k(self, values: np.ndarray, model: str, depth: str) -> np.ndarray:
        """[W,n] of values [W,C]."""
        meta = self.found.meta
        here = self.arm & (meta["model"] == model) & (meta["depth"] == depth)
        columns = [mean_over(values, self.weights, here & (meta["k"] == k)) for k in self.k(model, depth)]
        return np.stack(columns, 1)

    def pairs(self) -> list[str]:
        """Depths that the smallest and the largest model both have."""
        meta = {name: column[self.arm] for name, column in self.found.meta.items()}
        return stats.shared_depths(meta, self.models)

    def log_ratio(self, code: Coded, at: str, of: str, depth: str) -> np.ndarray:
        """[W]: of the largest model over the smallest, at equal bits or at an equal loss."""

        def points(model: str) -> tuple[np.ndarray, np.ndarray]:
            x, y = (
                self.along_k(code.bits if name == "bits" else code.of[name], model, depth)
                for name in (at, of)
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                return (x if at == "bits" else np.log(x)), y

        return rate.log_ratio(points(self.models[0]), points(self.models[-1]))


def ratio_rows(lines: Curves, codes: list[Coded]) -> list[dict]:
    """Every ratio, largest model over smallest, at a pair of hooks: rows of ratios.csv, intervals over
    documents (and seeds).
    """
    rows = []
    for code in codes:
        for at in ("bits", "kl", BEHAVIOUR) if code.name in (f"{STEP:g}σ", "8 bits") else ("bits",):
            for of in ("bits", *NAMES):
                for depth in lines.pairs() if at != of else []:
                    draws = lines.log_ratio(code, at, of, depth)
                    lo, hi = stats.interval(draws[stats.RESAMPLES])
                    ends = dict(zip(("ratio", "lo", "hi"), map(float, np.exp([draws[0], lo, hi]))))
                    rows.append({"depth": depth, "code": code.name, "at_equal": at, "of": of} | ends)
    return rows


def over_pairs(logs: np.ndarray) -> dict[str, float]:
    """Geometric mean over pairs of hooks of a factor given by its logs [G], with Student intervals, and p by
    flipping signs: nan below 6 pairs. (No proxy was put on a scale of its own, so no degree is spent.)
    """
    logs = logs[np.isfinite(logs)]
    G = len(logs)
    out = {"pairs": G, "factor": float(np.exp(logs.mean())) if G else np.nan}
    half = logs.std(ddof=1) / G**0.5 if G > 1 else np.nan
    for level, ends in ((0.95, ("lo", "hi")), (0.90, ("lo90", "hi90"))):
        reach = scipy.stats.t.ppf((1 + level) / 2, G - 1) * half if G > 1 else np.nan
        out |= dict(zip(ends, map(float, np.exp(np.array([-reach, reach])) * out["factor"])))
    p = np.nan
    if G >= stats.MIN_CLUSTERS:
        p = stats.p_value(stats.sign_patterns(G) @ logs / max(np.abs(logs).sum(), 1e-300))
    return out | {"p": p}


def leaf_f(contrast: dict[str, float]) -> str:
    """The pre-registered rule, see the top."""
    if contrast["pairs"] < stats.MIN_CLUSTERS:
        return "undecided"
    if max(contrast["factor"], 1 / contrast["factor"]) >= FACTOR and contrast["p"] < stats.ALPHA:
        return "differs"
    if contrast["lo90"] > 1 / FACTOR and contrast["hi90"] < FACTOR:
        return "same"
    return "undecided"


def geometries(rows: list[dict], code: str) -> dict[str, dict]:
    """{loss: its ratio at equal bits over pairs, and how far it stands from that of BEHAVIOUR}."""

    def logs(of: str) -> np.ndarray:
        here = [row for row in rows if (row["code"], row["at_equal"], row["of"]) == (code, "bits", of)]
        return np.log([row["ratio"] for row in here])

    return {
        name: {"ratio": over_pairs(logs(name)), "apart": over_pairs(logs(name) - logs(BEHAVIOUR))}
        for name in NAMES
    }


def reached(lines: Curves, codes: list[Coded]) -> list[dict]:
    """k*(t) and bits*(t) of every hook: the smallest k, and the fewest bits under any code that quantises,
    that reach CE_rec >= t; beside it at 8 bits a value. Linear between grid points.
    """
    plain_code, *steps = codes
    rows = []
    for model, depth in lines.hooks():
        k = lines.k(model, depth)
        ce = 1 - lines.along_k(plain_code.of[BEHAVIOUR], model, depth)

        def bits(code: Coded, target: float, at: tuple[str, str] = (model, depth)) -> np.ndarray:
            return curves.k_star(
                lines.along_k(code.bits, *at), 1 - lines.along_k(code.of[BEHAVIOUR], *at), target
            )

        for target in TARGETS:
            row = {"model": model, "depth": depth, "CE_rec": target}
            row["k*"] = in_words(curves.k_star(k, ce, target), k[0], k[-1])
            if steps:
                first, last = (
                    pick([lines.along_k(code.bits, model, depth)[0, i] for code in steps])
                    for pick, i in ((min, 0), (max, -1))
                )
                best = np.min([bits(code, target) for code in steps], 0)
                row["bits*"] = in_words(best, first, last)
            whole = lines.along_k(plain_code.bits, model, depth)[0]
            row["bits* at 8 bits"] = in_words(bits(plain_code, target), whole[0], whole[-1])
            rows.append(row)
    return rows


def in_words(draws: np.ndarray, first: float, last: float) -> str:
    """A value with its percentile interval over documents, each censored where it lies beyond the grid."""
    star = curves.KStar("", "", "", "", 0, 0, round(first), round(last), draws)
    value, lo, hi = (end if isinstance(end, str) else f"{end:.1f}" for end in star.words())
    return f"{value} [{lo}, {hi}]"


def rate_rows(found: Measured, codes: list[Coded], lines: Curves, spectra: list[dict]) -> list[dict]:
    """Every SAE under every code: bits, losses, how far it stands above the Gaussian bound of its hook, and
    whether it is on its hook's front of CE against L0. Rows of rates.csv.
    """
    on_front = np.zeros(len(found.saes), bool)
    for hook in set(zip(found.meta["model"], found.meta["layer"])):
        here = (found.meta["model"] == hook[0]) & (found.meta["layer"] == hook[1])
        l0 = np.array([row["l0"] for row in found.saes])[here]
        on_front[here] = rate.front(l0, found.values["dce"][stats.ALL, here])
    rows = []
    for i, sae in enumerate(found.saes):
        for code in codes:
            row = vars(Condition.of(sae)) | {"code": code.name, "bits": float(code.bits[0, i])}
            row |= {name: float(code.of[name][0, i]) for name in NAMES}
            for name, column in ((R2, "sigma"), ("1-r2_nosink", "sigma_nosink"), ("1-r2_fisher", "fisher")):
                spectrum = np.array(
                    [s[column] for s in spectra if (s["model"], s["layer"]) == (sae["model"], sae["layer"])]
                )
                bound = rate.share_left(spectrum, code.bits[0, i]) if len(spectrum) else np.nan
                row[f"above_{column}"] = float(row[name] / bound)
            rows.append(row | {"l0": sae["l0"], "front": int(on_front[i])})
    return rows


def analyse(out: pathlib.Path, settings: dict) -> tuple[dict, list[dict]]:
    """rates.csv, ratios.csv, verdict.json, report.md and the plots: (verdict, rows of ratios.csv).

    A pure function of the saved tables.
    """
    found = load_measurements(out, settings, N_RESAMPLES, LOSSES)
    codes = [eight_bits(found), *quantised(out, found)]
    lines, record = Curves.of(found, settings), out / store.RUN
    tables = {name: read_table(store.checked(record, name)) for name in TABLES}
    tables["softmax.csv"] = []
    if "softmax.csv" in store.written(record):
        tables["softmax.csv"] = read_table(store.checked(record, "softmax.csv"))
    rates = rate_rows(found, codes, lines, tables["spectra.csv"])
    ratios = ratio_rows(lines, codes)
    by_loss = geometries(ratios, f"{STEP:g}σ")
    contrast = by_loss[R2]["apart"]
    verdict = plain(
        dict(
            leaf=leaf_f(contrast),
            contrast=contrast,
            by_loss=by_loss,
            by_code={code.name: geometries(ratios, code.name)[R2]["apart"] for code in codes},
            models=[settings["models"][0], settings["models"][-1]],
            reached=reached(lines, codes),
            softmax=tables["softmax.csv"],
            finish=kl_finetune.moves(tables["finish.csv"]),
            thresholds=dict(
                factor=FACTOR, alpha=stats.ALPHA, min_pairs=stats.MIN_CLUSTERS, step=STEP, code="ideal length"
            ),
            settings=settings,
            rows_sha256=rows_hash(out),
            quantised_sha256=store.sha256(store.checked(record, QUANTISED)),
        )
    )
    verdict["answer"] = vars(answer(verdict))
    files: dict[str, store.Content | None] = {
        "rates.csv": as_csv(rates, list(rates[0])),
        "ratios.csv": as_csv(ratios, "depth code at_equal of ratio lo hi".split()),
        "verdict.json": as_json(verdict),
        "report.md": report(found, rates, ratios, verdict, tables, settings),
    }
    charts = [chart.of_saes(found.saes, settings["models"], [BY_NAME["r2"], BY_NAME["bits"]])]
    pictures = plots(lines, codes, rates, ratios, verdict, tables, settings)
    store.put(record, with_page(out, files | pictures, charts))
    return verdict, ratios


LEAVES = {
    "differs": "at equal bits, 1 − R² and behaviour disagree about what the larger model's SAEs lose",
    "same": f"at equal bits, 1 − R² and behaviour agree within a factor of {FACTOR:g} about what the larger "
    "model's SAEs lose",
    "undecided": "this grid cannot decide whether 1 − R² and behaviour agree about what the larger model's "
    "SAEs lose",
}


def sentence(verdict: dict) -> str:
    """What was found."""
    small, large = verdict["models"]
    r2, ce = (verdict["by_loss"][name]["ratio"] for name in (R2, BEHAVIOUR))
    apart, least = verdict["contrast"], verdict["thresholds"]["min_pairs"]
    text = LEAVES[verdict["leaf"]]
    if not apart["pairs"]:
        return f"{text}: no depth is shared by two models whose curves meet."
    text += f": {large} over {small}, {factor(r2)} in 1 − R², {factor(ce)} in ΔCE / L_orig; "
    text += f"{factor(apart)} between them"
    p = "" if apart["p"] is None else f", p = {apart['p']:.3f}"
    few = f"; {least} needed" if apart["pairs"] < least else ""
    return f"{text} ({apart['pairs']} pairs of hooks{few}{p})."


QUESTION = (
    "At equal bits and equal depth, do R² and cross-entropy agree about how much more {large}'s SAEs lose "
    "than {small}'s?"
)
LIMITS = (
    "No cost in practice: the bits are an ideal code's. It is about {these}, compared at {pairs} pairs of "
    "hooks; pairs of other models may come out otherwise."
)


def answer(verdict: dict) -> Answer:
    small, large = verdict["models"]
    return Answer(
        QUESTION.format(small=small, large=large),
        as_sentence(sentence(verdict)),
        LIMITS.format(these=about_these(verdict["settings"]), pairs=verdict["contrast"]["pairs"]),
    )


def factor(of: dict) -> str:
    """A factor and its interval."""
    return with_ends(of["factor"], of["lo"], of["hi"])


def with_ends(value: float | None, lo: float | None, hi: float | None) -> str:
    """A positive number and its interval in text, three digits."""
    if value is None or not np.isfinite(value):
        return "undefined"
    if lo is None or hi is None or not np.isfinite([lo, hi]).all():
        return f"{short(value)} [undefined]"
    return f"{short(value)} [{short(lo)}, {short(hi)}]"


# ------------------------------------------------------------------------------------------ report, plots
REPORT = """\
# Exp-F: at equal bits, does the larger model lose more, and in which geometry?

{answer}
![rate and distortion](rate.png)

## At equal bits

{equal_bits}

Loss of {large} over that of {small} at equal depth and equal bits, values on a grid of {step}σ: ln loss \
linear in bits between the k of the grid, mean over the bits that both curves reach; nothing is \
extrapolated. By depth with 95% intervals over {documents} documents{seeds}, the tables of the code held; \
`all`: geometric mean over pairs of hooks, Student interval over them; `over 1-ce_rec`: the same of the \
ratio divided by behaviour's, 1 = this geometry says about scale what behaviour says; p: signs flipped \
over pairs. Not covered: other seeds where there is one, other texts, other models; hooks of a model are \
not independent of each other, so the last two rows are about these two models.

The losses, each normalised as it says. 1-r2: error over variance of h; _nosink: without sink positions; \
1-cosine: mean over tokens; 1-r2_fisher: E(g_y·δ)² over E(g_y·(h − mean))², the error's Fisher energy \
over h's own, labels y drawn from the model (above 1 where the error is felt more than h − mean is, whose \
part along h a LayerNorm takes away); half_swd: ½ E(Σ g_y·δ)² a token, nats², not normalised; kl, dce: \
nats a token, not normalised; 1-ce_rec: ΔCE / L_orig. (dce over 1-ce_rec is {large}'s L_orig over \
{small}'s, and nothing else.) The normalisation is part of the answer: half_swd and 1-r2_fisher weigh the \
same errors by the same gradients.

1-r2 over 1-ce_rec, which the verdict is about, under every code: {by_code}.

![ratios](ratios.png)

## At equal behaviour

{equal_behaviour}

The same at equal KL and at equal ΔCE / L_orig (both on a logarithmic scale): what the larger model's \
code takes in bits, and what its error looks like, where the model is as much disturbed.

## How many latents, how many bits, to reach a CE_rec

{reached}

`<`, `>`: reached by the first grid point already, not reached by the last. bits*: fewest bits over the \
steps of the grid of values; intervals over documents{seeds}.

## Rate, and what 8 bits a value overcharge

{rates}

Bits a token. Indices: every latent a Bernoulli of its own rate, the rates of one half of the documents \
coding the other. Values: round(z / step), the step in σ, the standard deviation of the SAE's active \
values (all latents together, without sinks) on {training} tokens of the training side; what rounds to 0 \
is not sent; each latent's histogram over the other half, backed off with {backed_off} pseudo-counts on \
that of all latents. Nothing is fitted to what it codes. Ideal lengths: an arithmetic coder is within 2 \
bits of a whole message. Neither the dictionary nor the tables are counted. `8 bits`: fixed 8 bits a \
value, nothing rounded.

## Above the Gaussian bound

{bound}

The loss at {step}σ over the least one that a Gaussian source of the hook's covariance has at as many \
bits (reverse water-filling over the eigenvalues of Σ, and of Σ^½GΣ^½, G averaged over positions; both \
known from the evaluation text, which favours the bound). Above 1: worse than transform coding of the \
principal components in that geometry; h is not Gaussian, so that a code may be below 1. (1-r2_fisher \
weighs every token's error by its own G, the bound all by the mean.)

![front](front.png)

SAEs that no other of their hook beats in L0 and CE: {on_front} of {n_saes} (`front` in rates.csv).

## Where the error lies

![directions](directions.png)

{directions}

Share of the first tenth and the first half of the eigendirections, of the largest eigenvalues: of the \
variance of h (Σ) or of G's trace, and of the squared error of the hook's middle SAE, not quantised.

## Softmax geometry at the last hook

{softmax}

## A finish through the model: which scores notice?

{finish}

## One bounded observer

{observer}

{about}"""
SOFTMAX = """\
There the logits are an unembedding of the final norm, so that J is known and G has a closed form. Its \
distance from the two exact forms of `fisher.py`, which Exp-C uses, relative, over {positions} positions: \
{text}."""
NO_SOFTMAX = "Not computed: no hook of the grid is a last block's, or what follows it is no LayerNorm."


def report(
    found: Measured, rates: list[dict], ratios: list[dict], verdict: dict, tables: dict, settings: dict
) -> bytes:
    small, large = verdict["models"]
    softmax = NO_SOFTMAX
    if tables["softmax.csv"]:
        each = [
            f"{row['model']} {row['sequence']:.1e} (sequence), {row['same']:.1e} (same position)"
            for row in tables["softmax.csv"]
        ]
        softmax = SOFTMAX.format(positions=tables["softmax.csv"][0]["positions"], text="; ".join(each))
    report_text = REPORT.format(
        answer=Answer(**verdict["answer"]).markdown(),
        equal_bits=equal_bits(ratios, verdict["by_loss"], f"{STEP:g}σ"),
        small=small,
        large=large,
        step=f"{STEP:g}",
        documents=" or ".join(map(str, settings["documents"])),
        seeds=" and seeds" if len(settings["seeds"]) > 1 else "",
        by_code="; ".join(f"{code} {factor(of)}" for code, of in verdict["by_code"].items()),
        equal_behaviour=equal_behaviour(ratios, f"{STEP:g}σ"),
        reached=markdown(verdict["reached"], list(verdict["reached"][0])),
        rates=rate_table(rates),
        training=f"{TRAINING_ROWS * settings['ctx']:,}",
        backed_off=rate.BACKED_OFF,
        bound=bound_table(rates),
        on_front=sum(row["front"] for row in rates if row["code"] == "8 bits"),
        n_saes=len(found.saes),
        directions=direction_table(tables["directions.csv"]),
        softmax=softmax,
        finish=kl_finetune.section(tables["finish.csv"]),
        observer=prequential_probe.section(tables["observer.csv"]),
        about="\n".join(about_the_run(label_last_block(found.saes, settings), settings)),
    )
    return report_text.encode()


def equal_bits(ratios: list[dict], by_loss: dict, code: str) -> str:
    """A row for every depth, then what all pairs say."""
    here = [row for row in ratios if (row["code"], row["at_equal"]) == (code, "bits") and row["of"] in NAMES]
    by_depth: dict[str, dict] = {}
    for row in here:
        by_depth.setdefault(row["depth"], {"depth": row["depth"]})[row["of"]] = with_ends(
            row["ratio"], row["lo"], row["hi"]
        )
    last = [
        {"depth": "all"} | {name: factor(by_loss[name]["ratio"]) for name in NAMES},
        {"depth": "over 1-ce_rec"} | {name: factor(by_loss[name]["apart"]) for name in NAMES},
        {"depth": "p"} | {name: short(by_loss[name]["apart"]["p"]) for name in NAMES},
    ]
    last[1][BEHAVIOUR] = last[2][BEHAVIOUR] = ""
    return markdown([*by_depth.values(), *last], ["depth", *NAMES])


def equal_bits_in_short(verdict: dict, colour: bool) -> str:
    """What all pairs say, for a terminal of 80 columns."""
    by_loss, (small, large) = verdict["by_loss"], verdict["models"]
    rows = [
        {
            "loss": name,
            f"{large} / {small}": factor(by_loss[name]["ratio"]),
            "over 1-ce_rec": "" if name == BEHAVIOUR else factor(by_loss[name]["apart"]),
            "p": "" if name == BEHAVIOUR else short(by_loss[name]["apart"]["p"]),
        }
        for name in NAMES
    ]
    return f"{columns(rows, colour=colour)}\n\nat equal bits; 95% over pairs of hooks of one depth"


def equal_behaviour(ratios: list[dict], code: str) -> str:
    shown = ["bits", R2, "1-cosine", "1-r2_fisher", "half_swd"]
    rows: dict[tuple, dict] = {}
    for row in ratios:
        if row["code"] == code and row["at_equal"] != "bits" and row["of"] in shown:
            key = row["at_equal"], row["depth"]
            into = rows.setdefault(key, dict(zip(("at equal", "depth"), key)))
            into[row["of"]] = with_ends(row["ratio"], row["lo"], row["hi"])
    if not rows:
        return "No depth is shared by two models."
    return markdown(list(rows.values()), ["at equal", "depth", *shown])


def of_each_sae(rates: list[dict]) -> dict[Condition, dict[str, dict]]:
    """{SAE: {code: row}}."""
    found: dict[Condition, dict[str, dict]] = {}
    for row in rates:
        found.setdefault(Condition.of(row), {})[row["code"]] = row
    return found


def rate_table(rates: list[dict]) -> str:
    rows = []
    for one, codes in of_each_sae(rates).items():
        row = {name: getattr(one, name) for name in ("model", "layer", "recipe", "k", "seed")}
        row |= {f"{code}: bits": f"{found['bits']:.1f}" for code, found in codes.items()}
        rows.append(row | {f"{code}: 1-r2": found[R2] for code, found in codes.items()})
    return markdown(rows, list(rows[0]))


def bound_table(rates: list[dict]) -> str:
    rows = []
    for one, codes in of_each_sae(rates).items():
        found = codes[f"{STEP:g}σ"]
        row = {name: getattr(one, name) for name in ("model", "layer", "recipe", "k", "seed")}
        row |= {"bits": f"{found['bits']:.1f}", R2: found[R2], "over the bound in Σ": found["above_sigma"]}
        row |= {"without sinks": found["above_sigma_nosink"], "1-r2_fisher": found["1-r2_fisher"]}
        rows.append(row | {"over the bound in Σ^½GΣ^½": found["above_fisher"]})
    return markdown(rows, list(rows[0]))


def direction_table(directions: list[dict]) -> str:
    rows: dict[tuple, dict] = {}
    for row in directions:
        into = rows.setdefault((row["model"], row["layer"]), {"model": row["model"], "layer": row["layer"]})
        weight = "variance" if row["directions"] == "Σ" else "sensitivity"
        for last, words in ((1, "first tenth"), (rate.GROUPS // 2, "first half")):
            for name, what in ((weight, "own"), ("error", "error")):
                column = f"{row['directions']} {words}: {what}"
                into[column] = into.get(column, 0.0) + (row[name] if row["group"] <= last else 0.0)
    return markdown(list(rows.values()), list(next(iter(rows.values()))))


def plots(
    lines: Curves,
    codes: list[Coded],
    rates: list[dict],
    ratios: list[dict],
    verdict: dict,
    tables: dict,
    settings: dict,
) -> dict[str, store.Content | None]:
    """{file: PNG}."""
    return {
        "rate.png": rate_plot(lines, codes, tables["spectra.csv"], settings),
        "ratios.png": ratio_plot(ratios, verdict),
        "front.png": front_plot(rates, settings),
        "directions.png": direction_plot(tables["directions.csv"], settings),
    }


SHOWN = {R2: "1 − R²", "1-r2_fisher": "1 − R²_Fisher", BEHAVIOUR: "ΔCE / L_orig"}


def rate_plot(lines: Curves, codes: list[Coded], spectra: list[dict], settings: dict) -> Any:
    """Loss against bits: a column for every depth, a row for every geometry."""
    plt, colours = pyplot(), model_colours(settings["models"])
    depths = sorted({depth for _, depth in lines.hooks()})
    hook_at = {(hook.rpartition("@")[0], depth): hook for hook, depth in settings["hooks"].items()}
    size = 2.2 * len(depths) + 2, 7
    figure, axes = plt.subplots(
        len(SHOWN), len(depths), figsize=size, sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    styles = {"8 bits": dict(linestyle=":", alpha=0.7), f"{STEP:g}σ": dict(marker="o", markersize=4)}
    reach = np.concatenate([code.bits[0, lines.arm] for code in codes])
    bits = np.geomspace(reach.min() / 1.1, reach.max() * 1.1, 100)
    for row, (name, label) in zip(axes, SHOWN.items()):
        column = {R2: "sigma", "1-r2_fisher": "fisher"}.get(name)
        for axis, (model, depth) in ((row[depths.index(hook[1])], hook) for hook in lines.hooks()):
            for code in codes:
                x, y = (lines.along_k(v, model, depth)[0] for v in (code.bits, code.of[name]))
                style = styles.get(code.name, dict(linewidth=0.6, alpha=0.6))
                axis.plot(x, y, color=colours[model], **style)
            if column:
                here = hook_at[model, depth]
                spectrum = np.array([s[column] for s in spectra if hook_of(s) == here])
                bound = rate.share_left(spectrum, bits)
                axis.plot(bits, bound, "--", color=colours[model], linewidth=0.9)
        y = np.concatenate([code.of[name][0, lines.arm] for code in codes])
        y = y[y > 0]
        row[0].set(xscale="log", yscale="log", xlim=(bits[0], bits[-1]), ylabel=label)
        if len(y):
            row[0].set_ylim(y.min() / 1.3, y.max() * 1.3)
        lo, hi = row[0].get_ylim()
        ticks = [v * 10.0**e for e in range(-5, 2) for v in (1, 2, 5) if lo <= v * 10.0**e <= hi]
        row[0].set_yticks(ticks, [f"{v:g}" for v in ticks])
        for axis in row:
            axis.set_xticks([50, 100, 200, 400], ["50", "100", "200", "400"], fontsize=8)
            axis.set_xticks([], minor=True)
            axis.yaxis.set_minor_formatter(plt.NullFormatter())
            axis.grid(alpha=0.3, which="both")
    for axis, depth in zip(axes[0], depths):
        axis.set_title(f"depth {depth}", fontsize=9)
    dark = "0.3"
    handles = [plt.Line2D([], [], color=colours[model], label=model) for model in settings["models"]]
    handles += [
        plt.Line2D([], [], color=dark, marker="o", markersize=4, label=f"values at {STEP:g}σ"),
        plt.Line2D([], [], color=dark, linewidth=0.6, label="other steps"),
        plt.Line2D([], [], color=dark, linestyle=":", label="8 bits a value"),
        plt.Line2D([], [], color=dark, linestyle="--", linewidth=0.9, label="Gaussian bound"),
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.supxlabel("bits a token", fontsize=10)
    return figure


def ratio_plot(ratios: list[dict], verdict: dict) -> Any:
    """The ratio of losses at equal bits in every geometry."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for i, name in enumerate(NAMES):
        here = [
            row["ratio"]
            for row in ratios
            if (row["code"], row["at_equal"], row["of"]) == (f"{STEP:g}σ", "bits", name)
        ]
        axis.scatter(here, np.full(len(here), i), s=14, color="0.6", zorder=2)
        of = verdict["by_loss"][name]["ratio"]
        if of["factor"] is not None:
            axis.plot(of["factor"], i, "D", color=BLUE, zorder=3)
        if of["lo"] is not None:
            axis.plot([of["lo"], of["hi"]], [i, i], color=BLUE, linewidth=2, zorder=3)
    behaviour = verdict["by_loss"][BEHAVIOUR]["ratio"]["factor"]
    if behaviour is not None:
        axis.axvspan(behaviour / FACTOR, behaviour * FACTOR, color="#E69F00", alpha=0.15, zorder=0)
        axis.axvline(behaviour, color="#E69F00", linewidth=1, zorder=1)
    axis.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(NAMES)), NAMES)
    axis.invert_yaxis()
    small, large = verdict["models"]
    axis.set(xlabel=f"loss of {large} over {small} at equal bits", xscale="log")
    axis.set_title(f"grey: a pair of hooks; line: behaviour, band: a factor of {FACTOR:g}", fontsize=9)
    lo, hi = axis.get_xlim()
    ticks = [x for x in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10) if lo <= x <= hi]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3, axis="x")
    return figure


def front_plot(rates: list[dict], settings: dict) -> Any:
    """CE_rec against L0, the front of every hook joined."""
    plt, colours = pyplot(), model_colours(settings["models"])
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    here = [row for row in rates if row["code"] == "8 bits"]
    for model, layer in sorted({(row["model"], row["layer"]) for row in here}):
        own = sorted(
            (row["l0"], 1 - row[BEHAVIOUR], row["front"])
            for row in here
            if (row["model"], row["layer"]) == (model, layer)
        )
        l0, ce, on_front = map(np.array, zip(*own))
        kept = on_front == 1
        axis.plot(l0[kept], ce[kept], "o-", color=colours[model], markersize=4, linewidth=0.9, alpha=0.8)
        axis.plot(l0[~kept], ce[~kept], "x", color=colours[model], markersize=4)
    handles = [plt.Line2D([], [], color=colours[m], marker="o", label=m) for m in settings["models"]]
    axis.legend(handles=handles, fontsize=8, title="one line a hook")
    axis.set(xscale="log", xlabel="L0, active latents a token", ylabel="CE_rec")
    axis.set_xticks(settings["k"], map(str, settings["k"]))
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    return figure


def direction_plot(directions: list[dict], settings: dict) -> Any:
    """How much of the error the first eigendirections hold, of Sigma and of G."""
    plt, colours = pyplot(), model_colours(settings["models"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    share = np.linspace(0, 1, rate.GROUPS + 1)
    for axis, name, weight, words in zip(
        axes, ("Σ", "G"), ("variance", "sensitivity"), ("variance of h", "trace of G")
    ):
        for model, layer in sorted({(row["model"], row["layer"]) for row in directions}):
            own = [
                row
                for row in directions
                if (row["model"], row["layer"], row["directions"]) == (model, layer, name)
            ]
            for column, style in (("error", "-"), (weight, ":")):
                axis.plot(
                    share,
                    np.r_[0, np.cumsum([row[column] for row in own])],
                    style,
                    color=colours[model],
                    alpha=0.7,
                    linewidth=1,
                )
        axis.plot([0, 1], [0, 1], color="0.4", linewidth=0.8)
        axis.set(
            xlabel=f"eigendirections of {name}, largest first (share)",
            title=f"solid: squared error, dotted: {words}",
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share that they hold")
    handles = [plt.Line2D([], [], color=colours[m], label=m) for m in settings["models"]]
    axes[1].legend(handles=handles, fontsize=8, title="one line a hook")
    return figure


# -------------------------------------------------------------------------------------- another script's rows
OF_SAVED_ROWS = """\
From the rows of {script}.py, indices at their ideal length and 8 bits a value, nothing quantised. No \
verdict: it is about losses after quantisation. Nothing is written.

Loss of {large} over that of {small} at equal bits:

{equal_bits}

{reached}

On their hook's front of CE against L0: {on_front} of {n_saes} SAEs; beaten: {beaten}"""


def of_saved_rows(out: pathlib.Path, settings: dict) -> str:
    """What needs no quantised forward, from a folder of another script."""
    found = load_measurements(out, settings, N_RESAMPLES, LOSSES)
    lines, codes = Curves.of(found, settings), [eight_bits(found)]
    ratios, rates = ratio_rows(lines, codes), rate_rows(found, codes, lines, [])
    star = reached(lines, codes)
    beaten = [str(Condition.of(row)) for row in rates if not row["front"]]
    return OF_SAVED_ROWS.format(
        script=settings["script"],
        large=settings["models"][-1],
        small=settings["models"][0],
        equal_bits=equal_bits(ratios, plain(geometries(ratios, "8 bits")), "8 bits"),
        reached=markdown(star, list(star[0])),
        on_front=len(rates) - len(beaten),
        n_saes=len(rates),
        beaten="; ".join(beaten) or "none",
    )


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
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
    # the passes of quantised codes through the tail, for every SAE
    experiment = Experiment(
        "expf_rate", None, OWN, functools.partial(study, command=command), more_passes=len(STEPS)
    )
    with hushed(command):
        if (done := run(command, experiment)) is None:
            return
        out, settings = done
        verdict, _ = analyse(out, settings)
    table = equal_bits_in_short(verdict, coloured(sys.stdout))
    conclude(command, out, Answer(**verdict["answer"]), table, verdict["leaf"])


if __name__ == "__main__":
    run_script(main)
