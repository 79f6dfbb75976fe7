"""Exp-D: do activations vary in more directions than the output depends on, and is that where R^2 misjudges
an SAE?

    python expd_mi.py                                # embedded models, four CPU-minutes
    python expd_mi.py --critic hybrid                # the other critic, hours
    python expd_mi.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                      --data NeelNanda/pile-small-tokenized-2b
    python expd_mi.py --from outputs/expd_mi         # tables, verdict and plots again, without a model

Hypothesis H3: the task-relevant dimension departs from the geometric one exactly where the proxy fails worst.
The geometric dimension of a hook is the participation ratio (PR) of the covariance Sigma without its first
direction; the task-relevant one is dim_fisher, the PR of Sigma^1/2 G Sigma^1/2 with G the pullback Fisher.
How the proxy fails at a hook is the signed error with which R^2, calibrated on all other hooks, predicts the
log10 of what its SAEs cost in cross-entropy. If h varies in directions that the output ignores, R^2 counts
errors there that cost nothing: it predicts too much. So H3 says that the error rises with log(pr_defl1 /
dim_fisher), among the hooks of a model.

Beside the primary dimension two others that know nothing of gradients: canonical correlations of h with the
final norm's output, and trained critics of their mutual information at the middle hook of each model. Each
has rules that refuse its count, and a count that fails one is not printed.
"""

import functools
import itertools
import math
import pathlib
import sys

from common import parse_args, run_script
from transport_geometry.measuring import mutual_information
from transport_geometry.measuring.dimension import canonical_rows, geometry_rows, norms
from transport_geometry.measuring.evaluate import activations
from transport_geometry.measuring.fisher_study import MAX_BLOCKS, moments
from transport_geometry.measuring.metrics import BY_NAME, PROXIES
from transport_geometry.models.lm import text_config
from transport_geometry.records import store
from transport_geometry.records.results import about_the_run, label_last_block, load_measurements, rows_hash
from transport_geometry.records.tables import (
    as_json,
    bounds,
    grouped,
    markdown,
    plain,
    read_table,
    short,
    signed,
    span,
)
from transport_geometry.reporting.console import Answer, coloured, columns, conclude, hushed
from transport_geometry.reporting.figures import model_colours, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment, eval_batch, run
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics import leaderboard, stats
from transport_geometry.statistics.leaderboard import AFTER_H2, about_these

import numpy as np
import torch

# every block of the three models: H3 counts hooks within models, and two k span the curve that R^2 is
# calibrated by
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in range(6)),
    k="4,32",
    tokens="40k",
    expansion=4,
    eval_seqs=20,
    ctx=256,
)
FLAGS = {
    "--critic": dict(
        default="separable",
        choices=sorted(mutual_information.SCHEDULES),
        help="of mutual information: separable, or hybrid, which takes hours",
    )
}
N_RESAMPLES = 2000
DRAWS = 2  # of labels for G: eight move dim_fisher by one part in a hundred
SIGMAS = (0.0, 0.5, 1.0, 2.0)  # noise on Y, in standard deviations of its channels
# which critics are trained: {Y: {estimator: amounts of noise}}; two are the fewest that the ladder rule can
# judge
CRITICS: dict[str, dict[str, tuple[float, ...]]] = {
    "final norm": {"infonce": SIGMAS, "smile": SIGMAS[2:], "nwj": SIGMAS[2:]},
    "logits, Fisher": {"infonce": SIGMAS},
}

# The decision, fixed before any result. A rank correlation of .5 is what the research log's tree asks of H3.
# Depth is shared by the models, and what runs smoothly with it correlates by itself: so what counts are hooks
# within their models, and then, again, whole depths. The covariance's first direction can be one position's:
# so it must also hold where the sinks are left out and nothing is deflated.
MIN_RHO = 0.5
MIN_HOOKS = stats.MIN_CLUSTERS  # below, no test of 5% has a chance
OF_A_MODEL = stats.MIN_HOOKS  # with fewer a model's hooks have no order to speak of
MOST_PATTERNS, DRAWN_PATTERNS = 20_000, 10_000  # permutations: all of them, or as many drawn
TABLES = ("geometry.csv", "positions.csv", "canonical.csv")  # critics.csv: where there is a middle hook


