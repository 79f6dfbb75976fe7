"""What is said of one SAE, on errors whose answer is known: planted in SAE files that go through --sae, and
given to `evaluate` as they are.
"""

import math

import zygote
from helpers import quick_sae, script, tiny_model
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records.results import load_results
from transport_geometry.records.tables import read_table
from transport_geometry.reporting.sae_words import FINDINGS, KL_MARGIN, SINK_MARGIN, said_of
from transport_geometry.saes.train import activation_chunks
from transport_geometry.statistics.resampling import document_weights
from transport_geometry.text import heldout

import numpy as np
import pytest
import torch
from test_formats import write_lens

LAYER, CTX, SEQS = 3, 64, 48


def a_row(**findings):
    """A row in which nothing is found, but what is given: column=(value, lo, hi)."""
    row = dict(ce_orig=3.0, ce_recon=3.3, ce_zero=9.0, ce_rec=0.9, ce_rec_sinkclean=0.9, r2=0.8)
    row |= dict(r2_nosink=0.8, n_seq=12, n_tok=3060, n_sink=13, calm_share=0.01, kl_excess=0.7)
    nothing = dict.fromkeys(("sink_harm", "sink_r2", "sink_r2_lost"), (0.0, -0.001, 0.001))
    nothing |= dict(ce_over_zero=(-5.7, -5.8, -5.6), ce_below_zero=(-0.9, -0.92, -0.88))
    nothing |= dict(kl_deficit=(-0.7, -0.8, -0.6))
    for name, ends in (nothing | findings).items():
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), ends))
    return row


def test_the_first_finding_that_holds_is_the_word():
    over, sink = (1.0, 0.5, 1.5), (0.1, SINK_MARGIN + 0.01, 0.2)
    everything = dict.fromkeys(("ce_over_zero", "ce_below_zero"), over)
    everything |= dict.fromkeys(("sink_harm", "sink_r2"), sink) | dict(kl_deficit=over)
    findings = [finding for finding in FINDINGS if finding.column != "sink_r2_lost"]
    names = [finding.word for finding in findings]
    assert names[:4] == [
        "worse than zero ablation",
        "more than doubles CE",
        "breaks the sink",
        "R² is the sink's",
    ]
    for finding in findings:
        said = said_of(a_row(**everything), 12)
        first, *others = names[names.index(finding.word) :]
        assert (said["word"], said["also"]) == (first, ", ".join(others)), finding
        del everything[finding.column]
    assert said_of(a_row(), 12)["word"] == "as it reads"


def test_no_clean_bill_by_omission():
    """An interval that holds the margin has shown nothing, and one that is not there even less."""
    across = said_of(a_row(sink_r2=(0.06, 0.04, 0.08)), 12)
    assert across["word"] == "cannot be judged" and "about 48 documents would tell" in across["says"]
    just = said_of(a_row(sink_r2=(0.06, SINK_MARGIN + 1e-4, 0.08)), 12)
    assert just["word"] == "R² is the sink's"
    one = said_of(a_row(kl_deficit=(0.0, 0.0, 0.0)), 1)
    assert one["word"] == "cannot be judged" and "there is no interval" in one["says"]
    earlier = said_of(a_row(kl_deficit=(math.nan,) * 3) | dict(kl_excess=math.nan), 12)
    assert earlier["word"] == "cannot be judged" and "was not measured" in earlier["says"]


def test_what_is_said_has_the_rows_own_numbers():
    row = a_row(sink_r2=(0.37, 0.36, 0.38)) | dict(r2=0.998, r2_nosink=0.626)
    assert said_of(row, 12)["says"].startswith("R² 0.998 is 13 positions in 3,060; without them it is 0.626.")
    row = a_row(sink_r2_lost=(1.2, 1.1, 1.3)) | dict(r2=-0.49, r2_nosink=0.685)
    assert said_of(row, 12)["word"] == "R² is the sink's"
    row = a_row(sink_harm=(1.8, 1.7, 1.9)) | dict(ce_rec=-1.16, ce_rec_sinkclean=0.64, n_sink=12)
    assert "83% of the harm is one position a sequence" in said_of(row, 12)["says"]
    both = dict(ce_over_zero=(1.0, 0.5, 1.5), ce_below_zero=(3.0, 2.5, 3.5), sink_harm=(1.8, 1.7, 1.9))
    said = said_of(a_row(**both) | dict(ce_rec=-3.0), 12)
    assert said["word"] == "worse than zero ablation" and "--leave-sinks" in said["read"]
    assert "no sink by the rule has 20% of SST" in said_of(a_row() | dict(calm_share=0.2), 12)["says"]


