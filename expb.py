"""Exp-B: which cheap proxy of an SAE's quality predicts what its patch does to cross-entropy?

    python expb.py                                   # embedded models, six CPU-minutes
    python expb.py --device mps
    python expb.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --data NeelNanda/pile-small-tokenized-2b --tokens 10M
    python expb.py --models EleutherAI/pythia-70m@3 --sae EleutherAI/sae-pythia-70m-32k      # SAEs that exist: can their R^2 be trusted?
    python expb.py --from outputs/expb               # tables, verdict and plots again, without a model

Hypothesis H2: a sensitivity-weighted proxy, SWD = E[(g.delta)^2], ranks SAEs by CE_rec better than R^2, and
better than the best Euclidean control. TopK SAEs are trained over models x layers x k, their reconstructions
patched in, and every proxy and the cross-entropy measured on the same held-out tokens. Decided by partial
Spearman given k, the error of dCE predicted for a hook that was left out, tests that count hooks, and the
transfer gap across scale.
"""

import pathlib

from common import parse_args, run_script
from transport_geometry import audit, leaderboard, store
from transport_geometry.figures import as_png, model_colours, pyplot
from transport_geometry.flag import FLAG_COLUMNS, FLAG_TEXT, flagged
from transport_geometry.leaderboard import (
    LEADERBOARD,
    MAGNITUDE,
    gate,
    how_to_read,
    leaderboard_plot,
    leaderboard_table,
    read_verdict,
)
from transport_geometry.metrics import BY_NAME, EUCLIDEAN_CONTROLS, PROXIES, Metric, oriented
from transport_geometry.results import about_the_run, marked, measured, rows_hash
from transport_geometry.run import Experiment, run
from transport_geometry.tables import as_csv, as_json, markdown, plain, read_table, readable_count

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
N_RESAMPLES = 2000


# ------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict, exp_a: dict | None) -> tuple[dict, list[dict], list[dict]]:
    """leaderboard.csv, verdict.json, report.md, the plots, and audit.csv and pairs.csv where SAEs are from
    files: (verdict, rows of both).

    A pure function of conditions.csv, sequences.npz and the gate.
    """
    found = measured(out, settings, N_RESAMPLES)
    nulls, mine, values, meta = found.nulls, found.saes, found.values, found.meta
    scores = {proxy.name: proxy.score(values[proxy.name]) for proxy in PROXIES}
    targets = {"ce_rec": values["ce_rec"], "kl": oriented("kl", values["kl"])}
    board = []
    for target_name, target in targets.items():
        board += leaderboard.board(
            scores,
            target,
            values[MAGNITUDE[target_name]],
            meta,
            settings["models"],
            target_name=target_name,
            controls=EUCLIDEAN_CONTROLS,
            n_resamples=N_RESAMPLES,
        )
    leaf, gate_text = gate(exp_a, settings)
    verdict = leaderboard.verdict_h2(
        [row for row in board if row["target"] == "ce_rec"],
        scores,
        targets["ce_rec"],
        values["dce"],
        meta,
        settings["models"],
        controls=EUCLIDEAN_CONTROLS,
        gate=leaf,
        n_resamples=N_RESAMPLES,
    )
    verdict = plain(verdict | {"settings": settings, "gate_text": gate_text, "rows_sha256": rows_hash(out)})
    mine = flagged(mine, values)
    audited, pairs = (
        make(mine, values, settings) if "saes" in settings else [] for make in (audit.audit_rows, audit.pairs)
    )
    files = {
        "leaderboard.csv": as_csv(board, LEADERBOARD),
        "verdict.json": as_json(verdict),
        **plots(mine, board, settings),
        "report.md": report(
            nulls,
            mine,
            board,
            verdict,
            settings,
            audit.audit_report(audited, pairs, settings) if audited else [],
        ),
    }
    if audited:
        files |= {"audit.csv": as_csv(audited, audit.COLUMNS), "pairs.csv": as_csv(pairs, audit.PAIRS)}
    store.put(out / store.RUN, files)
    return verdict, audited, pairs


def sentence(verdict: dict) -> str:
    """The verdict on H2 in words."""
    leaf = verdict["leaf_if_ungated"] if verdict["leaf"] == "gated" else verdict["leaf"]
    text = {
        "supported": "SWD ranks SAEs by CE_rec better than the best Euclidean control, and transfers across scale better.",
        "beats-r2-only": "SWD beats R², but not the best Euclidean control: no case for a sensitivity-weighted geometry.",
        "rejected": "SWD is not shown to predict CE_rec better than the best Euclidean control.",
        "not-transferable": "SWD ranks better than the best control, but the models' ranges of the proxy hardly meet, so whether it "
        "transfers across scale cannot be judged.",
        leaderboard.CANNOT: "No data of this grid could have shown SWD to be better than the best Euclidean control: there is too little left to gain.",
        "undecided": "This grid cannot decide.",
    }[leaf] + f" ({verdict['reason']}.)"
    return (
        f"H2: {leaf}. {text}"
        if verdict["leaf"] != "gated"
        else f"H2: gated ({verdict['gate_text']}). Ungated it would read: {leaf}. {text}"
    )


