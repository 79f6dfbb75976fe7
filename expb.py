"""Exp-B: which cheap proxy of an SAE's quality predicts what its patch does to cross-entropy?

    python expb.py                                   # embedded models, four CPU-minutes
    python expb.py --device mps
    python expb.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --tokens 10M \\
                   --data NeelNanda/pile-small-tokenized-2b
    python expb.py --sae PATH_OR_ID,...              # SAEs that exist: audit.py does it
    python expb.py --from outputs/expb               # tables, verdict and plots again, without a model

Two claims. Here: about these SAEs on these layers, units the evaluation documents (and seeds); always
answered. In general: about other layers of these models, units the hooks, of which six effective ones are
needed, since neighbouring layers share their errors.

Hypothesis H2: a sensitivity-weighted proxy, SWD = E[(g.delta)^2], ranks SAEs by CE_rec better than R^2, and
better than the best Euclidean control. TopK SAEs are trained over models x layers x k, their reconstructions
patched in, and every proxy and the cross-entropy measured on the same held-out tokens. Decided by partial
Spearman given k, the error of dCE predicted for a hook that was left out, tests that count hooks, and the
transfer gap across scale.
"""

import importlib
import pathlib
import sys

from common import parse_args, run_script
from transport_geometry.audit import trial_lines
from transport_geometry.measuring.metrics import BY_NAME, PROXIES, Metric
from transport_geometry.records import store
from transport_geometry.records.results import (
    about_the_run,
    describe_units,
    label_last_block,
    load_measurements,
    rows_hash,
)
from transport_geometry.records.tables import (
    as_csv,
    as_json,
    estimate,
    markdown,
    plain,
    read_table,
    readable_count,
    signed,
)
from transport_geometry.reporting import chart
from transport_geometry.reporting.console import Answer, as_sentence, coloured, conclude, hushed, number
from transport_geometry.reporting.figures import as_png, model_colours, points_legend, pyplot, score_axis
from transport_geometry.reporting.page import with_page
from transport_geometry.reporting.where_it_hurts import of_folder
from transport_geometry.reporting.words import ABOUT_WORDS, OF_A_ROW, with_words
from transport_geometry.running.run import Experiment, run
from transport_geometry.statistics import claims, leaderboard
from transport_geometry.statistics.leaderboard import (
    AFTER_EXP_A,
    LEADERBOARD,
    about_these,
    board_in_short,
    how_to_read,
    leaderboard_plot,
    leaderboard_table,
    of_target,
    what_r2_is_worth,
)

import numpy as np
from matplotlib.axes import Axes

# 3 models x 6 layers = 18 hooks: hooks, not k and not seeds, are what the tests and the bootstrap count
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in range(6)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=32,
    ctx=256,
)
N_RESAMPLES = 2000


# ------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict, colour: bool = False) -> tuple[dict, str]:
    """leaderboard.csv, verdict.json, report.md and the plots: (verdict, the table to print).

    A pure function of conditions.csv and sequences.npz.
    """
    found = load_measurements(out, settings, N_RESAMPLES)
    scores = {proxy.name: proxy.score(found.values[proxy.name]) for proxy in PROXIES}
    board, h2 = leaderboard.ranked(scores, found, settings, N_RESAMPLES)
    said = vars(answer(h2, board, settings))
    verdict = plain(h2 | {"answer": said, "settings": settings, "rows_sha256": rows_hash(out)})
    saes = with_words(found.saes, found.values, min(settings["documents"]))
    where, pictures = of_folder(out)
    files: dict[str, store.Content | None] = {
        "leaderboard.csv": as_csv(board, LEADERBOARD),
        "verdict.json": as_json(verdict),
        "report.md": report(found.nulls, saes, board, verdict, settings, where),
        **pictures,
    }
    charts = [chart.of_saes(saes, settings["models"], [BY_NAME["r2"], BY_NAME["swd_tok"]])]
    store.put(out / store.RUN, with_page(out, files | plots(saes, board, verdict), charts))
    if verdict["n_clusters"] < verdict["min_hooks"]:  # nothing to rank proxies by: the SAEs themselves
        return verdict, trial_lines(saes)
    return verdict, board_in_short(read_table(out / "leaderboard.csv"), colour)


def sentence_here(verdict: dict) -> str:
    """What H2 comes to on these SAEs, in words."""
    leaf, reason = verdict["here"]["leaf"], verdict["here"]["reason"]
    return f"{leaf}. {claims.LEAVES[leaf]} ({reason})."


