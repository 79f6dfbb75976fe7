"""Exp-B: which cheap proxy of an SAE's quality predicts what its patch does to cross-entropy?

    python expb.py                                   # embedded models, four CPU-minutes
    python expb.py --device mps
    python expb.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                   --data NeelNanda/pile-small-tokenized-2b
    python expb.py --sae PATH_OR_ID,...              # SAEs that exist: audit.py does it
    python expb.py --from outputs/expb               # tables, verdict and plots again, without a model

TopK SAEs are trained over models x layers x k, their reconstructions patched in, and every proxy and the
cross-entropy measured on the same held-out tokens (the proxies: `measuring/metrics.py`).

Two claims. Here: about these SAEs on these layers, units the evaluation documents (and seeds); always
answered. In general: about other layers of these models, units the hooks, of which six effective ones are
needed, since neighbouring layers share their errors.

Hypothesis H2: a sensitivity-weighted proxy, SWD = E[(g.delta)^2], ranks SAEs by CE_rec better than R^2, and
better than the best Euclidean control. The rule stands below, fixed before any result.
"""

import importlib
import math
import pathlib
import sys
import typing

from common import parse_args, run_script
from transport_geometry.measuring.metrics import BY_NAME, PROXIES
from transport_geometry.records.results import (
    about_the_run,
    describe_units,
    label_last_block,
    load_measurements,
)
from transport_geometry.records.tables import as_csv, markdown, readable_count, signed
from transport_geometry.reporting import claims_report, where_it_hurts
from transport_geometry.reporting import leaderboard_report as shared
from transport_geometry.reporting.audit_report import trial_lines
from transport_geometry.reporting.console import Answer, as_sentence, number
from transport_geometry.reporting.figures import along_depth, saes_against
from transport_geometry.reporting.sae_words import ABOUT_WORDS, OF_A_ROW, WORDS, with_words
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.run import Experiment
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.intervals import ALPHA
from transport_geometry.statistics.leaderboard import LEADERBOARD, Contest, of_target, ranked
from transport_geometry.statistics.resampling import MIN_HOOKS_OF_A_MODEL
from transport_geometry.statistics.transfer import MIN_IN_RANGE

import numpy as np

# 3 models x 6 layers = 18 hooks: hooks, not k and not seeds, are what the tests and the bootstrap count
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in range(6)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=32,
    ctx=256,
)

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure
N_RESAMPLES = 2000
TEXT = blocks("expb")  # words of reporting/reports/expb.md; each leaf below is a block there


# ------------------------------------------------------------------------ the rule, fixed before any result
MIN_DIFFERENCE = 0.10  # order: partial Spearman, SWD minus the control
MAX_GAMMA_RATIO = 0.5  # transfer: |transfer gap| of SWD over the control's
CANNOT = "cannot be shown here"


def leaf_h2(swd: Contest) -> tuple[str, str]:
    """The pre-registered rule of H2 in general: (leaf, why), the first that applies.

    Three claims, each against a control chosen on half A of the documents and tested on half B:
      order: partial Spearman higher by MIN_DIFFERENCE or more, swap p < .05;
      size: the leave-one-hook-out error of log10 dCE smaller;
      transfer: |transfer gap| at most MAX_GAMMA_RATIO of the control's, and smaller by a 95% interval.
    Order at one k is one question and size another: H2 is supported only where both point the same way.
    """
    own, control = swd.of_the_proxy, swd.order_control
    order, order_r2 = ranks_better(swd, "control"), ranks_better(swd, "r2")
    worse = own["diff_control"] < 0 and own["p_control"] < ALPHA
    size_gain = own["diff_loho_control"]
    size = size_gain > 0 and own["p_loho"] < ALPHA

    # is there enough to judge?
    if swd.n_clusters < MIN_EFFECTIVE_HOOKS:
        return "undecided", f"{swd.n_clusters} hooks, {MIN_EFFECTIVE_HOOKS} needed"
    if swd.n_effective < MIN_EFFECTIVE_HOOKS:
        return "undecided", (
            f"neighbouring hooks share their errors, so that {swd.n_clusters} say as much as "
            f"{swd.n_effective:.1f} independent ones, {MIN_EFFECTIVE_HOOKS} needed"
        )
    if np.isnan(own["p_control"]):
        return "undecided", "the difference to the best control is undefined"

    # order and size must not disagree
    if order and np.isnan(size_gain):
        return "undecided", (
            f"ranks better than {control}, and how well it predicts the size of dCE is undefined "
            "(a dCE that is not positive has no logarithm)"
        )
    if order and not size_gain > 0:
        return "undecided", (
            f"the two statistics disagree: it ranks better than {control}, and does not predict the "
            "size of dCE better"
        )
    if not order and size:
        return "undecided", (
            "the two statistics disagree: it predicts the size of dCE better, and is not shown to rank "
            f"better than {control}"
        )

    # not shown to order better: because it does not, or because nothing could have?
    if not order and order_r2:
        return "beats-r2-only", f"ranks better than r2, not shown to rank better than {control}"
    if not order and (missing := no_room(swd, worse)):
        return CANNOT, (
            f"{control} leaves {swd.room:.2f} to gain in partial Spearman, less than {' and '.join(missing)}"
            + ("; and it ranks worse" if worse else "")
        )
    if worse:
        return "rejected", f"ranks worse than {control}"
    if not order:
        return "rejected", f"not shown to rank better than {control}, nor than r2"

    # a better order that does not carry over across scale is not what H2 claims
    if np.isnan(swd.gamma_proxy) or np.isnan(swd.gamma_control):  # one model, or no depth in common
        return "undecided", "ranks better, transfer across scale undefined on this grid"
    if not transfer_judged(swd):
        return "not-transferable", (
            "ranks better, but too few of the larger model's values are in range to judge"
        )
    if not transfer_holds(swd):
        return (
            "rejected",
            f"ranks better than {control}, not shown to transfer better than {swd.transfer_control}",
        )
    return (
        "supported",
        f"ranks better than {control} and transfers across scale better than {swd.transfer_control}",
    )


