"""A finish lowers what it is told to, through the model, and its two arms differ in nothing else."""

from helpers import get_saes, log_probs_64, one_hook, tiny_model
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import PROXIES
from transport_geometry.models.lm import Hook
from transport_geometry.records.tables import as_csv, read_table
from transport_geometry.saes import kl_finetune
from transport_geometry.saes.sae import tied_init
from transport_geometry.text import heldout

import numpy as np
import pytest
import torch

RATE = 3e-3


@pytest.fixture(scope="module")
def tiny():
    """(hook, batches [20 of [4,12]], other rows [8,12], an SAE with the mean in its place)."""
    hook = Hook(tiny_model(dtype=torch.float32), 1)
    rows = torch.randint(0, 41, (88, 12), generator=torch.Generator().manual_seed(5))
    h = hook.head(rows[:80]).flatten(0, 1)
    return hook, rows[:80].split(4), rows[80:], tied_init(16, 64, 3, 0, h.mean(0)).requires_grad_(False)


def weights(sae):
    return {name: tensor.numpy().tobytes() for name, tensor in sae.state_dict().items()}


# ------------------------------------------------------------------------------------------- the loss
def test_the_gradient_is_that_of_finite_differences(monkeypatch):
    monkeypatch.setattr("transport_geometry.models.lm.log_probs", log_probs_64)
    hook = Hook(tiny_model(), 1)
    rows = torch.randint(0, 41, (3, 10), generator=torch.Generator().manual_seed(1))
    h = hook.head(rows)
    sae = tied_init(16, 64, 3, 0, h.flatten(0, 1).mean(0).float()).double()
    torch.stack(kl_finetune.losses(hook, sae, rows, h, "kl")).sum().backward()
    for name, tensor in sae.named_parameters():
        direction = torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(2))

        def at(step, tensor=tensor, direction=direction):
            with torch.no_grad():
                tensor += step * direction
                value = torch.stack(kl_finetune.losses(hook, sae, rows, h, "kl")).sum().item()
                tensor -= step * direction
            return value

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        assert (tensor.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7), name


def test_the_losses_are_means_over_the_patched_positions(tiny):
    """KL(p || p_hat) per token, not the other way round, as `evaluate` measures it by other means; the
    squared error is that of the same positions.
    """
    hook, _, rows, sae = tiny
    sse, kl = kl_finetune.losses(hook, sae, rows, hook.head(rows), "kl")
    sums = evaluate(hook, rows, {"sae": sae}, 4)["sae"].sums
    n = sums["n"].sum()
    assert kl.item() == pytest.approx(sums["kl"].sum() / n, rel=1e-4)
    assert sse.item() == pytest.approx(sums["sse"].sum() / n, rel=1e-5)
    (alone,) = kl_finetune.losses(hook, sae, rows, hook.head(rows), "mse")
    assert alone.item() == sse.item()


# ------------------------------------------------------------------------------------------- the training
def test_kl_falls_on_other_rows_and_more_than_under_the_control(tiny):
    hook, batches, rows, sae = tiny
    arms = {"start": sae}
    for kind in ("mse", "kl"):
        arms[kind] = kl_finetune.finish(hook, batches, sae, kind, RATE)
    found = evaluate(hook, rows, arms, 4)
    kl, sse = ({arm: found[arm].sums[q].sum() for arm in arms} for q in ("kl", "sse"))
    assert kl["kl"] < 0.95 * kl["mse"] and kl["kl"] < 0.9 * kl["start"]
    assert sse["mse"] < sse["start"] and sse["mse"] < sse["kl"]