QUESTION = (
    "Does a score weighted by what the model feels (SWD) order SAEs by what patching them in does to "
    "cross-entropy better than R² does, and better than any plain Euclidean score?"
)
FOUND = {
    "supported": "SWD does better, by {diff_r2} than R² and by {diff_control} than the best Euclidean "
    "control, {control}, and carries over between models better.",
    "beats-r2-only": "SWD does better than R², by {diff_r2}, but is not shown to do better than the best "
    "Euclidean control, {control} ({diff_control}).",
    "rejected": "SWD is not shown to do better: {diff_r2} against R², {diff_control} against the best "
    "Euclidean control, {control}.",
    "not-transferable": "SWD does better, by {diff_control} than the best Euclidean control, {control}, but "
    "the models' ranges hardly meet, so whether it carries over between them cannot be judged.",
    leaderboard.CANNOT: "The best Euclidean control, {control}, leaves only {room} to gain, so SWD, at "
    "{diff_r2} against R², could not have been shown to do better here.",
    "undecided": "SWD stands at {diff_r2} against R², and this grid cannot decide: {reason}",
}
LIMITS = (
    "It is about order at one k, not about size, and about {these}. Every proxy is "
    "tested alone, and one not shown to be better is not shown to be equal."
)


def answer(verdict: dict, board: list[dict], settings: dict) -> Answer:
    """verdict: on H2."""
    text = FOUND[verdict["leaf"]].format(
        **{name: number(verdict, name) for name in ("diff_r2", "diff_control")},
        control=verdict["a_control"],
        room="nothing" if verdict["room"] is None else f"{verdict['room']:.2f}",
        reason=verdict["reason"],
    )
    general = claims.none_in_general(board, settings["models"])
    if not general:
        general = f"{what_r2_is_worth(board)} {as_sentence(text)}"
        general = f"In general, about {claims.layers_of(settings['models'])}: {general}"
    limits = AFTER_EXP_A + LIMITS.format(these=about_these(settings))
    return Answer(QUESTION, f"{claims.in_short(board)} {general}", limits)


# ------------------------------------------------------------------------------------------ report, plots
REPORT = """\
# Exp-B: which proxy predicts patched cross-entropy?

{answer}
![every proxy against R²](leaderboard.png)

The verdict here: {here}

The verdict in general, H2: {leaf} ({reason}).

## Here: how proxies order these SAEs by CE_rec

{table_here}

{how_to_read_here}

![R² and SWD against CE_rec](swd_r2.png)

{within}{general}## Every SAE

{saes}

{words}

{where}

## Null rows (never in a correlation)

{nulls}

null-gaussian is a drawn isotropic error, as long at every token as the error of the hook's middle SAE: its \
kl_excess and fed_excess are 0 but for chance. `undefined`: the identity has no error, so fed, rho and the \
excesses are 0/0; a reconstruction without a code has no alive, l0 and bits.

{about}
## Appendix: CE_rec against every proxy

![every proxy](proxies.png)
"""
IN_GENERAL = """\
{left_out}{board}

{how_to_read}
### Target KL

{board_kl}

"""
OF_AN_SAE = "model layer k seed tokens r2 r2_nosink cosine swd_tok ce_rec frac_zero kl alive bits fed".split()
OF_A_NULL = (
    "model layer sae r2 cosine swd_tok dce ce_rec kl kl_excess rho fed_nosink fed_iso_nosink fed_excess"
).split()


def report(
    nulls: list[dict], saes: list[dict], board: list[dict], verdict: dict, settings: dict, where: str
) -> bytes:
    models = settings["models"]
    strata = {name: name for name in claims.ARMS.values() if claims.row_of(board, "r2", name)}
    strata |= {name: f"within {name}" for name in models if len(models) > 1}
    within = [f"### Here, {title}\n\n{claims.table(board, name)}\n\n" for name, title in strata.items()]
    none = claims.none_in_general(board, models)
    judged = [row for row in board if row["n_effective"] >= verdict["min_clusters"]]
    general = f"## In general: {claims.layers_of(models)}\n\n" + (f"{none}\n\n" if none else "")
    if len(judged_pooled := {row["proxy"] for row in of_target(judged)}) > 1:
        general += IN_GENERAL.format(
            left_out=left_out(board, judged_pooled),
            board=leaderboard_table(judged, "ce_rec", "pooled"),
            how_to_read="\n".join(how_to_read(verdict, settings)),
            board_kl=leaderboard_table(judged, "kl", "pooled"),
        )
    shown = [
        row | {"tokens": readable_count(row["tokens"]), "k": row["k"] or "none"}
        for row in label_last_block(saes, settings)
    ]
    text = REPORT.format(
        answer=Answer(**verdict["answer"]).markdown(),
        leaf=verdict["leaf"],
        reason=verdict["reason"],
        here=sentence_here(verdict),
        table_here=claims.table(board),
        how_to_read_here=claims.how_to_read(settings, describe_units(settings)),
        within="".join(within),
        general=general,
        saes=markdown(shown, [*OF_AN_SAE, *OF_A_ROW]),
        words=ABOUT_WORDS,
        where=where,
        nulls=markdown(label_last_block(nulls, settings), OF_A_NULL),
        about="\n".join(about_the_run(saes, settings)),
    )
    return text.encode()


