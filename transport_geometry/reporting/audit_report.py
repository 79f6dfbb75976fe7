"""The audit as a person reads it: the three lines, what the console shows, and the report."""

import itertools
import os
import re
import textwrap
from collections.abc import Sequence

from transport_geometry.measuring.r2_by_library import LIBRARIES
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
from transport_geometry.reporting.console import WIDTH, Answer, sentence_case
from transport_geometry.reporting.sae_words import ABOUT_WORDS, WORDS
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics.sae_pairs import HOOK_AND_TOKENS, KINDS, counted

import numpy as np

TEXT = blocks("audit")
NAMED = 10  # pairs, at most, that the report names
FEW = 4  # SAEs of which the console says all that is said


def count_of(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def hooks_of(rows: list[dict]) -> str:
    """In words, a few of them."""
    hooks = list(dict.fromkeys(f"{row['model']} L{row['layer']}" for row in rows))
    return ", ".join(hooks[:2]) + (f" and {count_of(len(hooks) - 2, 'more hook')}" if len(hooks) > 2 else "")


def words_counted(rows: list[dict]) -> dict[str, int]:
    """{word: SAEs}, of the words there are."""
    return {word: n for word in WORDS if (n := sum(row["word"] == word for row in rows))}


def name_in_pair(row: dict, end: str, names: dict[str, str]) -> str:
    name = names[row[f"sae_{end}"]]
    return name if row["layer_a"] == row["layer_b"] else f"block {row[f'layer_{end}']} ({name})"


def answer(rows: list[dict], found: list[dict], settings: dict) -> Answer:
    """rows: `audit_rows`; found: `pairs`."""
    where = dict(hooks=hooks_of(rows), behind=describe_units(settings).partition(",")[0])
    if len(rows) == 1:
        asked = TEXT["question of one"].format(**where)
        out = TEXT["answer of one"].format(**rows[0] | {"word": sentence_case(rows[0]["word"])})
    else:
        asked = TEXT["question"].format(saes=f"these {len(rows)} SAEs", **where)
        words = ", ".join(f"{word}: {n}" for word, n in words_counted(rows).items())
        names = short_names([row["sae"] for row in rows], 40)
        out = f"{sentence_case(words)}. {pairs_in_short(found, names)}."
    if refused := len(settings.get("refused", {})):
        out += f" {count_of(refused, 'other')} refused."
    by_chance = TEXT["by chance"].format(n=0.025 * len(found)) if found else ""
    return Answer(asked, out, TEXT["limits"].format(by_chance=by_chance))


def pairs_in_short(found: list[dict], names: dict[str, str]) -> str:
    """What R² does with the pairs, and the one that it inverts most; names {sae: as it is printed}."""
    if not found:
        return TEXT["no pairs"]
    n, pairs = counted(found), count_of(len(found), "pair")
    if n["undefined"] == len(found):
        return TEXT["none judged"].format(pairs=pairs)
    at_a_hook = sum(row["layer_a"] == row["layer_b"] for row in found)
    between = len(found) - at_a_hook
    text = TEXT["answer of pairs"].format(
        pairs=pairs, at_a_hook=at_a_hook, between=between, inverts=n["inverts"]
    )
    if not_told := n["claims"] + n["misses"] + n["neither"]:
        text += f"; not told apart by one or both: {not_told}"
    if n["undefined"]:
        text += f"; not to be judged: {n['undefined']}"
    if (worst := found[0])["kind"] == "inverts":
        a, b = (name_in_pair(worst, end, names) for end in "ab")
        r2, ce_rec = (estimate(worst, f"delta_{name}", 3) for name in ("r2", "ce_rec"))
        text += TEXT["furthest"].format(a=a, b=b, r2=r2, ce_rec=ce_rec)
    return text


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
    ['width-32768', 'length-32768']
    """
    paths = [name.split("/") for name in names]
    first = len(os.path.commonprefix([path[:-1] for path in paths]))
    last = len(os.path.commonprefix([path[:first:-1] for path in paths])) if len(set(names)) > 1 else 0
    rests = ["/".join(path[first : len(path) - last]) for path in paths]
    if len(set(rests)) > 1 and max(map(len, rests)) > most:  # nor what their names begin with alike
        begin = len(re.sub(r"[^-_.]*$", "", os.path.commonprefix(rests)))
        rests = [rest[begin:] for rest in rests]
    out: dict[str, str] = {}
    for name, rest in zip(names, rests):
        ending = ""
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
    """Of HOOK_AND_TOKENS' values."""
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
    leave_sinks = settings.get("leave_sinks", False)
    odd = warnings([row | {"sae": names[row["sae"]]} for row in rows], leave_sinks)
    said = [*odd, *(f"refused: {sae}: {why}" for sae, why in sorted(settings.get("refused", {}).items()))]
    lines += [""] * bool(said)
    for line in said:
        lines += hanging(line)
    return "\n".join(lines)


def hanging(text: str) -> list[str]:
    """Its lines, WIDTH wide, whole words."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def trial_lines(saes: list[dict]) -> str:
    """The SAEs of a run that is too small for a leaderboard, as `console` shows those of an audit. saes: rows
    as `with_words` gives them.
    """
    groups: dict[str, list[dict]] = {}
    for row in saes:
        name = f"{row['sae']} {row['recipe']} {readable_count(row['tokens'])} s{row['seed']}"
        groups.setdefault(f"{row['model']} block {row['layer']}", []).append(row | {"sae": name})
    names = sorted({row["sae"] for rows in groups.values() for row in rows})
    return "\n".join(sae_lines(groups, short_names(names, NAME_LETTERS)))


# -------------------------------------------------------------------------------------- what is said of pairs
def pair_sentence(found: list[dict]) -> str:
    """What R² says about the choice between two SAEs. found: `pairs`."""
    if not found:
        return TEXT["nothing to compare"]
    n = counted(found)
    more = "".join("; " + TEXT[f"pairs: {kind}"].format(**n) for kind in KINDS[2:] if n[kind])
    return TEXT["all pairs"].format(pairs=count_of(len(found), "pair"), more=more, **n)


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
        lines.append(TEXT["one pair"].format(a=a, b=b, where=where, r2=r2, ce_rec=ce_rec))
    return lines + ([f"- and {len(inverted) - NAMED} more in pairs.csv"] if len(inverted) > NAMED else [])


def pair_report(found: list[dict], settings: dict) -> list[str]:
    """In Markdown."""
    text = [pair_sentence(found), ""]
    if not found:
        return text
    if lines := pair_lines(found):
        text += [*lines, ""]
    groups: dict[tuple, list[dict]] = {}
    for row in found:
        at = f"block {row['layer_a']}" if row["layer_a"] == row["layer_b"] else "between blocks"
        groups.setdefault((row["model"], row["k"], at), []).append(row)
    if len(groups) > 1:
        columns = ("model", "k", "at")
        table = [
            dict(zip(columns, group), pairs=len(rows)) | counted(rows)
            for group, rows in sorted(groups.items())
        ]
        text += [markdown(table, [*columns, "pairs", *KINDS]), ""]
    n, behind = len(found), describe_units(settings)
    return [*text, TEXT["about differences"].format(behind=behind, n=n, by_chance=0.05 * n), ""]


# ------------------------------------------------------------------------------------------------ the report
HEADLINE = [
    *"sae k l0 ce_rec".split(),
    "CE_rec interval",
    "r2",
    "R² interval",
    *"r2_nosink sink_share kl_excess dead dense word also dominated_by".split(),
]


def warnings(rows: list[dict], leave_sinks: bool = False) -> list[str]:
    """What makes a row's numbers other than they seem. leave_sinks: were sinks not patched?"""
    text = []
    for row in rows:
        if row["trained_on"] not in ("not said", row["model"]):
            text.append(TEXT["other model"].format(**row))
        if row.get("differs"):
            text.append(TEXT["differs"].format(sae=row["sae"], what=", ".join(row["differs"])))
        if row["r2"] < 0 and not row["r2_nosink"] >= 0:  # else it is a sink's, which its word says
            text.append(TEXT["negative"].format(**row))
        if row["unseen"] and not leave_sinks:
            text.append(TEXT["unseen"].format(sae=row["sae"], positions=", ".join(row["unseen"])))
        if row.get("ignored"):
            text.append(TEXT["ignored"].format(sae=row["sae"], fields=", ".join(row["ignored"])))
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


def audit_report(rows: list[dict], found: list[dict], settings: dict) -> str:
    """In Markdown: the answer, the picture, one line per SAE and what is said of it, the pairs. found:
    `pairs`.
    """
    tables = [f"### {title}\n\n{headline(here)}\n" for title, here in by_hook(rows).items()]
    if refused := sorted(settings.get("refused", {}).items()):
        tables.append(f"### Refused\n\n{markdown([{'sae': sae, 'why': why} for sae, why in refused])}\n")
    by_r2 = sorted(rows, key=lambda row: (-row["r2"], row["sae"]))
    measures = ("r2", *LIBRARIES)
    without_sinks = [
        {name: row[f"{name}_nosink"] for name in measures} | {"sae": f"{row['sae']}, no sinks"}
        for row in by_r2
    ]
    contexts = sorted({(row["ctx"], row["bos"]) for row in rows})
    asked = ", ".join(f"{ctx} tokens{' after a BOS' if bos else ''}" for ctx, bos in contexts)
    other_tokens = f"\n{TEXT['other tokens'].format(contexts=asked)}\n" if len(contexts) > 1 else ""
    return TEXT["report"].format(
        answer=answer(rows, found, settings).markdown(),
        pairs="\n".join(pair_report(found, settings)),
        warnings="".join(f"- **{line}**\n" for line in warnings(rows, settings.get("leave_sinks", False))),
        one_by_one="\n".join(tables),
        words=ABOUT_WORDS,
        about=TEXT["about columns"],
        says="".join(f"- {row['sae']}: **{row['word']}**. {row['says']} {row['read']}\n" for row in rows),
        libraries=markdown(by_r2, ["sae", *measures]),
        libraries_nosink=markdown(without_sinks, ["sae", *measures]),
        definitions="\n".join(f"{name}: {meaning}." for name, meaning in LIBRARIES.items()),
        contexts=other_tokens,
    )
