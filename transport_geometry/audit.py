"""The audit: for SAEs that others trained, which one to use at each hook and what its R² is worth; what R²
says of every pair; every library's R² under its name.

    import torch
    from transport_geometry.audit import audit
    from transport_geometry.models.loading import load_model
    from transport_geometry.models.text import heldout_rows
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))  # or a transformers model of yours
    held = heldout_rows("stdlib", tokenizer, 64, 16)  # or token ids [S,T] of yours
    print(audit(model, 3, "my/sae", held.input_ids, held.document))

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model; C
SAEs, W weightings of the documents (`stats.ALL`, ...).
"""

import itertools
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats import sae_files
from transport_geometry.formats.file_sae import fused
from transport_geometry.formats.names import hub_name
from transport_geometry.measuring.evaluate import Reconstruction, activations, evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.measuring.r2_by_library import LIBRARIES
from transport_geometry.models.lm import Hook, fused_attention_errs, text_config
from transport_geometry.models.loading import pick_layer
from transport_geometry.records.results import describe_units
from transport_geometry.records.tables import (
    bounds,
    estimate,
    grouped,
    is_undefined,
    markdown,
    percent,
    readable_count,
    span,
)
from transport_geometry.reporting import words
from transport_geometry.reporting.console import WIDTH, Answer, sentence_case
from transport_geometry.reporting.words import ABOUT_WORDS, WORDS, with_words
from transport_geometry.saes import basis_gate
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics.stats import (
    ALL,
    N_FIXED,
    RESAMPLES,
    document_weights,
    isotonic_predict,
    percentiles,
)

import numpy as np
import torch

