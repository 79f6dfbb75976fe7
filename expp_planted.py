"""Exp-P: does the instrument find what was put there?

    python expp_planted.py                      # twins of an embedded model, six CPU-minutes
    python expp_planted.py --dry-run            # the commands that it runs, and no more
    python expp_planted.py --from outputs/expp_planted

Verdicts on real SAEs say *undertrained*, *gated*, *undecided*: honest, and no proof that an effect would be
found. Here the effects are planted (`transport_geometry/plant.py`), in twins of one model and in their SAEs,
and what Exp-A and Exp-B say of them, by their own commands on real text, is held against what must come out. A
sink at position 0, which owns the variance and changes no logit. Errors turned towards what the model feels,
so that H2 is true. SAEs that lag behind, and catch up. What must come out was written before.
"""

import hashlib
import json
import pathlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import GRID_FLAGS, parser_of, run_script
from transport_geometry import commands, ranks, store
from transport_geometry.condition import NULLS
from transport_geometry.errors import UserError
from transport_geometry.evaluate import Activations, activations, evaluate
from transport_geometry.figures import as_png, pyplot
from transport_geometry.lm import Hook
from transport_geometry.metrics import BY_NAME, METRICS, PROXIES, Sums, computed
from transport_geometry.models import load_model
from transport_geometry.plant import Gauge, regauge, split
from transport_geometry.run import eval_batch
from transport_geometry.scale import mismatch
from transport_geometry.tables import (
    as_csv,
    as_json,
    estimate,
    grouped,
    markdown,
    percent,
    plain,
    read_table,
    readable_count,
    signed,
)
from transport_geometry.text import heldout_rows

import numpy as np
import torch

MODEL, LAYER, CTX, SEQS = "stdlib-s", 3, 256, 24
NORM = 3700  # SST times 19 here, times 18 between the published models
SINKS = [f"{kind}{NORM}" for kind in ("null", "visible", "relative")]
NORMS = [462, 925, 1850, NORM]
LEAVES = {  # twin: the leaf of Exp-A's tree that must come out, and why
    "null900": ("N", "a sink moves R² alone, and little enough to be judged"),
    "starved0.1:50000": ("H0", "its SAEs had a tenth of the first budget and all of the later ones"),
    "turned0.6": ("H1", "its errors are felt more at every budget, and are as long"),
    "starved0.4+turned-0.5": ("H0+H1", "its errors are longer and felt less: CE_rec is as before"),
    f"null{NORM}": ("undecided", "the sink takes R² out of the plain model's range"),
}
AMOUNTS = (0.0, 0.5, 1.0)  # of turning, over hooks of two twins
MET = 0.005  # how far R² of the null twin may be from the closed form


# ------------------------------------------------------------------------------------------------ the parts
@dataclass(frozen=True)
class Part:
    """A command of Exp-A or Exp-B on planted twins, into a folder of its own."""

    name: str
    script: str
    flags: str

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        return out / self.name

    def command(self) -> str:
        return f"python {self.script}.py {self.flags}"


def with_plants(plants: Sequence[str], flags: str) -> str:
    return (
        f"--models {MODEL}@{LAYER} --plant {','.join(plants)} --eval-seqs {SEQS} --ctx {CTX} --expansion 4 "
        f"--seeds 0,1,2 {flags}"
    )


def twins(amount: float) -> list[str]:
    """Two twins whose errors are turned: the first mostly away from what the model feels, the second towards
    it, and by different amounts at different blocks.
    """
    return [f"{MODEL}+turned{a * amount:g}:{b * amount:g}" for a, b in ((-1, 0.4), (-0.4, 1))]


def at_all_blocks(models: Sequence[str], blocks: int = 6) -> str:
    return ",".join(f"{model}@{layer}" for model in models for layer in range(blocks))


GEOMETRY = "--k 8,24 --tokens 50k --expansion 4 --eval-seqs 16 --ctx 256"
GATE = Part(
    "gate",
    "expa",
    f"--models {','.join(f'{twin}@{LAYER}' for twin in twins(1))} --k 8,24 --tokens 10k,40k,50k "
    "--seeds 0,1,2 --expansion 4 --eval-seqs 16 --ctx 256",
)
PARTS = (
    Part("sinks", "expa", with_plants(SINKS, "--k 8 --tokens 30k,100k --sinks keep,drop")),
    Part("saelens", "expa", with_plants(SINKS[:2], "--k 8 --tokens 300k --recipe saelens")),
    Part("norms", "expa", with_plants([f"null{norm}" for norm in NORMS], "--k 8 --tokens 100k")),
    Part("leaves", "expa", with_plants(list(LEAVES), "--k 8,32 --tokens 10k,80k,100k")),
    GATE,
    *(
        Part(f"turned-{amount:g}", "expb", f"--models {at_all_blocks(twins(amount))} {GEOMETRY}")
        for amount in AMOUNTS
    ),
    Part("few-hooks", "expb", f"--models {at_all_blocks(twins(1), 2)} {GEOMETRY}"),
    Part(
        "sink-over-hooks",
        "expb",
        f"--models {at_all_blocks([MODEL, f'{MODEL}+null900'], 5)} {GEOMETRY}",
    ),
)


