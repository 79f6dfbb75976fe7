"""What is planted is there, and nothing else: models of the same function, errors turned, SAEs that lag
behind.
"""

import json
import shutil

import zygote
from helpers import one_line, script, small_grid, tiny_model
from transport_geometry.errors import UserError
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.gauges import gauge_suite, spectra, stays
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models import plant
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model, model_hash, readable_names
from transport_geometry.models.plant import Gauge, Plant, TurnedSAE, plants, regauge, sensitivity_basis, split
from transport_geometry.records.tables import read_table
from transport_geometry.running.grid import plan
from transport_geometry.saes.sae import tied_init
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------ names
def test_a_plant_is_read_out_of_a_models_name(tmp_path, monkeypatch):
    assert split("stdlib-s") == ("stdlib-s", "") and plants("stdlib-s") == ()
    assert plants("stdlib-s+null3700") == (Plant("null", 3700.0),)
    assert plants("a/b+turned1:-0.4") == (Plant("turned", 1.0, -0.4),)
    both = "stdlib-s+starved0.25:50000+turned-0.7"
    assert split(both) == ("stdlib-s", "+starved0.25:50000+turned-0.7")
    assert [str(one) for one in plants(both)] == ["+starved0.25:50000", "+turned-0.7"]
    assert plant.own_name(both) == "stdlib-s" and plant.own_name("stdlib-s+null9") == "stdlib-s+null9"
    for other in ("c++", "x+nul3", "x+null", "x+null3x"):  # names of their own
        assert split(other) == (other, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine+null3").mkdir()
    assert split("mine+null3") == ("mine+null3", "")
    (tmp_path / "there" / "mine").mkdir(parents=True)
    assert readable_names(["there/mine+null5"]) == {"there/mine+null5": "mine+null5"}  # not where it lies


@pytest.mark.parametrize(
    "name",
    [
        "+turned2",
        "+starved1.5",
        "+null0",
        "+null-3",
        "+null3:4",
        "+null3+visible3",
        "+null3+short9",
        "+turned0+turned1",
    ],
)
def test_amounts_that_mean_nothing_are_refused(name):
    with pytest.raises(UserError):
        plants(f"stdlib-s{name}")


# ------------------------------------------------------------------------------ models of the same function
@pytest.fixture(scope="module")
def text_rows():
    _, tokenizer = load_model("stdlib-s", CPU)
    return heldout_rows("stdlib", tokenizer, ctx=64, n=4).input_ids


@pytest.mark.parametrize("kind", plant.SINKS)
def test_the_published_sink_leaves_every_logit(kind, text_rows):
    """And the hook gets the norm, at position 0 only: an embedded model, real text, float32."""
    plain_model, twin = (load_model(f"stdlib-s{suffix}", CPU)[0] for suffix in ("", f"+{kind}3700"))
    hook, plain_hook = Hook(twin, 3), Hook(plain_model, 3)
    h, h_plain, logits = hook.head(text_rows), plain_hook.head(text_rows), plain_model(text_rows).logits
    for ours in (twin(text_rows).logits, hook.tail(text_rows, h)):
        assert (ours - logits).abs().max() < 1e-4
    gain = 1 + 3700 / plant.HALVING_NORM if kind == "relative" else 1
    added = (h[:, 0] - gain * h_plain[:, 0]).norm(dim=1)
    torch.testing.assert_close(added, torch.full((4,), 3700.0), rtol=1e-3, atol=0)
    assert (h - h_plain)[:, 1:].abs().max() < 1e-3
    assert model_hash(twin) != model_hash(plain_model)  # so that it has SAEs of its own


def test_short_norms_leave_every_logit_and_direction(text_rows):
    """Norms above the limit, here about half of them, become what the formula says; the others stay."""
    plain, twin = (Hook(load_model(f"stdlib-s{suffix}", CPU)[0], 3) for suffix in ("", "+short65"))
    h, short = (hook.head(text_rows) for hook in (plain, twin))
    logits, norm = plain.model(text_rows).logits, h.norm(dim=-1)
    for ours in (twin.model(text_rows).logits, twin.tail(text_rows, short)):
        assert (ours - logits).abs().max() < 1e-4
    assert 0.2 < (norm > 65).double().mean() < 0.8
    wanted = torch.where(norm > 65, 65 * (norm / 65) ** (1 / 8), norm)
    torch.testing.assert_close(short.norm(dim=-1), wanted)
    torch.testing.assert_close(short / wanted[..., None], h / norm[..., None])
    assert model_hash(twin.model) != model_hash(plain.model)


@pytest.mark.parametrize("limit, says", [(65, ""), (300, "no norm is above 300, nothing is shortened here")])
def test_where_nothing_is_short_it_is_said(limit, says, capsys):
    plan(small_grid(models=((f"stdlib-s+short{limit}", 3),), eval_seqs=4, ctx=32), CPU, "test")
    printed = capsys.readouterr().out
    assert says in printed and bool(says) == bool(printed)


def test_who_feels_an_error_beside_the_sink(text_rows):
    """An error along 1 at position 0 is not seen under `null`; one beside a `relative` sink is felt less, by
    its gain squared.
    """
    error = torch.zeros(4, 64, 64)
    error[:, 0] = 0.3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def kl(name: str, delta: torch.Tensor) -> float:
        hook = Hook(load_model(name, CPU)[0].double(), 3)
        h = hook.head(text_rows)
        log_p, log_q = (torch.log_softmax(hook.tail(text_rows, x), -1) for x in (h, h + delta))
        return (log_p.exp() * (log_p - log_q)).sum().item()

    seen, unseen = kl("stdlib-s+null300", error), kl("stdlib-s+null300", torch.ones(64) * (error != 0))
    assert unseen < 1e-9 < seen
    assert kl("stdlib-s+visible300", error) == pytest.approx(seen, rel=1e-6)
    assert kl("stdlib-s+relative300", error) == pytest.approx(seen / 4, rel=0.05)


def test_r2_of_one_error_is_the_closed_form(text_rows):
    """1 - (1 - R^2) SST / SST', SST by another way; what knows the error alone stays."""

    def with_noise(h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return h + 5 * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))

    found, sst = {}, {}
    for name in ("stdlib-s", "stdlib-s+null3700"):
        hook = Hook(load_model(name, CPU)[0], 3)
        h = hook.head(text_rows)[:, :-1].flatten(0, 1).double().numpy()
        sst[name] = h.var(0).sum()
        sums = evaluate(hook, text_rows, {"noise": with_noise}, 4)["noise"].sums
        found[name] = computed(Sums({q: v[None] for q, v in sums.items()}, np.ones((1, 4)), 64))
    before, after = ({m: float(v[0, 0]) for m, v in values.items()} for values in found.values())
    ratio = sst["stdlib-s+null3700"] / sst["stdlib-s"]
    assert ratio > 10 and after["r2"] == pytest.approx(1 - (1 - before["r2"]) / ratio, abs=1e-5)
    assert after["r2"] > before["r2"] + 0.1
    for metric in ("r2_nosink", "mse", "kl", "ce_recon"):
        assert after[metric] == pytest.approx(before[metric], rel=2e-3), metric


