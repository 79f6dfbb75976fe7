"""SAEs as codes, of Exp-F: bits and losses of each after quantisation, and their curves along k, on which two
models, or two hooks, are compared at equal bits.

Shapes: C SAEs, W weightings of the documents (0 all, 1 and 2 halves, then resamples).
"""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.measuring import rate
from transport_geometry.measuring.metrics import Metric, Sums, computed
from transport_geometry.records import store
from transport_geometry.records.condition import Condition, hook_of
from transport_geometry.records.results import Measured, load_results
from transport_geometry.records.tables import read_table
from transport_geometry.running.grid import sae_name
from transport_geometry.statistics import curves
from transport_geometry.statistics.hook_pair import PAIRED, as_models, mean_over
from transport_geometry.statistics.resampling import bootstrap_weights, document_weights

import numpy as np

R2, CE = "1-r2", "1-ce_rec"  # losses
QUANTISED = "quantised.csv"
TARGETS = (0.85, 0.90, 0.95)  # of CE_rec, for k* and bits*
OF_H = ("sst", "sst_nosink", "fisher_h", "ce_orig")  # sums that quantisation does not change


@dataclass(frozen=True, eq=False)
class Coded:
    """C SAEs as codes."""

    name: str
    bits: np.ndarray  # [W,C], a token
    losses: dict[str, np.ndarray]  # {loss: [W,C]}


def at_eight_bits(found: Measured, losses: Sequence[Metric]) -> Coded:
    """Indices as `metrics.index_bits` has them and 8 bits a value, which is charged but not rounded."""
    values = {loss.name: found.values[loss.name] for loss in losses}
    bits = np.array([row["bits"] for row in found.saes])
    return Coded("8 bits", np.tile(bits, (len(values[losses[0].name]), 1)), values)


def quantised(out: pathlib.Path, found: Measured, losses: Sequence[Metric], n_resamples: int) -> list[Coded]:
    """The SAEs after quantisation, one for each step of QUANTISED."""
    rows, sums = load_results(out)
    documents = sums["document"][[row["recipe"] != "null" for row in rows]]  # [C,S]
    n_doc = int(sums["document"].max()) + 1
    weights = document_weights(n_doc, n_resamples, seed=0)
    clean = {
        q: np.stack([np.bincount(of, v, n_doc) for of, v in zip(documents, found.sums[q])]) for q in OF_H
    }
    place = {Condition.of(row): i for i, row in enumerate(found.saes)}
    table = read_table(store.checked(out / store.RUN, QUANTISED))
    codes = []
    for step in sorted({row["step"] for row in table}):
        coded = {q: np.zeros((len(place), n_doc)) for q in rate.CODED}
        for row in table:
            if row["step"] == step:
                for q, of_documents in coded.items():
                    of_documents[place[Condition.of(row)], row["document"]] = row[q]
        both = Sums(clean | coded, weights, 0)
        bits = both.per_token("bits_idx") + both.per_token("bits_val")
        codes.append(Coded(f"{step:g}σ", bits, computed(both, losses)))
    return codes


