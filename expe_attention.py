"""Exp-E: does a patch do its harm by changing whom the later positions attend to, and does that change say
more about patched cross-entropy than Euclidean error does?

    python expe_attention.py                                # embedded models, four CPU-minutes
    python expe_attention.py --models EleutherAI/pythia-70m@3,EleutherAI/pythia-410m@12 --tokens 10M \\
                             --data NeelNanda/pile-small-tokenized-2b
    python expe_attention.py --from outputs/expe_attention  # tables, verdict and plots again, without a model

Claim P: the plan distortion, mean KL between a query's attention before and after the patch, predicts CE_rec
beyond the best Euclidean control. It explains rather than replaces: it takes a patched forward, as dCE itself
does. Beside it, two runs between the clean and the patched one say how much of dCE goes through the plans,
and a map of KL over blocks and heads where the plan breaks (`attention_plan.py`).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.measuring.attention_plan import Change, check_readable, four_runs
from transport_geometry.measuring.dimension import participation_of
from transport_geometry.measuring.evaluate import activations
from transport_geometry.measuring.metrics import BY_NAME, DISTORTION, PROXIES, Metric, Sums
from transport_geometry.measuring.patch import Patch
from transport_geometry.models.lm import cross_entropy
from transport_geometry.records import store
from transport_geometry.records.results import (
    Measured,
    about_the_run,
    hook_of,
    label_last_block,
    load_measurements,
    rows_hash,
    subset,
)
from transport_geometry.records.tables import (
    as_csv,
    as_json,
    grouped,
    markdown,
    percent,
    plain,
    read_table,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting.console import Answer, coloured, conclude, hushed
from transport_geometry.reporting.figures import model_colours, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment, eval_batch, run
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics import leaderboard, stats
from transport_geometry.statistics.leaderboard import (
    AFTER_H2,
    LEADERBOARD,
    about_these,
    board_in_short,
    how_to_read,
    leaderboard_plot,
    leaderboard_table,
)

import numpy as np
import torch

# every hook that attention follows: 15, since hooks, not k, are what the tests and the bootstrap count
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in range(5)),
    k="4,32",
    tokens="100k",
    expansion=4,
    eval_seqs=16,
    ctx=256,
)
N_RESAMPLES = 2000
MIN_ADDED = 0.2  # P: partial Spearman of the plan distortion with CE_rec given k and the best control
BEYOND = ("nmse_tok", "cosine", "r2", "swd_tok", "kl")  # what else it might add to, descriptive
TABLES = ("depth.csv", "hooks.csv")


# ------------------------------------------------------------------------------------------- measurement
FIELDS = tuple(field.name for field in dataclasses.fields(Change))
QUANTITIES = ("plan_n", *(f"plan_{name}" for name in FIELDS), "plan_next", "ce_frozen", "ce_plan_only")


def terms(patch: Patch) -> dict[str, torch.Tensor]:
    """Per predicted position [B,T-1]: every field of Change, mean over the blocks after the hook and their
    heads, at queries t >= 1; KL of the next block alone; CE of the run with clean plans, and of the one with
    patched plans. nan where no attention follows.
    """
    clean, hook = patch.clean, patch.clean.hook
    B, T, _ = clean.h.shape
    if hook.is_last:
        return dict.fromkeys(QUANTITIES, clean.h.new_full((B, T - 1), torch.nan))
    sums = dict.fromkeys(("plan_next", *(f"plan_{name}" for name in FIELDS)), clean.h.new_zeros(B, T))
    n_blocks = 0

    def look(block: int, change: Change) -> None:
        nonlocal n_blocks
        n_blocks += 1
        for name in FIELDS:
            sums[f"plan_{name}"] = sums[f"plan_{name}"] + getattr(change, name).mean(1)
        if block == hook.layer + 1:
            sums["plan_next"] = change.kl.mean(1)

    h_hat = clean.whole(patch.h_hat)
    frozen, plan_only = four_runs(hook, clean.input_ids, clean.h, h_hat, look)
    queries = torch.ones_like(clean.h[:, :-1, 0])
    queries[:, 0] = 0  # one key
    out = {name: v[:, :-1] * queries / (1 if name == "plan_next" else n_blocks) for name, v in sums.items()}
    return out | {
        "plan_n": queries,
        "ce_frozen": cross_entropy(frozen, clean.input_ids),
        "ce_plan_only": cross_entropy(plan_only, clean.input_ids),
    }


def over(part: str, whole: str) -> Callable[[Sums], np.ndarray]:
    """Formula: a ratio of two quantities' sums."""
    return lambda s: s[part] / s[whole]


