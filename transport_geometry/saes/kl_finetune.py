"""KL finetuning ("finish"): a trained SAE is trained a little more, through the model, on KL(p || p_hat).

Braun et al. 2024 (arXiv:2405.12241) train SAEs on KL(p || p_hat) of the patched run; Karvonen 2025
(arXiv:2503.17272) does it for the last few percent of the tokens, together with the MSE, and closes 20-50% of
the CE gap. The SAE then reconstructs no better and does less harm: which proxies notice? The control has as
many steps on the MSE alone.

Shapes: B sequences, T positions, N = B*(T-1) patched positions, F = d_sae, d = d_model; G hooks.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transport_geometry.errors import Fault
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import DISTORTION, IDENTITY, PROXIES, SIGNED, Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.records.tables import markdown, short, span
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import eval_batch
from transport_geometry.saes.recipes import Statistics, Training, unit_norm_step
from transport_geometry.saes.sae import SAE, TopKSAE, TrainingSpec
from transport_geometry.saes.sinks import sinks_of
from transport_geometry.statistics.hook_dependence import MIN_EFFECTIVE_HOOKS
from transport_geometry.statistics.intervals import ALPHA, interval
from transport_geometry.statistics.resampling import RESAMPLES, bootstrap_weights
from transport_geometry.text import heldout

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm import tqdm

TOKEN_SHARE = 0.15  # tokens of a finish, as a share of the SAE's own
RATE_FACTOR = 0.2  # its rate over recipe `base`'s
START, MSE, KL = ARMS = ("start", "mse", "kl")
OTHERS = ("ce_rec", "dce", "kl", "fed_excess")  # columns besides the proxies
COLUMNS = ["model", "layer", "k", "arm", "steps", "tokens", *(proxy.name for proxy in PROXIES), *OTHERS]
# rows of `moves` besides the proxies
SHOWN = (("ce_rec", IDENTITY), ("kl", DISTORTION), ("fed_excess", SIGNED))
N_RESAMPLES = 2000


# ------------------------------------------------------------------------------------------- the training
def losses(hook: Hook, sae: TopKSAE, input_ids: Tensor, h: Tensor, kind: str) -> list[Tensor]:
    """The losses of a finish, means over patched positions: the squared error |h_hat - h|^2 and, for kind
    "kl", KL(p || p_hat) in nats with all positions that have a target patched at once, as in evaluation.

    input_ids [B,T], h [B,T,d]. Differentiable in the SAE's weights.
    """
    flat = h[:, :-1].flatten(0, 1)
    h_hat = sae.reconstruct(flat)[2]
    found = [(h_hat - flat).square().sum(1).mean()]
    if kind == KL:
        with torch.no_grad():
            log_p = hook.log_probs(input_ids, h)
        log_q = hook.log_probs(input_ids, torch.cat([h_hat.view_as(h[:, :-1]), h[:, -1:]], 1))
        pair = log_q.flatten(0, 1), log_p.flatten(0, 1)
        found.append(kl_div(*pair, log_target=True, reduction="batchmean"))  # the mean over positions
    return found


def finish(hook: Hook, batches: Sequence[Tensor], sae: TopKSAE, kind: str, rate: float) -> TopKSAE:
    """A copy of the SAE after one step on each of batches, [B,T] token ids.

    kind "mse": squared error; "kl": squared error and KL. Each term is divided by its value in the first
    batch before any step, so that both begin at 1 and no weight is chosen. Adam at `rate`, which falls
    linearly to 0; decoder rows kept at norm 1 as in recipe `base`; no AuxK, so dead latents stay dead. The
    rate is for activations scaled to E|h|^2 = d, as in training: biases, which are in h's own units, take it
    over the scale. Nothing is random. Raises Fault on a loss that is not finite.
    """
    sae = copy.deepcopy(sae).requires_grad_(True)
    start: list[float] = []
    for step, input_ids in enumerate(
        tqdm(batches, desc=f"{kind} finish", unit="step", delay=2, leave=False, disable=None)
    ):
        input_ids = input_ids.to(hook.device)
        h = hook.head(input_ids)
        if step == 0:
            optimiser = adam(sae, rate, h)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / len(batches))
        terms = losses(hook, sae, input_ids, h, kind)
        start = start or [term.item() for term in terms]
        loss = torch.stack([term / first for term, first in zip(terms, start)]).sum()
        if not math.isfinite(loss.item()):
            raise Fault(f"layer {hook.layer}: the loss of the {kind} finish is not finite at step {step}")
        optimiser.zero_grad()
        loss.backward()
        unit_norm_step(optimiser, sae.W_dec)
        schedule.step()
    return sae.requires_grad_(False)


def adam(sae: TopKSAE, rate: float, h: Tensor) -> torch.optim.Adam:
    """Recipe `base`'s, for an SAE of activations like h [B,T,d] that are not scaled to E|h|^2 = d."""
    scale = math.sqrt(h.shape[-1] / Statistics.of(h.flatten(0, 1), sinks_of(h).flatten()).square)
    weights, biases = [sae.W_enc, sae.W_dec], [sae.b_enc, sae.b_dec]
    fused = sae.W_dec.device.type in ("cpu", "cuda")
    groups = [{"params": weights, "lr": rate}, {"params": biases, "lr": rate / scale}]
    return torch.optim.Adam(groups, eps=6.25e-10, fused=fused)


