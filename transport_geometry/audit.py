"""The audit: for SAEs that others trained, what R^2 says of every pair; one row each, with every library's
R^2 under its name; the flag.

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model; C
SAEs, W re-weightings of the documents, of which row 0 is all of them and rows 3.. are resamples
(`conditions.measured`).
"""

import itertools

from transport_geometry.flag import FLAG_COLUMNS, FLAG_TEXT, NO_WIDTH
from transport_geometry.formats import hub_name
from transport_geometry.libraries import LIBRARIES
from transport_geometry.results import behind
from transport_geometry.stats import isotonic_predict
from transport_geometry.tables import bounds, markdown, span

import numpy as np

COLUMNS = (
    [
        "sae",
        "model",
        "layer",
        "format",
        "trained_on",
        "basis",
        "fvu_as_said",
        "fvu_otherwise",
        "ctx",
        "bos",
        "d_sae",
        "k",
        "l0",
        "alive",
    ]
    + [f"{name}{end}" for name in ("r2", *LIBRARIES) for end in ("", "_nosink")]
    + [
        "nmse_tok",
        "cosine",
        "ce_orig",
        "ce_recon",
        "dce",
        "ce_rec",
        "ce_rec_sinkclean",
        "frac_zero",
        "frac_mean",
        "kl",
        "swd_tok",
        "swd_seq",
        "swd_sampled",
        "rho",
        "fed",
        "fed_nosink",
        "fed_nosink_lo",
        "fed_nosink_hi",
        "flag",
        "fed_iso_nosink",
        "fed_excess",
        "fed_excess_lo",
        "fed_excess_hi",
        "kl_swd_ratio",
        "kl_swd_ratio_lo",
        "kl_swd_ratio_hi",
        "ce_rec_lo",
        "ce_rec_hi",
        "ce_rec_residual",
        "ce_rec_residual_lo",
        "ce_rec_residual_hi",
    ]
)
PAIRS = [
    "model",
    "layer",
    "ctx",
    "bos",
    "sae_a",
    "sae_b",
    "r2_a",
    "r2_b",
    "delta_r2",
    "delta_r2_lo",
    "delta_r2_hi",
    "ce_rec_a",
    "ce_rec_b",
    "delta_ce_rec",
    "delta_ce_rec_lo",
    "delta_ce_rec_hi",
    "l0_a",
    "l0_b",
    "kind",
]
KINDS = ("orders", "inverts", "claims", "misses", "neither", "undefined")
SAME_L0 = 1.5  # pairs whose L0 lie within this factor: the choice that a user has
RESOLUTION = 1e-5  # a difference of R^2 or CE_rec that float32 cannot tell from none: one SAE in two formats
CURVE_OF = 3  # other SAEs, at least, that a curve of CE_rec on R^2 is drawn through
NAMED = 10  # pairs, at most, that the report names


def audit_rows(saes: list[dict], values: dict, settings: dict) -> list[dict]:
    """Of audit.csv, sorted by model, layer and name. saes: rows as `leaderboard.flagged` gives them; values
    {metric: [W,C]}.
    """
    rows = []
    fed, ce = (np.percentile(values[name][3:], [2.5, 97.5], axis=0).T for name in ("fed_nosink", "ce_rec"))
    for row, (lo, hi), (ce_lo, ce_hi), residual in zip(saes, fed, ce, residuals(saes, values, settings)):
        said = settings["saes"][row["sae"]]
        rows.append(
            row
            | {name: said[name] for name in ("format", "basis", "ctx", "bos", "unseen")}
            | {
                "trained_on": hub_name(said["model"]) if said["model"] else "not said",
                "k": row["k"] or "none",
                "fed_nosink_lo": lo,
                "fed_nosink_hi": hi,
                "ce_rec_lo": ce_lo,
                "ce_rec_hi": ce_hi,
                **dict(zip(("ce_rec_residual", "ce_rec_residual_lo", "ce_rec_residual_hi"), residual)),
            }
        )
    return rows