def run_parts(out: pathlib.Path, args: Any) -> None:
    """Every part by its own command; what a folder holds already is kept, and an interrupted one goes on."""
    for number, part in enumerate(PARTS, 1):
        print(f"[{number}/{len(PARTS)}] {part.command()}", flush=True)
        flags = [*shlex.split(part.flags), "--out", str(part.folder(out)), "--cache", str(args.cache)]
        flags += ["--device", args.device, *["--fresh"] * args.fresh]
        if part.script == "expb":  # else a verdict that lies about would be read
            flags += ["--verdict", str(GATE.folder(out) / "verdict.json")]
        commands.call(part.script, flags)


# ---------------------------------------------------------------------------- the models, and what they compute
def planted_models() -> list[str]:
    """The plain model, and every twin with a sink that a part trains SAEs on."""
    sinks = dict.fromkeys([*SINKS, *(f"null{norm}" for norm in NORMS)])
    return [MODEL, *(f"{MODEL}+{sink}" for sink in sinks)]


def canyon() -> list[dict]:
    """What the sinks do to the hook: participation ratio of the covariance with and without sink positions,
    SST over the plain model's, and the largest change of a logit. On the parts' evaluation text.
    """
    rows: list[dict] = []
    for name in planted_models():
        model, tokenizer = load_model(name, torch.device("cpu"))
        input_ids = heldout_rows("stdlib", tokenizer, CTX, SEQS).input_ids
        shared = activations(Hook(model, LAYER), input_ids, 8)
        with torch.no_grad():
            logits = model(input_ids[:4], use_cache=False).logits
        sst, pr = spectrum(shared, without_sinks=False)
        if not rows:
            plain_logits, plain_sst = logits, sst
        rows.append(
            {
                "model": name,
                "layer": LAYER,
                "pr": pr,
                "pr_nosink": spectrum(shared, without_sinks=True)[1],
                "sst_ratio": sst / plain_sst,
                "logits": (logits - plain_logits).abs().max().item(),
            }
        )
    return rows


def spectrum(shared: Activations, without_sinks: bool) -> tuple[float, float]:
    """(SST a token, participation ratio) of the covariance over the evaluated positions, float64."""
    h = shared.h[:, :-1][~shared.sink] if without_sinks else shared.h[:, :-1].flatten(0, 1)
    centred = h.double() - h.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    return values.sum().item(), (values.sum() ** 2 / values.square().sum()).item()


def gauges(d: int, ctx: int) -> dict[str, Gauge]:
    """Ways to write the same hook: a shift along the all-ones direction of another size at every position,
    which LayerNorm does not see; a rotation that keeps that direction; another length at every position.
    """
    generator = torch.Generator().manual_seed(0)
    ones, zeros = torch.ones(ctx, 1), torch.zeros(ctx, d)
    axis = torch.full((d, 1), d**-0.5, dtype=torch.float64)
    inside = torch.randn(d, d, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.cat([axis, inside[:, 1:]], 1))[0]  # its first column is the axis
    within = torch.linalg.qr(inside[1:, 1:])[0]
    turn = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), within) @ basis.T
    sizes = torch.randn(ctx, 1, generator=generator)
    return {
        "shift along 1": Gauge(ones, 20 * sizes.expand(ctx, d)),
        "rotation around 1": Gauge(ones, zeros, turn.float()),
        "length of each token": Gauge((0.5 * sizes).exp(), zeros),
    }


def gauge_suite(n_seq: int = 8, ctx: int = 64) -> list[dict]:
    """Every metric of one and the same reconstruction, written in each gauge: a row a metric."""
    found: dict[str, dict[str, float]] = {}
    for name, gauge in ({"as it is": None} | gauges(64, ctx)).items():
        model, tokenizer = load_model(MODEL, torch.device("cpu"))
        if gauge is not None:
            regauge(model, gauge)
        input_ids = heldout_rows("stdlib", tokenizer, ctx, n_seq).input_ids
        sums = evaluate(Hook(model, LAYER), input_ids, {"half": half(gauge, ctx)}, n_seq)["half"].sums
        values = computed(Sums({q: v[None] for q, v in sums.items()}, np.ones((1, n_seq)), 64))
        found[name] = {metric: float(value[0, 0]) for metric, value in values.items()}
    before = found.pop("as it is")
    rows = []
    for metric in (m.name for m in METRICS if np.isfinite(before.get(m.name, np.nan))):
        moved = {name: values[metric] - before[metric] for name, values in found.items()}
        rows.append({"metric": metric, "as it is": before[metric]} | moved)
    return rows


