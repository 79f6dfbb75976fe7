"""The audit: which of the SAEs that you have should you use, and what is its R^2 worth?

    python audit.py --models EleutherAI/pythia-70m@3 --sae EleutherAI/sae-pythia-70m-32k
    python audit.py --models EleutherAI/pythia-70m@3 --sae 'my/saes/layers.3*,canrager/lm_sae/PATTERN'
    python audit.py --from outputs/audit             # tables and plots again, without a model

Question: which SAE does least harm when its reconstruction is patched in, and does R^2 say so? Grid: the SAEs
of --sae, on the same held-out tokens. Each SAE gets a word from what was measured of it (see
`reporting/sae_words.py`): whether a sink owns its R^2 or its harm, and how much its error costs beside a
random one as long. Each pair of SAEs of one model, k, context and BOS, at one hook or at two, is ordered,
inverted (R^2 and CE_rec both differ, in opposite directions) or not told apart, by paired 95% intervals over
documents. An SAE that cannot be read, or does not read what its files say, is refused with the reason, and
the others go on.
"""

import math
import pathlib
import typing
from typing import Any

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.formats.hook_names import hub_name
from transport_geometry.measuring.metrics import PROXIES
from transport_geometry.measuring.r2_by_library import LIBRARIES
from transport_geometry.records.results import about_the_run, label_last_block, load_measurements
from transport_geometry.records.tables import as_csv, grouped, markdown
from transport_geometry.reporting.audit_report import (
    answer,
    audit_report,
    console,
    count_of,
    short_names,
    title_of,
    words_counted,
)
from transport_geometry.reporting.figures import BLUE, GREEN, ORANGE, PURPLE, pyplot
from transport_geometry.reporting.leaderboard_report import how_to_read, leaderboard_table
from transport_geometry.reporting.sae_words import COLUMNS as WORD_COLUMNS
from transport_geometry.reporting.sae_words import WORDS, with_words
from transport_geometry.reporting.where_it_hurts import of_folder
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.run import Experiment
from transport_geometry.statistics.leaderboard import LEADERBOARD, Contest, ranked
from transport_geometry.statistics.resampling import MIN_HOOKS_OF_A_MODEL
from transport_geometry.statistics.sae_pairs import (
    HOOK_AND_TOKENS,
    PAIRS,
    counted,
    dominated,
    pairs,
    residuals,
)

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the evaluation; what is trained elsewhere is --sae's
GRID = dict(models="", k="1", tokens="1", expansion=1, eval_seqs=32, ctx=256)
OUT = pathlib.Path("outputs/audit")
N_RESAMPLES = 2000
COLUMNS = [
    *"sae model layer format trained_on basis fvu_as_said fvu_otherwise ctx bos d_sae".split(),
    *"k l0 alive dense".split(),
    *"word also says read dominated_by ce_rec ce_rec_lo ce_rec_hi r2 r2_lo r2_hi".split(),
    *"sink_share n_sink n_tok calm_share".split(),
    *WORD_COLUMNS,
    *(f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink") if name + end != "r2"),
    *"nmse_tok cosine ce_orig ce_recon ce_zero dce ce_rec_sinkclean frac_zero frac_mean kl".split(),
    *"swd_tok swd_seq swd_sampled rho fed fed_nosink fed_iso_nosink fed_excess".split(),
    *"ce_rec_residual ce_rec_residual_lo ce_rec_residual_hi refused".split(),
]


# ---------------------------------------------------------------------------------------------- one row each
def audit_rows(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[dict]:
    """Of audit.csv, sorted by model, layer and name. saes: rows as `with_words` gives them; values {metric:
    [W,C]}.
    """
    residual, residual_lo, residual_hi = residuals(saes, values, settings).T
    better = dominated(saes, values, settings)
    rows = []
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        rows.append(
            row
            | {name: declared[name] for name in ("format", "basis", "ctx", "bos", "unseen")}
            | {name: declared.get(name, []) for name in ("ignored", "differs")}
            | {
                "trained_on": hub_name(declared["model"]) if declared["model"] else "not said",
                "k": row["k"] or "none",
                "dominated_by": better[i],
                "ce_rec_residual": residual[i],
                "ce_rec_residual_lo": residual_lo[i],
                "ce_rec_residual_hi": residual_hi[i],
                "refused": "",
            }
        )
    return rows


def refused_rows(settings: dict) -> list[dict]:
    """Of audit.csv, behind the others: the SAEs that could not be measured, and why not."""
    refused = settings.get("refused", {})
    return [
        dict.fromkeys(COLUMNS, math.nan) | {"sae": sae, "word": "refused", "refused": why}
        for sae, why in sorted(refused.items())
    ]


# ------------------------------------------------------------------------------------- tables and answer
def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """Everything after one row per SAE: a pure function of conditions.csv and sequences.npz."""
    found = load_measurements(out, settings, N_RESAMPLES)
    saes = with_words(found.saes, found.values, min(settings["documents"]))
    rows = audit_rows(saes, found.values, settings)
    two = pairs(saes, found.values, settings)
    scores = {proxy.name: proxy.score(found.values[proxy.name]) for proxy in PROXIES}
    board, swd = ranked(scores, found, settings, N_RESAMPLES)
    where, pictures = of_folder(out)
    report = [audit_report(rows, two, settings), *of_proxies(board, swd, settings), where, ""]
    report += ["## Null rows", "", markdown(label_last_block(found.nulls, settings), OF_A_NULL), ""]
    return Findings(
        answer=answer(rows, two, settings),
        verdict={
            "leaf": leaf(rows, two),
            "pairs": counted(two),
            "words": words_counted(rows),
            "refused": settings.get("refused", {}),
        },
        short_verdict=leaf(rows, two),
        report="\n".join([*report, *about_the_run(saes, settings)]),
        figures={"audit.png": picture(rows, two), **pictures},
        table=lambda colour: console(rows, two, settings),
        tables={
            "audit.csv": as_csv([*rows, *refused_rows(settings)], COLUMNS),
            "pairs.csv": as_csv(two, PAIRS),
            "leaderboard.csv": as_csv(board, LEADERBOARD),
        },
    )


def leaf(rows: list[dict], two: list[dict]) -> str:
    """The answer in a word: of one SAE its own, of several from the pairs."""
    n = counted(two)
    if len(rows) == 1:
        return rows[0]["word"]
    if n["inverts"]:
        return "R² inverts"
    return "no pair can be judged" if len(two) == n["undefined"] else "no inversion shown"


OF_A_NULL = "model layer sae r2 cosine swd_tok dce ce_rec kl rho fed_nosink fed_iso_nosink fed_excess".split()
FEW_HOOKS = "{hooks}, and {needed} are needed to compare proxies: leaderboard.csv has what there is."


def of_proxies(board: list[dict], swd: Contest, settings: dict) -> list[str]:
    """The leaderboard over these SAEs, in Markdown lines: which proxy would have told?"""
    text = ["## Which proxy would have told?", ""]
    if swd.n_clusters < MIN_HOOKS_OF_A_MODEL:
        return [
            *text,
            FEW_HOOKS.format(hooks=count_of(swd.n_clusters, "hook"), needed=MIN_HOOKS_OF_A_MODEL),
            "",
        ]
    return [*text, leaderboard_table(board, "ce_rec"), "", how_to_read(swd, settings), ""]


# -------------------------------------------------------------------------------------------- the plot
# of WORDS, in their order; the markers say the same without colour
LOOKS = (
    ("#000000", "X"),
    ("#000000", "v"),
    (ORANGE, "v"),
    (ORANGE, "D"),
    (BLUE, "^"),
    (GREEN, "o"),
    ("#777777", "s"),
)
MARKS = dict(zip(WORDS, LOOKS, strict=True))
INVERTED = PURPLE
NAME_HEIGHT = 0.16  # inches, of a name
NAME_LETTERS = 34


def picture(rows: list[dict], two: list[dict]) -> "Figure":
    """R² against CE_rec, a panel for each hook, context and BOS: every SAE named at the right, coloured by
    its word, with both intervals; a line joins the two of a pair that R² inverts.
    """
    plt = pyplot()
    panels = grouped(rows, HOOK_AND_TOKENS)
    heights = [max(3.2, NAME_HEIGHT * (len(here) + 1)) for here in panels.values()]
    top, between, width = 1.0, 0.8, 9.5
    tall = top + sum(heights) + between * len(heights) - 0.25
    figure, edge = plt.figure(figsize=(width, tall)), tall - top
    names = short_names([row["sae"] for row in rows], NAME_LETTERS)
    inverted = [row for row in two if row["kind"] == "inverts"]
    for (group, here), height in zip(panels.items(), heights):
        axis = figure.add_axes((0.08, (edge - height) / tall, 0.5, height / tall))
        panel(axis, here, inverted, names, height)
        axis.set_title(title_of(group), fontsize=9, loc="left")
        edge -= height + between
    figure.text(0.02, 1 - 0.25 / tall, title(two), fontsize=11, weight="bold", va="center")
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=says)
        for says, (colour, marker) in MARKS.items()
        if any(row["word"] == says for row in rows)
    ]
    if inverted:
        handles.append(plt.Line2D([], [], color=INVERTED, linewidth=1.5, label="a pair that R² inverts"))
    at = (0.01, 1 - 0.56 / tall)
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=at, ncols=3, fontsize=8, frameon=False)
    return figure


