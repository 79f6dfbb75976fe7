"""Exp-C: does the pullback Fisher, which weighs an error by how much it changes the output, say more about
patched cross-entropy than SWD?

    python expc_fisher.py                                   # embedded models, six CPU-minutes
    python expc_fisher.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                          --data NeelNanda/pile-small-tokenized-2b
    python expc_fisher.py --from outputs/expc_fisher        # tables, verdict and plots again, without a model

Hypothesis H2': delta^T G delta, with G = J^T F J the pullback Fisher, adds predictive value beyond SWD, which
estimates it from one label, the data's. The form is exact, for all positions together (one forward-mode pass
through the tail, `measuring/fisher.py`); two other choices of its block stand beside it. A quadratic form
holds only near h, so it is calibrated against the KL measured at h + alpha delta for several alpha.
"""

import pathlib

from common import parse_args, run_script
from transport_geometry.measuring import fisher
from transport_geometry.measuring.evaluate import DRAWS
from transport_geometry.measuring.fisher_study import SHAPE, estimators, geometry, path_integral
from transport_geometry.measuring.metrics import BY_NAME, DISTORTION, PROXIES, Metric, Sums, mean
from transport_geometry.measuring.patch import Patch
from transport_geometry.models.lm import cross_entropy, kl_divergence
from transport_geometry.records import store
from transport_geometry.records.condition import Condition
from transport_geometry.records.results import about_the_run, label_last_block, load_measurements
from transport_geometry.records.tables import as_csv, markdown, read_table, readable_count, signed, span
from transport_geometry.reporting import leaderboard_report
from transport_geometry.reporting.console import Answer
from transport_geometry.reporting.figures import (
    decade_ticks,
    points_by_model,
    points_legend,
    pyplot,
    saes_against,
)
from transport_geometry.reporting.sae_words import ABOUT_WORDS, OF_A_ROW, with_words
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment, eval_batch
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics.correlations import partial_draws
from transport_geometry.statistics.hook_tests import added_value, out_of_hook_gain
from transport_geometry.statistics.intervals import ALPHA, interval
from transport_geometry.statistics.leaderboard import LEADERBOARD, Contest, of_target, ranked
from transport_geometry.statistics.resampling import N_FIXED, RESAMPLES

import numpy as np
import torch

# 9 hooks: three depths of each model; what is measured once per hook is most of the cost
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in (1, 3, 5)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=24,
    ctx=256,
)
N_RESAMPLES = 2000
ALPHAS = (0.1, 0.3, 1.0)  # how far along delta the quadratic form is checked
TEXT = blocks("expc_fisher")


# ------------------------------------------------------------------------------------------- measurement
def terms(patch: Patch) -> dict[str, torch.Tensor]:
    """Per predicted position [B,T-1]: two blocks of the exact form, the variance of the real logit change, KL
    and cross-entropy on the way to the patch.
    """
    clean, delta = patch.clean, patch.delta
    split = clean.hook, clean.input_ids, clean.h, delta, clean.p
    out = {
        "fisher_seq": fisher.sequence_form(*split),
        "fisher_same": fisher.same_form(*split),
        "half_var": fisher.variance(clean.p, patch.log_q - clean.log_p) / 2,
    }
    for alpha in ALPHAS[:-1]:
        log_a = clean.log_probs(clean.h + alpha * delta)
        out[f"kl_{alpha}"] = kl_divergence(clean.p, clean.log_p, log_a)
        out[f"ce_{alpha}"] = cross_entropy(log_a, clean.input_ids)
    return out


def kl_at(sums: Sums | dict, alpha: float) -> np.ndarray:
    """KL at h + alpha delta; the patch itself is alpha = 1."""
    return sums["kl" if alpha == 1 else f"kl_{alpha}"]


def locality(alpha: float) -> Metric:
    """KL at h + alpha delta over the quadratic form: 1 where the form holds."""
    return Metric(f"locality_{alpha:g}", lambda s: kl_at(s, alpha) / (alpha**2 * s["fisher_seq"] / 2))


# beside the proxies of Exp-B, per evaluated token
FISHER = (
    Metric("fisher_seq", mean("fisher_seq"), DISTORTION),
    Metric("fisher_tok", mean("fisher"), DISTORTION),
    Metric("fisher_same", mean("fisher_same"), DISTORTION),
    Metric("half_var", mean("half_var"), DISTORTION),
)
OWN = (*FISHER, Metric("delta_sq", mean("sse"), DISTORTION), *map(locality, ALPHAS))