def ranks_better(swd: Contest, base: str) -> bool:
    """Than `control` or `r2`: by the margin, and by the test."""
    own = swd.of_the_proxy
    return own[f"diff_{base}"] >= MIN_DIFFERENCE and own[f"p_{base}"] < ALPHA


def no_room(swd: Contest, worse: bool) -> list[str]:
    """What the room above the control is less than."""
    text = []
    if swd.room < MIN_DIFFERENCE:
        text.append(f"the margin of {MIN_DIFFERENCE:.2f}")
    if swd.p_perfect >= ALPHA:
        text.append(f"what could show here (p would be {swd.p_perfect:.2f} for the target itself)")
    if swd.room < swd.smallest_detectable and not worse:
        text.append(f"the {swd.smallest_detectable:.2f} that shows here in four of five cases")
    return text


def transfer_judged(swd: Contest) -> bool:
    return swd.in_range_proxy >= MIN_IN_RANGE and swd.in_range_control >= MIN_IN_RANGE


def transfer_holds(swd: Contest) -> bool:
    smaller = abs(swd.gamma_proxy) <= MAX_GAMMA_RATIO * abs(swd.gamma_control)
    return transfer_judged(swd) and smaller and swd.gamma_gain_lo > 0


# ------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """Everything after one row per SAE: a pure function of conditions.csv and sequences.npz."""
    found = load_measurements(out, settings, N_RESAMPLES)
    # {proxy: [W, C]}: of C SAEs, on all documents, on either half of them, and under every resample
    scores = {proxy.name: proxy.score(found.values[proxy.name]) for proxy in PROXIES}
    board, swd = ranked(scores, found, settings, N_RESAMPLES)
    leaf, reason = leaf_h2(swd)
    saes = with_words(found.saes, found.values, min(settings["documents"]))
    where, pictures = where_it_hurts.of_folder(out)
    said = answer(leaf, reason, swd, board, settings)

    def table(colour: bool) -> str:
        few = swd.n_clusters < MIN_HOOKS_OF_A_MODEL  # nothing to rank proxies by: the SAEs themselves
        return trial_lines(saes) if few else shared.board_in_short(board, colour)

    return Findings(
        answer=said,
        verdict={
            "leaf": leaf,
            "reason": reason,
            **swd.record(),
            **what_the_rule_asked(swd),
            "saes": counted(saes),
        },
        short_verdict=f"H2: {leaf}; here: {swd.here['leaf']}",
        report=report(leaf, reason, swd, board, saes, found.nulls, said, where, settings),
        figures={**figures(saes, board, leaf, settings["models"]), **pictures},
        table=table,
        tables={"leaderboard.csv": as_csv(board, LEADERBOARD)},
    )


def what_the_rule_asked(swd: Contest) -> dict:
    """Of verdict.json: what holds, and the thresholds."""
    return dict(
        a_holds=ranks_better(swd, "control"),
        a_holds_vs_r2=ranks_better(swd, "r2"),
        b_judged=transfer_judged(swd),
        b_holds=transfer_holds(swd),
        alpha=ALPHA,
        min_clusters=MIN_EFFECTIVE_HOOKS,
        min_hooks=MIN_HOOKS_OF_A_MODEL,
        min_difference=MIN_DIFFERENCE,
        max_gamma_ratio=MAX_GAMMA_RATIO,
        min_in_range=MIN_IN_RANGE,
    )


def counted(saes: list[dict]) -> dict:
    """How many SAEs have which word, and from how many to how many times a random error's KL theirs is."""
    known = [math.exp(row["kl_excess"]) for row in saes if math.isfinite(row["kl_excess"])]
    of_words = {word: n for word in WORDS if (n := sum(row["word"] == word for row in saes))}
    return {"words": of_words, "kl_ratio": [min(known), max(known)] if known else None}