N_RESAMPLES = 2000
COLUMNS = [
    *"sae model layer format trained_on basis fvu_as_said fvu_otherwise ctx bos d_sae".split(),
    *"k l0 alive dense".split(),
    *"word also says read dominated_by ce_rec ce_rec_lo ce_rec_hi r2 r2_lo r2_hi".split(),
    *"sink_share n_sink n_tok calm_share".split(),
    *words.COLUMNS,
    *(f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink") if name + end != "r2"),
    *"nmse_tok cosine ce_orig ce_recon ce_zero dce ce_rec_sinkclean frac_zero frac_mean kl".split(),
    *"swd_tok swd_seq swd_sampled rho fed fed_nosink fed_iso_nosink fed_excess".split(),
    *"ce_rec_residual ce_rec_residual_lo ce_rec_residual_hi refused".split(),
]
# what SAEs share that are ranked, and that are paired; k of one that has none: its L0, to a power of two
HOOK_AND_TOKENS = "model layer ctx bos".split()
AT_ONE_K = "model k ctx bos".split()
PAIRS = [
    *AT_ONE_K,
    *"layer_a layer_b sae_a sae_b r2_a r2_b delta_r2 delta_r2_lo delta_r2_hi".split(),
    *"ce_rec_a ce_rec_b delta_ce_rec delta_ce_rec_lo delta_ce_rec_hi l0_a l0_b kind".split(),
    "documents_to_tell",
]
# what R² says of a pair, as CE_rec sees it
KINDS = ("inverts", "orders", "claims", "misses", "neither", "undefined")
NO_WIDTH = 1e-6  # an interval as narrow comes of one document
RESOLUTION = 1e-5  # a difference of R² or CE_rec that float32 cannot tell from none: one SAE in two formats
CURVE_OF = 3  # other SAEs, at least, that a curve of CE_rec on R² is drawn through
NAMED = 10  # pairs, at most, that the report names
FEW = 4  # SAEs of which the console says all that is said


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
            | {"ignored": declared.get("ignored", [])}
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


# --------------------------------------------------------------------------------------- what is compared
def comparable(saes: list[dict], settings: dict, names: Sequence[str]) -> dict[tuple, list[int]]:
    """{values of names: indices of the SAEs that share them}, sorted; names: AT_ONE_K or HOOK_AND_TOKENS."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        k = row["k"] or 2 ** round(math.log2(max(row["l0"], 1)))
        shared = row | {"k": k, "ctx": declared["ctx"], "bos": declared["bos"]}
        groups.setdefault(tuple(shared[name] for name in names), []).append(i)
    return dict(sorted(groups.items()))


def dominated(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[str]:
    """Of every SAE, the one of its hook and tokens with no more latents active and the highest CE_rec, where
    that is higher by a 95% interval over documents; else nothing.
    """
    out = [""] * len(saes)
    ce_rec = values["ce_rec"]
    for members in comparable(saes, settings, HOOK_AND_TOKENS).values():
        for i in members:
            others = [j for j in members if j != i and saes[j]["l0"] <= saes[i]["l0"] * (1 + RESOLUTION)]
            for j in sorted(others, key=lambda j: -ce_rec[ALL, j]):
                if percentiles((ce_rec[:, j] - ce_rec[:, i])[RESAMPLES])[0] > RESOLUTION:
                    out[i] = saes[j]["sae"]
                    break
    return out


def kind(r2: tuple[float, float], ce_rec: tuple[float, float]) -> str:
    """What R² says of a pair, as CE_rec sees it: one of KINDS, from the 95% intervals (lo, hi) of both
    differences.

    `orders`: both differ, the same way; `inverts`: both differ, R² the other way; `claims`: R² differs and
    CE_rec is not shown to; `misses`: CE_rec differs and R² is not shown to; `neither`. An interval without
    width (one document) shows nothing: `undefined`.
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
    """Of pairs.csv: every two SAEs of one model, k and tokens, at one hook or at two; `sae_a` the one with
    the higher R², differences a minus b. Inverted ones come first, by the CE_rec that choosing after R² loses
    at least (the interval's near end).

    saes: rows of conditions.csv; values {metric: [W,C]}. Both SAEs of a pair stand under the same resamples.
    """
    found = []
    for group, members in comparable(saes, settings, AT_ONE_K).items():
        for i, j in itertools.combinations(members, 2):
            a, b = sorted((i, j), key=lambda at: (-values["r2"][ALL, at], saes[at]["layer"], saes[at]["sae"]))
            row = dict(zip(AT_ONE_K, group)) | difference(saes, values, a, b)
            found.append(row | {"documents_to_tell": documents_to_tell(row, min(settings["documents"]))})
    columns = [*AT_ONE_K, "layer_a", "layer_b", "sae_a", "sae_b"]

    def furthest(row: dict) -> tuple:
        lost = row["delta_ce_rec_hi"] if row["kind"] == "inverts" else 0.0
        return KINDS.index(row["kind"]), lost, *(row[column] for column in columns)

    return sorted(found, key=furthest)


def difference(saes: list[dict], values: dict[str, np.ndarray], a: int, b: int) -> dict[str, Any]:
    """Of a row of pairs.csv: a minus b, with intervals."""
    row: dict[str, Any] = {}
    for end, at in (("a", a), ("b", b)):
        row |= {f"{name}_{end}": saes[at][name] for name in ("sae", "layer", "l0")}
        row |= {f"{metric}_{end}": values[metric][ALL, at] for metric in ("r2", "ce_rec")}
    intervals = []
    for metric in ("r2", "ce_rec"):
        delta = values[metric][:, a] - values[metric][:, b]
        lo, hi = percentiles(delta[RESAMPLES])
        row |= {f"delta_{metric}": delta[ALL], f"delta_{metric}_lo": lo, f"delta_{metric}_hi": hi}
        intervals.append((lo, hi))
    return row | {"kind": kind(*intervals)}


def documents_to_tell(row: dict, n_doc: int) -> float:
    """Of how many documents the interval of the difference in CE_rec would leave out 0, if the difference
    stays: it shrinks as their root. nan where nothing is known; never below n_doc, which are there.
    """
    delta, lo, hi = (row[f"delta_ce_rec{end}"] for end in ("", "_lo", "_hi"))
    if not np.isfinite([delta, lo, hi]).all() or delta == 0 or hi - lo < NO_WIDTH:
        return math.nan
    reach = delta - lo if delta > 0 else hi - delta
    return float(np.ceil(n_doc * max(1.0, (reach / delta) ** 2)))


def residuals(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """[C,3]: CE_rec less what R^2 lets expect, and the ends of its 95% interval: the increasing curve through
    the *other* SAEs of the same hook and tokens, whatever their k, at its R^2.

    nan with fewer than CURVE_OF others on the same tokens, and at an R^2 beyond all of theirs: a curve held
    flat there would call the best SAE of every hook better than its R^2. The interval is over documents; the
    other SAEs are as they are.
    """
    out = np.full((len(saes), 3), np.nan)
    for members in comparable(saes, settings, HOOK_AND_TOKENS).values():
        # many SAEs: fewer resamples, each fit takes C steps
        n_resamples = min(len(values["r2"]) - N_FIXED, max(200, 20_000 // len(members)))
        used = np.r_[ALL, N_FIXED : N_FIXED + n_resamples]
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
ASKED = "Which of {saes} does least harm when it is patched in, and does R² say so ({hooks}; {behind})?"
ASKED_OF_ONE = "Can the R² of this SAE be read as it is ({hooks}; {behind})?"
OF_ONE = (
    "{word}: R² {r2:.3f} [{r2_lo:.3f}, {r2_hi:.3f}], CE_rec {ce_rec:.3f} [{ce_rec_lo:.3f}, {ce_rec_hi:.3f}]. "
    "{says} {read}"
)
OF_PAIRS = (
    "Of {pairs} of one k ({at_a_hook} at one hook, {between} between layers) R² inverts {inverts}{open}"
)
WORST = "; furthest: {a} over {b}, R² {r2}, CE_rec {ce_rec}"
NONE_JUDGED = "None of {pairs} of one k can be judged: there is no interval"
NO_PAIRS = "No two of them share model, k, context and BOS, so that no order is judged"
LIMITS = (
    "It is about these SAEs on this text, not about ways to train (another seed is another SAE), other texts "
    "or what features mean{by_chance}."
)
BY_CHANCE = "; each interval is for its pair alone, and up to {n:.2g} inversions would come by chance"


def count_of(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def hooks_of(rows: list[dict]) -> str:
    """In words, a few of them."""
    hooks = list(dict.fromkeys(f"{row['model']} L{row['layer']}" for row in rows))
    return ", ".join(hooks[:2]) + (f" and {count_of(len(hooks) - 2, 'more hook')}" if len(hooks) > 2 else "")


def counted(found: list[dict]) -> dict[str, int]:
    """{kind: pairs}."""
    return {name: sum(row["kind"] == name for row in found) for name in KINDS}


def words_counted(rows: list[dict]) -> dict[str, int]:
    """{word: SAEs}, of the words there are."""
    return {word: n for word in WORDS if (n := sum(row["word"] == word for row in rows))}


def not_told(n: dict[str, int]) -> str:
    """The pairs on which R² and CE_rec do not both speak, in words; nothing where there are none."""
    open_ones, unjudged = n["claims"] + n["misses"] + n["neither"], n["undefined"]
    text = f"; not told apart by one or both: {open_ones}" if open_ones else ""
    return text + (f"; not to be judged: {unjudged}" if unjudged else "")


def name_in_pair(row: dict, end: str, names: dict[str, str]) -> str:
    name = names[row[f"sae_{end}"]]
    return name if row["layer_a"] == row["layer_b"] else f"block {row[f'layer_{end}']} ({name})"


def answer(rows: list[dict], found: list[dict], settings: dict) -> Answer:
    """rows: `audit_rows`; found: `pairs`."""
    short = short_names([row["sae"] for row in rows], 40)
    where = dict(hooks=hooks_of(rows), behind=describe_units(settings).partition(",")[0])
    if len(rows) == 1:
        asked = ASKED_OF_ONE.format(**where)
        out = OF_ONE.format(**rows[0] | {"word": sentence_case(rows[0]["word"])})
    else:
        asked = ASKED.format(saes=f"these {len(rows)} SAEs", **where)
        said = ", ".join(f"{word}: {n}" for word, n in words_counted(rows).items())
        out = f"{sentence_case(said)}. "
        n = counted(found)
        at_a_hook = sum(row["layer_a"] == row["layer_b"] for row in found)
        if n["undefined"] == len(found):
            out += NONE_JUDGED.format(pairs=count_of(len(found), "pair")) if found else NO_PAIRS
        else:
            out += OF_PAIRS.format(
                pairs=count_of(len(found), "pair"),
                at_a_hook=at_a_hook,
                between=len(found) - at_a_hook,
                inverts=n["inverts"],
                open=not_told(n),
            )
        if found and (worst := found[0])["kind"] == "inverts":
            out += WORST.format(
                a=name_in_pair(worst, "a", short),
                b=name_in_pair(worst, "b", short),
                r2=estimate(worst, "delta_r2", 3),
                ce_rec=estimate(worst, "delta_ce_rec", 3),
            )
        out += "."
    refused = len(settings.get("refused", {}))
    out += f" {count_of(refused, 'other')} refused." if refused else ""
    by_chance = BY_CHANCE.format(n=0.025 * len(found)) if found else ""
    return Answer(asked, out, LIMITS.format(by_chance=by_chance))


# ------------------------------------------------------------------------------------------ what is printed
SHORT_WORD = {"worse than zero ablation": "worse than zero", "more than doubles CE": "more than 2x CE"}
LINE = "{name:<{width}}  {k:>5}  {ce_rec:<23}  {r2:>6}  {word}"
# what a line leaves to the name
NAME_LETTERS = WIDTH - len(LINE.format(name="", width=0, k="", r2="", ce_rec="", word="cannot be judged"))


def short_names(names: Sequence[str], most: int) -> dict[str, str]:
    """{name: the same without what all share of the path, first or last, and its middle where it is still
    longer than `most`}: as many different ones as names.

    >>> short_names(["org/run/layers.3/a", "org/run/layers.3/b"], 20)
    {'org/run/layers.3/a': 'a', 'org/run/layers.3/b': 'b'}
    >>> list(short_names(["org/a/layers.3", "org/b/layers.3"], 20).values())
    ['a', 'b']
    >>> list(short_names(["topk-of-width-32768", "topk-of-length-32768"], 12).values())
    ['topk-…-32768', 'topk…8768 #2']
    """
    paths = [name.split("/") for name in names]
    first = len(os.path.commonprefix([path[:-1] for path in paths]))
    last = len(os.path.commonprefix([path[:first:-1] for path in paths])) if len(set(names)) > 1 else 0
    out: dict[str, str] = {}
    for name, path in zip(names, paths):
        rest, ending = "/".join(path[first : len(path) - last]), ""
        for number in itertools.count(2):
            room = most - len(ending)
            front = room // 2 - 1
            cut = rest if len(rest) <= room else f"{rest[:front]}…{rest[len(rest) - room + front + 1 :]}"
            if cut + ending not in out.values():
                break
            ending = f" #{number}"
        out[name] = cut + ending
    return out


def number(value: float | None) -> str:
    return "undefined" if value is None or is_undefined(value) else f"{value:.3f}"


def sae_lines(groups: dict[str, list[dict]], names: dict[str, str]) -> list[str]:
    """A line for each SAE, at most WIDTH wide, under a line for each group; in a group by k, the highest
    CE_rec first.

    groups {what its SAEs share: rows with sae, k, r2, ce_rec, ce_rec_lo, ce_rec_hi, word}; names {sae: as it
    is printed}.
    """
    width = max(map(len, (*names.values(), "SAE")))
    head = LINE.format(name="SAE", width=width, k="k", r2="R²", ce_rec="CE_rec [95%]", word="its R²")
    lines = [head]
    for title, rows in groups.items():
        lines += textwrap.wrap(f"- {title}", WIDTH)
        for row in in_order(rows):
            lo, hi = number(row["ce_rec_lo"]), number(row["ce_rec_hi"])
            ce_rec = f"{number(row['ce_rec'])} [{lo if lo == 'undefined' else f'{lo}, {hi}'}]"
            k = row["k"] if row["k"] not in (0, "none") else f"~{row['l0']:.0f}"
            word = SHORT_WORD.get(row["word"], row["word"])
            name = names[row["sae"]]
            line = LINE.format(name=name, width=width, k=k, r2=number(row["r2"]), ce_rec=ce_rec, word=word)
            lines.append(line.rstrip())
    return lines


def in_order(rows: list[dict]) -> list[dict]:
    """By k, or L0 where there is none, and then the highest CE_rec first."""
    active = {id(row): row["l0"] if row["k"] in (0, "none") else row["k"] for row in rows}
    return sorted(rows, key=lambda row: (active[id(row)], -np.nan_to_num(row["ce_rec"]), row["sae"]))


def title_of(group: tuple) -> str:
    model, layer, ctx, bos = group
    return f"{model} block {layer}, {ctx} tokens{' after a BOS' if bos else ''}"


def by_hook(rows: list[dict]) -> dict[str, list[dict]]:
    """{what they share: rows of audit.csv}."""
    return {title_of(group): here for group, here in grouped(rows, HOOK_AND_TOKENS).items()}


def console(rows: list[dict], found: list[dict], settings: dict) -> str:
    """What a person sees below the answer, WIDTH wide: one line per SAE, what is said of a few, the pairs
    that R² inverts, what is odd, and what was refused.
    """
    names = short_names([row["sae"] for row in rows], NAME_LETTERS)
    lines = sae_lines(by_hook(rows), names)
    if 1 < len(rows) <= FEW:
        lines += [""]
        for row in rows:
            lines += hanging(f"{names[row['sae']]}: {row['says']} {row['read']}")
    if named := [row for row in found if row["kind"] == "inverts"][:NAMED]:
        lines += ["", "R² inverts (higher R² minus lower, 95% intervals):"]
        for row in named:
            r2, ce_rec = (estimate(row, f"delta_{metric}", 3) for metric in ("r2", "ce_rec"))
            lines += hanging(f"{name_in_pair(row, 'a', names)} over {name_in_pair(row, 'b', names)}")
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


def trial_lines(saes: list[dict]) -> str:
    """The SAEs of a run that is too small for a leaderboard, as `console` shows those of an audit. saes: rows
    as `with_words` gives them.
    """
    rows = [
        row | {"sae": f"{row['sae']} {row['recipe']} {readable_count(row['tokens'])} s{row['seed']}"}
        for row in saes
    ]
    groups = {
        f"{model} block {layer}": here for (model, layer), here in grouped(rows, ["model", "layer"]).items()
    }
    names = sorted({row["sae"] for row in rows})
    return "\n".join(sae_lines(groups, short_names(names, NAME_LETTERS)))


# -------------------------------------------------------------------------------------- what is said of pairs
NOTHING_TO_COMPARE = (
    "No two of these SAEs can be compared (same model, k and tokens): nothing is said about what R² orders."
)
ALL_PAIRS = (
    "Of the {pairs} that can be compared (same model, k and tokens), R² orders {orders} as CE_rec does and "
    "inverts {inverts}{more}."
)
MORE_PAIRS = {  # where there are such
    "claims": "in {claims} R² shows a difference and CE_rec none",
    "misses": "in {misses} CE_rec shows one and R² none",
    "neither": "in {neither} neither does",
    "undefined": "{undefined} cannot be judged: there is no interval",
}
ONE_PAIR = "- R² inverts {a} over {b} ({where}): R² {r2}, CE_rec {ce_rec}"
ABOUT_DIFFERENCES = (
    "Differences: the SAE of higher R² minus the other; 95% intervals, both SAEs under the same resamples "
    "of {behind}. Every interval is for its pair alone: among {n} pairs that did not differ at all, "
    "{by_chance:.4g} would be expected to be shown to differ by chance, in R² and again in CE_rec. Inverted "
    "ones come first, by the CE_rec that choosing after R² loses at least. All pairs: pairs.csv, where "
    "documents_to_tell says of how many documents CE_rec would tell the two apart, if the difference stays."
)


def pair_sentence(found: list[dict]) -> str:
    """What R² says about the choice between two SAEs. found: `pairs`."""
    if not found:
        return NOTHING_TO_COMPARE
    n = counted(found)
    more = "; ".join(text.format(**n) for name, text in MORE_PAIRS.items() if n[name])
    return ALL_PAIRS.format(pairs=count_of(len(found), "pair"), more=f"; {more}" * bool(more), **n)


def pair_lines(found: list[dict]) -> list[str]:
    """The inverted pairs in Markdown, the furthest first."""
    inverted = [row for row in found if row["kind"] == "inverts"]
    names = {row[f"sae_{end}"]: row[f"sae_{end}"] for row in inverted for end in "ab"}
    lines = []
    for row in inverted[:NAMED]:
        r2, ce_rec = (estimate(row, f"delta_{metric}", 3) for metric in ("r2", "ce_rec"))
        one_hook = f"block {row['layer_a']}, " if row["layer_a"] == row["layer_b"] else ""
        where = f"{row['model']}, {one_hook}k = {row['k']}, {row['ctx']} tokens"
        a, b = (name_in_pair(row, end, names) for end in "ab")
        lines.append(ONE_PAIR.format(a=a, b=b, where=where, r2=r2, ce_rec=ce_rec))
    return lines + ([f"- and {len(inverted) - NAMED} more in pairs.csv"] if len(inverted) > NAMED else [])


def pair_report(found: list[dict], settings: dict) -> list[str]:
    """In Markdown."""
    text = [pair_sentence(found), ""]
    if not found:
        return text
    if lines := pair_lines(found):
        text += [*lines, ""]
    named = [
        row | {"at": f"block {row['layer_a']}" if row["layer_a"] == row["layer_b"] else "between blocks"}
        for row in found
    ]
    groups = grouped(named, ["model", "k", "at"])
    if len(groups) > 1:
        table = [
            dict(zip(("model", "k", "at"), group)) | {"pairs": len(rows)} | counted(rows)
            for group, rows in sorted(groups.items())
        ]
        text += [markdown(table, ["model", "k", "at", "pairs", *KINDS]), ""]
    n = len(found)
    return [*text, ABOUT_DIFFERENCES.format(behind=describe_units(settings), n=n, by_chance=0.05 * n), ""]


# ------------------------------------------------------------------------------------------------ the report
HEADLINE = [
    *"sae k l0 ce_rec".split(),
    "CE_rec interval",
    "r2",
    "R² interval",
    *"r2_nosink sink_share kl_excess dead dense word also dominated_by".split(),
]
OTHER_MODEL = "{sae}: its files say {trained_on}; measured on {model}"
NEGATIVE = "{sae}: worse than predicting the mean (R² {r2:.2f}); the wrong model, layer or normalisation?"
UNSEEN = (
    "{sae}: never saw some positions ({positions}) and is patched there too; ce_rec_sinkclean and *_nosink "
    "leave sinks out"
)
IGNORED = "{sae}: fields of its files that nobody here knows, and that are not computed: {fields}"
ABOUT_COLUMNS = (
    "Within a hook by k, the highest CE_rec first. dominated_by: an SAE of the hook with no more latents "
    "active has a higher CE_rec (95% interval of the difference). kl_excess: the ε-random substitution of "
    "Gurnee (2024), sinks clean in both runs. dead, dense: latents that never fire, and that fire on more "
    "than a tenth of the tokens. frac_zero in audit.csv is what other libraries call CE loss score or loss "
    "recovered; ce_rec = 2 - L_recon/L_orig is not. All columns: audit.csv."
)
OTHER_TOKENS = (
    "Not all SAEs were measured on the same tokens: their files ask for contexts of {contexts}. Compare "
    "within one of them."
)
REPORT = """\
# Audit: which SAE, and what is its R² worth?

{answer}
![R² against CE_rec](audit.png)

## One by one

{one_by_one}
{words}

{about}

{says}
{warnings}
## What R² inverts

{pairs}
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
        if row.get("ignored"):
            text.append(IGNORED.format(sae=row["sae"], fields=", ".join(row["ignored"])))
    return text


def headline(rows: list[dict]) -> str:
    """One line per SAE of a hook, in Markdown."""
    lines = [
        row
        | {
            "CE_rec interval": bounds(row["ce_rec_lo"], row["ce_rec_hi"], 3),
            "R² interval": bounds(row["r2_lo"], row["r2_hi"], 3),
            "sink_share": percent(row["sink_share"]),
            "kl_excess": span(row["kl_excess"], row["kl_excess_lo"], row["kl_excess_hi"]),
            "dead": percent(1 - row["alive"]),
            "dense": percent(row["dense"]),
        }
        for row in in_order(rows)
    ]
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
    """In Markdown lines: the answer, the picture, one line per SAE and what is said of it, the pairs. found:
    `pairs`.
    """
    tables = [f"### {title}\n\n{headline(here)}\n" for title, here in by_hook(rows).items()]
    if refused := refusals(settings):
        tables.append("### Refused\n\n" + markdown([{"sae": sae, "why": why} for sae, why in refused]) + "\n")
    by_r2 = sorted(rows, key=lambda row: (-row["r2"], row["sae"]))
    text = REPORT.format(
        answer=answer(rows, found, settings).markdown(),
        pairs="\n".join(pair_report(found, settings)),
        warnings="".join(f"- **{line}**\n" for line in warnings(rows)),
        one_by_one="\n".join(tables),
        words=ABOUT_WORDS,
        about=ABOUT_COLUMNS,
        says="".join(f"- {row['sae']}: **{row['word']}**. {row['says']} {row['read']}\n" for row in rows),
        libraries=markdown(by_r2, ["sae", "r2", *LIBRARIES]),
        libraries_nosink=markdown([_without_sinks(row) for row in by_r2], ["sae", "r2", *LIBRARIES]),
        definitions="\n".join(f"{name}: {meaning}." for name, meaning in LIBRARIES.items()),
        contexts=_contexts(rows),
    )
    return text.split("\n")


# ------------------------------------------------------------------------------------------------ from Python
RETURNED = (
    "r2 r2_nosink cosine ce_orig ce_recon dce ce_rec ce_rec_sinkclean frac_zero kl swd_tok swd_sampled l0 "
    "sink_share kl_excess fed_excess"
).split()
# SAELens' names of what is defined in the same way
SAELENS = {"explained_variance": "r2", "ce_loss_score": "frac_zero"}


class Audited(dict[str, Any]):
    """{metric: value, metric_lo, metric_hi: its 95% interval over documents}, word, also, says, read, n_tok,
    n_sink, documents. It prints as a table.
    """

    def records(self) -> list[dict[str, Any]]:
        """A row a metric, for a data frame."""
        return [
            {"metric": name, "value": self[name], "lo": self[f"{name}_lo"], "hi": self[f"{name}_hi"]}
            for name in self
            if f"{name}_lo" in self
        ]

    def __str__(self) -> str:
        rows = [
            {"metric": row["metric"], "value": number(row["value"]), "95%": bounds(row["lo"], row["hi"], 3)}
            for row in self.records()
        ]
        return "\n".join(
            [f"{sentence_case(self['word'])}. {self['says']} {self['read']}", "", markdown(rows)]
        )


def audit(
    model: Any,
    layer: int,
    sae: str | os.PathLike | SAE | Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    document: Sequence[int] | np.ndarray | None = None,
    basis: str | None = None,
    ignore_fields: Sequence[str] = (),
) -> Audited:
    """R², CE_rec, dCE (nats a token), KL, ... of one SAE at the output of block `layer`, on these tokens and
    a model that is loaded, and what is said of it.

    The numbers that `audit.py` writes for the same tokens. model: a causal language model of transformers,
    in eval mode. sae: a path or hub id of one SAE, whose basis is checked as its files say (`basis`, `raw`
    or `centred`, goes on regardless), an SAE of this package, or any function h [N,d] -> h_hat [N,d]
    (SAELens' SAEs are such). ignore_fields: of an SAE's files, that are not known and let pass. tokens
    [S,T], int64: as they are, a BOS only where they hold one. document [S], 0..D-1: of which document each
    row is, each its own by default; of one document there is no interval. Raises UserError, Fault.
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
    given, shared = _reconstruction(sae, hook, tokens, basis, ignore_fields), activations(hook, tokens, batch)
    result = evaluate(hook, tokens, {name: given}, batch, shared=shared, document=of)[name]
    weights = document_weights(int(of.max()) + 1, N_RESAMPLES, seed=0)[:, of]
    values = computed(
        Sums({q: v[None] for q, v in result.sums.items()}, weights, text_config(model).hidden_size)
    )
    n_doc, n_sink = int(of.max()) + 1, int(shared.sink.sum())
    row = {metric: float(value[ALL, 0]) for metric, value in values.items()}
    row |= dict(n_seq=len(tokens), n_tok=shared.sink.numel(), n_sink=n_sink, calm_share=shared.calm_share)
    (row,) = with_words([row], values, n_doc)
    out = Audited({name: row[name] for name in ("word", "also", "says", "read")})
    for name, metric in [*zip(RETURNED, RETURNED), *SAELENS.items()]:
        lo, hi = (float(end[0]) for end in percentiles(values[metric][RESAMPLES]))
        out |= {name: float(values[metric][ALL, 0]), f"{name}_lo": lo, f"{name}_hi": hi}
    return Audited(out | {"n_tok": row["n_tok"], "n_sink": n_sink, "documents": n_doc})


def _reconstruction(
    sae: Any, hook: Hook, tokens: torch.Tensor, basis: str | None, ignore_fields: Sequence[str]
) -> Reconstruction:
    """What `evaluate` takes. Raises UserError."""
    if isinstance(sae, (str, os.PathLike)):
        files = sae_files.find(str(sae))
        if len(files) > 1:
            raise UserError(f"{sae}: {len(files)} SAEs, of which one is to be named: {files[0].label}, ...")
        read = sae_files.read(files[0], ignore_fields).to(hook.device)
        near = basis_gate.near(hook, tokens[:4])
        if read.W_enc.shape[1] != near[hook.layer].shape[1]:
            raise UserError(f"{sae}: reads {read.W_enc.shape[1]} dimensions, of {near[hook.layer].shape[1]}")
        said = basis or sae_files.describe(files[0]).basis
        if not basis:
            basis_gate.check_basis(read, said, files[0].label, hook.layer, near)
        read.centred = said == "centred"
        return fused(read)
    if basis:
        raise UserError("basis is about an SAE's files")
    if ignore_fields:
        raise UserError("ignore_fields is about an SAE's files")
    if isinstance(sae, SAE):
        return sae.to(hook.device)
    return lambda h, mean: sae(h)