def half(gauge: Gauge | None, ctx: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A reconstruction that is smooth, so that rounding stays rounding: half of the directions, the rest at a
    fifth of their size.
    """
    basis = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))[0]

    def reconstruct(h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        x = h.view(-1, ctx - 1, h.shape[1])
        x = x if gauge is None else gauge.read(x)
        x = 0.2 * x + 0.8 * (x @ basis) @ basis.T
        return (x if gauge is None else gauge.write(x)).reshape(h.shape)

    return reconstruct


# --------------------------------------------------------------------------------- what must come out, and did
@dataclass(frozen=True)
class Check:
    """One planted truth: what was put there, what the instrument must say of it, and what it says."""

    planted: str
    must: str
    says: str
    found: bool


@dataclass(frozen=True, eq=False)
class Findings:
    """What the parts left behind, read again. Nothing of a part is computed a second time."""

    verdicts: dict[str, dict]  # {part: verdict.json}
    deltas: dict[str, list[dict]]  # {part of Exp-A: deltas.csv}
    saes: dict[str, list[dict]]  # {part: rows of conditions.csv, without null rows}
    flags: dict[str, list[dict]]  # {part of Exp-B: rows with their flag}
    canyon: list[dict]
    gauges: list[dict]

    def leaf(self, part: str, twin: str) -> str:
        """Exp-A's leaf on the plain model against a twin."""
        whole = self.verdicts[part]
        return next(v["leaf"] for v in [whole, *whole["other_arms"]] if v["large"].endswith(f"+{twin}"))

    def delta(self, part: str, twin: str, **cell: Any) -> dict:
        """The row of deltas.csv, plain model against twin, at the largest budget unless said."""
        pair = {"small": MODEL, "large": f"{MODEL}+{twin}"}
        here = [row for row in self.deltas[part] if (pair | cell).items() <= row.items()]
        return max(here, key=lambda row: row["tokens"])


def findings(out: pathlib.Path) -> Findings:
    """Raises UserError where a part is not finished, Damaged where a file is not as it was written."""
    verdicts, deltas, saes, flags = {}, {}, {}, {}
    for part in PARTS:
        record = part.folder(out) / store.RUN
        if "verdict.json" not in store.written(record):
            raise UserError(f"--from {out}: {part.name} is not finished there")
        verdicts[part.name] = json.loads(store.checked(record, "verdict.json").read_text(encoding="utf-8"))
        rows = read_table(store.checked(record, "conditions.csv"))
        saes[part.name] = [row for row in rows if row["recipe"] != "null"]
        if part.script == "expa":
            deltas[part.name] = read_table(store.checked(record, "deltas.csv"))
        else:
            found = measured(part.folder(out), verdicts[part.name]["settings"], N_RESAMPLES)
            flags[part.name] = flagged(found.saes, found.values)
    tables = [read_table(store.checked(out / store.RUN, name)) for name in ("canyon.csv", "gauges.csv")]
    return Findings(verdicts, deltas, saes, flags, *tables)


def checks(f: Findings) -> list[Check]:
    """Every planted truth, in the order of the report."""
    return [*of_sinks(f), *of_leaves(f), *of_geometry(f), *of_gauges(f)]


def of_sinks(f: Findings) -> list[Check]:
    moved = max(row["logits"] for row in f.canyon)
    at_norm = {row["model"]: row for row in f.canyon}
    plain_pr, planted = at_norm[MODEL]["pr"], at_norm[f"{MODEL}+null{NORM}"]
    pr = f"{plain_pr:.1f} → {planted['pr']:.2f}; without sinks {planted['pr_nosink']:.1f}"
    kept = abs(planted["pr_nosink"] / at_norm[MODEL]["pr_nosink"] - 1) < 0.02
    off = closed_form(f)
    out = [
        Check("sinks", "every logit within 1e-4", f"{moved:.0e}", moved <= 1e-4),
        Check("a sink", "PR falls below 2, and not without sinks", pr, planted["pr"] < 2 and kept),
        Check(f"null{NORM}", f"R² = 1 − SSE/SST′ within {MET}", f"off by {off:.4f}", abs(off) <= MET),
    ]
    for sink in SINKS:
        row = f.delta("sinks", sink, sinks="keep")
        says = f"ΔR² {estimate(row, 'delta_r2', 3)}, ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}"
        found = row["delta_r2_lo"] > 0 and row["delta_ce_rec_hi"] < 0
        out.append(Check(sink, "R² up, CE_rec down", says, bool(found)))
    row = f.delta("sinks", SINKS[0], sinks="drop")
    says = f"ΔCE_rec {estimate(row, 'delta_ce_rec', 3)}"
    found = row["delta_ce_rec_lo"] < 0 < row["delta_ce_rec_hi"]
    out.append(Check(f"{SINKS[0]}, dropped in training", "CE_rec as without it", says, bool(found)))
    return out


def closed_form(f: Findings) -> float:
    """R² of the null twin less what the plain model's SSE over the twin's SST says: 1 − (1 − R²) SST / SST′."""
    r2 = {twin: mean_at_end(f.saes["sinks"], f"{MODEL}{twin}", "r2") for twin in ("", f"+null{NORM}")}
    ratio = next(row["sst_ratio"] for row in f.canyon if row["model"] == f"{MODEL}+null{NORM}")
    return r2[f"+null{NORM}"] - (1 - (1 - r2[""]) / ratio)


def mean_at_end(saes: list[dict], model: str, metric: str) -> float:
    """Mean over seeds at the largest budget, sinks kept in training."""
    return float(np.mean([row[metric] for row in at_end(saes, model)]))


def at_end(saes: list[dict], model: str) -> list[dict]:
    """A model's SAEs of the largest budget, sinks kept in training, by seed."""
    here = [row for row in saes if row["model"] == model and not row["sae"].endswith("nosinks")]
    return [row for row in here if row["tokens"] == max(other["tokens"] for other in here)]


def of_leaves(f: Findings) -> list[Check]:
    expected = [("sinks", SINKS[0], "undertrained", "30k and 100k tokens are too few")]
    expected += [(part, twin, *LEAVES[part][twin]) for part in LEAVES for twin in LEAVES[part]]
    out = []
    for part, twin, leaf, why in expected:
        says = f.leaf(part, twin)
        out.append(Check(twin, f"Exp-A: {leaf} ({why})", says, says == leaf))
    says = f.verdicts["gate"]["leaf"]
    return [*out, Check("turned twins", "Exp-A: H1, which opens the gate", says, says == "H1")]


def of_geometry(f: Findings) -> list[Check]:
    whole, none = f.verdicts[f"turned-{AMOUNTS[-1]:g}"], f.verdicts["turned-0"]
    few, over = f.verdicts["few-hooks"], f.verdicts["sink-over-hooks"]
    right, wrong = flags_of(f.flags[f"turned-{AMOUNTS[-1]:g}"])
    says = f"{percent(right)} of those turned by 0.4 or more point there, {percent(wrong)} the other way"
    return [
        Check("errors turned", "H2: supported, behind an open gate", whole["leaf"], whole["leaf"] == "supported"),
        Check("errors turned", "flags point that way", says, right >= 0.5 and wrong == 0),
        Check(
            "errors turned by 0",
            "H2: not supported",
            none["leaf_if_ungated"],
            none["leaf_if_ungated"] != "supported",
        ),
        Check("four hooks", "H2: undecided", few["leaf_if_ungated"], few["leaf_if_ungated"] == "undecided"),
        Check(
            "a sink in half the hooks",
            "H2: beats-r2-only",
            over["leaf_if_ungated"],
            over["leaf_if_ungated"] == "beats-r2-only",
        ),
    ]


def flags_of(saes: list[dict]) -> tuple[float, float]:
    """(share that points the right way, the wrong way) of the SAEs whose errors are turned by 0.4 or more."""
    points = {"R² flatters this SAE": 1, "R² underrates it": -1}
    turns = [plants(row["model"])[0].turn(row["layer"], BLOCKS) for row in saes]
    judged = [(np.sign(turn), points.get(row["flag"], 0)) for turn, row in zip(turns, saes) if abs(turn) >= 0.4]
    right, wrong = ([turn == sign * flag for turn, flag in judged] for sign in (1, -1))
    return float(np.mean(right)), float(np.mean(wrong))


MUST_PASS = ("r2_ln", "kl", "ce_recon")  # every gauge
MUST_FAIL = ("r2", "cosine", "nmse_tok")  # the shift


def passes(row: dict, gauge: str) -> bool:
    """Is a metric the same in this gauge, to 1e-3 of its size?"""
    return bool(abs(row[gauge]) <= 1e-3 * max(abs(row["as it is"]), 1e-2))


def of_gauges(f: Findings) -> list[Check]:
    rows = {row["metric"]: row for row in f.gauges}
    names = [name for name in f.gauges[0] if name not in ("metric", "as it is")]
    kept = [m for m in MUST_PASS if all(passes(rows[m], name) for name in names)]
    moved = [m for m in MUST_FAIL if not passes(rows[m], names[0])]
    return [
        Check("three gauges", f"{', '.join(MUST_PASS)} stay", ", ".join(kept), len(kept) == len(MUST_PASS)),
        Check("the shift", f"{', '.join(MUST_FAIL)} move", ", ".join(moved), len(moved) == len(MUST_FAIL)),
    ]