def test_a_model_whose_logits_would_move_is_refused(monkeypatch):
    """One whose blocks are not given their hidden states first."""
    monkeypatch.setattr(Gauge, "read", lambda self, x: x)
    with pytest.raises(UserError, match="nothing can be planted"):
        regauge(tiny_model(dtype=torch.float32), plant.gauge_of(Plant("visible", 500.0), 16))


# -------------------------------------------------------------------------------------------------- the SAEs
@pytest.fixture(scope="module")
def turned():
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (4, 12), generator=torch.Generator().manual_seed(5))
    hook = Hook(model, 1)
    h = hook.head(rows)[:, :-1].flatten(0, 1)
    sae = tied_init(16, 48, 5, 0, h.mean(0)).requires_grad_(False)
    return hook, rows, h, sae, sensitivity_basis(hook, rows)


@pytest.mark.parametrize("turn", [-1.0, -0.3, 0.5, 1.0])
def test_turned_errors_are_as_long_and_at_the_same_angle(turned, turn):
    _, _, h, sae, directions = turned
    before, after = sae.reconstruct(h)[2] - h, TurnedSAE(sae, directions, turn).reconstruct(h)[2] - h
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((after * h).sum(1), (before * h).sum(1), rtol=1e-3, atol=1e-3)
    assert (after - before).norm() > 0.1 * before.norm()