def added_ce(s: Sums, ce: str) -> np.ndarray:
    """What a run's CE is above the clean run's, summed over evaluated tokens."""
    return s[ce] - s["ce_orig"]


# on the leaderboard beside the proxies of Exp-B, per head and query
PLAN = (
    Metric("plan_kl", over("plan_kl", "plan_n"), DISTORTION),
    Metric("plan_jeffreys", over("plan_jeffreys", "plan_n"), DISTORTION),
    Metric("plan_half_var", over("plan_half_var", "plan_n"), DISTORTION),
    Metric("plan_next", over("plan_next", "plan_n"), DISTORTION),
)
OWN = (
    *PLAN,
    Metric("plan_first", over("plan_kl_first", "plan_kl")),
    Metric("to_first", over("plan_first", "plan_n")),
    Metric("to_first_hat", over("plan_first_hat", "plan_n")),
    Metric("plan_entropy", over("plan_entropy", "plan_n")),
    Metric("plan_entropy_hat", over("plan_entropy_hat", "plan_n")),
    Metric("out_plan", over("plan_plan_sq", "plan_out_sq")),
    Metric("out_value", over("plan_value_sq", "plan_out_sq")),
    Metric("dce_frozen", lambda s: added_ce(s, "ce_frozen") / s["n"]),
    Metric("dce_plan_only", lambda s: added_ce(s, "ce_plan_only") / s["n"]),
    Metric("mediated", lambda s: 1 - added_ce(s, "ce_frozen") / added_ce(s, "ce_recon")),
    Metric("plan_only", lambda s: added_ce(s, "ce_plan_only") / added_ce(s, "ce_recon")),
)


def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> dict[str, list[dict]]:
    """Once per hook, with the middle SAE of the grid: {"depth.csv": a row per block after the hook and head,
    "hooks.csv": one}.

    Means over queries t >= 1; out_plan and out_value relative to |o|^2, as in conditions.csv.
    """
    hook, input_ids, condition = eval_set.hook, eval_set.held.input_ids, eval_set.middle.condition
    shared = activations(hook, input_ids, batch := eval_batch(hook, input_ids.shape[1]))
    used, calm = shared.h[:, :-1].flatten(0, 1), ~shared.sink.flatten()
    name = {"model": condition.model, "layer": condition.layer}
    ratios = {"pr": participation_of(used), "pr_nosink": participation_of(used[calm])}
    of_hook = [name | {"d": eval_set.d} | ratios]
    which = name | {key: getattr(condition, key) for key in ("recipe", "k", "seed", "tokens")}
    if hook.is_last:  # no attention, and a row that says so
        return {
            "depth.csv": [which | dict.fromkeys(("block", "head", *FIELDS), np.nan)],
            "hooks.csv": of_hook,
        }
    sums: dict[int, dict[str, torch.Tensor]] = {}

    def look(block: int, change: Change) -> None:
        mine = sums.setdefault(block, {})
        for name in FIELDS:
            mine[name] = mine.get(name, 0) + getattr(change, name)[:, :, 1:-1].cpu().double().sum((0, 2))

    with torch.no_grad():
        for x, h in zip(input_ids.split(batch), shared.h.split(batch)):
            x, h = x.to(device), h.to(device)
            h_hat = torch.cat([sae.reconstruct(h.flatten(0, 1))[2].view_as(h)[:, :-1], h[:, -1:]], 1)
            four_runs(hook, x, h, h_hat, look)
    n = len(input_ids) * max(input_ids.shape[1] - 2, 0) or np.nan
    rows = []
    for block, fields in sorted(sums.items()):
        for head in range(len(fields["kl"])):
            means = {field: float(v[head]) / n for field, v in fields.items()}
            rows.append(which | {"block": block, "head": head} | means)
    return {"depth.csv": rows, "hooks.csv": of_hook}