def pace(budget: int, d_sae: int, ctx: int) -> tuple[int, int, float]:
    """(steps, sequences a step, rate) of the finish of an SAE of this budget: TOKEN_SHARE of its tokens, as
    many a step as it had, at RATE_FACTOR times the rate that it had before its decay.
    """
    batch, boost = Training.pace(budget)
    sequences = max(1, batch // ctx)
    steps = max(1, int(TOKEN_SHARE * budget) // (sequences * ctx))
    return steps, sequences, RATE_FACTOR * 2e-4 * math.sqrt(2**14 / d_sae) * boost


# ------------------------------------------------------------------------------------------- once per hook
def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> list[dict]:
    """Rows of finish.csv: the middle SAE of a hook as it is and after either finish, measured on the held-out
    rows. Both are finished on the same rows of the training side in the same order.

    No rows for an SAE that was not trained here: its budget, and so its finish, is unknown.
    """
    hook, held, middle = eval_set.hook, eval_set.held, eval_set.middle
    if not isinstance(middle.origin, TrainingSpec):
        return []
    assert isinstance(sae, TopKSAE)
    condition, ctx = middle.condition, held.input_ids.shape[1]
    steps, sequences, rate = pace(condition.tokens, condition.d_sae, ctx)
    split, data = middle.origin.split, eval_set.source.data
    rows = heldout.spread_rows(data, eval_set.tokenizer, ctx, steps * sequences, split, eval_set.bos)
    arms: dict[str, SAE] = {START: sae}
    for kind in (MSE, KL):
        arms[kind] = finish(hook, rows.split(sequences), sae, kind, rate)
    batch = eval_batch(hook, ctx)
    results = evaluate(
        hook, held.input_ids, arms, batch, document=held.document, label=f"finish {eval_set.label}"
    )
    sums = {q: np.stack([results[arm].sums[q] for arm in arms]) for q in results[START].sums}
    values = computed(Sums(sums, np.ones((1, len(held.input_ids))), eval_set.d))
    out = []
    for i, arm in enumerate(arms):
        done = 0 if arm == START else steps
        row = {"model": condition.model, "layer": condition.layer, "k": condition.k, "arm": arm}
        row |= {"steps": done, "tokens": done * sequences * (ctx - 1)}
        out.append({**row, **{name: float(values[name][0, i]) for name in COLUMNS[len(row) :]}})
    return out


# ------------------------------------------------------------------------------------------- over hooks
def moves(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """For CE_rec, KL, fed_excess and every proxy: at how many hooks its score (larger = better) is above the
    control's after the KL finish, the mean difference with its interval, and what that says.

    p: two-sided sign test over hooks. `notices`: the score goes where CE_rec goes, p < .05; `fooled`: the
    other way, p < .05; else `not shown`. All `undecided` below 6 hooks, or where CE_rec itself is not shown
    to move. Interval: hooks resampled within models, as the leaderboard's.
    """
    by_hook = {(row["model"], row["layer"], row["arm"]): row for row in rows}
    hooks = sorted({(row["model"], row["layer"]) for row in rows})
    meta = {"model": np.array([m for m, _ in hooks]), "layer": np.array([layer for _, layer in hooks])}
    weights = bootstrap_weights(meta, N_RESAMPLES, seed=0)
    out: list[dict[str, Any]] = []
    for name, score in (*SHOWN, *((proxy.name, proxy.score) for proxy in PROXIES)):
        after = np.array([[by_hook[*hook, arm][name] for hook in hooks] for arm in (MSE, KL)], float)
        control, through = score(after)
        change = through - control
        up, down = int((change > 0).sum()), int((change < 0).sum())
        known = up + down and np.isfinite(change).all()
        p = float(scipy.stats.binomtest(up, up + down).pvalue) if known else np.nan
        lo, hi = interval((weights @ change / weights.sum(1))[RESAMPLES])
        row: dict[str, Any] = {"metric": name, "up": up, "down": down, "change": float(change.mean())}
        shown = len(hooks) >= MIN_EFFECTIVE_HOOKS and p < ALPHA
        out.append(row | {"lo": lo, "hi": hi, "p": p, "shown": shown})
    target = out[0]
    for row in out:
        agrees = (row["up"] > row["down"]) == (target["up"] > target["down"])
        words = "not shown" if not row["shown"] else "notices" if agrees else "fooled"
        row["says"] = words if target["shown"] else "undecided"
    return out


TEXT = """\
**{answer}**

One SAE a hook (the middle one of the grid) is trained on for {tokens} more tokens of the training side, \
{steps} steps of Adam at {slower:.0%} of recipe base's rate, falling to 0: on the squared error and \
KL(p‖p̂) of the patched run, each divided by its value at the start, and in the control on the squared \
error alone, on the same rows in the same order. All numbers are of the held-out rows that the other \
tables are about.

{by_hook}

What the KL finish does over the MSE finish, {hooks} hooks:

{proxies}

change: mean over hooks of the score after the KL finish less that after the MSE finish (the leaderboard's \
scores, larger = better: −log10 of a distortion, so 0.03 is 7% less of it); hooks resampled within models. \
p: sign test over hooks, not corrected for the number of proxies. notices: the score goes where CE_rec \
goes; fooled: the other way; not shown: it does not move, or too little for these sequences to say \
(swd_seq and swd_sampled square sums over whole sequences, and are the noisiest).{no_interval} The KL \
finish is an intervention, made to lower KL: it shows what a proxy cannot see, not how often trained SAEs \
differ in it. How much a finish wins depends on how far the SAE had been trained.
"""


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown about finish.csv, the answer first. A pure function of its rows."""
    if not rows:
        return "**No SAE here was trained by this program, so none was finished.**\n"
    found = moves(rows)
    by_hook: dict[tuple, dict] = {}
    for row in rows:
        by_hook.setdefault((row["model"], row["layer"], row["k"]), {})[row["arm"]] = row
    shown = []
    for (model, layer, k), arms in sorted(by_hook.items()):
        line = {"model": model, "layer": layer, "k": k}
        for name, title in (("kl", "KL"), ("dce", "ΔCE"), ("r2", "R²"), ("nmse_tok", "nmse_tok")):
            line[title] = " → ".join(short(arms[arm][name]) for arm in ARMS)
        shown.append(line)
    proxies = [
        {
            "metric": row["metric"],
            "up": f"{row['up']} of {len(by_hook)}",
            "change": span(row["change"], row["lo"], row["hi"], 3),
            "p": row["p"],
            "says": "" if row["metric"] in OTHERS else row["says"],
        }
        for row in found
    ]
    done = [row for row in rows if row["arm"] != START]
    no_interval = " `undefined`: a model with fewer than 3 hooks, or a score that is not defined."
    return TEXT.format(
        answer=answer(found, rows),
        tokens=" or ".join(f"{n:,}" for n in sorted({row["tokens"] for row in done})),
        steps=" or ".join(map(str, sorted({row["steps"] for row in done}))),
        slower=RATE_FACTOR,
        by_hook=markdown(shown, list(shown[0])) + "\n\nAs trained → MSE finish → KL finish.",
        hooks=len(by_hook),
        proxies=markdown(proxies, list(proxies[0])),
        no_interval=no_interval if any(math.isnan(row["lo"]) for row in found) else "",
    )


def answer(found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The first sentence, from `moves` and the rows it is of."""
    target, hooks = found[0], len({(row["model"], row["layer"]) for row in rows})
    kl = {arm: np.mean([row["kl"] for row in rows if row["arm"] == arm]) for arm in ARMS}
    through, control = (f"{kl[arm] / kl[START] - 1:+.0%}" for arm in (KL, MSE))
    moved = (
        f"A finish through the model changes KL by {through} ({control} for an MSE finish of as many steps), "
        f"and its CE_rec is the higher one at {target['up']} of {hooks} hooks"
    )
    if hooks < MIN_EFFECTIVE_HOOKS:
        return f"{moved}: undecided what a proxy makes of it, with fewer than {MIN_EFFECTIVE_HOOKS} hooks."
    if not target["shown"]:
        p = short(target["p"])
        return f"{moved} (p = {p}): not shown to move, so no proxy can be said to notice or to miss it."
    groups = []
    words = {"notices": "what notices", "fooled": "what goes the other way", "not shown": "neither"}
    for says, what in words.items():
        names = [row["metric"] for row in found if row["says"] == says and row["metric"] not in OTHERS]
        groups.append(f"{what}: {', '.join(names) or 'none'}")
    return f"{moved}. Of the proxies, {'; '.join(groups)}."