# ------------------------------------------------------------------------------------------- measurement
def study(eval_set: EvalSet, sae: SAE, device: torch.device, critic: str) -> dict[str, list[dict]]:
    """What is measured once per hook, without an SAE: {table: rows}."""
    hook, held, condition = eval_set.hook, eval_set.held, eval_set.middle.condition
    name = {"model": condition.model, "layer": condition.layer}
    batch = eval_batch(hook, held.input_ids.shape[1])
    shared = activations(hook, held.input_ids, batch)
    blocks = min(int(held.document.max()) + 1, MAX_BLOCKS)
    sums = moments(hook, held.input_ids, shared, batch, held.document % blocks, blocks, DRAWS)
    y = mutual_information.final_norm(hook, held.input_ids, shared.h, batch)
    kept = ~shared.sink
    document = torch.from_numpy(held.document)[:, None].expand(kept.shape)[kept].numpy()
    of_h, of_y = (v[kept].double().numpy() for v in (shared.h[:, :-1], y))
    tables: dict[str, list[dict]] = {
        "geometry.csv": geometry_rows(*sums),
        "positions.csv": norms(shared.h),
        "canonical.csv": canonical_rows(of_h, of_y, document, SIGMAS),
    }
    if hook.layer == text_config(hook.model).num_hidden_layers // 2:
        tables["critics.csv"] = critics_at(eval_set, critic)
    return {table: [name | row for row in found] for table, found in tables.items()}


def critics_at(eval_set: EvalSet, critic: str) -> list[dict]:
    """A row for each Y, estimator and amount of noise."""
    hook, ids = eval_set.hook, eval_set.held.input_ids
    split = getattr(eval_set.middle.origin, "split", "train")
    ctx = min(mutual_information.CTX, ids.shape[1])
    texts = mutual_information.rows_of(eval_set.source.data, split, eval_set.tokenizer, ctx, eval_set.bos)
    batch = eval_batch(hook, ctx)
    fit, stop, held = (
        mutual_information.pairs_at(hook, rows, batch, seed) for seed, rows in enumerate(texts)
    )
    rows = []
    for target, pairs in mutual_information.targets(hook, (fit, stop, held), ids[:1].to(hook.device)).items():
        name = {"target": target, "width": pairs.fit.y.shape[-1], "n_fit": len(fit.x), "n_held": len(held.x)}
        for estimator, sigmas in CRITICS[target].items():
            found = mutual_information.critic_rows(
                pairs, sigmas, (estimator,), mutual_information.SCHEDULES[critic]
            )
            rows += [name | row for row in found]
    return rows