def check(eval_sets: list[EvalSet]) -> None:
    """Raises UserError where nothing could be measured: no attention after any hook, or one that cannot be
    read.
    """
    if all(eval_set.hook.is_last for eval_set in eval_sets):
        raise UserError("--models: each hook is its model's last block, and no attention follows it")
    for eval_set in eval_sets:
        if not eval_set.hook.is_last:
            check_readable(eval_set.hook, eval_set.held.input_ids[:1])


# the four runs of `terms`, in plain attention
EXPERIMENT = Experiment("expe_attention", terms, OWN, study, more_passes=6, check=check)


# ---------------------------------------------------------------------------------------------- analysis
@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over hooks (or over pairs of hooks), and its 95% interval."""

    value: float
    lo: float
    hi: float
    n: int  # hooks, or pairs

    def words(self, above: str, below: str) -> str:
        """Which side of 0 the interval lies on."""
        if self.lo > 0 or self.hi < 0:
            return above if self.lo > 0 else below
        return "undecided"


def by_hook(meta: dict) -> list[tuple[str, int, np.ndarray]]:
    """(model, layer, [C] bool) of every hook, in the order in which tables have them."""
    hooks = sorted(set(zip(meta["model"], meta["layer"])))
    return [(m, layer, (meta["model"] == m) & (meta["layer"] == layer)) for m, layer in hooks]


def weights_of(hooks: dict[str, np.ndarray], W: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights [3 + R, G] of hooks {model, layer: [G]}, resampled within models, and which of W weightings of
    the documents goes with each). nan below 6 hooks, or 3 of a model.
    """
    weights = stats.bootstrap_weights(hooks, N_RESAMPLES, 0)
    if len(weights[0]) < stats.MIN_CLUSTERS:
        weights[stats.RESAMPLES] = np.nan
    return weights, stats.resample_index(W, N_RESAMPLES) if W > 1 else np.zeros(len(weights), int)


def mean_over_hooks(v: np.ndarray, hooks: dict[str, np.ndarray]) -> Estimate:
    """v [W,G]: documents are resampled with the hooks where W says how; one weighting leaves them fixed."""
    weights, which = weights_of(hooks, len(v))
    draws = (weights * v[which]).sum(1) / weights.sum(1)
    return Estimate(float(draws[0]), *stats.interval(draws[stats.RESAMPLES]), len(hooks["model"]))


def within_models(x: np.ndarray, y: np.ndarray, hooks: dict[str, np.ndarray]) -> Estimate:
    """Pearson correlation over hooks of x [G] and y [W,G], each less its model's mean."""
    weights, which = weights_of(hooks, len(y))
    models = (hooks["model"][:, None] == np.unique(hooks["model"])).astype(float)
    design = stats.weighted_design(weights, models)
    r = stats.correlation(stats.unit_residual(x[None], design), stats.unit_residual(y[which], design))
    return Estimate(float(r[0]), *stats.interval(r[stats.RESAMPLES], fisher=True), len(x))


def larger_minus_smaller(y: np.ndarray, meta: dict, models: list[str]) -> Estimate:
    """Of y [W,C]: largest model minus smallest at the same depth and k, mean over the k that both have, then
    over depths, which are resampled as pairs of hooks.
    """
    depths, gaps, kept = stats.shared_depths(meta, models), [], []
    for i, depth in enumerate(depths):
        here = meta["depth"] == depth
        small, large = (here & (meta["model"] == m) for m in (models[0], models[-1]))
        same = sorted(set(meta["k"][small]) & set(meta["k"][large]))
        of_k = [y[:, large & (meta["k"] == k)].mean(1) - y[:, small & (meta["k"] == k)].mean(1) for k in same]
        if of_k:
            gaps.append(np.mean(of_k, 0))
            kept.append(i)
    if not gaps:
        return Estimate(np.nan, np.nan, np.nan, 0)
    weights = stats.depth_weights(meta, models, N_RESAMPLES, 0)[:, kept]
    which = stats.resample_index(len(y), N_RESAMPLES)
    draws = (weights * np.transpose(gaps)[which]).sum(1) / weights.sum(1)
    return Estimate(float(draws[0]), *stats.interval(draws[stats.RESAMPLES]), len(gaps))


