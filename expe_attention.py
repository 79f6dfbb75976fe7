"""Exp-E: does a patch do its harm by changing whom the later positions attend to, and does that change say
more about patched cross-entropy than Euclidean error does?

    python expe_attention.py                                # embedded models, four CPU-minutes
    python expe_attention.py --models EleutherAI/pythia-70m@3,EleutherAI/pythia-410m@12 --tokens 10M \\
                             --data NeelNanda/pile-small-tokenized-2b
    python expe_attention.py --from outputs/expe_attention  # tables, verdict and plots again, without a model

Hypothesis P: the plan distortion, mean KL between a query's attention before and after the patch, predicts
CE_rec beyond the best Euclidean control. The rule stands below, fixed before any result. The distortion takes
a patched forward, as dCE itself does: it explains the harm and is no cheap substitute for measuring it.

Two descriptions stand beside it (`measuring/attention_plan.py`): two runs between the clean and the patched
one say how much of dCE goes through the attention plans, and a map over blocks and heads says where the plans
change.
"""

import pathlib
import typing
from collections.abc import Callable

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.measuring import attention_map
from transport_geometry.measuring.attention_map import FIELDS, TABLES
from transport_geometry.measuring.attention_plan import Change, check_readable, four_runs
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
    subset,
)
from transport_geometry.records.tables import (
    as_csv,
    estimate,
    markdown,
    percent,
    read_table,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting import claims_report, leaderboard_report
from transport_geometry.reporting.console import Answer
from transport_geometry.reporting.figures import joined_points, model_colours, pyplot, saes_against
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import Experiment
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.hook_tests import added_value, out_of_hook_gain
from transport_geometry.statistics.intervals import ALPHA
from transport_geometry.statistics.leaderboard import LEADERBOARD, Contest, of_target, ranked
from transport_geometry.statistics.over_hooks import mean_over_hooks

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

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure
N_RESAMPLES = 2000
TEXT = blocks("expe_attention")


# ------------------------------------------------------------------------------- what is measured per patch
AVERAGED = ("plan_next", *(f"plan_{name}" for name in FIELDS))
QUANTITIES = ("plan_n", *AVERAGED, "ce_frozen", "ce_plan_only")


def terms(patch: Patch) -> dict[str, torch.Tensor]:
    """QUANTITIES at each predicted position [B,T-1]: every field of Change, mean over heads and the blocks
    after the hook, at queries t >= 1; KL of the next block alone; CE of the run with clean plans, and of the
    one with patched plans. nan where no attention follows.
    """
    clean, hook = patch.clean, patch.clean.hook
    B, T, _ = clean.h.shape
    if hook.is_last:
        return dict.fromkeys(QUANTITIES, clean.h.new_full((B, T - 1), torch.nan))
    sums = dict.fromkeys(AVERAGED, clean.h.new_zeros(B, T))
    n_blocks = 0

    def look(block: int, change: Change) -> None:
        nonlocal n_blocks
        n_blocks += 1
        for name in FIELDS:
            sums[f"plan_{name}"] = sums[f"plan_{name}"] + getattr(change, name).mean(1)
        if block == hook.layer + 1:
            sums["plan_next"] = change.kl.mean(1)

    frozen, plan_only = four_runs(hook, clean.input_ids, clean.h, clean.whole(patch.h_hat), look)
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
    """How much a run's CE is above the clean run's, summed over evaluated tokens."""
    return s[ce] - s["ce_orig"]


# on the leaderboard beside the proxies of Exp-B, per head and query
PLAN = tuple(
    Metric(name, over(name, "plan_n"), DISTORTION)
    for name in ("plan_kl", "plan_jeffreys", "plan_half_var", "plan_next")
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


def check(eval_sets: list[EvalSet]) -> None:
    """Raises UserError where nothing could be measured: no attention after any hook, or one that cannot be
    read.
    """
    if all(eval_set.hook.is_last for eval_set in eval_sets):
        raise UserError("--models: each hook is its model's last block, and no attention follows it")
    for eval_set in eval_sets:
        if not eval_set.hook.is_last:
            check_readable(eval_set.hook, eval_set.held.input_ids[:1])


# ------------------------------------------------------------------------ the rule, fixed before any result
MIN_ADDED = 0.2  # partial Spearman of the plan distortion with CE_rec given k and the best control


def leaf_p(added: float, p: float) -> str:
    """The pre-registered rule of P. The control is chosen on half A of the documents; added and p
    (`hook_tests.added_value`) are of half B.
    """
    if np.isnan(added):
        return "undecided"
    return "supported" if added >= MIN_ADDED and p < ALPHA else "rejected"


# ------------------------------------------------------------------------------------- tables and verdict
BEYOND = ("nmse_tok", "cosine", "r2", "swd_tok", "kl")  # what else it might add to, descriptive


def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """Everything after the rows: a pure function of conditions.csv, sequences.npz and TABLES.

    Everything that is compared with the plan distortion is compared on the hooks that have one: SAEs at a
    model's last block stand in the table of SAEs and nowhere else.
    """
    whole = load_measurements(out, settings, N_RESAMPLES, OWN)
    found = subset(whole, np.array([hook_of(row) not in settings["last_blocks"] for row in whole.saes]))
    values, meta = found.values, found.meta
    scores = {one.name: one.score(values[one.name]) for one in (*PROXIES, *PLAN, BY_NAME["kl"])}
    board, swd = ranked(scores, found, settings, N_RESAMPLES)
    board = [row for row in board if row["proxy"] != row["target"]]  # KL is a target too
    added = p = np.nan
    if control := swd.order_control:
        x, base, y = (v[2] for v in (scores["plan_kl"], scores[control], values["ce_rec"]))
        added, p = added_value(x, base, y, meta)
    beyond = []
    for name in BEYOND:
        all_documents = (scores["plan_kl"][0], scores[name][0], values["ce_rec"][0], meta)
        more = dict(zip(("added", "p"), added_value(*all_documents)))
        more |= dict(zip(("gain", "gain_lo", "gain_hi"), out_of_hook_gain(*all_documents)))
        beyond.append({"beyond": name} | more)
    depth, of_hooks = (read_table(store.checked(out / store.RUN, name)) for name in TABLES)
    rows = attention_map.by_block(depth, of_hooks)
    by_hook, means = shares(found)
    (of_plan,), (of_r2,) = (
        [row for row in of_target(board) if row["proxy"] == name] for name in ("plan_kl", "r2")
    )
    leaf = leaf_p(added, p)
    verdict = {
        "leaf": leaf,
        "n_clusters": swd.n_clusters,
        "control": control,
        "added": added,
        "p": p,
        "beyond": beyond,
        "board": {name: v for name, v in of_plan.items() if name not in ("proxy", "target", "stratum")},
        **means,
        "breaks": attention_map.where_plans_change(rows, values, meta, settings["models"], N_RESAMPLES),
        "left_out": settings["last_blocks"],
        "thresholds": dict(min_added=MIN_ADDED, alpha=ALPHA, min_clusters=MIN_EFFECTIVE_HOOKS),
    }
    after_h2 = leaderboard_report.TEXT["after h2"].format(claim="the attention plan")
    said = Answer(
        TEXT["question"],
        TEXT[leaf].format(**verdict),
        TEXT["limits"].format(after_h2=after_h2, scope=leaderboard_report.scope(settings)),
    )
    pair = [
        f"{one['proxy']}: rank correlation at one k {claims_report.estimate_here(one, 'partial')}"
        for one in (of_r2, of_plan)
    ]
    return Findings(
        answer=said,
        verdict=verdict,
        short_verdict=f"P: {leaf}",
        report=report(whole, board, swd, verdict, said, by_hook, rows, depth, settings),
        figures={
            "leaderboard.png": leaderboard_report.leaderboard_figure(
                board, f"P, that plan_kl says more than a Euclidean score: {leaf}"
            ),
            "depth.png": attention_map.depth_figure(rows, settings["models"]),
            "mediation.png": mediation_figure(by_hook, settings["models"]),
            "plan_r2.png": saes_against(
                whole.saes, [BY_NAME["r2"], PLAN[0]], settings["models"], pair, size=(4.5, 4.2)
            ),
        },
        table=lambda colour: leaderboard_report.board_in_short(board, colour),
        tables={"leaderboard.csv": as_csv(board, LEADERBOARD)},
    )


def shares(found: Measured) -> tuple[list[dict], dict[str, dict]]:
    """(a row per hook, {share: its mean over hooks}): of a hook's dCE, summed over its SAEs, the share that
    clean plans take away (mediated) and the share that patched plans cause alone (plan_only).
    """
    values, meta = found.values, found.meta
    places = sorted(set(zip(meta["model"], meta["layer"])))
    hooks = {name: np.array(column) for name, column in zip(("model", "layer"), zip(*places))}
    here = [(meta["model"] == model) & (meta["layer"] == layer) for model, layer in places]
    total, frozen, plan_only = (
        np.stack([values[name][:, mask].sum(1) for mask in here], 1)
        for name in ("dce", "dce_frozen", "dce_plan_only")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        of_hooks = {"mediated": 1 - frozen / total, "plan_only": plan_only / total}  # [W,G]
    rows = [
        {"model": model, "layer": layer} | {name: float(v[0, i]) for name, v in of_hooks.items()}
        for i, (model, layer) in enumerate(places)
    ]
    return rows, {name: mean_over_hooks(v, hooks, N_RESAMPLES) for name, v in of_hooks.items()}


# ------------------------------------------------------------------------------------------- report, figures
OF_AN_SAE = (
    "model layer sae recipe k seed tokens nmse_tok kl ce_rec dce mediated plan_only plan_kl plan_next "
    "plan_first to_first to_first_hat plan_entropy plan_entropy_hat out_plan out_value"
).split()
OF_A_NULL = (
    "model layer sae nmse_tok ce_rec dce mediated plan_only plan_kl plan_first out_plan out_value".split()
)


def report(
    whole: Measured,
    board: list[dict],
    swd: Contest,
    verdict: dict,
    said: Answer,
    by_hook: list[dict],
    rows: list[dict],
    depth: list[dict],
    settings: dict,
) -> str:
    lowest = verdict["breaks"]["lowest_pr"]
    changes = {
        name: of | {"interval": span(of["value"], of["lo"], of["hi"])}
        for name, of in verdict["breaks"].items()
        if name != "lowest_pr"
    }
    means = {
        name: "{} [{}, {}]".format(*(percent(verdict[name][end]) for end in ("value", "lo", "hi")))
        for name in ("mediated", "plan_only")
    }
    left_out = TEXT["left out"].format(hooks=", ".join(settings["last_blocks"]))
    beyond = [
        row | {"added": signed(row["added"]), "gain": estimate(row, "gain")} for row in verdict["beyond"]
    ]
    in_percent = [row | {name: percent(row[name]) for name in means} for row in by_hook]
    shown = [
        row | {"tokens": readable_count(row["tokens"])} for row in label_last_block(whole.saes, settings)
    ]
    return TEXT["report"].format(
        answer=said.markdown(),
        leaf=verdict["leaf"],
        min_added=MIN_ADDED,
        alpha=ALPHA,
        n_clusters=swd.n_clusters,
        left_out=f" {left_out}" if settings["last_blocks"] else "",
        **changes,
        lowest=", ".join(lowest),
        n_lowest=len(lowest),
        n_middle=sum(1 / 3 <= depth <= 2 / 3 for depth in lowest.values()),
        breaks=attention_map.block_table(rows),
        heads=attention_map.head_table(depth, settings["models"]),
        mediation=markdown(in_percent),
        **means,
        board=leaderboard_report.leaderboard_table(board, "ce_rec"),
        how_to_read=leaderboard_report.how_to_read(swd, settings),
        beyond=markdown(beyond, ["beyond", "added", "p", "gain"]),
        saes=markdown(shown, OF_AN_SAE),
        nulls=markdown(label_last_block(whole.nulls, settings), OF_A_NULL),
        about="\n".join(about_the_run(whole.saes, settings)),
    )


def mediation_figure(rows: list[dict], models: list[str]) -> "Figure":
    """Shares of dCE by the hook's layer, a colour for each model."""
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    titles = {"mediated": "taken away by clean plans", "plan_only": "caused by patched plans alone"}
    for axis, (name, title) in zip(axes, titles.items()):
        for (model, colour), marker in zip(model_colours(models).items(), "os^Dv" * len(models)):
            mine = [row for row in rows if row["model"] == model]
            x, y = [row["layer"] for row in mine], [100 * row[name] for row in mine]
            says = [f"{model}@{layer}: {share:.0f}%" for layer, share in zip(x, y)]
            joined_points(axis, x, y, says, colour, label=model, marker=marker)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(xlabel="patched block", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of ΔCE")
    axes[0].legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
    # more_passes: the four runs of `terms`, in plain attention
    experiment = Experiment(
        "expe_attention", terms, OWN, attention_map.study, more_passes=6, check=check, study_patches=True
    )
    run_and_report(command, experiment, analyse)


if __name__ == "__main__":
    run_script(main)
