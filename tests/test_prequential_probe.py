"""The bounded observer on sources whose entropy is known, and on inputs that tell nothing."""

import math

from helpers import one_hook
from transport_geometry.measuring import prequential_probe
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.prequential_probe import observe
from transport_geometry.records.tables import as_csv, read_table
from transport_geometry.saes.sae import tied_init

import numpy as np
import pytest
import torch


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def bits_of(log_p):
    """Mean entropy of rows of natural log-probabilities [n,V], in bits."""
    return -(log_p.exp() * log_p).sum(1).mean().item() / math.log(2)


def teacher(n=50_000, held=5_000, d=32, V=64, rank=8):
    """(x, y, held x, held y, entropy in bits): labels from a softmax of rank 8."""
    generator = drawn(0)
    W = torch.randn(V, rank, generator=generator) @ torch.randn(rank, d, generator=generator)
    x = torch.randn(n + held, d, generator=generator)
    log_p = torch.log_softmax(x @ W.T * 0.9 / math.sqrt(d), 1)
    y = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(1)
    return x[:n], y[:n], x[n:], y[n:], bits_of(log_p)


def test_an_observer_of_the_teachers_rank_gets_near_its_entropy_and_one_below_does_not():
    *data, entropy = teacher()
    assert entropy == pytest.approx(2.94, abs=0.05)
    right, poor = (observe(*data, 64, rank=rank) for rank in (8, 2))
    assert entropy - 0.05 < right.held.mean() < entropy + 0.25
    assert poor.held.mean() > entropy + 1.3 and poor.learnt < 0.5 * right.learnt
    assert not right.refused


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_independent_pairs_cost_their_entropy_and_are_refused(spread):
    """Uniform labels, and others: that labels are not equally frequent is no knowledge of x."""
    for seed in range(6):
        generator = drawn(seed)
        log_p = torch.log_softmax(spread * torch.randn(1, 64, generator=generator), 1)
        x = torch.randn(20_000, 32, generator=generator)
        y = torch.multinomial(log_p.exp()[0], len(x), replacement=True, generator=generator)
        seen = observe(x[:16_000], y[:16_000], x[16_000:], y[16_000:], 64)
        assert seen.held.mean() == pytest.approx(bits_of(log_p), abs=0.12)
        assert seen.refused and seen.learnt < 100, seed


def test_an_input_that_never_changes_is_refused():
    y = torch.randint(0, 5, (3000,), generator=drawn(0))
    x = torch.ones(3000, 4)
    assert observe(x[:2000], y[:2000], x[2000:], y[2000:], 5).refused


def test_the_code_of_a_stationary_source_is_its_entropy_and_what_is_learnt_of_it():
    """A Markov source: L is above n H, by less than a tenth of it, and K is what was too much."""
    generator = drawn(3)
    log_p = torch.log_softmax(2 * torch.randn(12, 12, generator=generator), 1)
    state = torch.randint(0, 12, (80_000,), generator=generator)
    y = torch.multinomial(log_p.exp()[state], 1, generator=generator).squeeze(1)
    x = torch.nn.functional.one_hot(state, 12).float()
    n, entropy = 64_000, bits_of(log_p[state])
    seen = observe(x[:n], y[:n], x[n:], y[n:], 12)
    assert seen.held.mean() == pytest.approx(entropy, abs=0.05)
    assert 0 < seen.code / n - entropy < 0.1 * entropy
    assert seen.learnt == pytest.approx(seen.code - n * entropy, abs=0.04 * n)
    # what the table alone would have cost is the most that can be learnt
    in_table = -(torch.bincount(y[:n]) / n).log2()[y[:n]].sum().item()
    assert 0 < seen.learnt < in_table - n * entropy


def test_a_pair_is_coded_before_it_is_learnt():
    """One step's worth of pairs is coded by the table, and K is 0; a second step's is not."""
    x, y, *held, _ = teacher(n=2 * prequential_probe.BATCH, held=10)
    for steps in (1, 2):
        n = steps * prequential_probe.BATCH
        seen = observe(x[:n], y[:n], *held, 64)
        count = torch.bincount(y[:n], minlength=64) + 0.5
        in_table = -(count / count.sum()).log2()[y[:n]].sum().item()
        if steps == 1:
            assert seen.code == pytest.approx(in_table, rel=1e-6)
            assert seen.learnt == pytest.approx(0, abs=1e-3)
        else:
            assert abs(seen.code - in_table) > 1e-2