# ---------------------------------------------------------------------------------------------- the files
def write_affine(folder, W: torch.Tensor, mean: torch.Tensor) -> None:
    """h_hat = mean + W (h - mean) as a ReLU SAE in SAELens' format: each dimension has a latent for either
    sign. W [d,d], mean [d].
    """
    d = len(mean)
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    tensors = dict(W_enc=both.t(), b_enc=torch.zeros(2 * d), W_dec=both @ W.t().float(), b_dec=mean)
    meta = dict(sae_lens_version="6.54.12", model_name="stdlib-s", context_size=CTX, prepend_bos=False)
    meta |= dict(hook_name=f"blocks.{LAYER}.hook_resid_post")
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    write_lens(folder, "standard", tensors, d_in=d, d_sae=2 * d, k=None, metadata=meta)


@pytest.fixture(scope="module")
def hook():
    """stdlib-s at block 3, from training text: model, an SAE, h's mean [d] and covariance [d,d], eigenvectors
    of G [d,d], ascending.
    """
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))
    h, sink = next(activation_chunks(Hook(model, LAYER), "stdlib", tokenizer, 128, 40_000, "keep"))
    rows = next(heldout.train_rows("stdlib", tokenizer, CTX, 64))
    uniforms = torch.rand(4, 64, CTX - 1, generator=torch.Generator().manual_seed(0))
    _, (_, *gradients) = Hook(model, LAYER).clean_pass(rows, Hook(model, LAYER).head(rows), uniforms)
    G = sum(torch.einsum("btd,bte->de", g, g).double() for g in gradients)
    centred = (h - h.mean(0)).double()
    sigma, of_g = centred.T @ centred / len(h), torch.linalg.eigh(G).eigenvectors
    return model, quick_sae(h, sink, 16), h.mean(0), sigma, of_g


def rotation(d: int, seed: int) -> torch.Tensor:
    noise = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise)[0]


def isotropic(sigma, of_g):
    length = 0.3 * (sigma.trace() / 64).sqrt()
    return length * rotation(64, 1) @ torch.linalg.inv(torch.linalg.cholesky(sigma))


# name -> (what is said, the error's matrix from h - mean, given Sigma and the eigenvectors of G)
READS, MILDER, UNJUDGED = "as it reads", "milder than random", "cannot be judged"
KNOWN = {
    "top8": (READS, lambda sigma, of_g: -0.5 * of_g[:, -8:] @ of_g[:, -8:].T),
    "low32": (MILDER, lambda sigma, of_g: -0.3 * of_g[:, :32] @ of_g[:, :32].T),
    # a lower R² than top8's, and a higher CE_rec
    "low32-larger": (MILDER, lambda sigma, of_g: -0.42 * of_g[:, :32] @ of_g[:, :32].T),
    "isotropic": (READS, isotropic),
    "rotated": (READS, lambda sigma, of_g: 0.3 * rotation(64, 2)),
    "exact": (UNJUDGED, lambda sigma, of_g: torch.zeros(64, 64, dtype=torch.float64)),  # up to rounding
    "shrunk": (READS, lambda sigma, of_g: -0.7 * torch.eye(64, dtype=torch.float64)),
}


@pytest.fixture(scope="module")
def audited(hook, tmp_path_factory):
    """(results folder, what was printed) of audit.py on the files of KNOWN."""
    _, _, mean, sigma, of_g = hook
    folder = tmp_path_factory.mktemp("known")
    for name, (_, error) in KNOWN.items():
        write_affine(folder / "saes" / name, torch.eye(64, dtype=torch.float64) + error(sigma, of_g), mean)
    size = f"--eval-seqs {SEQS} --ctx {CTX} --device cpu --basis *=raw".split()
    places = "--sae", folder / "saes", "--out", folder / "out"
    done = script("audit.py", *places, *size, setup=zygote.UNDRAWN)
    return folder / "out", done.stdout


def test_known_errors_through_the_command(audited):
    out, printed = audited
    rows = {row["sae"].rpartition("/")[2]: row for row in read_table(out / "audit.csv")}
    assert {name: (row["word"], KNOWN[name][1]) for name, row in rows.items()} == KNOWN
    exact = rows.pop("exact")
    assert math.isnan(exact["kl_excess"]) and "there is no error" in exact["says"]
    for row in rows.values():
        assert row["kl_excess_lo"] < row["kl_excess"] < row["kl_excess_hi"]
    excess = {name: row["kl_excess"] for name, row in rows.items()}
    # along what the model feels most, in no direction more than in another, along what it feels least
    assert excess["top8"] > KL_MARGIN and max(excess["low32"], excess["low32-larger"]) < -KL_MARGIN
    assert max(abs(excess["rotated"]), abs(excess["isotropic"])) < KL_MARGIN / 2
    for name, (says, _) in KNOWN.items():
        assert any(line.startswith(f"{name} ") and line.endswith(says) for line in printed.splitlines()), name


