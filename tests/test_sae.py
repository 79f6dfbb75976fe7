"""The SAE and its training: what the recipe promises, planted dictionaries, and a resume that is the unbroken
run.
"""

import dataclasses
import itertools
import json
import math
import shutil
import types

from helpers import PEAK, contents, get_saes, process, tiny_model
from transport_geometry import kernels
from transport_geometry.errors import Fault, UserError
from transport_geometry.models.lm import Hook
from transport_geometry.saes import recipes
from transport_geometry.saes import train as trainer
from transport_geometry.saes.recipes import SAELensTraining, Statistics, Training, trunk
from transport_geometry.saes.sae import TopKSAE, TrainingSpec, load_sae, save_sae, tied_init
from transport_geometry.saes.train import activation_chunks

import pytest
import torch
from tqdm import tqdm


def planted(
    n: int, d: int = 32, latents: int = 64, active: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [n,d], dictionary [latents,d] of unit rows): sums of `active` rows with coefficients in [1,2]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(latents, d, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    which = torch.rand(n, latents, generator=generator).topk(active).indices
    return ((1 + torch.rand(n, active, 1, generator=generator)) * rows[which]).sum(1), rows


BAR = tqdm(disable=True)
EXT = pytest.param(
    "ext", marks=pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")
)


@pytest.fixture(autouse=True)
def _restore():
    yield
    kernels.use(None)


def start(h: torch.Tensor, d_sae=64, k=3, seed=0, budgets=None, sink=None, recipe=Training) -> Training:
    """A training that has not made a step."""
    statistics = Statistics.of(h, torch.zeros(len(h), dtype=torch.bool) if sink is None else sink)
    return recipe(statistics, d_sae, k, seed, budgets or [len(h)])


def trained(h: torch.Tensor, **how) -> Training:
    training = start(h, **how)
    training.feed(h, 0, BAR, "test")
    return training


def r2(sae: TopKSAE, h: torch.Tensor) -> float:
    return 1 - ((sae.decode(*sae.encode(h)) - h).square().sum() / (h - h.mean(0)).square().sum()).item()


def test_a_planted_dictionary_is_found_by_unit_rows_and_sparse_codes():
    h, rows = planted(240_000)
    sae = trained(h, d_sae=128).finished()
    held, _ = planted(2_000, seed=0)
    assert r2(sae, held) > 0.95
    best = (rows @ sae.W_dec.T).max(1).values
    assert best.median() > 0.97 and best.mean() > 0.93
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128), rtol=0, atol=1e-5)
    values, indices = sae.encode(held)
    assert values.shape == (2_000, 3) and (values >= 0).all() and (indices.diff(dim=1) > 0).all()