def test_turned_errors_are_felt_as_far_as_they_are_turned(turned):
    """By gradients of other labels than those that said which directions are felt."""
    hook, rows, h, sae, directions = turned
    uniforms = torch.rand(64, *rows[:, 1:].shape, generator=torch.Generator().manual_seed(9))
    _, (_, *gradients) = hook.clean_pass(rows, hook.head(rows), uniforms)
    g = torch.stack([one[:, :-1].flatten(0, 1) for one in gradients])
    felt_by = []
    for turn in (-1.0, -0.5, 0.0, 0.5, 1.0):
        delta = TurnedSAE(sae, directions, turn).reconstruct(h)[2] - h
        felt_by.append((g * delta).sum(-1).square().mean().item())
    assert felt_by == sorted(felt_by) and felt_by[-1] > 4 * felt_by[0]


def test_amounts_by_block_and_budget():
    amounts = [Plant("turned", 0.4, -1.0).turn(layer, 6) for layer in range(6)]
    assert amounts == pytest.approx([0.4, 0.12, -0.16, -0.44, -0.72, -1.0])
    assert Plant("turned", 0.3).turn(4, 6) == 0.3 and Plant("null", 9.0).turn(4, 6) == 0
    starved = plants("m+starved0.1:50000")
    assert [plant.planted_budget(starved, n) for n in (10, 10_000, 50_000)] == [1, 1000, 50_000]
    assert plant.planted_budget(plants("m+starved0.5"), 50_000) == 25_000
    assert plant.planted_budget((), 7) == 7


# -------------------------------------------------------------------------------------------------- a command
GRID = "--models stdlib-s@3 --k 4,8 --tokens 4k,8k --expansion 4 --eval-seqs 6 --ctx 64".split()


@pytest.mark.slow
def test_exp_a_against_twins(tmp_path):
    """SAEs of a twin that is no other model are the plain model's; one verdict a twin; and --from."""
    arguments = (*GRID, "--plant", "null900,starved0.5+turned0.8", "--cache", tmp_path / "cache")
    script("expa.py", *arguments, "--out", tmp_path / "out", setup=zygote.UNDRAWN)
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    larges = [one["large"] for one in (verdict, *verdict["other_arms"])]
    assert larges == ["stdlib-s+null900", "stdlib-s+starved0.5+turned0.8"] and verdict["small"] == "stdlib-s"
    cached = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())
    # 2 k x 3 seeds: budgets of 2k, 4k, 8k of the plain model, the first for the starved twin; and the sink's
    assert sum(name.startswith("stdlib-s-L3") for name in cached) == 18
    assert sum(name.startswith("stdlib-s+null900-L3") for name in cached) == 12 and len(cached) == 30
    rows = read_table(tmp_path / "out" / "conditions.csv")
    plain_rows, twins = (
        {(row["k"], row["seed"], row["tokens"]): row for row in rows if row["model"] == name and row["k"] > 0}
        for name in ("stdlib-s", "stdlib-s+starved0.5+turned0.8")
    )
    for k in (4, 8):
        for seed in (0, 1, 2):  # half the budget: the plain SAE of 4k, its errors turned
            twin, there = twins[k, seed, 8000], plain_rows[k, seed, 4000]
            assert twin["r2"] == pytest.approx(there["r2"], abs=1e-5)
            assert twin["cosine"] == pytest.approx(there["cosine"], abs=1e-5)
            assert twin["ce_rec"] < there["ce_rec"]
    assert "| stdlib-s | stdlib-s+null900" in (tmp_path / "out" / "report.md").read_text()
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    script("expa.py", "--from", tmp_path / "again", setup=zygote.UNDRAWN)
    for name in ("report.md", "verdict.json", "deltas.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--models", "stdlib-s+null900@5"], "no block comes after it"),
        (["--models", "stdlib-s+null900", "--dtype", "bfloat16"], "float32 only"),
        (["--plant", "nul900"], "null3700, visible3700"),
    ],
)
def test_a_plant_that_cannot_be_is_one_line(arguments, says, tmp_path):
    assert says in one_line(script("expa.py", *arguments, "--out", tmp_path / "out", check=2))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- Exp-P
