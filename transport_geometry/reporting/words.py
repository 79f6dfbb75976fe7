"""What is said of one SAE: who owns its R², where its harm is, and which score to read.

Each finding is a number measured on the same tokens, its 95% interval over documents, and a margin. Shapes: C
SAEs, W weightings of the documents, of which 0 is all of them and 3.. are resamples.
"""

import math
from dataclasses import dataclass

from transport_geometry.records.tables import span
from transport_geometry.statistics.stats import ALL, RESAMPLES, interval

import numpy as np

KL_FLOOR = 1e-6  # nats a token: less is lost in float32, and its ratio to anything means nothing
MUCH_OF_SST = 0.1  # of one position that is no sink by the rule: worth saying


@dataclass(frozen=True)
class Finding:
    """Holds where the interval of a column lies above the margin."""

    word: str
    column: str  # of a row, with _lo and _hi
    margin: float
    says: str
    read: str  # which score instead, or what to do


SINK_MARGIN = 0.05  # of R² and of CE_rec
READ_CE_REC = "Read CE_rec: no score of the reconstruction says what such an error does."
# An error that costs *more* than a random one as long has no word: that is every SAE's. Of 24 SAEs of the
# embedded models (two recipes, k = 4 and 32, 50k tokens) kl_excess was .20 to 1.6, of the mean 1.0 to 2.0.
KL_MARGIN = math.log(1.25)
FINDINGS = (
    Finding(
        "worse than zero ablation",
        "ce_over_zero",
        0.0,
        "Patched CE is {ce_recon:.2f} nats: worse than cutting the layer's output to zero ({ce_zero:.2f}).",
        READ_CE_REC,
    ),
    Finding(
        "more than doubles CE",
        "ce_below_zero",
        0.0,
        "Patched CE is {ce_recon:.2f} nats, more than twice the {ce_orig:.2f} without the patch.",
        READ_CE_REC,
    ),
    Finding(
        "breaks the sink",
        "sink_harm",
        SINK_MARGIN,
        "{harm_share} of the harm is {where}: leave sinks alone and CE_rec is {ce_rec_sinkclean:.3f}.",
        "Scores without sinks cannot see it: read SWD or CE_rec. An SAE trained without sinks (--sinks drop) "
        "should leave them alone when it is patched in (--leave-sinks).",
    ),
    *(
        Finding(
            "R² is the sink's",
            column,
            SINK_MARGIN,
            "R² {r2:.3f} is {n_sink} positions in {n_tok:,}; without them it is {r2_nosink:.3f}.",
            "Read SWD, or R² without sinks.",
        )
        for column in ("sink_r2", "sink_r2_lost")  # well rebuilt, or badly
    ),
    Finding(
        "underrates",
        "kl_deficit",
        KL_MARGIN,
        "Its error costs less than a random one as long.",
        "Read CE_rec or KL: R² says too little of it.",
    ),
)
AS_IT_READS, UNJUDGED = "as it reads", "cannot be judged"
WORDS = (*dict.fromkeys(finding.word for finding in FINDINGS), AS_IT_READS, UNJUDGED)
NOTHING_ELSE = "No sink owns its R² or its harm."
NO_INTERVAL = "Of one document there is no interval."
NOT_THERE = "{name} is undefined: there is no error, or it was not measured."
ACROSS = "{name} {value} lies across its margin of {margin:.2f}; {n} documents would tell."
NAMED = {
    "ce_over_zero": "Patched CE less that of zero ablation",
    "ce_below_zero": "−CE_rec",
    "sink_harm": "CE_rec with sinks clean less CE_rec",
    "sink_r2": "R² less R² without sinks",
    "sink_r2_lost": "R² without sinks less R²",
    "kl_deficit": "−kl_excess",
}
EXCESS = "Its error costs {kl_ratio:.2g} times the KL of a random error as long."
HIDDEN = "One position that is no sink by the rule has {calm_share:.0%} of SST."
ABOUT_WORDS = (
    "The word of an SAE is the first that holds, each by its 95% interval over documents: "
    + "; ".join(f"*{word}*" for word in WORDS[:-2])
    + f"; *{AS_IT_READS}*, where none is and all could be shown not to be; else *{UNJUDGED}*. The sink is "
    f"broken, or owns R², where CE_rec, or R², moves by more than {SINK_MARGIN} without sinks. *underrates*: "
    "kl_excess, the log of how many times the KL of a random error as long the SAE's error costs, lies below "
    f"{-KL_MARGIN:.2f}. Every trained SAE's error costs more than a random one: that has a number and no "
    "word. sink_share: of SST, in sink positions."
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
            lo, hi = interval(
                value[RESAMPLES, i]
            )  # of few documents some resamples hold none with a random error
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
    excess = [EXCESS.format(**facts)] if math.isfinite(row["kl_excess"]) else []
    open_ones = [text for finding in FINDINGS if (text := why_open(row, finding, n_doc))]
    if mend:
        word, read = holds[0].word, mend.read
    elif open_ones:
        word, read = UNJUDGED, "Read CE_rec with its interval."
        says.append(open_ones[0])
    else:
        word, read = AS_IT_READS, "R² may be read as it is, beside CE_rec."
        says.append(NOTHING_ELSE)
    if row.get("calm_share", 0) > MUCH_OF_SST:
        says.append(HIDDEN.format(**row))
    says += excess
    also = ", ".join(finding.word for finding in holds[1:])
    return {"word": word, "also": also, "says": " ".join(says), "read": read}


def why_open(row: dict, finding: Finding, n_doc: int) -> str:
    """Why this row neither has the finding nor is shown not to have it; empty where it is one or the other.

    An interval shrinks as the root of the documents: so many more would put the margin outside of it.
    """
    value, lo, hi = (row[f"{finding.column}{end}"] for end in ("", "_lo", "_hi"))
    if not np.isfinite([value, lo, hi]).all():
        return NOT_THERE.format(name=NAMED[finding.column])
    if n_doc < 2:
        return NO_INTERVAL
    if not lo <= finding.margin <= hi:
        return ""
    reach = (finding.margin - lo) if value > finding.margin else (hi - finding.margin)
    distance = abs(value - finding.margin)
    times = ((distance + reach) / max(distance, 1e-9)) ** 2
    n = f"about {round(n_doc * times):,}" if times < 1000 else "more than a thousand times as many"
    value = span(value, lo, hi)
    return ACROSS.format(name=NAMED[finding.column], value=value, margin=finding.margin, n=n)


def share_in_words(part: float, whole: float) -> str:
    """Of a harm, at the start of a sentence.

    >>> share_in_words(0.5, 0.51), share_in_words(0.25, 0.5)
    ('All', '50%')
    """
    share = part / whole if whole > 0 else math.nan
    return "All" if not share < 0.95 else f"{share:.0%}"
