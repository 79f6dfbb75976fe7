"""The audit: for SAEs that others trained, what R^2 says of every pair; one row each, with every library's
R^2 under its name; the flag.

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model; C
SAEs, W weightings of the documents, of which 0 is all of them and 3.. are resamples (`results.measured`).
"""

import itertools

from transport_geometry.flag import FLAG_COLUMNS, FLAG_TEXT, NO_WIDTH
from transport_geometry.formats import hub_name
from transport_geometry.libraries import LIBRARIES
from transport_geometry.results import behind
from transport_geometry.stats import isotonic_predict, percentiles
from transport_geometry.tables import bounds, estimate, grouped, markdown

import numpy as np

COLUMNS = [
    *"sae model layer format trained_on basis fvu_as_said fvu_otherwise ctx bos d_sae k l0 alive".split(),
    *(f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink")),
    *"nmse_tok cosine ce_orig ce_recon dce ce_rec ce_rec_sinkclean frac_zero frac_mean kl".split(),
    *"swd_tok swd_seq swd_sampled rho fed fed_nosink fed_nosink_lo fed_nosink_hi flag".split(),
    *"fed_iso_nosink fed_excess fed_excess_lo fed_excess_hi".split(),
    *"kl_swd_ratio kl_swd_ratio_lo kl_swd_ratio_hi ce_rec_lo ce_rec_hi".split(),
    *"ce_rec_residual ce_rec_residual_lo ce_rec_residual_hi".split(),
]
GROUP = "model layer ctx bos".split()  # SAEs are compared within one
PAIRS = [
    *GROUP,
    *"sae_a sae_b r2_a r2_b delta_r2 delta_r2_lo delta_r2_hi".split(),
    *"ce_rec_a ce_rec_b delta_ce_rec delta_ce_rec_lo delta_ce_rec_hi l0_a l0_b kind".split(),
]
KINDS = ("orders", "inverts", "claims", "misses", "neither", "undefined")
SAME_L0 = 1.5  # pairs whose L0 lie within this factor: the choice that a user has
RESOLUTION = 1e-5  # a difference of R^2 or CE_rec that float32 cannot tell from none: one SAE in two formats
CURVE_OF = 3  # other SAEs, at least, that a curve of CE_rec on R^2 is drawn through
NAMED = 10  # pairs, at most, that the report names


def audit_rows(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> list[dict]:
    """Of audit.csv, sorted by model, layer and name. saes: rows as `flag.flagged` gives them; values {metric:
    [W,C]}.
    """
    fed_lo, fed_hi = percentiles(values["fed_nosink"][3:])
    ce_lo, ce_hi = percentiles(values["ce_rec"][3:])
    residual, residual_lo, residual_hi = residuals(saes, values, settings).T
    rows = []
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        rows.append(
            row
            | {name: declared[name] for name in ("format", "basis", "ctx", "bos", "unseen")}
            | {
                "trained_on": hub_name(declared["model"]) if declared["model"] else "not said",
                "k": row["k"] or "none",
                "fed_nosink_lo": fed_lo[i],
                "fed_nosink_hi": fed_hi[i],
                "ce_rec_lo": ce_lo[i],
                "ce_rec_hi": ce_hi[i],
                "ce_rec_residual": residual[i],
                "ce_rec_residual_lo": residual_lo[i],
                "ce_rec_residual_hi": residual_hi[i],
            }
        )
    return rows


# ----------------------------------------------------------------------------------------------------- pairs
def comparable(saes: list[dict], settings: dict) -> dict[tuple, list[int]]:
    """{(model, layer, ctx, bos): indices of its SAEs}: those whose numbers come from the same activations at
    the same tokens.
    """
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(saes):
        declared = settings["saes"][row["sae"]]
        groups.setdefault((row["model"], row["layer"], declared["ctx"], declared["bos"]), []).append(i)
    return groups


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
    """Of pairs.csv: every comparable pair, `sae_a` the one with the higher R^2, differences a minus b, sorted
    by hook and names.

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
    return sorted(found, key=_place)


def _place(row: dict) -> list:
    """By which rows of pairs.csv are sorted."""
    return [row[column] for column in (*GROUP, "sae_a", "sae_b")]


def residuals(saes: list[dict], values: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """[C,3]: CE_rec less what R^2 lets expect, and the ends of its 95% interval: the increasing curve through
    the *other* SAEs, at its R^2.

    nan with fewer than CURVE_OF others on the same tokens, and at an R^2 beyond all of theirs: a curve held
    flat there would call the best SAE of every hook better than its R^2. The interval is over documents; the
    other SAEs are as they are.
    """
    out = np.full((len(saes), 3), np.nan)
    for members in comparable(saes, settings).values():
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


# -------------------------------------------------------------------------------------- what is said of pairs
NOTHING_TO_COMPARE = (
    "No two of these SAEs can be compared (same model, layer and tokens): nothing is said about what R² "
    "orders."
)
ALL_PAIRS = "Of the {pairs} of SAEs that can be compared (same model, layer and tokens), {told}"
NEAR_PAIRS = "Of the {n} with about as many latents active (L0 within a factor of {factor:g}), {told}"
NONE_NEAR = "None of them has about as many latents active (L0 within a factor of {factor:g}) on both sides."
TOLD = (
    "R² orders {orders} as CE_rec does, inverts {inverts}, and in {claims} claims a difference that CE_rec "
    "does not show"
)
TOLD_MORE = {  # where there are such
    "misses": "in {misses} CE_rec shows one that R² does not",
    "neither": "in {neither} neither does",
    "undefined": "{undefined} have no interval",
}
ONE_PAIR = "- {says}: {sae_a} over {sae_b}: R² {r2}, CE_rec {ce_rec} (L0 {l0_a:.3g} and {l0_b:.3g})"
SAYS = {"inverts": "inverted", "claims": "claimed, not shown"}  # the pairs to look at, in this order
ABOUT_DIFFERENCES = (
    "Differences: the SAE of higher R² minus the other; 95% intervals, both SAEs under the same resamples "
    "of {behind}. Every interval is for its pair alone: among {n} pairs that did not differ at all, "
    "{by_chance:.4g} would be expected to be shown to differ by chance, in R² and again in CE_rec. All "
    "pairs: pairs.csv."
)


def clearness(row: dict) -> float:
    """How far a pair's differences lie from 0, in half widths of their intervals; of an inverted pair, the
    less clear of the two.
    """

    def of(metric: str) -> float:
        width = row[f"delta_{metric}_hi"] - row[f"delta_{metric}_lo"]
        return abs(row[f"delta_{metric}"]) / max(width, NO_WIDTH) * 2

    return of("r2") if row["kind"] == "claims" else min(of("r2"), of("ce_rec"))


def same_l0(row: dict) -> bool:
    low, high = sorted((row["l0_a"], row["l0_b"]))
    return 0 < low and high <= SAME_L0 * low


def counted(found: list[dict]) -> dict[str, int]:
    """{kind: pairs}."""
    return {name: sum(row["kind"] == name for row in found) for name in KINDS}


def _told(found: list[dict]) -> str:
    n = counted(found)
    more = ", ".join(text.format(**n) for name, text in TOLD_MORE.items() if n[name])
    return TOLD.format(**n) + (f"; {more}." if more else ".")


def pair_sentences(found: list[dict]) -> list[str]:
    """The headline: what R^2 says about the choice between two SAEs, in Markdown lines. found: `pairs`."""
    if not found:
        return [NOTHING_TO_COMPARE]
    near = [row for row in found if same_l0(row)]
    many = "1 pair" if len(found) == 1 else f"{len(found)} pairs"
    text = [ALL_PAIRS.format(pairs=many, told=_told(found))]
    if not near:
        text.append(NONE_NEAR.format(factor=SAME_L0))
    elif len(near) < len(found):
        text.append(NEAR_PAIRS.format(n=len(near), factor=SAME_L0, told=_told(near)))
    return text


def pair_lines(found: list[dict]) -> list[str]:
    """The pairs to look at, inverted ones first, the clearest first."""
    order = list(SAYS)
    worth = sorted(
        (row for row in found if row["kind"] in order),
        key=lambda row: (order.index(row["kind"]), -clearness(row), _place(row)),
    )
    lines = []
    for row in worth[:NAMED]:
        r2, ce_rec = (estimate(row, f"delta_{metric}", 3) for metric in ("r2", "ce_rec"))
        lines.append(ONE_PAIR.format(**row, says=SAYS[row["kind"]], r2=r2, ce_rec=ce_rec))
    return lines + ([f"- and {len(worth) - NAMED} more in pairs.csv"] if len(worth) > NAMED else [])


def pair_report(found: list[dict], settings: dict) -> list[str]:
    """The report's first lines, in Markdown."""
    text = [f"**{' '.join(pair_sentences(found))}**", ""]
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
    *"sae layer k l0 r2 r2_nosink cosine ce_rec".split(),
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
## Can its R² be trusted?

{pairs}
{warnings}
## One by one

{headline}

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


def _best_first(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: -row["ce_rec"])


def headline(rows: list[dict]) -> str:
    """One line per SAE, best CE_rec first."""
    lines = []
    for row in _best_first(rows):
        interval = bounds(row["ce_rec_lo"], row["ce_rec_hi"], 3)
        residual = estimate(row, "ce_rec_residual", 3)
        lines.append(row | {"ce_rec interval": interval, "residual": residual})
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
    """The report's section, in Markdown lines: the pairs, then one line per SAE, best CE_rec first. found:
    `pairs`.
    """
    ranked = _best_first(rows)
    text = REPORT.format(
        pairs="\n".join(pair_report(found, settings)),
        warnings="".join(f"- **{line}**\n" for line in warnings(ranked)),
        headline=headline(rows),
        flag=FLAG_TEXT,
        residual=RESIDUAL.format(at_least=CURVE_OF + 1),
        libraries=markdown(ranked, ["sae", "r2", *LIBRARIES]),
        libraries_nosink=markdown([_without_sinks(row) for row in ranked], ["sae", "r2", *LIBRARIES]),
        definitions="\n".join(f"{name}: {meaning}." for name, meaning in LIBRARIES.items()),
        contexts=_contexts(rows),
    )
    return text.split("\n")