def left_out(board: list[dict], judged: set[str]) -> str:
    """The proxies that the table in general leaves out, as a paragraph; empty where there are none."""
    few = [f"{r['proxy']} ({r['n_effective']:.1f})" for r in of_target(board) if r["proxy"] not in judged]
    return f"Too few effective hooks: {', '.join(few)}.\n\n" if few else ""


def plots(saes: list[dict], board: list[dict], verdict: dict) -> dict[str, store.Content | None]:
    """{file: PNG}."""
    plt, columns, models = pyplot(), 4, verdict["settings"]["models"]
    rank = {row["proxy"]: f"rank correlation at one k {estimate(row, 'partial')}" for row in of_target(board)}
    two, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for axis, name, called in zip(axes, ("r2", "swd_tok"), ("R²", "SWD")):
        panel(axis, BY_NAME[name], saes, models)
        axis.set_title(f"{called}: {rank[name]}", fontsize=9)
    axes[0].set_ylabel("CE_rec")
    two.legend(**points_legend(models), loc="outside lower center", ncols=len(models) + 1)

    rows = -(-len(PROXIES) // columns)
    every, axes = plt.subplots(rows, columns, figsize=(11, 2.5 * rows), sharey=True, layout="constrained")
    for axis in axes.flat[len(PROXIES) :]:
        axis.set_visible(False)
    short = {row["proxy"]: signed(row["partial"]) for row in of_target(board)}
    for axis, proxy in zip(axes.flat, PROXIES):
        panel(axis, proxy, saes, models)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("")
        axis.set_title(f"{proxy.name}: {short[proxy.name]}", fontsize=9)
    every.supylabel("CE_rec", fontsize=10)
    every.suptitle(
        "CE_rec against every proxy, better to the right, and its rank correlation at one k", fontsize=11
    )
    every.legend(**points_legend(models), loc="outside lower center", ncols=len(models) + 1)
    return {
        "leaderboard.png": leaderboard_plot(board, verdict),
        "swd_r2.png": as_png(two),
        "proxies.png": as_png(every),
    }


def panel(axis: Axes, proxy: Metric, saes: list[dict], models: list[str]) -> None:
    """CE_rec of every SAE against one proxy; colour = model, size = k."""
    values = np.array([row[proxy.name] for row in saes])
    for model, colour in model_colours(models).items():
        here = [row for row in saes if row["model"] == model]
        axis.scatter(
            proxy.score(np.array([row[proxy.name] for row in here])),
            [row["ce_rec"] for row in here],
            s=[12 + 2.5 * row["k"] for row in here],
            color=colour,
            alpha=0.75,
            edgecolor="white",
            linewidth=0.5,
        )
    score_axis(axis, proxy, values)
    axis.grid(alpha=0.3)


def short_verdict(verdict: dict) -> str:
    """In general; and here."""
    return f"H2: {verdict['leaf']}; here: {verdict['here']['leaf']}"


# ---------------------------------------------------------------------------------------------------- main
def redirect_to(script: str) -> None:
    """Run another script in this one's place, with the same arguments and a results folder of its own."""
    sys.argv[0] = f"{script}.py"
    importlib.import_module(script).main()


def main() -> None:
    command = parse_args(__doc__, GRID)
    if command.grid.saes:
        return redirect_to("audit")
    with hushed(command):
        if (done := run(command, Experiment("expb", where=True))) is None:
            return
        out, settings = done
        verdict, table = analyse(out, settings, coloured(sys.stdout))
    conclude(command, out, Answer(**verdict["answer"]), table, short_verdict(verdict))


if __name__ == "__main__":
    run_script(main)