def test_the_seed_sets_the_order_and_what_is_held_out_takes_no_part():
    x, y, held_x, held_y, _ = teacher(n=4000, held=500)
    one, again, other = (observe(x, y, held_x, held_y, 64, seed=seed) for seed in (0, 0, 1))
    assert one.held.tobytes() == again.held.tobytes() and (one.code, one.learnt) == (again.code, again.learnt)
    assert other.code != one.code
    moved = observe(x, y, 3 * held_x + 1, held_y, 64)
    assert (moved.code, moved.learnt) == (one.code, one.learnt)
    assert not np.allclose(moved.held, one.held, atol=0.1)  # its scale is that of the training part
    units = observe(8 * x + 2, y, 8 * held_x + 2, held_y, 64)
    assert units.held == pytest.approx(one.held, abs=1e-2)


def test_documents_are_resampled_and_not_tokens():
    document = np.repeat(np.arange(10), 2)
    bits = np.repeat(np.arange(10.0), 2 * 50)
    mean, lo, hi = prequential_probe.mean_of_documents(bits, document)
    assert mean == 4.5 and lo < 3 and hi > 6
    assert prequential_probe.mean_of_documents(np.ones(1000), document) == (1, 1, 1)


# ------------------------------------------------------------------------------------------- once per hook
@pytest.mark.slow
def test_the_study_of_a_hook():
    eval_set, cpu = one_hook(eval_seqs=8, ctx=64), torch.device("cpu")
    hook, rows = eval_set.hook, eval_set.held.input_ids
    random = tied_init(64, 256, 8, 0, hook.head(rows).flatten(0, 1).mean(0)).requires_grad_(False)
    (row,) = prequential_probe.study(eval_set, random, cpu)
    assert prequential_probe.study(eval_set, random, cpu) == [row]
    assert row["lost_lo"] < row["lost"] < row["lost_hi"] and row["lost"] > 0.1 and not row["refused"]
    assert row["lost"] == pytest.approx(row["loss_h_hat"] - row["loss_h"])
    assert row["loss_h"] < row["table"] and row["k_auc_h"] > row["k_auc_h_hat"] > 0
    assert row["pairs"] == 260 * 63
    sums = evaluate(hook, rows, {"sae": random}, 4)["sae"].sums
    dce = (sums["ce_recon"] - sums["ce_orig"]).sum() / sums["n"].sum()
    assert row["dce_bits"] == pytest.approx(dce / math.log(2), rel=1e-4)

    class Identity(type(random)):
        def reconstruct(self, h):
            return None, None, h

    whole = Identity(*random.parameters(), 8)
    (row,) = prequential_probe.study(eval_set, whole, cpu)
    assert (row["lost"], row["dce_bits"], row["k_auc_h"]) == (0, 0, row["k_auc_h_hat"])


def test_a_hook_at_which_nothing_was_learnt_is_refused_with_the_rule(tmp_path):
    row = dict(model="s", layer=1, k=8, pairs=16320, table=8.0, loss_h=6.0, loss_h_hat=6.4)
    row |= dict(code_h=5.0, code_h_hat=6.0, k_auc_h=2e4, k_auc_h_hat=1.5e4, refused=0)
    row |= dict(lost=0.4, lost_lo=0.3, lost_hi=0.5, dce_bits=0.6, dce_bits_lo=0.5, dce_bits_hi=0.7)
    refused = row | dict(layer=2, k_auc_h_hat=-3.0, refused=1, lost=np.nan, lost_lo=np.nan, lost_hi=np.nan)
    said = prequential_probe.section([row, refused])
    (tmp_path / "observer.csv").write_bytes(as_csv([row, refused], list(row)))
    assert prequential_probe.section(read_table(tmp_path / "observer.csv")) == said
    assert said.count("| refused") == 1 and "0.40 bits less" in said.split("\n")[0]
