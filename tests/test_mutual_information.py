"""Critics against Gaussian pairs of known MI and dimension; what is refused."""

import math

from helpers import tiny_model
from transport_geometry.errors import UserError
from transport_geometry.measuring import mutual_information
from transport_geometry.measuring.dimension import snr_dimension
from transport_geometry.measuring.mutual_information import Pairs, Schedule, Split
from transport_geometry.models.lm import Hook

import numpy as np
import pytest
import torch


def gaussian(rho, n: int, seed: int) -> Pairs:
    generator, rho = torch.Generator().manual_seed(seed), torch.tensor(rho)
    x, noise = torch.randn(2, n, 1, len(rho), generator=generator)
    return Pairs(x, rho * x + (1 - rho**2).sqrt() * noise)


def split(rho, n: int = 16384) -> Split:
    return Split(gaussian(rho, n, 0), gaussian(rho, n // 8, 1), gaussian(rho, n // 4, 2))


# ------------------------------------------------------------------------------------------------- estimators
def test_estimators_with_the_optimal_critic_give_the_mi():
    """log p(x,y)/p(x)p(y) of two Gaussian dimensions of rho .8 and .5, MI .655 nats."""
    rho, mi = torch.tensor([0.8, 0.5]), -0.5 * math.log((1 - 0.64) * (1 - 0.25))
    pairs = gaussian((0.8, 0.5), 3000, 0)
    x, y = pairs.x[:, 0], pairs.y[:, 0]
    square = (y[None] - rho * x[:, None]) ** 2 / (1 - rho**2)
    S = (-0.5 * torch.log(1 - rho**2) - square / 2 + y[None] ** 2 / 2).sum(-1)
    assert mutual_information.values(S, "infonce").mean().item() == pytest.approx(mi, abs=0.04)
    assert mutual_information.values(S + 1, "nwj").mean().item() == pytest.approx(mi, abs=0.05)
    assert mutual_information.values(S, "smile").mean().item() == pytest.approx(mi, abs=0.05)
    shifted = S + torch.randn(1, 3000)  # of every column
    assert mutual_information.values(shifted, "nwj").mean() < mutual_information.values(S + 1, "nwj").mean()


def test_infonce_is_bounded_by_log_b_and_the_others_are_not():
    S = 50 * torch.eye(16) + torch.randn(16, 16)
    assert mutual_information.values(S, "infonce").mean().item() == pytest.approx(math.log(16), abs=1e-3)
    for scale in (0.1, 1, 10, 1000):
        assert mutual_information.values(scale * torch.randn(16, 16), "infonce").max() <= math.log(16)
    assert mutual_information.values(S, "smile").mean() > 2 * math.log(16)


# ------------------------------------------------------------------------------------------------ the critics
@pytest.mark.parametrize("rho", [(0.9, 0.7, 0.5, 0.3), (0.95,) * 2 + (0.6,) * 6])
def test_the_separable_critic_counts_snr(rho):
    """The PR of a trained critic's embeddings is that of SNR^2, to a tenth."""
    row = mutual_information.critic_row(split(rho), 0.0, "infonce", mutual_information.SCHEDULES["separable"])
    assert row["dimension"] == pytest.approx(snr_dimension(np.array(rho)), rel=0.1)
    mi = -0.5 * np.log(1 - np.square(rho)).sum()
    assert 0.75 * mi < row["mi"] < mi + 3 * row["mi_se"]


def test_independent_pairs_are_refused():
    pairs = split((0.0,) * 4, 2048)
    for estimator in mutual_information.ESTIMATORS:
        rows = mutual_information.critic_rows(pairs, (0.0, 1.0), (estimator,), Schedule("separable", 50, 1))
        assert mutual_information.refusals(rows, math.log(mutual_information.BATCH)) == ["null", "null"]


def test_the_hybrid_critic_is_a_network_of_pairs():
    critic = mutual_information.Critic(3, 5, hybrid=True)
    x, y = torch.randn(4, 3), torch.randn(6, 5)
    z_x, z_y = critic.of_x(x), critic.of_y(y)
    W, b = torch.cat([critic.pair_x.weight, critic.pair_y.weight], 1), critic.pair_x.bias
    for i in range(4):
        for j in range(6):
            score = critic.pair(W @ torch.cat([z_x[i], z_y[j]]) + b)
            torch.testing.assert_close(critic(x, y)[i, j], score[0])


def test_the_same_twice_nobody_elses_random_numbers_and_the_best_of_two_starts():
    before, pairs = torch.get_rng_state(), split((0.9, 0.9), 1024)

    def row(kind, noise, starts):
        return mutual_information.critic_row(pairs, noise, "infonce", Schedule(kind, 30, starts))

    assert row("separable", 0.5, 1) == row("separable", 0.5, 1)
    assert torch.equal(torch.get_rng_state(), before)
    one, two = (row("hybrid", 0.0, starts) for starts in (1, 2))
    assert two["mi"] > 0.3 and two["mi_fit"] >= one["mi_fit"]  # the best start is kept


def test_a_batch_has_one_position_of_a_sequence():
    n = 300
    number = (10 * torch.arange(n)[:, None] + torch.arange(4)).float()[..., None]  # sequence and position
    seen = 0
    for rows, x, y in mutual_information.batches(
        Pairs(number, -number), 0.0, torch.Generator().manual_seed(0)
    ):
        assert len(set(rows.tolist())) == mutual_information.BATCH and torch.equal(x, -y)
        assert torch.equal((x[:, 0] / 10).long(), rows)
        seen += 1
    assert seen == 4 * (n // mutual_information.BATCH)


def test_too_few_sequences_are_refused():
    rows = mutual_information.critic_rows(
        split((0.9,), 800), (0.0, 1.0), ("infonce",), Schedule("separable", 5, 1)
    )
    assert np.isnan(rows[0]["mi"]) and mutual_information.refusals(rows, 4.85) == ["too few sequences"] * 2


# -------------------------------------------------------------------------------------------- what is refused
def rung(**change):
    return dict(mi=2.0, dimension=5.0, mi_fit=2.2, mi_se=0.02, mi_null=0.0, mi_null_se=0.02) | change


@pytest.mark.parametrize(
    "rows, said",
    [
        ([rung(), rung(dimension=6.0)], ["", ""]),
        ([rung(), rung(dimension=7.0)], ["ladder", "ladder"]),
        ([rung(), rung(dimension=7.0), rung(dimension=8.0)], ["ladder", "", ""]),
        ([rung()], ["ladder"]),
        ([rung(mi=0.09, mi_fit=0.09), rung()], ["null", "ladder"]),  # a refused neighbour says nothing
        ([rung(mi=0.3, mi_fit=0.3, mi_se=0.1), rung()], ["null", "ladder"]),
        ([rung(mi=0.3, mi_fit=0.3, mi_null=0.25), rung()], ["null", "ladder"]),
        ([rung(mi=4.2, mi_fit=4.3), rung(), rung()], ["saturation", "", ""]),
        ([rung(mi=1.0, mi_fit=1.5), rung(), rung()], ["overfit", "", ""]),
        ([rung(mi=1.6, mi_fit=1.2), rung(), rung()], ["overfit", "", ""]),
        ([rung(mi=math.nan), rung(), rung()], ["too few sequences", "", ""]),
    ],
)
def test_rules_of_refusal(rows, said):
    assert mutual_information.refusals(rows, math.log(mutual_information.BATCH)) == said
    if said[0] == "saturation":
        assert mutual_information.refusals(rows, None) == ["", "", ""]  # it needs a ceiling


def test_raw_logits_are_refused():
    with pytest.raises(UserError, match="raw logits are a linear function"):
        mutual_information.refuse_logits("logits", 41, 41)
    mutual_information.refuse_logits("final norm", 16, 41)


# ------------------------------------------------------------------------------------------- pairs of a model
def test_pairs_are_h_and_the_final_norm_at_the_same_position_without_sinks():
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(0, 41, (5, 12), generator=torch.Generator().manual_seed(0))
    pairs = mutual_information.pairs_at(Hook(model, 1), ids, 2, seed=0)
    out = model(ids, output_hidden_states=True).hidden_states
    whole = {tuple(h.tolist()): (s, t) for s, row in enumerate(out[2]) for t, h in enumerate(row)}
    assert pairs.x.shape == (5, 4, 16)
    for s in range(5):
        places = [whole[tuple(h.tolist())] for h in pairs.x[s]]
        assert {row for row, _ in places} == {s} and len({t for _, t in places}) == 4
        for (row, t), y in zip(places, pairs.y[s]):
            assert 0 < t < 11
            torch.testing.assert_close(y, out[-1][row, t])


def test_fisher_components_by_the_whole_matrix():
    """Eigenvalues of F^1/2 Cov(z) F^1/2 over the vocabulary, F = mean diag(p) - p p^T."""
    torch.manual_seed(0)
    unembedding = torch.nn.Linear(6, 30, bias=False)
    y = torch.randn(500, 6) * torch.tensor([3, 2, 1, 1, 0.5, 0.1])
    with torch.no_grad():
        z = unembedding(y).double()
    p = torch.softmax(z, -1)
    F = torch.diag(p.mean(0)) - p.T @ p / len(p)
    values, vectors = torch.linalg.eigh(F)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    centred = z - z.mean(0)
    truth = torch.linalg.eigvalsh(root @ (centred.T @ centred / len(z)) @ root).flip(0)
    A = mutual_information.fisher_components(y, unembedding)
    found = (y - y.mean(0)) @ A
    cov = (found.T @ found / len(y)).double()
    torch.testing.assert_close(cov.diagonal(), truth[: A.shape[1]], rtol=1e-3, atol=1e-6)
    assert (cov - cov.diagonal().diag()).abs().max() < 1e-3 * cov.max()
    kept = truth[: A.shape[1]].sum() / truth.sum()
    assert kept >= mutual_information.KEPT_VARIANCE > (kept - truth[A.shape[1] - 1] / truth.sum())