@dataclass(frozen=True, eq=False)
class RateCurves:
    """The SAEs of one arm (recipe, sinks, budget) along k at every hook, means over seeds."""

    models: list[str]  # from the smallest to the largest; with --pairs each hook counts as a model
    # {(model, depth): {k: which SAEs [C] bool}}, in the order of models, depths and k
    hooks: dict[tuple[str, str], dict[int, np.ndarray]]
    weights: np.ndarray  # [W,C], of seeds
    # {what a table calls it: the two (model, depth) that are compared, the second over the first}
    pairs: dict[str, tuple[tuple[str, str], tuple[str, str]]]

    @property
    def unit(self) -> str:
        """What the pairs' names are."""
        return "pair" if all(depth == PAIRED for _, depth in self.hooks) else "depth"

    def place(self, row: Mapping[str, Any], depths: Mapping[str, str]) -> tuple[str, str]:
        """Which of `hooks` a row of a table is about. depths {hook: its depth}."""
        hook = hook_of(row)
        return (hook, PAIRED) if self.unit == "pair" else (row["model"], depths[hook])

    @classmethod
    def of(cls, found: Measured, settings: dict, n_resamples: int) -> "RateCurves":
        """Of the first recipe and sinks and the last budget. Raises UserError for SAEs from files."""
        if settings["recipe"] is None:
            raise UserError("SAEs from files have no curve over k")
        paired = settings.get("pairs", [])
        meta = as_models(found.meta) if paired else found.meta
        models = list(dict.fromkeys(meta["model"].tolist())) if paired else settings["models"]
        hooks = {}
        arm = (
            (meta["recipe"] == settings["recipe"][0])
            & (meta["tokens"] == settings["tokens"][-1])
            & (meta["sae"] == sae_name(settings["expansion"], settings["sinks"][0]))
        )
        for model in models:
            for depth in np.unique(meta["depth"][arm & (meta["model"] == model)]).tolist():
                here = arm & (meta["model"] == model) & (meta["depth"] == depth)
                ks = np.unique(meta["k"][here]).tolist()
                hooks[model, depth] = {k: here & (meta["k"] == k) for k in ks}
        weights = np.ones_like(found.values["dce"])
        if len(settings["seeds"]) > 1:
            units = ("model", "seed")  # all hooks of a model move together: a seed is theirs
            weights = bootstrap_weights(found.meta, n_resamples, 0, clusters=units, least=2)
        if paired:
            pairs = {f"{b} over {a}": ((a, PAIRED), (b, PAIRED)) for a, b in paired}
        else:
            small, large = models[0], models[-1]
            shared = [depth for model, depth in hooks if model == small != large and (large, depth) in hooks]
            pairs = {depth: ((small, depth), (large, depth)) for depth in shared}
        return cls(models, hooks, weights, pairs)

    def along_k(self, values: np.ndarray, hook: tuple[str, str]) -> np.ndarray:
        """[W,n], for the n k of the hook, of values [W,C]."""
        return np.stack([mean_over(values, self.weights, here) for here in self.hooks[hook].values()], 1)

    def log_ratio(self, code: Coded, at: str, of: str, pair: str) -> np.ndarray:
        """[W]: ln of the second hook's loss `of` over the first one's, at equal `at`: bits or a loss."""
        both = []
        for hook in self.pairs[pair]:
            x, y = (
                self.along_k(code.bits if name == "bits" else code.losses[name], hook) for name in (at, of)
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                both.append((x if at == "bits" else np.log(x), y))
        first, second = both
        return rate.log_ratio(first, second)


def reached(lines: RateCurves, codes: list[Coded]) -> list[dict]:
    """k*(t) and bits*(t) of every hook: the smallest k, and the fewest bits under any code that quantises,
    that reach CE_rec >= t; beside it at 8 bits a value. Linear between grid points.
    """
    rows = []
    for model, depth in lines.hooks:
        bits = [lines.along_k(code.bits, (model, depth)) for code in codes]
        ce = [1 - lines.along_k(code.losses[CE], (model, depth)) for code in codes]
        ks = np.array(list(lines.hooks[model, depth]))
        for target in TARGETS:
            at_eight, *at_steps = [curves.k_star(b, c, target) for b, c in zip(bits, ce)]
            row = {"model": model} | ({"depth": depth} if depth != PAIRED else {}) | {"CE_rec": target}
            row["k*"] = in_words(curves.k_star(ks, ce[0], target), ks[0], ks[-1])
            if at_steps:
                first, last = min(b[0, 0] for b in bits[1:]), max(b[0, -1] for b in bits[1:])
                row["bits*"] = in_words(np.min(at_steps, 0), first, last)
            rows.append(row | {"bits* at 8 bits": in_words(at_eight, bits[0][0, 0], bits[0][0, -1])})
    return rows


def in_words(draws: np.ndarray, first: float, last: float) -> str:
    """A value with its percentile interval over documents, each censored where it lies beyond the grid."""
    star = curves.KStar("", "", "", "", 0, 0, round(first), round(last), draws)
    value, lo, hi = (end if isinstance(end, str) else f"{end:.1f}" for end in star.words())
    return f"{value} [{lo}, {hi}]"
