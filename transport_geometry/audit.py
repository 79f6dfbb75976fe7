"""The audit: for SAEs that others trained, what R^2 says of every pair; one row each, with every library's
R^2 under its name; the flag.

    import torch
    from transport_geometry.audit import audit
    from transport_geometry.models import load_model
    from transport_geometry.text import heldout_rows
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))  # or a transformers model of yours
    held = heldout_rows("stdlib", tokenizer, 64, 16)  # or token ids [S,T] of yours
    print(audit(model, 3, "my/sae", held.input_ids, held.document))

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model; C
SAEs, W weightings of the documents, of which 0 is all of them and 3.. are resamples (`results.measured`).
"""

import itertools
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from transport_geometry import formats
from transport_geometry.answer import WIDTH, Answer
from transport_geometry.errors import UserError
from transport_geometry.evaluate import Reconstruction, evaluate
from transport_geometry.flag import FLAG_COLUMNS, FLAG_TEXT, FLAGS, FLATTERS, NO_WIDTH, UNDERRATES, flagged
from transport_geometry.formats import hub_name
from transport_geometry.libraries import LIBRARIES
from transport_geometry.lm import Hook, fused_attention_errs, text_config
from transport_geometry.metrics import Sums, computed
from transport_geometry.models import pick_layer
from transport_geometry.results import behind
from transport_geometry.sae import SAE
from transport_geometry.stats import document_weights, isotonic_predict, percentiles
from transport_geometry.tables import bounds, estimate, grouped, is_undefined, markdown, readable_count

import numpy as np
import torch