def loss_by_autograd(training: Training, w: dict, h: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The loss of recipe `base` with AuxK, from dense codes; w: leaves."""

    def code(x, W_enc, b_enc, k):
        pre = x @ W_enc.T + b_enc
        return (pre * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1)).relu()

    x = h * training.scale
    z = code(x - w["b_dec"], w["W_enc"], w["b_enc"], training.sae.k)
    error = x - (z @ w["W_dec"] + w["b_dec"])
    loss = error.square().sum(1).mean() / training.variance
    if len(dead):
        target, k = error.detach(), min(x.shape[1] // 2, len(dead))
        z = code(x - w["b_dec"].detach(), w["W_enc"][dead], w["b_enc"][dead], k)
        variance = (target - target.mean(0)).square().sum(1).mean()
        loss = loss + (target - z @ w["W_dec"][dead]).square().sum(1).mean() / variance / 32
    return loss


# of d = 32: none, fewer than AuxK takes, some of a matrix, some of a code
@pytest.mark.parametrize("dead", [0, 10, 40, 90])
@pytest.mark.parametrize("k", [3, 70])  # 70 of 100: some are cut to 0
@pytest.mark.parametrize("path", ["ref", EXT])
def test_a_step_is_adam_on_the_gradients_of_the_loss(path, k, dead):
    """In float64, against autograd through dense codes and torch.optim.Adam. Of the decoder's gradient only
    what is across a row counts, and rows have norm 1 after every step.
    """
    h, _ = planted(1_000)
    kernels.use(path)
    training = start(h.double(), d_sae=100, k=k, budgets=[10**6])
    training.sae = training.sae.double()
    training.moments = {name: (m.double(), v.double()) for name, (m, v) in training.moments.items()}
    weights = dict(training.sae.named_parameters())
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    optimiser = torch.optim.Adam(leaves.values(), lr=0, eps=6.25e-10)
    which = torch.arange(dead)
    for batch in h.double().split(250):
        training.idle.zero_()[which] = 1e9
        fired, training.fired = training.fired, lambda *_: None
        loss_by_autograd(training, leaves, batch, which).backward()
        optimiser.param_groups[0]["lr"] = training.rate()
        W = leaves["W_dec"]
        W.grad -= (W.grad * W.detach()).sum(1, keepdim=True) * W.detach()
        optimiser.step()
        W.data /= W.data.norm(dim=1, keepdim=True)
        optimiser.zero_grad()
        training.one_step(batch)
        training.fired = fired
    for name, w in weights.items():
        torch.testing.assert_close(
            w, leaves[name].detach(), rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}"
        )


def test_auxk_of_recipe_saelens_is_one_loss_as_a_matrix_and_as_a_code(monkeypatch):
    h, _ = planted(400)
    gradients = []
    for dense in (2, 0):
        monkeypatch.setattr(recipes, "DENSE", dense)
        training = start(h, d_sae=100, recipe=SAELensTraining)
        training.sae.b_enc.data -= 0.4  # so that negative ones are among the d/2
        leaves = [w.detach()[:60].clone().requires_grad_() for w in training.folded()[:3]]
        training.auxiliary_loss(h, h.flip(0), leaves).backward()
        gradients.append([w.grad for w in leaves])
    for one, other in zip(*gradients):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_scale_and_mean_leave_sinks_out():
    h, _ = planted(1_000)
    sink = torch.zeros(1000, dtype=torch.bool)
    sink[::50] = True
    loud = torch.where(sink[:, None], 500 * h, h)
    with_sinks, without = start(loud, sink=sink), start(h[~sink], budgets=[1000])
    assert with_sinks.scale == pytest.approx(without.scale)
    assert with_sinks.scale**2 * h[~sink].square().sum(1).mean() == pytest.approx(32, rel=1e-4)
    torch.testing.assert_close(with_sinks.sae.b_dec, without.sae.b_dec)


def test_latents_are_dead_after_a_tenth_of_the_run():
    h, _ = planted(10_000)
    training = start(h, d_sae=512, k=2)
    called = []
    training.auxiliary_gradients = lambda x, error, dead: called.append((training.step, len(dead))) or {}
    for i in range(6):
        training.one_step(h[256 * i : 256 * (i + 1)])
    assert training.dead_after() == 1_000 and [step for step, _ in called] == [3, 4, 5]  # 4 x 256 > 1000
    assert all(0 < n < 512 for _, n in called)


def test_the_rate_warms_up_stays_and_decays():
    h, _ = planted(1_000)
    training = start(h, d_sae=2**12, budgets=[10**6])
    assert training.batch == training.steps == 1000
    rates = []
    for training.step in range(1000):
        rates.append(training.rate() / training.lr)
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == rates[800] == 1
    assert rates[900] == pytest.approx(0.5) and 0 < rates[999] < 0.006
    for tokens, batch, boost in ((100, 100, 3.125), (10**4, 256, 5), (10**5, 256, 5), (10**8, 4096, 20)):
        training = start(h, d_sae=2**12, budgets=[tokens])
        assert training.batch == batch and training.lr == pytest.approx(4e-4 * boost)


def test_the_rate_never_falls_as_budgets_grow():
    budgets = [round(10 ** (i / 8)) for i in range(72)]
    batches, factors = zip(*map(Training.pace, budgets))
    assert list(batches) == sorted(batches) and list(factors) == sorted(factors)
    assert all(factor**2 / batch == pytest.approx(25 / 256) for batch, factor in zip(batches, factors))
    # one pace, so that budgets can share a trunk
    assert {Training.pace(b) for b in budgets if b >= Training.TRUNK_FROM} == {(4096, 20.0)}


def test_a_loss_that_is_not_finite_stops_with_one_line():
    h, _ = planted(1_000)
    training = start(h)
    h[::2] = math.nan
    with pytest.raises(Fault, match="stdlib-x k=3: the loss is not finite at step 3"):
        training.feed(h, 0, BAR, "stdlib-x k=3")


TRAIN = """
from transport_geometry import kernels
from transport_geometry.saes.recipes import RECIPES, Statistics
import torch
kernels.use("ext")  # whatever KERNELS says
h = torch.randn({n}, {d})
training = RECIPES["{recipe}"](Statistics.of(h, torch.zeros({n}, dtype=torch.bool)), 64, 8, 0, [10**9])
training.one_step(h)
before = peak()
training = RECIPES["{recipe}"](training.statistics, {F}, 8, 0, [10**9])
for _ in range(2):
    training.idle[: {dead}] = 1e12
    training.fired = lambda *_: None
    training.one_step(h)
print(peak() - before)
"""


@pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")
@pytest.mark.parametrize(
    "recipe, d, F, n, dead",
    [
        ("base", 512, 16384, 256, 4096),
        pytest.param("saelens", 512, 16384, 256, 4096, marks=pytest.mark.slow),
        pytest.param("base", 8, 65536, 4096, 65536, marks=pytest.mark.slow),
        pytest.param("saelens", 8, 65536, 4096, 65536, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_training(recipe, d, F, n, dead):
    """What `check_memory` says, and 24 MB: less than a gradient of W_enc at d = 512 (34 MB), far less than
    tokens by latents at d = 8 (1 GB).
    """
    code = PEAK + TRAIN.format(recipe=recipe, d=d, F=F, n=n, dead=dead)
    done = process("-c", code, env={"OMP_NUM_THREADS": "1"})
    matrices = 6 * F * d + 4 * dead * d if recipe == "base" else 19 * F * d
    if d == 8:  # AuxK's code of d/2 and its copies, what there is one of a latent
        matrices += 24 * n * d // 2 + 40 * F
    extra, allowed = int(done.stdout) / 1024, 4 * matrices / 2**20 + 24
    assert extra < allowed, f"{extra:.0f} MB of {allowed:.0f}"


# ----------------------------------------------------------------------------------------- trunk and branches
def test_budgets_share_a_trunk_where_batch_and_rate_agree():
    # few steps: each budget is a run of its own
    assert trunk("base", 250_000, [9_000, 80_000, 250_000]) == ()
    assert trunk("base", 10**8, [10**6, 10**7, 5 * 10**7, 10**8]) == (10**7, 5 * 10**7)
    assert trunk("saelens", 10**6, [1000, 10_000, 10**6]) == (10_000,)


def test_the_first_branch_is_a_run_of_its_own_to_the_bit():
    h, _ = planted(20_000)
    runs = start(h[:6_000], budgets=[6_000, 20_000]).feed(h, 0, BAR, "test")
    alone = start(h[:6_000], budgets=[6_000])
    alone.feed(h, 0, BAR, "test")
    (branch,) = (run for run in runs if run.budgets == [6_000])
    assert branch.step == branch.steps == alone.steps == 23
    ours, theirs = (run.finished().state_dict().values() for run in (branch, alone))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_branches_decay_the_trunk_does_not():
    h, _ = planted(1_000)
    trunk_run = start(h, budgets=[10**5, 2 * 10**5])
    assert trunk_run.branches == [(312, 10**5)] and trunk_run.steps == 390 + 390
    trunk_run.step = 312
    (twin,) = trunk_run.branch_off()
    assert twin.budgets == [10**5] and twin.steps == 390 and trunk_run.branch_off() == []
    for step, own, trunks in ((100, 1, 1), (312, 1, 1), (351, 0.5, 1), (389, 1 / 78, 1)):
        twin.step = trunk_run.step = step
        assert (twin.rate() / twin.lr, trunk_run.rate() / trunk_run.lr) == (pytest.approx(own), trunks)
    trunk_run.step = 311
    assert trunk_run.dead_after() == 10**4  # on the way to the first budget, then to the second
    trunk_run.step = 312
    assert trunk_run.dead_after() == 2 * 10**4 and twin.dead_after() == 10**4
    assert twin.sae is not trunk_run.sae and twin.moments["W_enc"][0] is not trunk_run.moments["W_enc"][0]


# ------------------------------------------------------------------------------------------- stream and cache
class Words:
    eos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return types.SimpleNamespace(input_ids=[ord(c) % 40 + 1 for c in text])


def spec(data, k, tokens, seed=0, d_sae=32, trunk=(), recipe="base", layer=1, sinks="keep") -> TrainingSpec:
    of_model = dict(model="tiny", weights="w", tokenizer="t", dtype="float32", layer=layer, ctx=16)
    of_text = dict(data=str(data), data_content="c", split="train", tokens=tokens, trunk=tuple(trunk))
    of_sae = dict(d_sae=d_sae, k=k, seed=seed, recipe=recipe, sinks=sinks, device="cpu", version=1)
    return TrainingSpec(**of_model, **of_text, **of_sae)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i * i} and {i % 7} make {i * i + i % 7}\n" for i in range(3000)))
    return path


def test_the_stream_gives_every_token_once_in_order(text, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    monkeypatch.setattr(recipes, "CHUNK", 1000)
    rows = next(trainer.heldout.train_rows(str(text), Words(), 16, 512))
    expected = Hook(model, 1).head(rows).flatten(0, 1)
    calm = torch.ones(len(expected), dtype=torch.bool)
    calm[::16] = False
    # with first=1 it passes over what a run that goes on has had
    for sinks, whole in (("keep", expected), ("drop", expected[calm])):
        for first, lengths in ((0, [1000, 1000, 500]), (1, [1000, 500])):
            of = activation_chunks(Hook(model, 1), str(text), Words(), 16, 2500, sinks, first=first)
            h, sink = zip(*of)
            assert [len(chunk) for chunk in h] == lengths
            torch.testing.assert_close(torch.cat(h), whole[1000 * first : 2500], rtol=1e-4, atol=1e-4)
            assert sinks == "drop" or torch.cat(sink)[-1000 * first % 16 :: 16].all()


ONE_STEP = {recipe: recipe.one_step for recipe in (Training, SAELensTraining)}


def stopped_after(n, monkeypatch):
    """Training is interrupted after n steps, of both recipes together."""
    left = itertools.count(n, -1)
    for recipe, one_step in ONE_STEP.items():

        def breaking(self, h, one_step=one_step):
            if next(left) == 0:
                raise KeyboardInterrupt
            return one_step(self, h)

        monkeypatch.setattr(recipe, "one_step", breaking)


def test_an_interrupted_run_ends_as_the_unbroken_one(text, tmp_path, monkeypatch):
    """Stopped at several steps, inside branches too, in both recipes; every file the same, byte for byte."""
    model = tiny_model(dtype=torch.float32)
    monkeypatch.setattr(recipes, "CHUNK", 1024)
    ticks = itertools.count(step=100.0)  # a checkpoint after every chunk
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(SAELensTraining, "pace", staticmethod(lambda tokens: (256, 1.0)))
    specs = [spec(text, 2, 4000), spec(text, 4, 4000), spec(text, 2, 1500, seed=1)]
    for recipe in ("base", "saelens"):  # the decay of 3500 spans two chunks
        specs += [
            spec(text, 4, 1200, seed=2, recipe=recipe),
            spec(text, 4, 3500, seed=2, trunk=[1200], recipe=recipe),
            spec(text, 4, 5000, seed=2, trunk=[1200, 3500], recipe=recipe),
        ]
    specs += [spec(text, 2, 3000, layer=0), spec(text, 2, 3000, sinks="drop"), spec(text, 2, 900, layer=0)]
    get_saes(model, Words(), specs, tmp_path / "whole")
    for stop in (20, 14, 31, 3):
        stopped_after(stop, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            get_saes(model, Words(), specs, tmp_path / "broken")
    stopped_after(10**6, monkeypatch)
    get_saes(model, Words(), specs, tmp_path / "broken")
    whole, broken = (contents(tmp_path / name) for name in ("whole", "broken"))
    assert whole == broken and len(whole) == 36


def test_one_pass_serves_every_hook(text, tmp_path, monkeypatch):
    """Hooks, arms, recipes and budgets together or one at a time: the same files. Together the model reads
    each row once; with little memory once for every hook.
    """
    model, read = tiny_model(dtype=torch.float32), []
    monkeypatch.setattr(recipes, "CHUNK", 1024)
    arms = itertools.product((0, 1), ("keep", "drop"), ("base", "saelens"))
    specs = [
        spec(text, 2, tokens, layer=layer, sinks=sinks, recipe=recipe)
        for layer, sinks, recipe in arms
        for tokens in (1500, 700)
    ]
    for layer in (0, 1):
        Hook(model, layer).way_to_patch(torch.arange(16)[None])  # looked for once, by runs of its own
    outputs = trainer.block_outputs
    monkeypatch.setattr(
        trainer, "block_outputs", lambda *run: (read.append((run[1], len(run[2]))), outputs(*run))[1]
    )

    def rows_read(folder, wanted, memory=10**9):
        read.clear()
        monkeypatch.setattr(trainer, "memory_of", lambda device: memory)
        get_saes(model, Words(), wanted, folder)
        return [(tuple(layers), n) for layers, n in read]

    together = rows_read(tmp_path / "together", specs)
    assert together == [((0, 1), 256)]  # 4096 tokens
    assert rows_read(tmp_path / "small", specs, 1) == [((0,), 256), ((1,), 256)]
    for one in specs:
        rows_read(tmp_path / "alone", [one])
    together, small, alone = (contents(tmp_path / name) for name in ("together", "small", "alone"))
    assert together == small == alone
    assert sum(name.endswith(".safetensors") for name in alone) == 16


def test_what_a_finished_run_lacks_is_trained_again(text, tmp_path, monkeypatch):
    """Someone deletes an SAE whose budget an interrupted run is past."""
    model = tiny_model(dtype=torch.float32)
    monkeypatch.setattr(recipes, "CHUNK", 1024)
    monkeypatch.setattr(trainer.time, "monotonic", itertools.count(step=100.0).__next__)
    monkeypatch.setattr(SAELensTraining, "pace", staticmethod(lambda tokens: (256, 1.0)))
    specs = [spec(text, 4, n, trunk=trunk, recipe="saelens") for n, trunk in ((1200, []), (5000, [1200]))]
    short, long = (one.folder(tmp_path) for one in specs)
    first = get_saes(model, Words(), specs, tmp_path)[0]
    (long / "sae.safetensors").unlink()
    stopped_after(16, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        get_saes(model, Words(), specs, tmp_path)
    stopped_after(10**6, monkeypatch)
    assert (long / "checkpoint.pt").exists()
    shutil.rmtree(short)
    assert torch.equal(get_saes(model, Words(), specs, tmp_path)[0].W_dec, first.W_dec)
    assert not (long / "checkpoint.pt").exists()


def test_a_text_that_changes_during_training_keeps_no_sae(text, tmp_path, monkeypatch):
    one_step = Training.one_step
    monkeypatch.setattr(recipes, "CHUNK", 1024)
    monkeypatch.setattr(
        Training, "one_step", lambda self, h: (text.open("a").write("more\n"), one_step(self, h))[1]
    )
    with pytest.raises(Fault, match="text.txt was changed while SAEs were trained"):
        get_saes(tiny_model(dtype=torch.float32), Words(), [spec(text, 2, 2000)], tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.safetensors"))


def test_the_cache_gives_back_what_was_trained(tmp_path):
    sae = tied_init(8, 32, 3, 0, torch.randn(8)).requires_grad_(False)
    files = []
    for _ in range(2):
        save_sae(tmp_path / "s", sae, {"a": 1})
        files.append((tmp_path / "s/sae.safetensors").read_bytes())
    back = load_sae(tmp_path / "s", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), back.parameters())) and back.k == 3
    assert json.loads((tmp_path / "s/cfg.json").read_text())["num_latents"] == 32 and files[0] == files[1]


def test_cache_names_read_and_stay_inside(tmp_path):
    one = spec("x", 8, 200_000)
    name = dataclasses.replace(one, model="EleutherAI/pythia-70m").folder(tmp_path)
    assert name.parent == tmp_path and name.name.startswith("EleutherAI--pythia-70m-L1-F32-k8-200k-s0-")
    assert dataclasses.replace(one, model="../../etc").folder(tmp_path).parent == tmp_path
    # the same text by another name
    assert one.folder(tmp_path) == spec("y", 8, 200_000).folder(tmp_path)
    assert one.folder(tmp_path) != dataclasses.replace(one, data_content="else").folder(tmp_path)


def test_an_sae_larger_than_the_memory_is_refused_before_it_is_made():
    trainer.check_memory(64, 256, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"--expansion 1000000000: .* takes 131,072 GB in training, and this machine has \d"
    ):
        trainer.check_memory(64, 64 * 10**9, torch.device("cpu"))


@pytest.mark.parametrize(
    "h, sink, word",
    [
        (torch.zeros(50, 8), False, "do not vary"),
        (torch.full((50, 8), 1e-30), False, "do not vary"),
        (torch.linspace(-3, 5, 8).expand(50, 8) * 7.7, False, "do not vary"),
        (planted(50)[0], True, "sink positions, all 50"),
        (planted(1)[0], False, "do not vary"),
    ],
)
def test_activations_that_say_nothing_are_one_line(h, sink, word):
    with pytest.raises(Fault, match=f"tiny L1: .*{word}"):
        Statistics.of(h, torch.full((len(h),), sink), "tiny L1")


def test_activations_that_vary_little_are_trained_on():
    h = planted(3000)[0]
    assert trained(100 + 0.1 * h).steps > 0 and math.isfinite(trained(1e-3 * h).statistics.variance)