def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> dict[str, list[dict]]:
    """What is measured once per hook: {table: rows}. sae: the middle one of the grid."""
    hook, input_ids, condition = eval_set.hook, eval_set.held.input_ids, eval_set.middle.condition
    batch = eval_batch(hook, input_ids.shape[1])
    few = input_ids[:batch].to(device)
    name = {"model": condition.model, "layer": condition.layer}
    which = name | {key: getattr(condition, key) for key in ("recipe", "k", "seed", "tokens")}
    return {
        "geometry.csv": [name | row for row in geometry(hook, input_ids, batch, eval_set.held.document)],
        "estimators.csv": [which | row for row in estimators(hook, few, sae)],
        "path.csv": [which | row for row in path_integral(hook, few, sae)],
    }


def check(eval_sets: list[EvalSet]) -> None:
    """Raises UserError where a position's own form cannot be had."""
    for eval_set in eval_sets:
        hook, one = eval_set.hook, eval_set.held.input_ids[:1].to(eval_set.hook.device)
        fisher.check_attention_mixes(hook, one, hook.head(one))


# passes through the tail: of `terms` two in forward mode, about three each, and two patches; of `study` 9
# backward passes of all the text and some 140 of one batch
EXPERIMENT = Experiment(
    "expc_fisher", terms, OWN, study, more_passes=8, study_passes=34, check=check, study_patches=True
)


# ------------------------------------------------------------------------ the rule, fixed before any result
MIN_ADDED = 0.2  # partial Spearman of the Fisher form with CE_rec, given SWD and k


def leaf_h2_prime(added: float, p: float) -> str:
    """The pre-registered rule of H2'. added, p: of `hook_tests.added_value`, nan below 6 hooks."""
    if np.isnan(added):
        return "undecided"
    return "supported" if added >= MIN_ADDED and p < ALPHA else "rejected"


# ------------------------------------------------------------- what is shown beside: ladder and calibration
MAX_KL_ERROR = 0.2  # the quadratic form holds where KL is within this share of it
RUNGS = (  # (metric, its sign in the report, what this step adds)
    ("delta_sq", "‖δ‖²", "the size of the error"),
    ("fisher_seq", "½δᵀGδ", "its direction, weighed by G"),
    ("half_var", "½Var_p(Δz)", "the nonlinearity of the network"),
    ("kl", "KL", "the softmax"),
    ("dce", "ΔCE", "the labels"),
)


def ladder(values: dict, meta: dict) -> list[dict]:
    """Partial Spearman with dCE given k of every rung between |delta|^2 and dCE, and what each step up gains,
    with the leaderboard's intervals.
    """
    rows, below = [], np.full(N_FIXED + N_RESAMPLES, np.nan)
    for metric, sign, adds in RUNGS:
        rho = np.ones_like(below)
        if metric != "dce":
            rho = partial_draws(DISTORTION(values[metric]), -values["dce"], meta, N_RESAMPLES)
        step, (lo, hi) = rho - below, interval((rho - below)[RESAMPLES])
        row = {"rung": sign, "what joins": adds, "rho": float(rho[0]), "step": float(step[0])}
        rows.append(row | {"step_lo": lo, "step_hi": hi})
        below = rho
    return rows


def calibration(sums: dict, meta: dict) -> list[dict]:
    """Per hook and alpha, over (SAE, sequence): slope of measured KL on alpha^2 delta^T G delta / 2, and of
    dCE on first plus second order.

    Slope through the origin; r2 = 1 - sum (measured - predicted)^2 / sum (measured - mean)^2, nothing fitted.
    """
    rows = []
    for model, layer in sorted(set(zip(meta["model"], meta["layer"]))):
        here = (meta["model"] == model) & (meta["layer"] == layer)
        s = {q: v[here] / sums["n"][here] for q, v in sums.items()}
        for alpha in ALPHAS:
            dce = s["ce_recon" if alpha == 1 else f"ce_{alpha}"] - s["ce_orig"]
            quadratic = alpha**2 * s["fisher_seq"] / 2
            row = {"model": str(model), "layer": int(layer), "alpha": alpha}
            against = {"kl": (kl_at(s, alpha), quadratic), "dce": (dce, alpha * s["gd"] + quadratic)}
            for name, (y, x) in against.items():
                with np.errstate(divide="ignore", invalid="ignore"):
                    row[f"{name}_slope"] = float((x * y).sum() / (x * x).sum())
                    row[f"{name}_r2"] = float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
            rows.append(row)
    return rows