def answer(leaf: str, reason: str, swd: Contest, board: list[dict], settings: dict) -> Answer:
    general = claims_report.none_in_general(board, settings["models"])
    if not general:
        text = TEXT[leaf].format(
            diff_r2=number(swd.of_the_proxy, "diff_r2"),
            diff_control=number(swd.of_the_proxy, "diff_control"),
            control=swd.order_control,
            room="nothing" if np.isnan(swd.room) else f"{swd.room:.2f}",
            reason=reason,
        )
        layers = claims_report.layers_of(settings["models"])
        general = f"In general, about {layers}: {shared.what_r2_is_worth(board)} {as_sentence(text)}"
    limits = TEXT["limits"].format(exp_a=shared.TEXT["after exp-a"], scope=shared.scope(settings))
    return Answer(TEXT["question"], f"{claims_report.in_short(board)} {general}", limits)


# ------------------------------------------------------------------------------------------- report, figures
OF_AN_SAE = "model layer k seed tokens r2 r2_nosink cosine swd_tok ce_rec frac_zero kl alive bits fed".split()
OF_A_NULL = (
    "model layer sae r2 cosine swd_tok dce ce_rec kl kl_excess rho fed_nosink fed_iso_nosink fed_excess"
).split()


def report(
    leaf: str,
    reason: str,
    swd: Contest,
    board: list[dict],
    saes: list[dict],
    nulls: list[dict],
    said: Answer,
    where: str,
    settings: dict,
) -> str:
    here = swd.here
    shown = [
        row | {"tokens": readable_count(row["tokens"]), "k": row["k"] or "none"}
        for row in label_last_block(saes, settings)
    ]
    return TEXT["report"].format(
        answer=said.markdown(),
        leaf=leaf,
        reason=reason,
        here=f"{here['leaf']}. {claims_report.OF_LEAF[here['leaf']]} ({here['reason']}).",
        table_here=claims_report.table(board),
        how_to_read_here=claims_report.how_to_read(settings, describe_units(settings)),
        within=shared.within(board, settings["models"]),
        general=general_section(swd, board, settings),
        saes=markdown(shown, [*OF_AN_SAE, *OF_A_ROW]),
        words=ABOUT_WORDS,
        where=where,
        nulls=markdown(label_last_block(nulls, settings), OF_A_NULL),
        about="\n".join(about_the_run(saes, settings)),
    )


def general_section(swd: Contest, board: list[dict], settings: dict) -> str:
    """The leaderboard over hooks, of the proxies that have hooks enough."""
    none = claims_report.none_in_general(board, settings["models"])
    text = f"## In general: {claims_report.layers_of(settings['models'])}\n\n" + (
        f"{none}\n\n" if none else ""
    )
    judged = [row for row in board if row["n_effective"] >= MIN_EFFECTIVE_HOOKS]
    names = {row["proxy"] for row in of_target(judged)}
    if len(names) < 2:
        return text
    few = [f"{r['proxy']} ({r['n_effective']:.1f})" for r in of_target(board) if r["proxy"] not in names]
    general = TEXT["general"].format(
        left_out=f"Too few effective hooks: {', '.join(few)}.\n\n" if few else "",
        board=shared.leaderboard_table(judged, "ce_rec"),
        how_to_read=shared.how_to_read(swd, settings),
        min_difference=MIN_DIFFERENCE,
        board_kl=shared.leaderboard_table(judged, "kl"),
    )
    return f"{text}{general}\n\n"


def figures(saes: list[dict], board: list[dict], leaf: str, models: list[str]) -> dict[str, "Figure"]:
    rows = {row["proxy"]: row for row in of_target(board)}
    two = [
        f"{name}: rank correlation at one k {claims_report.estimate_here(rows[proxy], 'partial')}"
        for name, proxy in (("R²", "r2"), ("SWD", "swd_tok"))
    ]
    every = [f"{proxy.name}: {signed(rows[proxy.name]['partial'])}" for proxy in PROXIES]
    pair = [BY_NAME["r2"], BY_NAME["swd_tok"]]
    return {
        "leaderboard.png": shared.leaderboard_figure(board, f"H2, that SWD does: {leaf}"),
        "swd_r2.png": saes_against(saes, pair, models, two, size=(4.5, 4.2)),
        "proxies.png": saes_against(saes, PROXIES, models, every),
        "layers.png": along_depth(saes, models),
    }


# ---------------------------------------------------------------------------------------------------- main
def redirect_to(script: str) -> None:
    """Run another script with the same arguments and a results folder of its own."""
    sys.argv[0] = f"{script}.py"
    importlib.import_module(script).main()


def main() -> None:
    command = parse_args(__doc__, GRID)
    if command.grid.saes:  # nothing to train and no grid to rank: the audit answers
        return redirect_to("audit")
    run_and_report(command, Experiment("expb", where=True), analyse)


if __name__ == "__main__":
    run_script(main)