# ------------------------------------------------------------------------------------------ report, plots
def report(nulls, mine, board, verdict: dict, settings: dict, audited: list[str]) -> bytes:
    text = [
        "# Exp-B: which proxy predicts patched cross-entropy?",
        "",
        *audited,
        f"**{sentence(verdict)}**",
        "",
        "![R² and SWD against CE_rec](swd_r2.png)",
        "",
        "## Leaderboard, all conditions, target CE_rec",
        "",
        leaderboard_table(board, "ce_rec", "pooled"),
        "",
        *how_to_read(verdict, settings),
        "![leaderboard](leaderboard.png)",
        "",
        "## Target KL",
        "",
        leaderboard_table(board, "kl", "pooled"),
        "",
    ]
    for model in settings["models"]:
        text += [f"## Within {model}", "", leaderboard_table(board, "ce_rec", model), ""]
    shown = [
        "model",
        "layer",
        "k",
        "seed",
        "tokens",
        "r2",
        "r2_nosink",
        "cosine",
        "swd_tok",
        "ce_rec",
        "frac_zero",
        "kl",
        "alive",
        "bits",
        "fed",
        *FLAG_COLUMNS,
    ]
    flags = [
        row | {"tokens": readable_count(row["tokens"]), "k": row["k"] or "none"}
        for row in marked(mine, settings)
    ]
    text += [
        "## Every SAE",
        "",
        markdown(flags, shown),
        "",
        FLAG_TEXT,
        "",
        "## Null rows (never in a correlation)",
        "",
        markdown(
            marked(nulls, settings),
            [
                "model",
                "layer",
                "sae",
                "r2",
                "cosine",
                "swd_tok",
                "dce",
                "ce_rec",
                "kl",
                "rho",
                "fed_nosink",
                "fed_iso_nosink",
                "fed_excess",
            ],
        ),
        "",
        "null-gaussian is a drawn isotropic error, as long at every token as the error of the hook's middle SAE: its fed_excess is 0 but for chance. "
        "`undefined`: the identity has no error, so fed, rho and the excess are 0/0; a reconstruction without a code has no alive, l0 and bits.",
        "",
        "![every proxy](proxies.png)",
        "",
        *about_the_run(mine, settings),
    ]
    return "\n".join(text).encode()


def plots(mine, board, settings: dict) -> dict[str, bytes]:
    """{file: PNG}."""
    plt, drawn = pyplot(), {"leaderboard.png": leaderboard_plot(board)}
    colours = model_colours(settings["models"])

    def panel(axis, proxy: Metric) -> None:
        for model in settings["models"]:
            here = [row for row in mine if row["model"] == model]
            x = proxy.score(np.array([row[proxy.name] for row in here]))
            axis.scatter(
                x,
                [row["ce_rec"] for row in here],
                s=[12 + 2.5 * row["k"] for row in here],
                color=colours[model],
                alpha=0.75,
                edgecolor="white",
                linewidth=0.5,
                label=model,
            )
        axis.set_xlabel(proxy.axis)
        axis.set_ylabel("CE_rec")
        axis.grid(alpha=0.3)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("r2", "swd_tok")):
        panel(axis, BY_NAME[name])
    axes[0].legend(title="size = k", fontsize=8)
    drawn["swd_r2.png"] = as_png(figure)

    columns = 4
    figure, axes = plt.subplots(
        -(-len(PROXIES) // columns), columns, figsize=(13, 11), sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(PROXIES) :]:
        axis.set_visible(False)
    for axis, proxy in zip(axes.flat, PROXIES):
        panel(axis, proxy)
    axes.flat[0].legend(title="size = k", fontsize=8)
    return drawn | {"proxies.png": as_png(figure)}


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, **GRID)
    exp_a = read_verdict(command.verdict)
    if (done := run(command, Experiment("expb"))) is None:
        return
    out, settings = done
    verdict, audited, pairs = analyse(out, settings, exp_a)
    if "saes" in settings:
        print(
            "\n".join(
                [
                    audit.headline(audited),
                    *audit.warnings(audited),
                    "",
                    *audit.pair_sentences(pairs),
                    *audit.pair_lines(pairs),
                ]
            )
        )
    else:
        print(leaderboard_table(read_table(out / "leaderboard.csv"), "ce_rec", "pooled"))
    print(f"---\n{sentence(verdict)}\nreport: {out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