def radius(row: dict) -> float:
    """The largest alpha up to which KL stays within MAX_KL_ERROR of the quadratic form; 0 where it never
    does, nan where that is 0.
    """
    if not np.isfinite(row[f"locality_{ALPHAS[0]:g}"]):
        return np.nan
    inside = [abs(row[f"locality_{alpha:g}"] - 1) <= MAX_KL_ERROR for alpha in ALPHAS]
    return max((alpha for i, alpha in enumerate(ALPHAS) if all(inside[: i + 1])), default=0.0)


# ------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """A pure function of conditions.csv, sequences.npz and the tables of `study`."""
    found = load_measurements(out, settings, N_RESAMPLES, OWN)
    values, meta = found.values, found.meta
    scores = {proxy.name: proxy.score(values[proxy.name]) for proxy in (*PROXIES, *FISHER)}
    board, contest = ranked(scores, found, settings, N_RESAMPLES)
    of_all = scores["fisher_seq"][0], scores["swd_tok"][0], values["ce_rec"][0], meta
    (added, p), gain = added_value(*of_all), out_of_hook_gain(*of_all)
    rungs = ladder(values, meta)
    shown = [row for row in rungs[1:-1] if row["step_lo"] > 0 or row["step_hi"] < 0]
    saes = with_words(found.saes, values, min(settings["documents"]))
    saes = [row | {"radius": radius(row)} for row in saes]
    verdict: dict = dict(
        leaf=leaf_h2_prime(added, p),
        n_clusters=contest.n_clusters,
        added=added,
        p=p,
        gain=dict(zip(("value", "lo", "hi"), gain)),
        ladder=rungs,
        lost_at=max(shown, key=lambda row: abs(row["step"]))["rung"] if shown else None,
        locality={f"{a:g}": float(np.median(values[f"locality_{a:g}"][0])) for a in ALPHAS},
        calibration=calibration(found.sums, meta),
        radius=[vars(Condition.of(row)) | {"radius": row["radius"]} for row in saes],
        thresholds=dict(min_added=MIN_ADDED, alpha=ALPHA, radius=MAX_KL_ERROR),
    )
    said = answer(verdict, settings)
    names = "geometry", "estimators", "path"
    tables = {name: read_table(store.checked(out / store.RUN, f"{name}.csv")) for name in names}
    tables |= dict(calibration=verdict["calibration"], saes=saes, nulls=found.nulls)
    return Findings(
        answer=said,
        verdict=verdict,
        short_verdict=f"H2': {verdict['leaf']}",
        report=report(said, verdict, board, contest, tables, settings),
        figures=figures(saes, found.sums, board, verdict["leaf"], settings["models"]),
        table=lambda colour: leaderboard_report.board_in_short(board, colour),
        tables={"leaderboard.csv": as_csv(board, LEADERBOARD)},
    )


def answer(verdict: dict, settings: dict) -> Answer:
    numbers = dict(added=signed(verdict["added"]), p=verdict["p"], gain=span(*verdict["gain"].values()))
    adds = TEXT["added" if np.isfinite(verdict["added"]) else "not added"].format(**numbers)
    after = leaderboard_report.TEXT["after h2"].format(claim="H2', that the Fisher form adds to SWD")
    return Answer(
        TEXT["question"],
        f"{TEXT[verdict['leaf']]}, on {verdict['n_clusters']} hooks: {adds}.",
        TEXT["limits"].format(after_h2=after, scope=leaderboard_report.scope(settings)),
    )


# ------------------------------------------------------------------------------------------ report, figures
OF_AN_SAE = (
    "model layer sae recipe k seed tokens r2 swd_tok fisher_seq fisher_tok fisher_same kl ce_rec "
    "locality_0.1 locality_1 radius fed"
).split()
OF_A_NULL = (
    "model layer sae r2 fisher_seq fisher_same kl ce_rec rho fed_nosink fed_iso_nosink fed_excess".split()
)