# -------------------------------------------------------------------------------------------------- pairs
def comparable(saes: list[dict], settings: dict) -> dict[tuple, list[int]]:
    """{(model, layer, ctx, bos): indices of its SAEs}: those whose numbers come from the same activations at
    the same tokens.
    """
    groups = {}
    for i, row in enumerate(saes):
        said = settings["saes"][row["sae"]]
        groups.setdefault((row["model"], row["layer"], said["ctx"], said["bos"]), []).append(i)
    return groups


def kind(r2: tuple[float, float], ce_rec: tuple[float, float]) -> str:
    """What R^2 says of a pair, as CE_rec sees it: one of KINDS, from the 95% intervals (lo, hi) of both
    differences.

    `orders`: both differ, the same way; `inverts`: both differ, R^2 the other way; `claims`: R^2 differs and
    CE_rec is not shown to; `misses`: CE_rec differs and R^2 is not shown to. An interval without width (one
    sequence) shows nothing: `undefined`.
    """
    if not np.isfinite([r2, ce_rec]).all() or any(
        hi - lo < NO_WIDTH and max(-lo, hi) > RESOLUTION for lo, hi in (r2, ce_rec)
    ):
        return "undefined"
    by_r2, by_ce = (int(lo > RESOLUTION) - int(hi < -RESOLUTION) for lo, hi in (r2, ce_rec))
    if by_r2 and by_ce:
        return "orders" if by_r2 == by_ce else "inverts"
    return "claims" if by_r2 else "misses" if by_ce else "neither"


def pairs(saes: list[dict], values: dict, settings: dict) -> list[dict]:
    """Of pairs.csv: every comparable pair, `sae_a` the one with the higher R^2, differences a minus b, sorted
    by hook and names.

    saes: rows of conditions.csv; values {metric: [W,C]}. Both SAEs of a pair stand under the same resamples.
    """
    out = []
    for (model, layer, ctx, bos), members in comparable(saes, settings).items():
        for i, j in itertools.combinations(members, 2):
            a, b = sorted((i, j), key=lambda at: (-values["r2"][0, at], saes[at]["sae"]))
            row = dict(model=model, layer=layer, ctx=ctx, bos=bos)
            for end, at in (("a", a), ("b", b)):
                row |= {f"sae_{end}": saes[at]["sae"], f"l0_{end}": saes[at]["l0"]} | {
                    f"{m}_{end}": values[m][0, at] for m in ("r2", "ce_rec")
                }
            ends = {}
            for metric in ("r2", "ce_rec"):
                delta = values[metric][:, a] - values[metric][:, b]
                ends[metric] = lo, hi = tuple(np.percentile(delta[3:], [2.5, 97.5]))
                row |= {f"delta_{metric}": delta[0], f"delta_{metric}_lo": lo, f"delta_{metric}_hi": hi}
            out.append(row | {"kind": kind(ends["r2"], ends["ce_rec"])})
    return sorted(out, key=lambda row: [row[c] for c in PAIRS[:6]])