def test_the_pairs_of_a_run(audited):
    """Two errors planted so that R² orders them against CE_rec, and one of them with half of its own error;
    each row again from the sequences.
    """
    out, _ = audited
    found = {
        frozenset(row[f"sae_{end}"].rpartition("/")[2] for end in "ab"): row
        for row in read_table(out / "pairs.csv")
    }
    n = len(KNOWN)
    assert len(found) == n * (n - 1) // 2
    row = found[frozenset(("top8", "low32-larger"))]
    assert row["kind"] == "inverts"
    for two in (("low32", "low32-larger"), ("low32", "shrunk")):
        assert found[frozenset(two)]["kind"] == "orders"
    assert row["sae_a"].endswith("top8") and row["delta_r2_lo"] > 0 > row["delta_ce_rec_hi"]
    assert row["delta_ce_rec"] == pytest.approx(row["ce_rec_a"] - row["ce_rec_b"], abs=2e-6)
    rows, sums = load_results(out)
    a, b = ([at["sae"] for at in rows].index(row[f"sae_{end}"]) for end in "ab")
    w = np.random.default_rng(5).multinomial(SEQS, np.full(SEQS, 1 / SEQS), 4000).astype(float)
    draws_a, draws_b = (2 - (w @ sums["ce_recon"][at]) / (w @ sums["ce_orig"][at]) for at in (a, b))
    width = np.subtract(*np.percentile(draws_a - draws_b, [97.5, 2.5]))
    assert row["delta_ce_rec_hi"] - row["delta_ce_rec_lo"] == pytest.approx(width, rel=0.15)
    for audit_row in read_table(out / "audit.csv"):
        assert audit_row["ce_rec_lo"] <= audit_row["ce_rec"] <= audit_row["ce_rec_hi"]


def test_the_null_row_of_a_run_holds_zero(audited):
    """null-gaussian goes the way of the SAEs, sampled: its excesses are 0 but for chance."""
    rows, sums = load_results(audited[0])
    d = sums.pop("d")
    with np.errstate(invalid="ignore"):
        values = computed(Sums(sums, document_weights(SEQS, 1000, 0), d))
    at = {row["sae"]: i for i, row in enumerate(rows)}
    for name in ("fed_excess", "kl_excess"):
        lo, hi = np.percentile(values[name][3:, at["null-gaussian"]], [2.5, 97.5])
        assert lo < 0 < hi, name
    nothing = ("fed_excess", "fed_iso_nosink", "kl_excess")
    assert np.isnan([rows[at["null-identity"]][name] for name in nothing]).all()


def test_a_trained_error_turned_at_random_costs_what_a_random_one_does(hook):
    """One rotation for all tokens, a new direction for each, and the null row's way: at the same hook, as
    long as the SAE's own error.
    """
    model, sae, mean, *_ = hook
    tokenizer = load_model("stdlib-s", torch.device("cpu"))[1]
    input_ids = heldout.heldout_rows("stdlib", tokenizer, ctx=CTX, n=SEQS).input_ids
    noise = torch.Generator().manual_seed(3)

    def error(x):
        return sae.reconstruct(x)[2] - x

    def turned(seed):
        Q = rotation(64, seed).float()
        return lambda x, mean: x + error(x) @ Q

    def anew(x, mean):
        direction = torch.randn(x.shape, generator=noise)
        return x + direction * (error(x).norm(dim=1) / direction.norm(dim=1))[:, None]

    reconstructions = {"drawn anew": anew} | {f"turned {seed}": turned(seed) for seed in (10, 11)}
    results = evaluate(Hook(model, LAYER), input_ids, reconstructions, 16)
    weights = document_weights(SEQS, 1000, 0)
    for name, result in results.items():
        values = computed(Sums({q: v[None] for q, v in result.sums.items()}, weights, 64))
        for metric in ("fed_excess", "kl_excess"):
            excess = values[metric][:, 0]
            lo, hi = np.percentile(excess[3:], [2.5, 97.5])
            assert abs(excess[0]) < KL_MARGIN / 2, (name, metric)
            if name == "drawn anew":
                assert lo < 0 < hi, metric


def test_isotropic_energy_is_the_mean_over_directions():
    """fisher_iso, which draws none, against the mean over the d axes of the error's own length: exact, for
    the axes sum to the trace.
    """
    model = tiny_model(dtype=torch.float32)
    input_ids = torch.randint(0, 41, (6, 12), generator=torch.Generator().manual_seed(5))

    def along(axis):  # by another length at every token
        return lambda x, mean: x + 0.1 * x.norm(dim=1, keepdim=True) * torch.eye(16)[axis]

    results = evaluate(Hook(model, 1), input_ids, {axis: along(axis) for axis in range(16)}, 6)
    for form in ("fisher", "fisher_nosink"):
        mean = sum(result.sums[form] for result in results.values()) / 16
        iso = results[0].sums[form.replace("fisher", "fisher_iso")]
        assert mean == pytest.approx(iso, rel=1e-4) and (iso > 0).all()
    assert (results[0].sums["fisher_iso"] > results[0].sums["fisher_iso_nosink"]).all()