def report(
    said: Answer, verdict: dict, board: list[dict], contest: Contest, tables: dict, settings: dict
) -> str:
    rungs = [
        row
        | {"partial Spearman": signed(row["rho"]), "step": span(row["step"], row["step_lo"], row["step_hi"])}
        for row in verdict["ladder"]
    ]
    rungs[0]["step"] = ""  # nothing is below it
    rows = [row | {"tokens": readable_count(row["tokens"])} for row in tables["saes"]]
    shapes = [shape_in_words(row) for row in tables["geometry"]]
    return TEXT["report"].format(
        answer=said.markdown(),
        leaf=verdict["leaf"],
        n_clusters=verdict["n_clusters"],
        gain=span(*verdict["gain"].values()),
        board=leaderboard_report.leaderboard_table(board, "ce_rec"),
        draws=DRAWS,
        how_to_read=leaderboard_report.how_to_read(contest, settings),
        ladder=markdown(rungs, ["rung", "what joins", "partial Spearman", "step"]),
        step=TEXT["a step"].format(rung=verdict["lost_at"]) if verdict["lost_at"] else TEXT["no step"],
        calibration=markdown(tables["calibration"]),
        max_error=MAX_KL_ERROR,
        locality=", ".join(f"α = {alpha}: {signed(value)}" for alpha, value in verdict["locality"].items()),
        geometry=markdown(shapes, ["model", "layer", "sinks", *SHAPE[:2], "pr / d", *SHAPE[2:]]),
        only_sinks=TEXT["only sinks"] if any(row["trace"] == "undefined" for row in shapes) else "",
        estimators=markdown(tables["estimators"]),
        path=markdown(tables["path"]),
        saes=markdown(label_last_block(rows, settings), [*OF_AN_SAE, *OF_A_ROW]),
        words=ABOUT_WORDS,
        nulls=markdown(label_last_block(tables["nulls"], settings), OF_A_NULL),
        about="\n".join(about_the_run(tables["saes"], settings)),
    )


def shape_in_words(row: dict) -> dict:
    """A row of geometry.csv, each number with its interval."""
    words = {"pr / d": row["pr"] / row["d"]}
    for name in SHAPE:
        value, lo, hi = (row[f"{name}{end}"] for end in ("", "_lo", "_hi"))
        ends = f"{lo:.3g}, {hi:.3g}" if np.isfinite([lo, hi]).all() else "undefined"
        words[name] = f"{value:.3g} [{ends}]" if np.isfinite(value) else "undefined"
    return row | words


def figures(saes: list[dict], sums: dict, board: list[dict], leaf: str, models: list[str]) -> dict:
    calibrated, axes = pyplot().subplots(1, len(ALPHAS), figsize=(11.2, 4.2), layout="constrained")
    for axis, alpha in zip(axes, ALPHAS):
        x = alpha**2 * sums["fisher_seq"].sum(1) / sums["n"].sum(1) / 2
        y = kl_at(sums, alpha).sum(1) / sums["n"].sum(1)
        points_by_model(axis, saes, x, y, models)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="0.4", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="α² ½ δᵀGδ per token")
        axis.set_title(f"at {alpha:g} δ the KL is {np.median(y / x):.2f} times the form", fontsize=9)
        decade_ticks(axis.xaxis, ends)
        decade_ticks(axis.yaxis, ends)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL per token, measured at h + αδ")
    calibrated.suptitle("KL predicted by the Fisher form, and KL measured (line: equal)", fontsize=10)
    calibrated.legend(**points_legend(models, saes), loc="outside lower center", ncols=4)

    proxies = BY_NAME["r2"], BY_NAME["swd_tok"], FISHER[0]
    rows = {row["proxy"]: row for row in of_target(board)}
    titles = [f"{one.name}: rank correlation at one k {signed(rows[one.name]['partial'])}" for one in proxies]
    return {
        "calibration.png": calibrated,
        "leaderboard.png": leaderboard_report.leaderboard_figure(
            board, f"H2', that the Fisher form adds to SWD: {leaf}"
        ),
        "swd_fisher.png": saes_against(saes, proxies, models, titles, size=(3.7, 3.9)),
    }


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    run_and_report(parse_args(__doc__, GRID), EXPERIMENT, analyse)


if __name__ == "__main__":
    run_script(main)