def residuals(saes: list[dict], values: dict, settings: dict) -> np.ndarray:
    """[C,3]: CE_rec less what R^2 lets expect, and the ends of its 95% interval: the increasing curve through
    the *other* SAEs, at its R^2.

    nan with fewer than CURVE_OF others on the same tokens, and at an R^2 beyond all of theirs: a curve held
    flat there would call the best SAE of every hook better than its R^2. The interval is over documents; the
    other SAEs are as they are.
    """
    out = np.full((len(saes), 3), np.nan)
    for members in comparable(saes, settings).values():
        # many SAEs: fewer resamples, each fit takes C steps
        rows = np.r_[0, 3 : min(len(values["r2"]), 3 + max(200, 20_000 // len(members)))]
        for i in members:
            others = [j for j in members if j != i]
            x, y, new = (
                values["r2"][rows][:, others],
                values["ce_rec"][rows][:, others],
                values["r2"][rows][:, [i]],
            )
            if len(others) < CURVE_OF or not x[0].min() <= new[0, 0] <= x[0].max():
                continue
            residual = values["ce_rec"][rows, i] - isotonic_predict(x, y, np.ones(x.shape), new)[:, 0]
            out[i] = residual[0], *np.percentile(residual[1:], [2.5, 97.5])
    return out


def clearness(row: dict) -> float:
    """How far a pair's differences lie from 0, in half widths of their intervals; of an inverted pair, the
    less clear of the two.
    """
    of = lambda m: abs(row[f"delta_{m}"]) / max(row[f"delta_{m}_hi"] - row[f"delta_{m}_lo"], NO_WIDTH) * 2
    return of("r2") if row["kind"] == "claims" else min(of("r2"), of("ce_rec"))


def same_l0(row: dict) -> bool:
    low, high = sorted((row["l0_a"], row["l0_b"]))
    return 0 < low and high <= SAME_L0 * low


def counted(found: list[dict]) -> dict[str, int]:
    return {name: sum(row["kind"] == name for row in found) for name in KINDS}


def pair_sentences(found: list[dict]) -> list[str]:
    """The headline: what R^2 says about the choice between two SAEs, in Markdown lines. found: `pairs`."""
    if not found:
        return [
            "No two of these SAEs can be compared (same model, layer and tokens): nothing is said about what R² orders."
        ]
    near, n = [row for row in found if same_l0(row)], counted(found)
    many = lambda number: f"{number} pair{'s' * (number != 1)}"

    def told(n: dict) -> str:
        rest = [f"in {n['misses']} CE_rec shows one that R² does not"] * bool(n["misses"]) + [
            f"in {n['neither']} neither does"
        ] * bool(n["neither"])
        rest += [f"{n['undefined']} have no interval"] * bool(n["undefined"])
        return (
            f"R² orders {n['orders']} as CE_rec does, inverts {n['inverts']}, and in {n['claims']} claims a difference that CE_rec does not show"
            + f"; {', '.join(rest)}" * bool(rest)
            + "."
        )

    text = [
        f"Of the {many(len(found))} of SAEs that can be compared (same model, layer and tokens), {told(n)}"
    ]
    if len(near) < len(found):
        text.append(
            f"Of the {len(near)} with about as many latents active (L0 within a factor of {SAME_L0:g}), {told(counted(near))}"
            if near
            else f"None of them has about as many latents active (L0 within a factor of {SAME_L0:g}) on both sides."
        )
    return text


def pair_lines(found: list[dict]) -> list[str]:
    """The pairs to look at, inverted ones first, the clearest first."""
    order = {"inverts": 0, "claims": 1}
    worth = sorted(
        (row for row in found if row["kind"] in order),
        key=lambda row: (order[row["kind"]], -clearness(row), [row[c] for c in PAIRS[:6]]),
    )
    lines = []
    for row in worth[:NAMED]:
        r2, ce = (span(*(row[f"delta_{m}{end}"] for end in ("", "_lo", "_hi")), 3) for m in ("r2", "ce_rec"))
        says = "inverted" if row["kind"] == "inverts" else "claimed, not shown"
        lines.append(
            f"- {says}: {row['sae_a']} over {row['sae_b']}: R² {r2}, CE_rec {ce} (L0 {row['l0_a']:.3g} and {row['l0_b']:.3g})"
        )
    return lines + ([f"- and {len(worth) - NAMED} more in pairs.csv"] if len(worth) > NAMED else [])


def pair_report(found: list[dict], settings: dict) -> list[str]:
    """The report's first lines, in Markdown."""
    text = [f"**{' '.join(pair_sentences(found))}**", ""]
    if not found:
        return text
    if lines := pair_lines(found):
        text += [*lines, ""]
    hooks = {}
    for row in found:
        hooks.setdefault(tuple(row[c] for c in PAIRS[:4]), []).append(row)
    if len(hooks) > 1:
        table = [
            dict(zip(PAIRS, hook)) | {"pairs": len(rows)} | counted(rows) for hook, rows in hooks.items()
        ]
        text += [markdown(table, [*PAIRS[:4], "pairs", *KINDS]), ""]
    return text + [
        f"Differences: the SAE of higher R² minus the other; 95% intervals, both SAEs under the same resamples of {behind(settings)}. Every interval "
        f"is for its pair alone: among {len(found)} pairs that did not differ at all, {0.05 * len(found):.4g} would be expected to be shown to differ by "
        "chance, in R² and again in CE_rec. All pairs: pairs.csv.",
        "",
    ]


def warnings(rows: list[dict]) -> list[str]:
    """What makes a row's numbers other than they seem."""
    text = []
    for row in rows:
        if row["trained_on"] not in ("not said", row["model"]):
            text.append(f"{row['sae']}: its files say {row['trained_on']}; measured on {row['model']}")
        if row["r2"] < 0:
            text.append(
                f"{row['sae']}: worse than predicting the mean (R² {row['r2']:.2f}); the wrong model, layer or normalisation?"
            )
        if row["unseen"]:
            text.append(
                f"{row['sae']}: never saw some positions ({', '.join(row['unseen'])}) and is patched there too; ce_rec_sinkclean and *_nosink "
                "leave sinks out"
            )
    return text


def headline(rows: list[dict]) -> str:
    """One line per SAE, best CE_rec first."""
    lines = [
        row
        | {
            "ce_rec interval": bounds(row["ce_rec_lo"], row["ce_rec_hi"], 3),
            "residual": span(*(row[f"ce_rec_residual{end}"] for end in ("", "_lo", "_hi")), 3),
        }
        for row in sorted(rows, key=lambda row: -row["ce_rec"])
    ]
    return markdown(
        lines,
        [
            "sae",
            "layer",
            "k",
            "l0",
            "r2",
            "r2_nosink",
            "cosine",
            "ce_rec",
            "ce_rec interval",
            "residual",
            "frac_zero",
            "frac_mean",
            "swd_tok",
            *FLAG_COLUMNS,
        ],
    )


def audit_report(rows: list[dict], found: list[dict], settings: dict) -> list[str]:
    """The report's section, in Markdown lines: the pairs, then one line per SAE, best CE_rec first. found:
    `pairs`.
    """
    ranked = sorted(rows, key=lambda row: -row["ce_rec"])
    text = (
        ["## Can its R² be trusted?", "", *pair_report(found, settings)]
        + [f"- **{line}**" for line in warnings(ranked)]
        + [""]
    )
    text += [
        "## One by one",
        "",
        headline(rows),
        "",
        FLAG_TEXT,
        "",
        "residual: CE_rec minus what the increasing curve of CE_rec on R², through the other SAEs on the same tokens, says at this "
        f"SAE's R²; `undefined` with fewer than {CURVE_OF + 1} SAEs, and for the lowest and the highest R², where there is no curve. "
        "frac_zero and frac_mean are ablation-normalised (what other libraries call loss or CE recovered), ce_rec "
        "= 2 - L_recon/L_orig is not. All columns: audit.csv.",
        "",
        "## One reconstruction, every library's R²",
        "",
        markdown(ranked, ["sae", "r2", *LIBRARIES]),
        "",
        markdown(
            [
                {
                    **row,
                    "r2": row["r2_nosink"],
                    **{n: row[f"{n}_nosink"] for n in LIBRARIES},
                    "sae": f"{row['sae']}, no sinks",
                }
                for row in ranked
            ],
            ["sae", "r2", *LIBRARIES],
        ),
        "",
        "r2: 1 - SSE/SST over the whole set (SAELens since 6.30).",
        "",
    ]
    text += [f"{name}: {meaning}." for name, meaning in LIBRARIES.items()]
    contexts = {(row["ctx"], row["bos"]) for row in rows}
    if len(contexts) > 1:
        text += [
            "",
            "Not all SAEs were measured on the same tokens: their files ask for contexts of "
            + ", ".join(f"{ctx} tokens{' after a BOS' if bos else ''}" for ctx, bos in sorted(contexts))
            + ". Compare within one of them.",
        ]
    return text + [""]