def test_exp_p_runs_commands_that_can_be_read():
    import expa
    import expb
    import expp_planted
    from common import parse_args

    for part in expp_planted.PARTS:
        grid = {"expa": expa.GRID, "expb": expb.GRID}[part.script]
        command = parse_args("", grid, part.flags.split())
        assert all(plants(name) or name == expp_planted.MODEL for name, _ in command.grid.models)
    dry = script("expp_planted.py", "--dry-run").stdout.splitlines()
    assert dry == [part.command() for part in expp_planted.PARTS]
    for flags in (["--k", "3"], ["--models", "stdlib-m"], ["--save-tokens"], ["--plant", "null3"]):
        assert "its grids are planted" in one_line(script("expp_planted.py", *flags, check=2))


def test_metrics_under_gauges():
    """Which scores say something about how the hook is written: the table of Exp-P, its own truth."""
    import expp_planted

    suite = gauge_suite(expp_planted.MODEL, 3, expp_planted.evaluation_rows(48, 4))
    rows = {row["metric"]: row for row in suite}
    shift, rotation, length = (name for name in rows["r2"] if name not in ("metric", "as it is"))

    def stay(gauge: str) -> set[str]:
        return {metric for metric, row in rows.items() if stays(row, gauge)}

    everywhere = {"r2_ln", "kl", "ce_recon", "ce_rec", "swd_tok", "swd_seq", "gd_abs", "ce_orig"}
    assert everywhere <= stay(shift) & stay(rotation) & stay(length)
    assert not {"r2", "r2_nosink", "cosine", "nmse_tok", "nmse"} & stay(shift)
    assert {"mse", "relerr"} - stay(shift) == {"relerr"}  # the error is what it was, h is not
    assert {"r2", "cosine", "nmse_tok", "mse"} <= stay(rotation)
    assert {"cosine", "nmse_tok"} <= stay(length) and not {"r2", "mse"} & stay(length)


def test_the_planted_spectrum_is_the_sinks(text_rows):
    plain, twin = spectra(["stdlib-s", "stdlib-s+visible3700"], 3, text_rows)
    assert plain["pr"] > 15 and twin["pr"] < 1.2
    assert twin["pr_nosink"] == pytest.approx(plain["pr_nosink"], rel=1e-3)


@pytest.mark.slow
def test_a_planted_sink_is_named_as_what_r2_is(tmp_path):
    """R² of its twin is another number for the same errors; the answer was once "no difference shown"."""
    grid = "--k 8 --tokens 10k --expansion 4 --eval-seqs 8 --sinks keep,drop".split()
    grid += ["--models", "stdlib-s@3,stdlib-s+null3700@3"]
    places = "--out", tmp_path / "out", "--cache", tmp_path / "cache"
    script("expb.py", *grid, "--device", "cpu", *places, setup=zygote.UNDRAWN)
    rows = read_table(tmp_path / "out/conditions.csv")
    lines = (tmp_path / "out/report.md").read_text().partition("## Every SAE")[2].splitlines()[:8]
    for name, word in (("stdlib-s ", "as it reads"), ("stdlib-s+", "R² is the sink's")):
        said = [line.split("|")[-2].strip() for line in lines if line.startswith(f"| {name}")]
        assert said == [word] * 2
    share = {row["model"]: row["sink_share"] for row in rows}
    assert share["stdlib-s"] < 0.02 and share["stdlib-s+null3700"] > 0.9