def title(two: list[dict]) -> str:
    if not two:
        return "No two SAEs share model, k and tokens"
    n = counted(two)
    return f"R² inverts {n['inverts']} of {count_of(len(two), 'pair')} of one k"


def panel(axis: "Axes", rows: list[dict], inverted: list[dict], names: dict[str, str], height: float) -> None:
    """One hook. height: of the axes, in inches. SAEs worse than the mean are named and not drawn, where there
    are others: they would press these together.
    """
    drawn = [row for row in rows if row["r2"] >= 0] or rows
    for row in drawn:
        (colour, marker), x, y = MARKS[row["word"]], row["r2"], row["ce_rec"]
        axis.plot([row["r2_lo"], row["r2_hi"]], [y, y], color=colour, linewidth=1, alpha=0.6)
        axis.plot([x, x], [row["ce_rec_lo"], row["ce_rec_hi"]], color=colour, linewidth=1, alpha=0.6)
        axis.plot(x, y, color=colour, marker=marker, markeredgecolor="white", linestyle="", zorder=3)
    for pair in inverted:
        if {pair["sae_a"], pair["sae_b"]} <= {row["sae"] for row in drawn}:
            x, y = ([pair[f"{metric}_{end}"] for end in "ab"] for metric in ("r2", "ce_rec"))
            axis.plot(x, y, color=INVERTED, linewidth=1.5, zorder=2)
    axis.margins(0.06)
    axis.set(xlabel="R²", ylabel="CE_rec")
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    lo, hi = axis.get_ylim()
    axis.set(xlim=axis.get_xlim(), ylim=(lo, hi))
    order = sorted(rows, key=lambda row: (row in drawn, row["ce_rec"], row["r2"], row["sae"]))
    # in the axes' own height, so that names outside of it have a place too
    at = np.array([(row["ce_rec"] - lo) / (hi - lo) if row in drawn else 0.0 for row in order])
    gap = NAME_HEIGHT / height
    for row, y in zip(order, spread(at, gap, gap / 2, 1 - gap / 2)):
        k = row["k"] if row["k"] != "none" else f"~{row['l0']:.0f}"
        name = f"{names[row['sae']]}  (k {k})"
        style: dict[str, Any] = dict(fontsize=7.5, va="center", color=MARKS[row["word"]][0])
        if row in drawn:
            axis.annotate(
                name,
                xy=(row["r2"], row["ce_rec"]),
                xytext=(1.04, y),
                textcoords="axes fraction",
                arrowprops=dict(arrowstyle="-", color="#bbbbbb", linewidth=0.5, shrinkB=3, relpos=(0, 0.5)),
                annotation_clip=False,
                **style,
            )
        else:
            axis.text(1.04, y, f"{name}, not drawn: R² {row['r2']:.2f}", transform=axis.transAxes, **style)


def spread(y: np.ndarray, gap: float, lo: float, hi: float) -> np.ndarray:
    """Ascending y [n], moved as little as need be (least squares) to lie `gap` apart within lo..hi."""
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(y))
    most = max(hi - steps[-1], lo) if len(y) else hi
    return np.clip(isotonic_regression(y - steps).x, lo, most) + steps


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = parse_args(__doc__, GRID)
    if not (command.grid.saes or command.finished):
        raise UserError("--sae PATH_OR_ID,..., please: the SAEs to audit (see --help)")
    run_and_report(command, Experiment("audit", default_out=OUT, where=True), analyse)


if __name__ == "__main__":
    run_script(main)