def test_no_steps_leave_the_sae_as_it_is_and_the_same_steps_give_the_same_bytes(tiny):
    hook, batches, _, sae = tiny
    before = weights(sae)
    for kind in ("mse", "kl"):
        assert weights(kl_finetune.finish(hook, [], sae, kind, RATE)) == before
        once, again = (kl_finetune.finish(hook, batches[:5], sae, kind, RATE) for _ in range(2))
        assert weights(once) == weights(again) != before
        norms = torch.linalg.vector_norm(once.W_dec, dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        assert not any(tensor.requires_grad for tensor in once.parameters())
    assert weights(sae) == before  # it is a copy that is trained


def test_a_finish_does_not_know_in_which_units_activations_come(tiny):
    """The same function of activations ten times as large, in a model that reads a tenth of them: the same
    finish. Of the MSE arm, which needs no model.
    """
    hook, batches, rows, sae = tiny

    class Scaled(Hook):
        def head(self, input_ids):
            return 8 * super().head(input_ids)

    large = tied_init(16, 64, 3, 0, 8 * sae.b_dec).requires_grad_(False)
    one = kl_finetune.finish(hook, batches, sae, "mse", RATE)
    other = kl_finetune.finish(Scaled(hook.model, 1), batches, large, "mse", RATE)
    torch.testing.assert_close(other.W_dec, one.W_dec, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.b_enc, 8 * one.b_enc, rtol=1e-3, atol=1e-4)


def test_the_pace_is_a_share_of_the_trainings_own():
    assert kl_finetune.pace(100_000, 256, 256) == (58, 1, pytest.approx(0.2 * 2e-4 * 8 * 5))
    assert kl_finetune.pace(10**7, 16384, 256) == (366, 16, pytest.approx(0.2 * 2e-4 * 20))
    assert kl_finetune.pace(300, 256, 256)[:2] == (1, 1)


# ------------------------------------------------------------------------------------------- over hooks
def planted(hooks, better_ce=lambda i: True):
    """Rows of finish.csv: the KL arm has the better ce_rec, kl and swd_tok, the worse r2 and nmse_tok, and a
    cosine that goes up and down.
    """
    rows = []
    for i in range(hooks):
        for arm in kl_finetune.ARMS:
            row = dict(model="sml"[i // 3], layer=i % 3, k=8, arm=arm, steps=78 * (arm != "start"), tokens=9)
            row |= {p.name: 0.5 for p in PROXIES} | {"ce_rec": 0.9, "dce": 0.2, "kl": 0.2, "fed_excess": 0.1}
            if arm == "kl":
                up = 1 if better_ce(i) else -1
                row |= dict(ce_rec=0.9 + up * 0.01, kl=0.19, swd_tok=0.4, r2=0.45, nmse_tok=0.55)
                row |= dict(cosine=0.5 + 0.01 * (-1) ** i)
            rows.append(row)
    return rows


def test_a_proxy_notices_or_is_fooled_as_planted(tmp_path):
    found = {row["metric"]: row for row in kl_finetune.moves(planted(9))}
    assert (found["ce_rec"]["up"], found["ce_rec"]["down"], found["ce_rec"]["p"]) == (9, 0, 2 / 2**9)
    assert (
        found["swd_tok"]["says"] == "notices" and found["r2"]["says"] == found["nmse_tok"]["says"] == "fooled"
    )
    assert found["cosine"]["says"] == found["mse"]["says"] == "not shown"
    assert found["swd_tok"]["change"] == pytest.approx(np.log10(0.5 / 0.4))
    assert found["swd_tok"]["lo"] == pytest.approx(found["swd_tok"]["hi"])  # no hook differs
    rows = planted(9)
    (tmp_path / "finish.csv").write_bytes(as_csv(rows, list(rows[0])))
    assert kl_finetune.section(read_table(tmp_path / "finish.csv")) == kl_finetune.section(rows)


def test_undecided_with_few_hooks_or_where_ce_does_not_move():
    few = kl_finetune.moves(planted(5))
    assert {row["says"] for row in few} == {"undecided"} and np.isnan(few[0]["lo"])
    mixed = planted(8, better_ce=lambda i: i % 2)
    assert {row["says"] for row in kl_finetune.moves(mixed)} == {"undecided"}
    worse = {row["metric"]: row["says"] for row in kl_finetune.moves(planted(9, better_ce=lambda i: False))}
    assert worse["r2"] == "notices" and worse["swd_tok"] == "fooled"  # it is CE_rec that they are held to


# ----------------------------------------------------------------------------------------- an embedded model
@pytest.mark.slow
def test_the_study_of_a_hook(tmp_path):
    eval_set, cpu = one_hook(eval_seqs=12, ctx=128), torch.device("cpu")
    (sae,) = get_saes(eval_set.hook.model, eval_set.tokenizer, [eval_set.middle.origin], tmp_path)
    rows = kl_finetune.study(eval_set, sae, cpu)
    start, control, through = rows
    assert [row["arm"] for row in rows] == list(kl_finetune.ARMS) and list(start) == kl_finetune.COLUMNS
    assert start["steps"] == 0 and control["steps"] == through["steps"] == 29
    assert control["tokens"] == through["tokens"] == 29 * 2 * 127
    assert through["kl"] < 0.99 * control["kl"] and through["kl"] < 0.985 * start["kl"]
    assert through["ce_rec"] > control["ce_rec"] and control["mse"] <= start["mse"] < through["mse"]
    assert kl_finetune.study(eval_set, sae, cpu) == rows
    found = evaluate(eval_set.hook, eval_set.held.input_ids, {"sae": sae}, 4)["sae"].sums
    assert start["kl"] == pytest.approx(found["kl"].sum() / found["n"].sum())
    # what it is finished on is not what it is evaluated on
    taken = heldout.spread_rows("stdlib", eval_set.tokenizer, 128, 58)
    assert len(torch.unique(taken, dim=0)) == 58
    assert not (taken[:, None] == eval_set.held.input_ids).all(-1).any()
