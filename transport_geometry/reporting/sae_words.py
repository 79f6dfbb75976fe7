"""What is said of one SAE: who owns its R², where its harm is, and which score to read.

Each finding is a number measured on the same tokens, its 95% interval over documents, and a margin. Shapes: C
SAEs, W weightings of the documents, of which 0 is all of them and 3.. are resamples.
"""

import math
from dataclasses import dataclass

from transport_geometry.records.tables import span
from transport_geometry.reporting.templates import blocks
from transport_geometry.statistics.intervals import interval
from transport_geometry.statistics.resampling import ALL, RESAMPLES

import numpy as np

KL_FLOOR = 1e-6  # nats a token: less is lost in float32, and its ratio to anything means nothing
MUCH_OF_SST = 0.1  # of one position that is no sink by the rule: worth saying


@dataclass(frozen=True)
class Finding:
    """Holds where the interval of a column lies above the margin."""

    word: str
    column: str  # of a row, with _lo and _hi
    margin: float

    @property
    def says(self) -> str:
        return TEXT[self.word]

    @property
    def read(self) -> str:
        """Which score to read instead, or what to do."""
        return TEXT[f"read: {self.word}"]


TEXT = blocks("words")
SINK_MARGIN = 0.05  # of R² and of CE_rec
# An error that costs *more* than a random one of the same length has no word: on most models every SAE does.
# Of 24 SAEs of the embedded ones (two recipes, k 4 and 32, 50k tokens) kl_excess was .20 to 1.6, of the mean
# 1 to 2; of 54 SAEs of Gemma 3 270M it was -2.8 to -.18.
KL_MARGIN = math.log(1.25)
FINDINGS = (
    Finding("worse than zero ablation", "ce_over_zero", 0.0),
    Finding("more than doubles CE", "ce_below_zero", 0.0),
    Finding("breaks the sink", "sink_harm", SINK_MARGIN),
    Finding("R² is the sink's", "sink_r2", SINK_MARGIN),  # which is rebuilt well ...
    Finding("R² is the sink's", "sink_r2_lost", SINK_MARGIN),  # ... or badly
    Finding("milder than random", "kl_deficit", KL_MARGIN),
)
AS_IT_READS, UNJUDGED = "as it reads", "cannot be judged"
WORDS = (*dict.fromkeys(finding.word for finding in FINDINGS), AS_IT_READS, UNJUDGED)
NAMED = {
    "ce_over_zero": "Patched CE less that of zero ablation",
    "ce_below_zero": "−CE_rec",
    "sink_harm": "CE_rec with sinks clean less CE_rec",
    "sink_r2": "R² less R² without sinks",
    "sink_r2_lost": "R² without sinks less R²",
    "kl_deficit": "−kl_excess",
}
ABOUT_WORDS = TEXT["about"].format(
    words="; ".join(f"*{word}*" for word in WORDS[:-2]),
    as_it_reads=AS_IT_READS,
    unjudged=UNJUDGED,
    sink_margin=SINK_MARGIN,
    kl_margin=-KL_MARGIN,
)
OF_A_ROW = ["sink_share", "kl_excess", "word"]
COLUMNS = [f"{name}{end}" for name in ("sink_r2", "sink_harm", "kl_excess") for end in ("", "_lo", "_hi")]


def with_words(saes: list[dict], values: dict[str, np.ndarray], n_doc: int) -> list[dict]:
    """The rows of C SAEs, each with its differences and their intervals, `word`, `also` (the words of other
    findings that hold), `says` and `read`. values {metric: [W,C]}, as `results.load_measurements` gives them;
    n_doc: documents.
    """
    small = np.minimum(values["kl"], values["kl"] / np.exp(values["kl_excess"]))[:1] < KL_FLOOR
    excess = np.where(small, np.nan, values["kl_excess"])
    differences = {
        "ce_over_zero": values["ce_recon"] - values["ce_zero"],
        "ce_below_zero": -values["ce_rec"],
        "sink_harm": values["ce_rec_sinkclean"] - values["ce_rec"],
        "sink_r2": values["r2"] - values["r2_nosink"],
        "sink_r2_lost": values["r2_nosink"] - values["r2"],
        "kl_excess": excess,
        "kl_deficit": -excess,
        "r2": values["r2"],
        "ce_rec": values["ce_rec"],
    }
    out = []
    for i, row in enumerate(saes):
        found: dict[str, float] = {}
        for name, value in differences.items():
            lo, hi = interval(value[RESAMPLES, i])  # of few documents some resamples have no random error
            found |= {name: value[ALL, i], f"{name}_lo": lo, f"{name}_hi": hi}
        out.append(row | found | said_of(row | found, n_doc))
    return out


def said_of(row: dict, n_doc: int) -> dict[str, str]:
    """word, also, says and read of a row that has every column of FINDINGS with its interval."""
    holds = [one for one in FINDINGS if row[f"{one.column}_lo"] > one.margin and n_doc > 1]
    facts = row | {
        "kl_ratio": math.exp(row["kl_excess"]) if math.isfinite(row["kl_excess"]) else math.nan,
        "harm_share": share_in_words(row["sink_harm"], 1 - row["ce_rec"]),
        "where": "one position a sequence" if row["n_sink"] == row["n_seq"] else f"{row['n_sink']} sinks",
    }
    # an error worse than zero more than doubles CE as well, and a broken sink is what to mend
    told = [one for one in holds if one.column != "ce_below_zero" or one is holds[0]]
    mend = next((one for one in holds if one.column == "sink_harm"), holds[0] if holds else None)
    says = [finding.says.format(**facts) for finding in told]
    if mend:
        word, read = holds[0].word, mend.read
    else:
        open_ones = [text for finding in FINDINGS if (text := why_open(row, finding, n_doc))]
        word = UNJUDGED if open_ones else AS_IT_READS
        says, read = [open_ones[0] if open_ones else TEXT[word]], TEXT[f"read: {word}"]
    if row.get("calm_share", 0) > MUCH_OF_SST:
        says.append(TEXT["hidden"].format(**row))
    if math.isfinite(row["kl_excess"]):
        says.append(TEXT["excess"].format(**facts))
    also = ", ".join(finding.word for finding in holds[1:])
    return {"word": word, "also": also, "says": " ".join(says), "read": read}


def why_open(row: dict, finding: Finding, n_doc: int) -> str:
    """Why this row neither has the finding nor is shown not to have it; empty where it is one or the other.

    An interval shrinks as the root of the documents: so many more would put the margin outside of it.
    """
    value, lo, hi = (row[f"{finding.column}{end}"] for end in ("", "_lo", "_hi"))
    if not np.isfinite([value, lo, hi]).all():
        return TEXT["undefined"].format(name=NAMED[finding.column])
    if n_doc < 2:
        return TEXT["one document"]
    if not lo <= finding.margin <= hi:
        return ""
    reach = (finding.margin - lo) if value > finding.margin else (hi - finding.margin)
    distance = abs(value - finding.margin)
    times = ((distance + reach) / max(distance, 1e-9)) ** 2
    n = f"about {round(n_doc * times):,}" if times < 1000 else "more than a thousand times as many"
    value = span(value, lo, hi)
    return TEXT["across"].format(name=NAMED[finding.column], value=value, margin=finding.margin, n=n)


def share_in_words(part: float, whole: float) -> str:
    """Of a harm, at the start of a sentence.

    >>> share_in_words(0.5, 0.51), share_in_words(0.25, 0.5)
    ('All', '50%')
    """
    share = part / whole if whole > 0 else math.nan
    return "All" if not share < 0.95 else f"{share:.0%}"