# ---------------------------------------------------------------------------------------------- analysis
def stratified_rho(x: np.ndarray, y: np.ndarray, stratum: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman within strata [R] of x and y, both [R or 1, n], under weights [R or 1, n] of the n hooks.

    Both are ranked within each stratum and centred there, then correlated over all: what strata differ in has
    left. nan where nothing varies.
    """
    R = max(len(x), len(y), len(weights))
    weights = np.broadcast_to(weights, (R, weights.shape[1]))
    u, v = np.empty(weights.shape), np.empty(weights.shape)
    for name in np.unique(stratum):
        here = stratum == name
        w = np.ascontiguousarray(weights[:, here])
        for ranks, z in ((u, x), (v, y)):
            r = stats.weighted_ranks(np.atleast_2d(z)[:, here], w)
            ranks[:, here] = r - (w * r).sum(1, keepdims=True) / w.sum(1, keepdims=True)
    uu, vv, uv = ((weights * a * b).sum(1) for a, b in ((u, u), (v, v), (u, v)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.minimum(uu, vv) > 1e-9, uv / np.sqrt(uu * vv), np.nan)


def arrangements(stratum: np.ndarray, seed: int = 0) -> np.ndarray:
    """[R,n]: orders of the n hooks that leave each in its stratum, the first as they are; all of them where
    they are at most MOST_PATTERNS, else DRAWN_PATTERNS drawn ones.
    """
    members = [np.flatnonzero(stratum == name) for name in np.unique(stratum)]
    n = len(stratum)
    if math.prod(math.factorial(len(m)) for m in members) <= MOST_PATTERNS:
        out = np.tile(np.arange(n), (math.prod(math.factorial(len(m)) for m in members), 1))
        for row, orders in zip(out, itertools.product(*(itertools.permutations(m) for m in members))):
            for m, order in zip(members, orders):
                row[m] = order
        return out
    rng, out = np.random.default_rng(seed), np.tile(np.arange(n), (DRAWN_PATTERNS, 1))
    for m in members:
        out[1:, m] = rng.permuted(out[1:, m], axis=1)
    return out


def depth_arrangements(model: np.ndarray, depth: np.ndarray) -> np.ndarray | None:
    """The same where whole depths trade places, in all models alike; None where models differ in their
    depths.
    """
    depths, place = np.unique(depth, return_inverse=True)
    at = {(m, d): i for i, (m, d) in enumerate(zip(model, place))}
    if len(at) < len(model) or len(at) != len(np.unique(model)) * len(depths):
        return None
    orders = arrangements(np.zeros(len(depths)))
    return np.stack([[at[m, order[d]] for m, d in zip(model, place)] for order in orders])


NOTHING = dict.fromkeys(("rho", "p", "critical", "least_p"), np.nan)


def association(x: np.ndarray, y: np.ndarray, stratum: np.ndarray, orders: np.ndarray | None) -> dict:
    """Stratified Spearman of x and y [n], its two-sided permutation p over `orders` [R,n] of the hooks,
    critical: the size that has p < .05 here, and least_p, the smallest p there is. nan where it is undefined.
    """
    if orders is None or not np.isfinite([x, y]).all():
        return dict(NOTHING)
    found = stratified_rho(x[None], y[orders], stratum, np.ones((1, len(x))))
    if not np.isfinite(found[0]):
        return dict(NOTHING)
    size = np.abs(found)
    return dict(
        rho=float(found[0]),
        p=stats.p_value(found),
        critical=float(np.quantile(size, 1 - stats.ALPHA, method="higher")),
        least_p=float(np.mean(size >= size.max() - 1e-9)),
    )


def given_depth(x: np.ndarray, y: np.ndarray, model: np.ndarray, layer: np.ndarray) -> float:
    """The stratified rank correlation of x and y with a common linear trend over layers taken out of both."""
    one = np.ones((1, len(x)))
    xy, xz, yz = (
        float(stratified_rho(a[None], b[None], model, one)[0]) for a, b in ((x, y), (x, layer), (y, layer))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def h3(hooks: list[dict]) -> dict:
    """H3 on rows of hooks, each with model, layer, depth, residual, log_ratio, log_ratio_nosink, energy.

    Only models with OF_A_MODEL hooks count. `within` is the statistic; `depths` its second test; `nosink` the
    same without sinks and deflation; `pooled`, which ignores models, is shown beside; `energy` asks whether
    the size of what the output notices, and not its dimension, is behind the residual.

    Simulated, 18 hooks in 3 models: `within` rejects a true null in 3 of 100, and finds (leaf_d's first
    condition) a correlation within models of .6, .7, .8 in 56, 74, 87. Where both numbers have depth profiles
    that all models share, unrelated ones, `within` rejects in 24 of 100 and `depths` in 4.
    """
    count = {m: sum(row["model"] == m for row in hooks) for m in {row["model"] for row in hooks}}
    used = [row for row in hooks if count[row["model"]] >= OF_A_MODEL]
    if len(used) < MIN_HOOKS:
        names = ("within", "depths", "nosink", "nosink_depths", "pooled", "energy")
        return dict(n_hooks=len(used), given_depth=np.nan, rho_lo=np.nan, rho_hi=np.nan) | {
            name: dict(NOTHING) for name in names
        }
    column = {name: np.array([row[name] for row in used]) for name in used[0]}
    model, residual = column["model"], column["residual"]
    of_hooks, everywhere = arrangements(model), np.zeros(len(used))
    weights = stats.bootstrap_weights({"model": model, "layer": column["layer"]}, N_RESAMPLES, seed=0)[
        stats.RESAMPLES
    ]
    of = column["log_ratio"], residual
    draws = np.array([np.nan])
    if np.isfinite(of).all():
        draws = stratified_rho(of[0][None], of[1][None], model, weights)
    lo, hi = stats.interval(draws, fisher=True)
    return dict(
        n_hooks=len(used),
        within=association(*of, model, of_hooks),
        rho_lo=lo,
        rho_hi=hi,
        depths=association(*of, model, depth_arrangements(model, column["depth"])),
        nosink=association(column["log_ratio_nosink"], residual, model, of_hooks),
        nosink_depths=association(
            column["log_ratio_nosink"], residual, model, depth_arrangements(model, column["depth"])
        ),
        given_depth=given_depth(*of, model, column["layer"]) if np.isfinite(of).all() else np.nan,
        pooled=association(*of, everywhere, arrangements(everywhere)),
        energy=association(column["energy"], residual, model, of_hooks),
    )


def leaf_d(found: dict) -> tuple[str, str]:
    """H3: (leaf, why)."""
    within, depths, nosink = found["within"], found["depths"], found["nosink"]
    if found["n_hooks"] < MIN_HOOKS:
        return "undecided", (f"{found['n_hooks']} hooks in models that have {OF_A_MODEL}, {MIN_HOOKS} needed")
    if not np.isfinite([within["rho"], within["p"], nosink["rho"]]).all():
        return "undecided", "a dimension or a residual is undefined"
    if not within["least_p"] < stats.ALPHA:
        return "undecided", f"no order of so few hooks has p < {stats.ALPHA}"
    if within["rho"] <= -MIN_RHO and within["p"] < stats.ALPHA:
        return "rejected", "the opposite: R² predicts too little where the dimensions depart most"
    if not (within["rho"] >= MIN_RHO and within["p"] < stats.ALPHA):
        return "rejected", "not shown among the hooks of a model"
    if not nosink["rho"] >= MIN_RHO:
        return "rejected", "not without sinks and deflation"
    if depths["least_p"] >= stats.ALPHA:
        return "undecided", f"no order of so few depths has p < {stats.ALPHA}"
    if depths["p"] >= stats.ALPHA:  # nan where the models differ in their depths
        return "rejected", "no more than what depth alone could do"
    return "supported", "among the hooks of a model, over whole depths, and without sinks"


def residuals(values: dict, meta: dict) -> dict[tuple[str, int], float]:
    """{hook: log10 dCE predicted from R^2, a quadratic fitted on all other hooks, minus measured, mean over
    its SAEs}: above 0 R^2 says that they cost more than they do.
    """
    errors = stats.loho_errors(BY_NAME["r2"].score(values["r2"][stats.ALL]), values["dce"][stats.ALL], meta)
    ids = stats.cluster_ids(meta)
    _, first = np.unique(ids, return_index=True)
    hooks = [(str(meta["model"][i]), int(meta["layer"][i])) for i in first]
    return dict(zip(hooks, stats.mean_by_hook(errors, ids).tolist()))


def hook_rows(geometry: list[dict], residual: dict, meta: dict, models: list[str]) -> list[dict]:
    """One row a hook: its dimensions, the task-relevant one without sinks, and what H3 compares."""
    depth = dict(zip(zip(meta["model"].tolist(), meta["layer"].tolist()), meta["depth"].tolist()))
    rows = []
    for (model, layer), pair in grouped(geometry, ("model", "layer")).items():
        whole, calm = (next(row for row in pair if row["sinks"] == sinks) for sinks in ("in", "out"))
        row = whole | {"depth": depth[model, layer], "residual": residual[model, layer]}
        row |= {"log_ratio_nosink": calm["log_ratio"], "pr_nosink": calm["pr"]}
        # G is a mean over positions: `both_counts`
        rows.append(row | {name: calm[name] for name in calm if name.startswith(("dim_fisher", "energy"))})
    return sorted(rows, key=lambda row: (models.index(row["model"]), row["layer"]))


def judged(rows: list[dict], ladder: tuple[str, ...], bounded: str = "") -> list[dict]:
    """Rows of a read-out with `refused`, the rule that their dimension fails: each ladder is judged for
    itself. bounded: the estimator whose MI has a ceiling.
    """
    out = []
    for _, group in grouped(rows, ladder).items():
        group = sorted(group, key=lambda row: row["sigma"])
        ceiling = math.log(mutual_information.BATCH) if bounded and group[0]["estimator"] == bounded else None
        out += [
            row | {"refused": why} for row, why in zip(group, mutual_information.refusals(group, ceiling))
        ]
    return out


def analyse(out: pathlib.Path, settings: dict) -> dict:
    """verdict.json, report.md and the plots: a pure function of conditions.csv, sequences.npz and the tables
    of hooks.
    """
    found = load_measurements(out, settings, N_RESAMPLES)
    values, meta, models = found.values, found.meta, settings["models"]
    scores = {proxy.name: proxy.score(values[proxy.name]) for proxy in PROXIES}
    _, h2 = leaderboard.ranked(scores, found, settings, N_RESAMPLES)
    there = store.written(out / store.RUN)
    names = [*TABLES, *(name for name in ("critics.csv",) if name in there)]
    tables = {name: read_table(store.checked(out / store.RUN, name)) for name in names}
    hooks = hook_rows(tables["geometry.csv"], residuals(values, meta), meta, models)
    canonical = judged([row | {"mi_se": 0.0} for row in tables["canonical.csv"]], ("model", "layer"))
    trained = judged(
        tables.get("critics.csv", []), ("model", "layer", "target", "estimator"), bounded="infonce"
    )
    result = h3(hooks)
    leaf, why = leaf_d(result)
    shown = (
        "model",
        "layer",
        "residual",
        "log_ratio",
        "log_ratio_nosink",
        "pr_defl1",
        "dim_fisher",
        "energy",
    )
    verdict = plain(
        dict(
            leaf=leaf,
            reason=why,
            h2=h2,
            h3=result,
            hooks=[{name: row[name] for name in shown} for row in hooks],
            refused=dict(canonical=refused_counts(canonical), critics=refused_counts(trained)),
            thresholds=dict(
                min_rho=MIN_RHO,
                alpha=stats.ALPHA,
                min_hooks=MIN_HOOKS,
                of_a_model=OF_A_MODEL,
                min_mi=mutual_information.MIN_MI,
                n_se=mutual_information.N_SE,
                from_ceiling=mutual_information.FROM_CEILING,
                overfit=mutual_information.OVERFIT,
                ladder=mutual_information.LADDER_TOLERANCE,
                ceiling=math.log(mutual_information.BATCH),
            ),
            settings=settings,
            rows_sha256=rows_hash(out),
        )
    )
    verdict["answer"] = vars(answer(verdict, settings))
    files: dict[str, store.Content | None] = {
        "verdict.json": as_json(verdict),
        "report.md": report(found.saes, hooks, canonical, trained, tables, verdict, settings),
    }
    charts = [
        chart.of_hooks(
            hooks, models, ("log_ratio", "log(pr_defl1 / dim_fisher)"), ("residual", "residual of R²")
        )
    ]
    pictures = plots(hooks, tables["positions.csv"], verdict, settings)
    store.put(out / store.RUN, with_page(out, files | pictures, charts))
    return verdict


def refused_counts(rows: list[dict]) -> dict[str, int]:
    """{rule, or `not refused`: how many}."""
    words = [row["refused"] or "not refused" for row in rows]
    return {word: words.count(word) for word in sorted(set(words))}


LEAVES = {
    "supported": "Where activations vary in more directions than the output depends on, R² overstates what "
    "an SAE costs, and most where the two dimensions depart most",
    "rejected": "It is not shown that R² misjudges SAEs where the geometric dimension departs from the one "
    "that the output depends on",
    "undecided": "This grid cannot decide",
}


QUESTION = (
    "Does R² misjudge SAEs most where activations vary in many more directions than the output depends on?"
)
LIMITS = (
    "A correlation over {n} hooks of {these}, after a dimension that is itself estimated: not shown is "
    "not absent."
)


def answer(verdict: dict, settings: dict) -> Answer:
    found = verdict["h3"]
    within = found["within"]
    numbers = (
        f"rank correlation {span(within['rho'], found['rho_lo'], found['rho_hi'])} among the hooks of a model"
    )
    if within["p"] is not None:
        numbers += f" (p = {within['p']:.3f}, {found['n_hooks']} hooks)"
    first = AFTER_H2.format(h2=verdict["h2"]["leaf"], claim="H3, that this is why R² fails")
    limits = LIMITS.format(n=found["n_hooks"], these=about_these(settings))
    return Answer(QUESTION, f"{LEAVES[verdict['leaf']]}: {numbers}.", first + limits)


# ------------------------------------------------------------------------------------------ report, plots
REPORT = """\
# Exp-D: does R² fail where the geometric dimension departs from the task-relevant one?

{answer}
![residual of R² against the dimension ratio](h3.png)

H3: {leaf} ({reason}).

{statistics}

residual: log10 ΔCE that R² predicts, by a quadratic fitted on all other hooks, minus what it is, mean over \
the hook's SAEs: above 0, R² says that they cost more than they do. It is compared with log(pr_defl1 / \
dim_fisher), which H3 expects to rise with it. The unit is the hook, ranked within its model; p: hooks trade \
places within their model (`whole depths`: depths trade places, in all models alike, so that only {n_depths} \
of them count), two-sided; critical: the size that has p < .05 on this grid. {interval}**Pooled over models \
is what not to believe**: the models differ in both numbers, and any two things in which models differ \
correlate. The row without sinks is a condition of the answer, not a second try: on its own, among so many \
rows, a p below .05 says nothing. `given the layer`: with a common trend over layers taken out of both, \
descriptive. `energy`: tr \
GΣ, how much the output would notice of h in all, in place of the ratio: whether the size and not the \
dimension is behind the residual, descriptive.

## Every hook

{hooks}

Intervals in brackets: 95%, leaving blocks of documents out one at a time; they know of no bias. dim_fisher: \
PR of Σ^½GΣ^½, without sink positions, G from {draws} draws of labels from the model; pr, pr_defl1, 2, 4: PR \
of the covariance, of all its eigenvalues and without the first 1, 2, 4; pr_nosink: without sink positions; \
pr_corrected: without the bias of a finite sample, from pairs of positions of different documents. A PR \
counts directions as if those that matter were equal.

## The canyon

![dimensions over depth](canyon.png)

{canyon}

## Norm by position

![norm by position](norms.png)

{positions}

norm: median over sequences, in medians over positions ≥ 1; sst_share: the position's share of Σ‖h − mean‖². \
Where position 0 owns the variance, R² and PR are about it.

## Canonical correlations of h with the final norm's output

{canonical}

Held out: fitted on half of the documents, measured on the other half, both ways; mi_fit: where it was \
fitted. sigma: Gaussian noise on Y, in standard deviations of its channels. dimension: PR of SNR² with SNR = \
ρ²/(1 − ρ²), which is what the optimal separable critic's PR would be were both Gaussian. MI: −½ Σ log(1 − \
ρ²). mi_null: from shuffled positions.

## Critics

{critics}

## Which counts are refused

`null`: MI is not {min_mi} nats and {n_se:g} standard errors above that of shuffled pairs, so the spectrum \
is noise. `saturation`: MI is within {from_ceiling} nats of log {batch} = {ceiling:.2f}, the most InfoNCE \
can say. `overfit`: held-out MI is further than {overfit:.0%} from that of the fitted pairs. `ladder`: the \
dimension differs by more than {ladder:.0%} from that at both neighbouring amounts of noise that are not \
refused, so that it is a number about the noise. The canonical read-out has no ceiling: of it three rules \
ask. Canonical: {refused_canonical}. Critics: {refused_critics}.

{about}"""
CRITICS_TEXT = """\
{table}

{kind} critics at the middle hook of each model ({hooks}), {steps} steps, {restarts}: fitted to {n_fit} rows \
of {ctx} tokens of the training side, {m} positions of each, measured on {n_held} of the held-out side; \
other pairs of a batch are of other sequences. Y: the final norm's output, or the logits' Fisher-weighted \
components ({width}). A count depends on the critic, on Y and on the noise, so that none of these is \
*the* dimension; the MI of InfoNCE is a lower bound and at most {ceiling:.2f} nats where canonical \
correlations say tens."""
NO_CRITICS = "None: no model's middle layer is on this grid."
OF_A_HOOK = ("model", "layer", "residual", "log_ratio", "pr", "pr_defl1", "pr_nosink", "dim_fisher")


def report(
    saes: list[dict],
    hooks: list[dict],
    canonical: list[dict],
    trained: list[dict],
    tables: dict[str, list[dict]],
    verdict: dict,
    settings: dict,
) -> bytes:
    found, thresholds = verdict["h3"], verdict["thresholds"]
    interval = ""
    if bounds(found["rho_lo"], found["rho_hi"]) != "undefined":
        interval = f"Hooks resampled within models: {bounds(found['rho_lo'], found['rho_hi'])}. "
    first = [row for row in tables["positions.csv"] if row["position"] == 0]
    text = REPORT.format(
        answer=Answer(**verdict["answer"]).markdown(),
        leaf=verdict["leaf"],
        reason=verdict["reason"],
        statistics=markdown(statistics(found), ["", "Spearman", "p", "critical"]),
        n_depths=len(set(settings["hooks"].values())),
        interval=interval,
        hooks=markdown([hook_words(row) for row in label_last_block(hooks, settings)], OF_A_HOOK),
        draws=DRAWS,
        canyon=markdown(
            label_last_block(hooks, settings),
            ["model", "layer", "d", "pr", "pr_defl1", "pr_defl2", "pr_defl4", "pr_nosink", "pr_corrected"],
        ),
        positions=markdown(
            label_last_block(in_order(first, settings), settings), ["model", "layer", "norm", "sst_share"]
        ),
        canonical=markdown(
            [refused_words(row) for row in label_last_block(in_order(canonical, settings), settings)],
            ["model", "layer", "sigma", "mi", "mi_fit", "mi_null", "dimension"],
        ),
        critics=critics_text(in_order(trained, settings), settings),
        batch=mutual_information.BATCH,
        refused_canonical=counted(verdict["refused"]["canonical"]),
        refused_critics=counted(verdict["refused"]["critics"]),
        about="\n".join(about_the_run(saes, settings)),
        **{
            name: thresholds[name]
            for name in ("min_mi", "n_se", "from_ceiling", "ceiling", "overfit", "ladder")
        },
    )
    return text.encode()


def statistics(found: dict) -> list[dict]:
    """The table under the answer."""
    names = (
        ("within models (H3)", "within"),
        ("the same, whole depths", "depths"),
        ("without sinks, pr_nosink for pr_defl1", "nosink"),
        ("that, whole depths", "nosink_depths"),
        ("energy for the ratio", "energy"),
        ("pooled over models: not to believe", "pooled"),
    )
    rows = []
    for words, name in names:
        of = found[name]
        p = "undefined" if of["p"] is None else f"{of['p']:.3f}"
        rows.append({"": words, "Spearman": signed(of["rho"]), "p": p, "critical": of["critical"]})
    rows.insert(2, {"": "given the layer", "Spearman": signed(found["given_depth"]), "p": "", "critical": ""})
    return rows


def hook_words(row: dict) -> dict:
    """A row of hooks, each dimension with its interval."""
    words = {"residual": signed(row["residual"], 3)}
    words["log_ratio"] = span(row["log_ratio"], row["log_ratio_lo"], row["log_ratio_hi"])
    for name in ("pr", "pr_defl1", "dim_fisher"):
        value, lo, hi = (short(row[column]) for column in (name, f"{name}_lo", f"{name}_hi"))
        words[name] = f"{value} [{lo}, {hi}]"
    return row | words


def in_order(rows: list[dict], settings: dict) -> list[dict]:
    """Models from the smallest; else as they are."""
    return sorted(rows, key=lambda row: (settings["models"].index(row["model"]), row["layer"]))


def refused_words(row: dict) -> dict:
    """A refused dimension is not printed."""
    return row | ({"dimension": f"refused ({row['refused']})"} if row["refused"] else {})


def counted(refused: dict[str, int]) -> str:
    return ", ".join(f"{n} {word}" for word, n in refused.items()) or "none"


def critics_text(rows: list[dict], settings: dict) -> str:
    if not rows:
        return NO_CRITICS
    columns = (
        "model",
        "layer",
        "target",
        "estimator",
        "sigma",
        "mi",
        "mi_se",
        "mi_fit",
        "mi_null",
        "dimension",
    )
    plan = mutual_information.SCHEDULES[settings["critic"]]
    widths = {(row["model"], row["width"]) for row in rows if row["target"] != "final norm"}
    return CRITICS_TEXT.format(
        table=markdown([refused_words(row) for row in label_last_block(rows, settings)], columns),
        kind=plan.critic.capitalize(),
        hooks=", ".join(dict.fromkeys(f"{row['model']} {row['layer']}" for row in rows)),
        steps=plan.steps,
        restarts="one start"
        if plan.restarts == 1
        else f"the best of {plan.restarts} starts on what it is fitted to",
        n_fit=", ".join(sorted({str(row["n_fit"]) for row in rows})),
        n_held=", ".join(sorted({str(row["n_held"]) for row in rows})),
        ctx=min(mutual_information.CTX, settings["ctx"]),
        m=mutual_information.PER_SEQUENCE,
        width=", ".join(f"{width} for {model}" for model, width in sorted(widths)) or "none",
        ceiling=math.log(mutual_information.BATCH),
    )


LINES = (  # column, label, style
    ("pr", "PR", dict(color="0.55", linestyle="--", marker="o")),
    ("pr_nosink", "PR without sinks", dict(color="C0", linestyle=":", marker="v")),
    ("pr_defl1", "PR deflated by 1", dict(color="C0", marker="s")),
    ("pr_corrected", "PR, corrected", dict(color="0.55", linestyle=":", marker="x")),
    ("dim_fisher", "dim_fisher", dict(color="C1", marker="D", linewidth=2)),
)


def plots(
    hooks: list[dict], positions: list[dict], verdict: dict, settings: dict
) -> dict[str, store.Content | None]:
    """{file: PNG}."""
    models = settings["models"]
    return {
        "h3.png": h3_plot(hooks, verdict["h3"], models),
        "canyon.png": canyon_plot(hooks, models),
        "norms.png": norms_plot(positions, models),
    }


TITLES = {"pooled": "pooled, not to believe", "within": "within models, what H3 is about"}


def h3_plot(hooks: list[dict], found: dict, models: list[str]) -> Any:
    """Left as they are, right with each model's mean taken out of both."""
    colours = model_colours(models)
    figure, axes = pyplot().subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for axis, name, centred in zip(axes, ("pooled", "within"), (False, True)):
        for model in models:
            here = [row for row in hooks if row["model"] == model]
            x, y = (np.array([row[c] for row in here], float) for c in ("log_ratio", "residual"))
            if centred:
                x, y = x - x.mean(), y - y.mean()
            axis.scatter(x, y, s=40, color=colours[model], label=model, edgecolor="white", linewidth=0.5)
            for row, at_x, at_y in zip(here, x, y):
                if np.isfinite([at_x, at_y]).all():
                    axis.annotate(
                        str(row["layer"]), (at_x, at_y), (5, 3), textcoords="offset points", fontsize=8
                    )
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_title(f"{TITLES[name]}: Spearman {signed(found[name]['rho'])}", fontsize=10)
    axes[0].set(xlabel="log(pr_defl1 / dim_fisher)", ylabel="log10 ΔCE that R² predicts, minus measured")
    axes[1].set(xlabel="log ratio minus its model's mean", ylabel="residual minus its model's mean")
    axes[0].legend(title="number = layer", fontsize=8)
    return figure


def canyon_plot(hooks: list[dict], models: list[str]) -> Any:
    figure, axes = pyplot().subplots(
        1, len(models), figsize=(3.3 * len(models) + 1, 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, model in zip(axes[0], models):
        here = [row for row in hooks if row["model"] == model]
        for column, label, style in LINES:
            axis.plot([row["layer"] for row in here], [row[column] for row in here], label=label, **style)
        axis.fill_between(
            [row["layer"] for row in here],
            [row["dim_fisher_lo"] for row in here],
            [row["dim_fisher_hi"] for row in here],
            color="C1",
            alpha=0.2,
            linewidth=0,
        )
        axis.set(yscale="log", xlabel="layer", title=f"{model}, d = {here[0]['d']}" if here else model)
        axis.grid(alpha=0.3, which="both")
    for ticks in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    axes[0, 0].set_ylabel("dimensions")
    axes[0, -1].legend(fontsize=7)
    return figure


def norms_plot(positions: list[dict], models: list[str]) -> Any:
    colours = model_colours(models)
    figure, axis = pyplot().subplots(figsize=(6.5, 3.8), layout="constrained")
    for model in models:
        here = grouped([row for row in positions if row["model"] == model], ("layer",))
        for i, rows in enumerate(here.values()):
            x, y = ([row[column] for row in rows] for column in ("position", "norm"))
            label = None if i else model
            axis.plot(x, y, color=colours[model], alpha=0.7, linewidth=1, marker=".", label=label)
    axis.axhline(10, color="0.4", linewidth=0.8, linestyle="--", label="sink: above 10 medians")
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xlim(-0.2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(
        yscale="log", xlabel="position (a line a hook)", ylabel="median ‖h‖, in medians over positions ≥ 1"
    )
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID, flags=FLAGS)
    experiment = Experiment("expd_mi", study=functools.partial(study, critic=command.own["critic"]))
    with hushed(command):
        if (done := run(command, experiment)) is None:
            return
        out, settings = done
        verdict = analyse(out, settings)
    rows = [{name: short(value) for name, value in row.items()} for row in statistics(verdict["h3"])]
    table = columns(rows, colour=coloured(sys.stdout))
    conclude(command, out, Answer(**verdict["answer"]), table, f"H3: {verdict['leaf']}")


if __name__ == "__main__":
    run_script(main)