def shares(values: dict, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of each hook's dCE, summed over its SAEs, the share that clean plans take away and the share that
    patched plans cause alone: [W,G] each.
    """
    total, frozen, plan_only = (
        np.stack([values[name][:, here].sum(1) for _, _, here in by_hook(meta)], 1)
        for name in ("dce", "dce_frozen", "dce_plan_only")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - frozen / total, plan_only / total


def break_map(depth: list[dict]) -> list[dict]:
    """Per hook that attention follows: KL at every block after it, mean over heads, as offsets from the hook.

    first_share: of the sum over blocks, in the first; first_over_rest: log2 of the first block's KL over the
    mean of the later ones' (nan where there is none).
    """
    rows = []
    for (model, layer), of_hook in grouped(depth, ("model", "layer")).items():
        kl = np.array([np.mean([r["kl"] for r in of]) for of in grouped(of_hook, ["block"]).values()])
        if np.isfinite(kl).all():
            with np.errstate(divide="ignore", invalid="ignore"):
                later = np.log2(kl[0] / kl[1:].mean()) if len(kl) > 1 else np.nan
                share = kl[0] / kl.sum()
            rows.append(
                dict(model=model, layer=layer, k=of_hook[0]["k"], kl=kl, share=share, first_over_rest=later)
            )
    return rows


def where_it_breaks(depth: list[dict], of_hooks: list[dict], found: Measured, models: list[str]) -> dict:
    """The three questions of the depth map, each {value, lo, hi, n} and a word; and the hook of lowest PR of
    each model, with its depth.

    depth, of_hooks: rows of TABLES. Plan distortion in log10, so 0.3 is twice as much; `per_error` divides it
    by nmse_tok before, both being quadratic in a small error.
    """
    values, meta = found.values, found.meta
    rows = [row for row in break_map(depth) if np.isfinite(row["first_over_rest"])]
    first = Estimate(np.nan, np.nan, np.nan, 0)
    if rows:
        hooks = {name: np.array([row[name] for row in rows]) for name in ("model", "layer")}
        first = mean_over_hooks(np.array([[row["first_over_rest"] for row in rows]]), hooks)
    out = {"first_block": vars(first) | {"word": first.words("first block", "later blocks")}}
    places = by_hook(meta)
    hooks = {"model": np.array([m for m, _, _ in places]), "layer": np.array([i for _, i, _ in places])}
    pr = {(row["model"], row["layer"]): row["pr"] for row in of_hooks}
    out["lowest_pr"] = {
        f"{model}@{layer}": float(meta["depth"][here][0])
        for model, layer, here in places
        if pr[model, layer] == min(pr[m, i] for m, i, _ in places if m == model)
    }
    x = np.log10([pr[m, layer] for m, layer, _ in places])
    kl = -DISTORTION(values["plan_kl"])
    for name, y in (("", kl), ("_per_error", kl + DISTORTION(values["nmse_tok"]))):
        size = larger_minus_smaller(y, meta, models)
        out[f"larger_model{name}"] = vars(size) | {"word": size.words("more", "less")}
        of_pr = within_models(x, np.stack([y[:, here].mean(1) for _, _, here in places], 1), hooks)
        out[f"low_pr{name}"] = vars(of_pr) | {"word": of_pr.words("less", "more")}
    return out


def beyond(scores: dict, y: np.ndarray, meta: dict) -> list[dict]:
    """What the plan distortion adds to each proxy of BEYOND, on all documents: descriptive. y [C]."""
    x, rows = scores["plan_kl"][stats.ALL], []
    for name in BEYOND:
        added, p = stats.added_value(x, scores[name][stats.ALL], y, meta)
        gain = stats.out_of_hook_gain(x, scores[name][stats.ALL], y, meta)
        rows.append(dict(beyond=name, added=added, p=p) | dict(zip(("gain", "gain_lo", "gain_hi"), gain)))
    return rows


def analyse(out: pathlib.Path, settings: dict) -> dict:
    """leaderboard.csv, verdict.json, report.md and the plots: a pure function of conditions.csv,
    sequences.npz and TABLES.

    Everything that is compared with the plan distortion is compared on the hooks that have one: rows of a
    model's last block stand in the table of SAEs and nowhere else.
    """
    whole = load_measurements(out, settings, N_RESAMPLES, OWN)
    followed = np.array([hook_of(row) not in settings["last_blocks"] for row in whole.saes])
    found = subset(whole, followed)
    values, meta = found.values, found.meta
    scores = {one.name: one.score(values[one.name]) for one in (*PROXIES, *PLAN, BY_NAME["kl"])}
    board, h2 = leaderboard.ranked(scores, found, settings, N_RESAMPLES)
    board = [row for row in board if row["proxy"] != row["target"]]  # KL is a target too
    control = h2["a_control"]
    added = p = np.nan
    if control:
        x, base, y = (v[stats.HALF_B] for v in (scores["plan_kl"], scores[control], values["ce_rec"]))
        added, p = stats.added_value(x, base, y, meta)
    leaf = leaderboard.leaf_added(added, p, MIN_ADDED)
    depth, of_hooks = (read_table(store.checked(out / store.RUN, name)) for name in TABLES)
    places = by_hook(meta)
    hooks = {"model": np.array([m for m, _, _ in places]), "layer": np.array([i for _, i, _ in places])}
    mediated, plan_only = shares(values, meta)
    row = next(r for r in board if (r["proxy"], r["target"], r["stratum"]) == ("plan_kl", "ce_rec", "pooled"))
    verdict = plain(
        dict(
            leaf=leaf,
            h2=h2,
            control=control,
            added=added,
            p=p,
            beyond=beyond(scores, values["ce_rec"][stats.ALL], meta),
            board={name: value for name, value in row.items() if name not in ("proxy", "target", "stratum")},
            mediated=vars(mean_over_hooks(mediated, hooks)),
            plan_only=vars(mean_over_hooks(plan_only, hooks)),
            breaks=where_it_breaks(depth, of_hooks, found, settings["models"]),
            left_out=settings["last_blocks"],
            thresholds=dict(min_added=MIN_ADDED, alpha=stats.ALPHA, min_clusters=stats.MIN_CLUSTERS),
            settings=settings,
            rows_sha256=rows_hash(out),
        )
    )
    verdict["answer"] = vars(answer(verdict, settings))
    by_share = [
        dict(model=m, layer=layer, mediated=float(mediated[0, i]), plan_only=float(plan_only[0, i]))
        for i, (m, layer, _) in enumerate(places)
    ]
    files: dict[str, store.Content | None] = {
        "leaderboard.csv": as_csv(board, LEADERBOARD),
        "verdict.json": as_json(verdict),
        "report.md": report(whole, board, verdict, by_share, depth, of_hooks, settings),
    }
    charts = [chart.of_saes(whole.saes, settings["models"], [BY_NAME["r2"], PLAN[0]])]
    pictures = plots(by_share, depth, board, verdict, settings)
    store.put(out / store.RUN, with_page(out, files | pictures, charts))
    return verdict


LEAVES = {
    "supported": "The plan distortion predicts CE_rec beyond the best Euclidean control",
    "rejected": "The plan distortion is not shown to predict CE_rec beyond the best Euclidean control",
    "undecided": "This grid cannot decide",
}


QUESTION = (
    "Does what a patch does to the attention patterns of later blocks say more about what it does to "
    "cross-entropy than the best Euclidean score?"
)
LIMITS = (
    "The distortion takes a patched forward, as the change of cross-entropy itself does: an "
    "explanation, and no cheap stand-in. It is about {these}."
)


def answer(verdict: dict, settings: dict) -> Answer:
    shown = "what it adds is undefined"
    if verdict["added"] is not None:
        shown = "given {control} and k it correlates with CE_rec at {added:+.2f} in rank, p = {p:.3f}".format(
            **verdict
        )
    first = AFTER_H2.format(h2=verdict["h2"]["leaf"], claim="the attention plan")
    return Answer(
        QUESTION,
        f"{LEAVES[verdict['leaf']]}, on {verdict['h2']['n_clusters']} hooks: {shown}.",
        first + LIMITS.format(these=about_these(settings)),
    )


# ------------------------------------------------------------------------------------------ report, plots
REPORT = """\
# Exp-E: does what a patch does to attention say more about patched cross-entropy than Euclidean error?

{answer}
![every proxy against R²](leaderboard.png)

P: {leaf}.

p: what CE_rec has beyond that control changes its sign in whole hooks, {n_clusters} of them; the \
control is chosen on half of the documents, and the test is on the other half. The plan distortion takes \
a patched forward, as dCE itself does: it is here to explain, and no cheap stand-in.{left_out}

## Where the plan breaks

![depth](depth.png)

- In which block after the hook: **{first_word}**. The first block's KL over the mean of the later \
ones', log2: {first}, {first_n} hooks with at least two blocks after them.
- More in the largest model than in the smallest: **{size_word}**. log10 of plan_kl at the same depth \
and k: {size}, {size_n} depths; per unit of nmse_tok: {size_per_error} ({size_per_error_word}).
- More where the participation ratio of the hook's activations is low: **{pr_word}**. Correlation of \
log10 plan_kl with log10 PR within models: {of_pr}, {pr_n} hooks (negative: more where PR is low); per \
unit of nmse_tok: {pr_per_error} ({pr_per_error_word}).

Each word is what a 95% interval that leaves out 0 says, else *undecided*: hooks resampled within models \
for the first and third (documents with them in the third), depths and documents for the second. Some \
blocks' plans move more than others' whatever is patched before them, so the first is about blocks as much \
as about distance: compare the lines above one block. Depth, PR and the number of blocks after a hook go \
together in one model, so the third is a correlation and no cause. Lowest PR among a model's hooks: \
{lowest}; {n_middle} of these {n_lowest} lie in the middle third of their model, where the research log \
expects it. Two or three models are no sample of model sizes.

{breaks}

KL at each block after the hook (+1: the next one), mean over heads and queries, nats, of the SAE with \
that k; plan_kl: their mean. lowest marks the smallest PR of a model. Per head in depth.csv; the heads \
whose plans change most:

{heads}

first: what the head gives to position 0, clean and patched; kl_first: the part of KL that is about it, \
the rest is how everything else is split.

## What goes through the plans

![mediation](mediation.png)

{mediation}

Two runs between the clean and the patched one. *Frozen*: fed ĥ, every attention after the hook with the \
clean run's plan. *Plan only*: fed h, with the patched run's plans. Values and MLPs flow in both. \
mediated = (ΔCE − ΔCE_frozen)/ΔCE, plan only = ΔCE_plan_only/ΔCE; they need not agree, since plans and \
values work together (the total indirect and the pure indirect effect of mediation analysis). Mean over \
{n_clusters} hooks, each the ratio of sums over its SAEs: mediated {mediated}, plan only {plan_only} \
(hooks resampled within models, with the documents).

## Leaderboard, target CE_rec

{board}

plan_kl: KL(A ‖ Â), mean over blocks after the hook, heads and queries t ≥ 1 (query 0 has one key); \
plan_jeffreys: KL in both directions; plan_half_var: ½Var_A of the change of the scores, their second \
order; plan_next: KL at the next block alone, which takes that block's queries and keys and no patched \
forward.

{how_to_read}
## Beyond other proxies (descriptive)

{beyond}

added: partial Spearman of plan_kl with CE_rec given k and that proxy, on all documents, p by sign flips \
over hooks; gain: how much less variance of CE_rec a linear model leaves with plan_kl in it, each hook \
predicted from the others (negative: it predicts worse; hooks resampled). One test above is \
confirmatory, these are not.

## Every SAE

{saes}

plan_first: share of plan_kl that is about position 0 (chain rule of KL); to_first, to_first_hat: what \
heads give to it, clean and patched; plan_entropy, plan_entropy_hat: nats, clean and patched; out_plan, \
out_value: |Σ(Â − A)v|² and |ΣÂ(v̂ − v)|² over |ΣAv|², the two parts whose sum is the change of a head's \
output.

## Null rows (never in a correlation)

{nulls}

`undefined`: the identity changes nothing, and shares of nothing are 0/0; at a model's last block no \
attention follows the hook.

Transport cost ⟨P, C⟩ and potentials are compared nowhere: a constant that joins all keys of a query \
leaves its plan as it is and moves both, so between two runs they say nothing about it.

{about}"""
LEFT_OUT = (
    " Left out, with every proxy beside it: {}, the last block, where no attention follows and the plan "
    "distortion is `undefined`."
)
OF_AN_SAE = (
    "model layer sae recipe k seed tokens nmse_tok kl ce_rec dce mediated plan_only plan_kl plan_next "
    "plan_first to_first to_first_hat plan_entropy plan_entropy_hat out_plan out_value"
).split()
OF_A_NULL = (
    "model layer sae nmse_tok ce_rec dce mediated plan_only plan_kl plan_first out_plan out_value".split()
)


def interval_words(estimate: dict) -> str:
    """Of an Estimate in a verdict."""
    return span(estimate["value"], estimate["lo"], estimate["hi"])


def report(
    whole: Measured,
    board: list[dict],
    verdict: dict,
    by_share: list[dict],
    depth: list[dict],
    of_hooks: list[dict],
    settings: dict,
) -> bytes:
    breaks = verdict["breaks"]
    first, size, of_pr = (breaks[name] for name in ("first_block", "larger_model", "low_pr"))
    size_per_error, pr_per_error = breaks["larger_model_per_error"], breaks["low_pr_per_error"]
    left_out = LEFT_OUT.format(", ".join(verdict["left_out"])) if verdict["left_out"] else ""
    shown = [
        row | {"tokens": readable_count(row["tokens"])} for row in label_last_block(whole.saes, settings)
    ]
    text = REPORT.format(
        answer=Answer(**verdict["answer"]).markdown(),
        leaf=verdict["leaf"],
        n_clusters=verdict["h2"]["n_clusters"],
        left_out=left_out,
        first_word=first["word"],
        first=interval_words(first),
        first_n=first["n"],
        size_word=size["word"],
        size=interval_words(size),
        size_n=size["n"],
        size_per_error=interval_words(size_per_error),
        size_per_error_word=size_per_error["word"],
        pr_word=of_pr["word"],
        of_pr=interval_words(of_pr),
        pr_n=of_pr["n"],
        pr_per_error=interval_words(pr_per_error),
        pr_per_error_word=pr_per_error["word"],
        lowest=", ".join(breaks["lowest_pr"]),
        n_lowest=len(breaks["lowest_pr"]),
        n_middle=sum(1 / 3 <= depth <= 2 / 3 for depth in breaks["lowest_pr"].values()),
        breaks=break_table(depth, of_hooks),
        heads=head_table(depth, settings["models"]),
        mediation=markdown(
            [row | {name: percent(row[name]) for name in ("mediated", "plan_only")} for row in by_share],
            ["model", "layer", "mediated", "plan_only"],
        ),
        mediated=share_words(verdict["mediated"]),
        plan_only=share_words(verdict["plan_only"]),
        board=leaderboard_table(board, "ce_rec", "pooled"),
        how_to_read="\n".join(how_to_read(verdict["h2"], settings)),
        beyond=markdown(
            [
                {
                    "beyond": row["beyond"],
                    "added": signed(row["added"]),
                    "p": row["p"],
                    "gain": span(row["gain"], row["gain_lo"], row["gain_hi"]),
                }
                for row in verdict["beyond"]
            ],
            ["beyond", "added", "p", "gain"],
        ),
        saes=markdown(shown, OF_AN_SAE),
        nulls=markdown(label_last_block(whole.nulls, settings), OF_A_NULL),
        about="\n".join(about_the_run(whole.saes, settings)),
    )
    return text.encode()


def share_words(estimate: dict) -> str:
    """A share and its interval."""
    ends = [percent(estimate[end]) for end in ("lo", "hi")]
    return f"{percent(estimate['value'])} [{', '.join(ends)}]"


def break_table(depth: list[dict], of_hooks: list[dict]) -> str:
    """One row per hook: PR, and KL by offset from the hook."""
    pr = {(row["model"], row["layer"]): row for row in of_hooks}
    rows = break_map(depth)
    most = max((len(row["kl"]) for row in rows), default=0)
    table = []
    for row in rows:
        here = pr[row["model"], row["layer"]]
        of_model = [pr[r["model"], r["layer"]]["pr"] for r in rows if r["model"] == row["model"]]
        mark = " lowest" if here["pr"] == min(of_model) else ""
        cells = dict(zip((f"+{i + 1}" for i in range(most)), [*map(float, row["kl"]), *[""] * most]))
        table.append(
            {"model": row["model"], "layer": row["layer"], "k": row["k"]}
            | {"PR": f"{here['pr']:.3g}{mark}", "PR_nosink": here["pr_nosink"]}
            | {"plan_kl": float(row["kl"].mean())}
            | cells
            | {"first block's share": percent(row["share"])}
        )
    return markdown(table, list(table[0]))


def head_table(depth: list[dict], models: list[str]) -> str:
    """The three heads of each model whose plans change most, over its hooks."""
    known = [row for row in depth if np.isfinite(row["kl"])]
    table = []
    for model in models:
        mine = sorted((row for row in known if row["model"] == model), key=lambda row: -row["kl"])
        table += mine[:3]
    names = [
        "model",
        "layer",
        "block",
        "head",
        "kl",
        "kl_first",
        "first",
        "first_hat",
        "entropy",
        "entropy_hat",
    ]
    return markdown(table, names)


def plots(
    by_share: list[dict], depth: list[dict], board: list[dict], verdict: dict, settings: dict
) -> dict[str, store.Content | None]:
    """{file: PNG}."""
    return {
        "depth.png": depth_plot(break_map(depth), settings["models"]),
        "mediation.png": mediation_plot(by_share, settings["models"]),
        "leaderboard.png": leaderboard_plot(board, verdict["h2"]),
    }


def depth_plot(rows: list[dict], models: list[str]) -> Any:
    """KL by block, a line for each hook, a panel for each model."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(models), figsize=(3.6 * len(models) + 1, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    last = max(row["layer"] + len(row["kl"]) for row in rows)
    for axis, model in zip(axes[0], models):
        mine = [row for row in rows if row["model"] == model]
        colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, max(len(mine), 1)))
        for row, colour in zip(mine, colours):
            blocks = row["layer"] + 1 + np.arange(len(row["kl"]))
            axis.plot(blocks, row["kl"], "o-", color=colour, label=f"after block {row['layer']}")
        axis.set(yscale="log", xlabel="block", title=model, xlim=(0.5, last + 0.5))
        axis.grid(alpha=0.3)
        if mine:
            axis.legend(title="patched", fontsize=8)
    axes[0, 0].set_ylabel("plan distortion: mean KL(A ‖ Â)\nover heads and queries, nats")
    return figure


def mediation_plot(rows: list[dict], models: list[str]) -> Any:
    """Shares of dCE by the hook's layer, a colour for each model."""
    plt = pyplot()
    colours = model_colours(models)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    for axis, name, title in zip(
        axes, ("mediated", "plan_only"), ("taken away by clean plans", "caused by patched plans alone")
    ):
        for model, marker in zip(models, "os^Dv" * len(models)):
            mine = [row for row in rows if row["model"] == model]
            x, y = [row["layer"] for row in mine], [100 * row[name] for row in mine]
            axis.plot(x, y, f"{marker}-", color=colours[model], label=model)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(xlabel="patched block", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of ΔCE")
    axes[0].legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
    with hushed(command):
        if (done := run(command, EXPERIMENT)) is None:
            return
        out, settings = done
        verdict = analyse(out, settings)
    table = board_in_short(read_table(out / "leaderboard.csv"), coloured(sys.stdout))
    conclude(command, out, Answer(**verdict["answer"]), table, f"P: {verdict['leaf']}")


if __name__ == "__main__":
    run_script(main)