N_RESAMPLES = 2000
COLUMNS = [
    *"sae model layer format trained_on basis fvu_as_said fvu_otherwise ctx bos d_sae k l0 alive".split(),
    *(f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink")),
    *"nmse_tok cosine ce_orig ce_recon dce ce_rec ce_rec_sinkclean frac_zero frac_mean kl".split(),
    *"swd_tok swd_seq swd_sampled rho fed fed_nosink fed_nosink_lo fed_nosink_hi flag".split(),
    *"fed_iso_nosink fed_excess fed_excess_lo fed_excess_hi".split(),
    *"kl_swd_ratio kl_swd_ratio_lo kl_swd_ratio_hi ce_rec_lo ce_rec_hi".split(),
    *"ce_rec_residual ce_rec_residual_lo ce_rec_residual_hi r2_lo r2_hi refused".split(),
]
HOOK_AND_TOKENS = "model layer ctx bos".split()
# SAEs are compared within one; k of an SAE that has none: its L0, to the nearest power of two
GROUP = "model layer k ctx bos".split()
PAIRS = [
    *GROUP,
    *"sae_a sae_b r2_a r2_b delta_r2 delta_r2_lo delta_r2_hi".split(),
    *"ce_rec_a ce_rec_b delta_ce_rec delta_ce_rec_lo delta_ce_rec_hi l0_a l0_b kind".split(),
]
# from where R^2 misleads most to where it says what CE_rec says
KINDS = ("inverts", "claims", "misses", "neither", "orders", "undefined")
RESOLUTION = 1e-5  # a difference of R^2 or CE_rec that float32 cannot tell from none: one SAE in two formats
CURVE_OF = 3  # other SAEs, at least, that a curve of CE_rec on R^2 is drawn through
NAMED = 10  # pairs, at most, that the report names


# ---------------------------------------------------------------------------------------------- one row each
def audit_rows(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[dict]:
    """Of audit.csv, sorted by model, layer and name. saes: rows as `flag.flagged` gives them; values {metric:
    [W,C]}.
    """
    ends = {name: percentiles(values[name][3:]) for name in ("fed_nosink", "ce_rec", "r2")}
    residual, residual_lo, residual_hi = residuals(saes, values, settings).T
    rows = []
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        rows.append(
            row
            | {name: declared[name] for name in ("format", "basis", "ctx", "bos", "unseen")}
            | {f"{name}_{end}": at[i] for name, two in ends.items() for end, at in zip(("lo", "hi"), two)}
            | {
                "trained_on": hub_name(declared["model"]) if declared["model"] else "not said",
                "k": row["k"] or "none",
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
        dict.fromkeys(COLUMNS, math.nan) | {"sae": sae, "flag": "refused", "refused": why}
        for sae, why in sorted(refused.items())
    ]


# ----------------------------------------------------------------------------------------------------- pairs
def group_of(row: dict, settings: dict) -> tuple:
    """The values of GROUP: SAEs of one group take as much of the same activations at the same tokens."""
    declared = settings["saes"][row["sae"]]
    k = row["k"] or 2 ** round(math.log2(max(row["l0"], 1)))
    return row["model"], row["layer"], k, declared["ctx"], declared["bos"]


def comparable(saes: list[dict], settings: dict, given_k: bool = True) -> dict[tuple, list[int]]:
    """{group: indices of its SAEs}, sorted. given_k False: of any k, under (model, layer, ctx, bos)."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(saes):
        model, layer, k, ctx, bos = group_of(row, settings)
        groups.setdefault((model, layer, k, ctx, bos) if given_k else (model, layer, ctx, bos), []).append(i)
    return dict(sorted(groups.items()))


def kind(r2: tuple[float, float], ce_rec: tuple[float, float]) -> str:
    """What R^2 says of a pair, as CE_rec sees it: one of KINDS, from the 95% intervals (lo, hi) of both
    differences.

    `orders`: both differ, the same way; `inverts`: both differ, R^2 the other way; `claims`: R^2 differs and
    CE_rec is not shown to; `misses`: CE_rec differs and R^2 is not shown to. An interval without width (one
    sequence) shows nothing: `undefined`.
    """
    if not np.isfinite([r2, ce_rec]).all():
        return "undefined"
    if any(hi - lo < NO_WIDTH and max(-lo, hi) > RESOLUTION for lo, hi in (r2, ce_rec)):
        return "undefined"
    by_r2, by_ce = (int(lo > RESOLUTION) - int(hi < -RESOLUTION) for lo, hi in (r2, ce_rec))
    if by_r2 and by_ce:
        return "orders" if by_r2 == by_ce else "inverts"
    if by_r2:
        return "claims"
    return "misses" if by_ce else "neither"


def pairs(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[dict]:
    """Of pairs.csv: every pair of a group, `sae_a` the one with the higher R^2, differences a minus b, sorted
    by how far R^2 misleads: see `misled`.

    saes: rows of conditions.csv; values {metric: [W,C]}. Both SAEs of a pair stand under the same resamples.
    """
    found = []
    for group, members in comparable(saes, settings).items():
        for i, j in itertools.combinations(members, 2):
            a, b = sorted((i, j), key=lambda at: (-values["r2"][0, at], saes[at]["sae"]))
            row = dict(zip(GROUP, group))
            for end, at in (("a", a), ("b", b)):
                row |= {f"sae_{end}": saes[at]["sae"], f"l0_{end}": saes[at]["l0"]}
                row |= {f"{metric}_{end}": values[metric][0, at] for metric in ("r2", "ce_rec")}
            intervals = []
            for metric in ("r2", "ce_rec"):
                delta = values[metric][:, a] - values[metric][:, b]
                lo, hi = percentiles(delta[3:])
                row |= {f"delta_{metric}": delta[0], f"delta_{metric}_lo": lo, f"delta_{metric}_hi": hi}
                intervals.append((lo, hi))
            found.append(row | {"kind": kind(*intervals)})
    return sorted(found, key=misled)


def misled(row: dict) -> tuple:
    """By which rows of pairs.csv are sorted: inverted ones first, by the CE_rec that choosing after R^2 loses
    at least (the interval's near end); then those that R^2 tells apart and CE_rec does not, by the least
    difference of R^2.
    """
    least = {"inverts": -row["delta_ce_rec_hi"], "claims": row["delta_r2_lo"]}.get(row["kind"], 0.0)
    return KINDS.index(row["kind"]), -least, *(row[column] for column in (*GROUP, "sae_a", "sae_b"))


def residuals(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """[C,3]: CE_rec less what R^2 lets expect, and the ends of its 95% interval: the increasing curve through
    the *other* SAEs of the same hook and tokens, whatever their k, at its R^2.

    nan with fewer than CURVE_OF others on the same tokens, and at an R^2 beyond all of theirs: a curve held
    flat there would call the best SAE of every hook better than its R^2. The interval is over documents; the
    other SAEs are as they are.
    """
    out = np.full((len(saes), 3), np.nan)
    for members in comparable(saes, settings, given_k=False).values():
        # many SAEs: fewer resamples, each fit takes C steps
        used = np.r_[0, 3 : min(len(values["r2"]), 3 + max(200, 20_000 // len(members)))]
        r2, ce_rec = values["r2"][used], values["ce_rec"][used]
        for i in members:
            others = [j for j in members if j != i]
            if len(others) < CURVE_OF or not r2[0, others].min() <= r2[0, i] <= r2[0, others].max():
                continue
            x, y = r2[:, others], ce_rec[:, others]
            residual = ce_rec[:, i] - isotonic_predict(x, y, np.ones(x.shape), r2[:, [i]])[:, 0]
            out[i] = residual[0], *percentiles(residual[1:])
    return out


# ------------------------------------------------------------------------------------------- the three lines
SAYS = {"inverts": "inverts", "claims": "alone tells apart"}  # the pairs to look at
ASKED = "Can the R² of {saes} be trusted to say whose patch does less harm ({hooks}; {behind})?"
OF_PAIRS = "Of {pairs} at one hook and k R² inverts {inverts} and tells {claims} apart that CE_rec does not"
WORST = "; furthest: {a} over {b}, R² {r2}, CE_rec {ce_rec}"
NO_PAIRS = "No two of them share hook, k, context and BOS, so that no order is judged"
ONE_SAE = "R² {r2:.3f} [{r2_lo:.3f}, {r2_hi:.3f}], CE_rec {ce_rec:.3f} [{ce_rec_lo:.3f}, {ce_rec_hi:.3f}]"
NOT_THIS = (
    "It is about these SAEs on this text, not about ways to train (another seed is another SAE), other texts "
    "or what features mean{by_chance}."
)
BY_CHANCE = "; each interval is for its pair alone, and up to {n:.2g} inversions would come by chance"


def count_of(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def hooks_of(rows: list[dict]) -> str:
    """In words, a few of them."""
    hooks = list(dict.fromkeys(f"{row['model']} L{row['layer']}" for row in rows))
    return ", ".join(hooks[:2]) + (f" and {len(hooks) - 2} more hooks" if len(hooks) > 2 else "")


def answer(rows: list[dict], found: list[dict], settings: dict) -> Answer:
    """rows: `audit_rows`; found: `pairs`."""
    short = short_names([row["sae"] for row in rows], 40)
    asked = ASKED.format(
        saes="this SAE" if len(rows) == 1 else f"these {len(rows)} SAEs",
        hooks=hooks_of(rows),
        behind=behind(settings).partition(",")[0],
    )
    if len(rows) == 1:
        out = ONE_SAE.format(**rows[0])
        out += f": {rows[0]['flag']}"
    else:
        out = NO_PAIRS
        if found:
            out = OF_PAIRS.format(pairs=count_of(len(found), "pair"), **counted(found))
            if (worst := found[0])["kind"] in SAYS:
                out += WORST.format(
                    a=short[worst["sae_a"]],
                    b=short[worst["sae_b"]],
                    r2=estimate(worst, "delta_r2", 3),
                    ce_rec=estimate(worst, "delta_ce_rec", 3),
                )
        flatters, underrates = (sum(row["flag"] == says for row in rows) for says in (FLATTERS, UNDERRATES))
        out += f". By the flag R² flatters {flatters} of {len(rows)} and underrates {underrates}"
    refused = len(settings.get("refused", {}))
    out += f". {count_of(refused, 'other')} refused." if refused else "."
    by_chance = BY_CHANCE.format(n=0.025 * len(found)) if found else ""
    return Answer(asked, out, NOT_THIS.format(by_chance=by_chance))


# ------------------------------------------------------------------------------------------ what is printed
SHORT_FLAG = dict(zip(FLAGS, ("flatters", "underrates", "no difference", "withheld", "undefined")))
LINE = "{name:<{width}}  {k:>5}  {r2:>7}  {ce_rec:<23}  {flag}"
# what a line leaves to the name
NAME_LETTERS = WIDTH - len(LINE.format(name="", width=0, k="", r2="", ce_rec="", flag="no difference"))


def short_names(names: Sequence[str], most: int) -> dict[str, str]:
    """{name: the same without what all share of the path, first or last, and its end where it is still longer
    than `most`}: as many different ones as names.

    >>> short_names(["org/run/layers.3/a", "org/run/layers.3/b"], 20)
    {'org/run/layers.3/a': 'a', 'org/run/layers.3/b': 'b'}
    >>> list(short_names(["org/a/layers.3", "org/b/layers.3"], 20).values())
    ['a', 'b']
    >>> list(short_names(["topk-of-width-32768", "gated-of-width-32768"], 12).values())
    ['…width-32768', '…th-32768 #2']
    """
    paths = [name.split("/") for name in names]
    first = len(os.path.commonprefix([path[:-1] for path in paths]))
    last = len(os.path.commonprefix([path[:first:-1] for path in paths])) if len(set(names)) > 1 else 0
    out: dict[str, str] = {}
    for name, path in zip(names, paths):
        rest, ending = "/".join(path[first : len(path) - last]), ""
        for number in itertools.count(2):
            room = most - len(ending)
            short = (rest if len(rest) <= room else "…" + rest[1 - room :]) + ending
            if short not in out.values():
                break
            ending = f" #{number}"
        out[name] = short
    return out


def number(value: float | None) -> str:
    return "undefined" if value is None or is_undefined(value) else f"{value:.3f}"


def sae_lines(groups: dict[str, list[dict]], names: dict[str, str]) -> list[str]:
    """A line for each SAE, at most WIDTH wide, under a line for each group; in a group in the order of R².

    groups {what its SAEs share: rows with sae, k, r2, ce_rec, ce_rec_lo, ce_rec_hi, flag}; names {sae: as it
    is printed}.
    """
    width = max(map(len, (*names.values(), "SAE")))
    head = LINE.format(name="SAE", width=width, k="k", r2="R²", ce_rec="CE_rec [95%]", flag="R² here")
    lines = [head]
    for title, rows in groups.items():
        lines += textwrap.wrap(title, WIDTH)
        for row in sorted(rows, key=lambda row: (-row["r2"], row["sae"])):
            lo, hi = number(row["ce_rec_lo"]), number(row["ce_rec_hi"])
            ce_rec = f"{number(row['ce_rec'])} [{lo if lo == 'undefined' else f'{lo}, {hi}'}]"
            k = row["k"] if row["k"] not in (0, "none") else f"~{row['l0']:.0f}"
            flag = SHORT_FLAG[row["flag"]]
            name = names[row["sae"]]
            line = LINE.format(name=name, width=width, k=k, r2=number(row["r2"]), ce_rec=ce_rec, flag=flag)
            lines.append(line.rstrip())
    return lines


def title_of(group: tuple) -> str:
    model, layer, k, ctx, bos = group
    return f"- {model} block {layer}, k = {k}, {ctx} tokens{' after a BOS' if bos else ''}"


def in_groups(rows: list[dict], found: list[dict], settings: dict) -> dict[str, list[dict]]:
    """{what they share: rows of audit.csv}, the group first in which R^2 misleads furthest."""
    as_measured = [row | {"k": 0 if row["k"] == "none" else row["k"]} for row in rows]
    groups = comparable(as_measured, settings)
    worst = list(dict.fromkeys(tuple(row[column] for column in GROUP) for row in found))
    order = sorted(groups, key=lambda group: (worst.index(group) if group in worst else len(worst), group))
    return {title_of(group): [rows[i] for i in groups[group]] for group in order}


def console(rows: list[dict], found: list[dict], settings: dict) -> str:
    """What a person sees below the answer, WIDTH wide: one line per SAE, what is odd, the worst pairs, and
    what was refused.
    """
    names = short_names([row["sae"] for row in rows], NAME_LETTERS)
    lines = sae_lines(in_groups(rows, found, settings), names)
    if named := [row for row in found if row["kind"] in SAYS][:NAMED]:
        lines += ["", "Where R² misleads, furthest first (higher R² minus lower, 95% intervals):"]
        for row in named:
            r2, ce_rec = (estimate(row, f"delta_{metric}", 3) for metric in ("r2", "ce_rec"))
            lines.append(f"R² {SAYS[row['kind']]} {names[row['sae_a']]} over {names[row['sae_b']]}")
            lines.append(f"  R² {r2}, CE_rec {ce_rec}")
    odd = warnings([row | {"sae": names[row["sae"]]} for row in rows])
    said = [*odd, *(f"refused: {sae}: {why}" for sae, why in refusals(settings))]
    lines += [""] * bool(said)
    for line in said:
        lines += hanging(line)
    return "\n".join(lines)


def hanging(text: str) -> list[str]:
    """Its lines, WIDTH wide, whole words."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def refusals(settings: dict) -> list[tuple[str, str]]:
    """(SAE, why it is refused)."""
    return sorted(settings.get("refused", {}).items())


def trial_lines(saes: list[dict], values: dict[str, np.ndarray]) -> str:
    """The SAEs of a run that is too small for a leaderboard, as `console` shows those of an audit. saes: rows
    as `flag.flagged` gives them; values {metric: [W,C]}.
    """
    lo, hi = percentiles(values["ce_rec"][3:])
    rows = [row | {"ce_rec_lo": lo[i], "ce_rec_hi": hi[i]} for i, row in enumerate(saes)]
    for row in rows:
        row["sae"] = f"{row['sae']} {row['recipe']} {readable_count(row['tokens'])} s{row['seed']}"
    groups = {
        f"- {model} block {layer}, k = {k}": here
        for (model, layer, k), here in grouped(rows, ["model", "layer", "k"]).items()
    }
    names = sorted({row["sae"] for row in rows})
    return "\n".join(sae_lines(groups, short_names(names, NAME_LETTERS)))


# -------------------------------------------------------------------------------------- what is said of pairs
NOTHING_TO_COMPARE = (
    "No two of these SAEs can be compared (same model, layer, k and tokens): nothing is said about what R² "
    "orders."
)
ALL_PAIRS = "Of the {pairs} that can be compared (same model, layer, k and tokens), {told}"
TOLD = (
    "R² orders {orders} as CE_rec does, inverts {inverts}, and in {claims} claims a difference that CE_rec "
    "does not show"
)
TOLD_MORE = {  # where there are such
    "misses": "in {misses} CE_rec shows one that R² does not",
    "neither": "in {neither} neither does",
    "undefined": "{undefined} have no interval",
}
ONE_PAIR = "- R² {says} {sae_a} over {sae_b} ({where}): R² {r2}, CE_rec {ce_rec}"
ABOUT_DIFFERENCES = (
    "Differences: the SAE of higher R² minus the other; 95% intervals, both SAEs under the same resamples "
    "of {behind}. Every interval is for its pair alone: among {n} pairs that did not differ at all, "
    "{by_chance:.4g} would be expected to be shown to differ by chance, in R² and again in CE_rec. Furthest "
    "first: of the inverted by the CE_rec that choosing after R² loses at least, of the others by the least "
    "difference of R². All pairs: pairs.csv."
)


def counted(found: list[dict]) -> dict[str, int]:
    """{kind: pairs}."""
    return {name: sum(row["kind"] == name for row in found) for name in KINDS}


def pair_sentence(found: list[dict]) -> str:
    """What R^2 says about the choice between two SAEs. found: `pairs`."""
    if not found:
        return NOTHING_TO_COMPARE
    n = counted(found)
    more = ", ".join(text.format(**n) for name, text in TOLD_MORE.items() if n[name])
    told = TOLD.format(**n) + (f"; {more}." if more else ".")
    return ALL_PAIRS.format(pairs=count_of(len(found), "pair"), told=told)


def pair_lines(found: list[dict]) -> list[str]:
    """The pairs to look at in Markdown, inverted ones first, the furthest first."""
    worth = [row for row in found if row["kind"] in SAYS]
    lines = []
    for row in worth[:NAMED]:
        r2, ce_rec = (estimate(row, f"delta_{metric}", 3) for metric in ("r2", "ce_rec"))
        where = title_of(tuple(row[column] for column in GROUP)).removeprefix("- ")
        lines.append(ONE_PAIR.format(**row, says=SAYS[row["kind"]], where=where, r2=r2, ce_rec=ce_rec))
    return lines + ([f"- and {len(worth) - NAMED} more in pairs.csv"] if len(worth) > NAMED else [])


def pair_report(found: list[dict], settings: dict) -> list[str]:
    """In Markdown."""
    text = [pair_sentence(found), ""]
    if not found:
        return text
    if lines := pair_lines(found):
        text += [*lines, ""]
    groups = grouped(found, GROUP)
    if len(groups) > 1:
        table = [
            dict(zip(GROUP, group)) | {"pairs": len(rows)} | counted(rows) for group, rows in groups.items()
        ]
        text += [markdown(table, [*GROUP, "pairs", *KINDS]), ""]
    n = len(found)
    return [*text, ABOUT_DIFFERENCES.format(behind=behind(settings), n=n, by_chance=0.05 * n), ""]


# ------------------------------------------------------------------------------------------------ the report
HEADLINE = [
    *"sae layer k l0 r2".split(),
    "R² interval",
    *"r2_nosink cosine ce_rec".split(),
    "ce_rec interval",
    *"residual frac_zero frac_mean swd_tok".split(),
    *FLAG_COLUMNS,
]
OTHER_MODEL = "{sae}: its files say {trained_on}; measured on {model}"
NEGATIVE = "{sae}: worse than predicting the mean (R² {r2:.2f}); the wrong model, layer or normalisation?"
UNSEEN = (
    "{sae}: never saw some positions ({positions}) and is patched there too; ce_rec_sinkclean and *_nosink "
    "leave sinks out"
)
RESIDUAL = (
    "residual: CE_rec minus what the increasing curve of CE_rec on R², through the other SAEs on the same "
    "tokens, says at this SAE's R²; `undefined` with fewer than {at_least} SAEs, and for the lowest and the "
    "highest R², where there is no curve. frac_zero and frac_mean are ablation-normalised (what other "
    "libraries call loss or CE recovered), ce_rec = 2 - L_recon/L_orig is not. All columns: audit.csv."
)
OTHER_TOKENS = (
    "Not all SAEs were measured on the same tokens: their files ask for contexts of {contexts}. Compare "
    "within one of them."
)
REPORT = """\
# Audit: can their R² be trusted?

{answer}
![R² against CE_rec](audit.png)

## Where R² misleads

{pairs}
{warnings}
## One by one

{one_by_one}
{flag}

{residual}

## One reconstruction, every library's R²

{libraries}

{libraries_nosink}

r2: 1 - SSE/SST over the whole set (SAELens since 6.30).

{definitions}
{contexts}"""


def warnings(rows: list[dict]) -> list[str]:
    """What makes a row's numbers other than they seem."""
    text = []
    for row in rows:
        if row["trained_on"] not in ("not said", row["model"]):
            text.append(OTHER_MODEL.format(**row))
        if row["r2"] < 0:
            text.append(NEGATIVE.format(**row))
        if row["unseen"]:
            text.append(UNSEEN.format(sae=row["sae"], positions=", ".join(row["unseen"])))
    return text


def headline(rows: list[dict]) -> str:
    """One line per SAE, the highest R² first."""
    lines = []
    for row in sorted(rows, key=lambda row: (-row["r2"], row["sae"])):
        intervals = {
            f"{name} interval": bounds(row[f"{column}_lo"], row[f"{column}_hi"], 3)
            for name, column in (("ce_rec", "ce_rec"), ("R²", "r2"))
        }
        lines.append(row | intervals | {"residual": estimate(row, "ce_rec_residual", 3)})
    return markdown(lines, HEADLINE)


def _without_sinks(row: dict) -> dict:
    """Every R² of the row over the other positions, under the names of those over all."""
    return {name: row[f"{name}_nosink"] for name in ("r2", *LIBRARIES)} | {"sae": f"{row['sae']}, no sinks"}


def _contexts(rows: list[dict]) -> str:
    """A paragraph where there are several."""
    contexts = sorted({(row["ctx"], row["bos"]) for row in rows})
    if len(contexts) < 2:
        return ""
    said = [f"{ctx} tokens{' after a BOS' if bos else ''}" for ctx, bos in contexts]
    return f"\n{OTHER_TOKENS.format(contexts=', '.join(said))}\n"


def audit_report(rows: list[dict], found: list[dict], settings: dict) -> list[str]:
    """In Markdown lines: the answer, the picture, the pairs, one line per SAE. found: `pairs`."""
    tables = [
        f"### {title.removeprefix('- ')}\n\n{headline(here)}\n"
        for title, here in in_groups(rows, found, settings).items()
    ]
    if refused := refusals(settings):
        tables.append("### Refused\n\n" + markdown([{"sae": sae, "why": why} for sae, why in refused]) + "\n")
    by_r2 = sorted(rows, key=lambda row: (-row["r2"], row["sae"]))
    text = REPORT.format(
        answer=answer(rows, found, settings).markdown(),
        pairs="\n".join(pair_report(found, settings)),
        warnings="".join(f"- **{line}**\n" for line in warnings(rows)),
        one_by_one="\n".join(tables),
        flag=FLAG_TEXT,
        residual=RESIDUAL.format(at_least=CURVE_OF + 1),
        libraries=markdown(by_r2, ["sae", "r2", *LIBRARIES]),
        libraries_nosink=markdown([_without_sinks(row) for row in by_r2], ["sae", "r2", *LIBRARIES]),
        definitions="\n".join(f"{name}: {meaning}." for name, meaning in LIBRARIES.items()),
        contexts=_contexts(rows),
    )
    return text.split("\n")


# ------------------------------------------------------------------------------------------------ from Python
RETURNED = "r2 r2_nosink cosine ce_orig ce_recon dce ce_rec kl swd_tok swd_sampled l0 fed_excess".split()


def audit(
    model: Any,
    layer: int,
    sae: str | os.PathLike | SAE | Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    document: Sequence[int] | np.ndarray | None = None,
    basis: str | None = None,
) -> dict[str, Any]:
    """R^2, CE_rec, dCE (nats a token), KL, the flag, ... of one SAE at the output of block `layer`, on these
    tokens and a model that is loaded: {metric: value, metric_lo, metric_hi: its 95% interval over documents},
    and flag, n_tok, documents.

    The numbers that `audit.py` writes for the same tokens. model: a causal language model of transformers, in
    eval mode. sae: a path or hub id of one SAE, whose basis is checked as its files say (`basis`, `raw` or
    `centred`, goes on regardless), an SAE of this package, or any function h [N,d] -> h_hat [N,d] (SAELens'
    SAEs are such). tokens [S,T], int64: as they are, a BOS only where they hold one. document [S], 0..D-1: of
    which document each row is, each its own by default; of one document there is no interval. Raises
    UserError, Fault.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.dtype != torch.int64:
        raise UserError(
            f"tokens are {list(tokens.shape)} {tokens.dtype}: [S,T] of int64, please, T at least 2"
        )
    if model.training:
        raise UserError("the model is in training mode: model.eval()")
    of = np.arange(len(tokens)) if document is None else np.unique(document, return_inverse=True)[1]
    if len(of) != len(tokens):
        raise UserError(f"document has {len(of)} entries, and tokens {len(tokens)} rows")
    hook = Hook(model, pick_layer(model, type(model).__name__, layer))
    if fused_attention_errs(model, hook.device):
        raise UserError(
            "in 16 bits torch's fused attention sees later positions on MPS: model.set_attn_implementation"
            "('eager')"
        )
    tokens = tokens.to(hook.device)
    name, batch = "SAE", max(1, 2048 // tokens.shape[1])
    result = evaluate(hook, tokens, {name: _reconstruction(sae, hook, tokens, basis)}, batch, document=of)[
        name
    ]
    weights = document_weights(int(of.max()) + 1, N_RESAMPLES, seed=0)[:, of]
    values = computed(
        Sums({q: v[None] for q, v in result.sums.items()}, weights, text_config(model).hidden_size)
    )
    row = {metric: float(value[0, 0]) for metric, value in values.items()}
    (row,) = flagged([row], values)
    out: dict[str, Any] = {}
    for metric in RETURNED:
        lo, hi = (float(end[0]) for end in percentiles(values[metric][3:]))
        out |= {metric: row[metric], f"{metric}_lo": lo, f"{metric}_hi": hi}
    n_tok = tokens.shape[0] * (tokens.shape[1] - 1)
    return out | {"flag": row["flag"], "n_tok": n_tok, "documents": int(of.max()) + 1}


def _reconstruction(sae: Any, hook: Hook, tokens: torch.Tensor, basis: str | None) -> Reconstruction:
    """What `evaluate` takes. Raises UserError."""
    if isinstance(sae, (str, os.PathLike)):
        files = formats.find(str(sae))
        if len(files) > 1:
            raise UserError(f"{sae}: {len(files)} SAEs, of which one is to be named: {files[0].label}, ...")
        read = formats.read(files[0]).to(hook.device)
        near = formats.near(hook, tokens[:4])
        if read.W_enc.shape[1] != near[hook.layer].shape[1]:
            raise UserError(f"{sae}: reads {read.W_enc.shape[1]} dimensions, of {near[hook.layer].shape[1]}")
        said = basis or formats.describe(files[0]).basis
        if not basis:
            formats.check_basis(read, said, files[0].label, hook.layer, near)
        read.centred = said == "centred"
        return formats.fused(read)
    if basis:
        raise UserError("basis is about an SAE's files")
    if isinstance(sae, SAE):
        return sae.to(hook.device)
    return lambda h, mean: sae(h)
