"""Recipe `saelens` against SAELens itself, and files that SAELens, sparsify and dictionary_learning write.
Needs the extra: pip install -e '.[test,parity]' -c constraints.txt
"""

import dataclasses

from transport_geometry.formats import find_and_read, known_fields, saelens, sparsify
from transport_geometry.formats.computed_sae import fused
from transport_geometry.formats.hook_names import hook_of_lens, hub_name
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import EMBEDDED, load_model
from transport_geometry.saes.recipes import SAELensTraining, Statistics
from transport_geometry.saes.sae import TopKSAE

import pytest
import torch
from test_formats import F as WIDE
from test_formats import H, the_file, write_gemma_scope, write_gemma_scope_2
from tqdm import tqdm

for library in ("sae_lens", "sparsify", "dictionary_learning"):
    pytest.importorskip(library, reason="the extra [parity] is not installed")
import peers  # noqa: E402

import datasets  # noqa: E402
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: E402
from sae_lens import TopKSAE as LensSAE  # noqa: E402
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig  # noqa: E402
from sae_lens.load_model import load_model as load_lens_model  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as lens_loaders  # noqa: E402
from sae_lens.registry import get_sae_training_class  # noqa: E402
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from sparsify import SparseCoderConfig  # noqa: E402

D, F, K, N = 24, 192, 4, 64


def activations(steps: int) -> torch.Tensor:
    """Unit variance, an offset, and a sink: what raw residual streams do to an unnormalised trainer."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(steps * N, 12, generator=generator) @ torch.randn(12, D, generator=generator) + 0.5
    h[::N] += 40 * torch.randn(D, generator=generator)
    return h


def statistics(h: torch.Tensor) -> Statistics:
    return Statistics.of(h, torch.zeros(len(h), dtype=torch.bool))


# 32: fewer dead latents than AuxK takes, so that it scales and takes negative pre-activations too
@pytest.fixture(params=[F, 32])
def both(request, monkeypatch):
    """(our training, their trainer, activations): the same initial weights, latents dead after 20 steps in
    both.
    """
    F = request.param
    monkeypatch.setattr(SAELensTraining, "DEAD_STEPS", 20)
    monkeypatch.setattr(SAELensTraining, "pace", staticmethod(lambda tokens: (N, 1.0)))
    h = activations(150)
    ours = SAELensTraining(statistics(h), F, K, 0, [len(h)])
    lens = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    with torch.no_grad():
        lens.W_enc.copy_(ours.sae.W_enc.T)
        lens.W_dec.copy_(ours.sae.W_dec)
    theirs = SAETrainer(SAETrainerConfig(len(h), N, lr_end=3e-5, dead_feature_window=20), lens, iter(()))
    return ours, theirs, h


def test_losses_agree_step_by_step_and_so_do_the_saes(both, tmp_path):
    ours, theirs, h = both
    with_auxk = 0
    for step, batch in enumerate(h.split(N)):
        dead = int((ours.idle[:-1] > 20).sum())
        assert dead == int(theirs.dead_neurons.sum()), step
        mine, output = ours.one_step(batch), theirs.step(batch)
        theirs.n_training_steps += 1
        with_auxk += dead > 0
        torch.testing.assert_close(
            mine, output.loss.detach(), rtol=2e-4, atol=0, msg=lambda m: f"step {step}: {m}"
        )
    assert 10 < with_auxk < 150  # the run had both kinds of step
    torch.testing.assert_close(ours.sae.W_dec, theirs.sae.W_dec.detach(), rtol=0, atol=2e-4)
    theirs.sae.save_inference_model(tmp_path)
    saved = LensSAE.load_from_disk(tmp_path)
    sae = ours.finished()
    h_hat = saved.decode(saved.encode(h[:500]))
    error = (sae.decode(*sae.encode(h[:500])) - h_hat).norm() / h_hat.norm()
    assert error < 1e-3


def test_first_steps_agree_to_rounding(both):
    ours, theirs, h = both
    for batch in h.split(N)[:10]:
        torch.testing.assert_close(ours.one_step(batch), theirs.step(batch).loss.detach(), rtol=2e-6, atol=0)


def test_the_defaults_are_theirs():
    architecture, trainer, runner = (
        {field.name: field.default for field in dataclasses.fields(config)}
        for config in (TopKTrainingSAEConfig, SAETrainerConfig, LanguageModelSAERunnerConfig)
    )
    sae = {
        "decoder_init_norm": 0.1,
        "aux_loss_coefficient": 1.0,
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
    }
    training = {
        "lr": 3e-4,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "dead_feature_window": SAELensTraining.DEAD_STEPS,
    }
    assert architecture.items() >= sae.items()
    assert trainer.items() >= training.items() and runner.items() >= training.items()
    ours = SAELensTraining(Statistics(torch.zeros(D), 1.0, 1.0), F, K, 0, [10**7])
    group = ours.optimiser.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.9, 0.999), 1e-8)
    assert runner["train_batch_size_tokens"] == ours.batch == 4096
    lens = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    for name in ("b_enc", "b_dec"):
        assert not getattr(lens, name).any() and not getattr(ours.sae, name).any()
    for sae in (lens, ours.sae):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), 0.1))
        assert sae.W_dec.abs().max() < 0.1 * 3**0.5  # rows of uniform entries: none far above the rest
    assert torch.equal(ours.sae.W_enc, ours.sae.W_dec) and torch.equal(lens.W_enc, lens.W_dec.T)


def test_a_budget_is_a_checkpoint_of_the_longest_run(monkeypatch):
    monkeypatch.setattr(SAELensTraining, "pace", staticmethod(lambda tokens: (N, 1.0)))
    h = activations(30)
    of, bar = statistics(h), tqdm(disable=True)
    runs = SAELensTraining(of, F, K, 0, [10 * N, 30 * N]).feed(h, 0, bar, "")
    (alone,) = SAELensTraining(of, F, K, 0, [10 * N]).feed(h, 0, bar, "")
    (short,) = (run for run in runs if run.budgets == [10 * N])
    assert [run.step for run in runs] == [30, 10] and torch.equal(short.sae.W_dec, alone.sae.W_dec)


# ---------------------------------------------------------------------------------- files the libraries write
@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{library and architecture: (its folder, its forward)}, and held-out activations."""
    h = activations(60)
    return peers.everything(tmp_path_factory.mktemp("peers"), h[: 50 * N], F, K), h[50 * N :]


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_file_gives_the_forward_that_its_library_gives(name, written):
    saes, h = written
    folder, theirs = saes[name]
    (file,) = find_and_read.find(str(folder))
    values, _, h_hat = fused(find_and_read.read(file)).reconstruct(h)
    expected = theirs(h)
    assert ((h_hat - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
    assert (values > 0).any() and find_and_read.describe(file).layer == 3


@pytest.mark.parametrize(
    "name", "standard gated topk abstopk batchtopk matryoshka_batchtopk jumprelu".split()
)
def test_every_field_of_saelens_own_configurations_is_known_or_says_nothing(name):
    """Of an SAE as it is trained, and as it is kept."""
    training = get_sae_training_class(name)[1]
    more = {"matryoshka_widths": [8, F]} if name.startswith("matryoshka") else {}
    one = training(d_in=D, d_sae=F, **more)
    for config in (one.to_dict(), one.get_inference_sae_cfg_dict()):
        assert not known_fields.check(saelens.VERSION_6, config, {}, ()).ignored


def test_every_field_of_sparsifys_configuration_is_known():
    of = sparsify.FIELDS
    assert {field.name for field in dataclasses.fields(SparseCoderConfig)} <= of.read | of.unused


def test_an_exported_sae_computes_the_same_in_saelens(tmp_path):
    h = activations(4)
    sae = SAELensTraining(statistics(h), F, K, 0, [len(h)]).finished()
    made = {"model": "stdlib-s", "layer": 3, "ctx": 64, "data": "stdlib", "sinks": "drop"}
    saelens.write_saelens(tmp_path, sae, made)
    theirs = LensSAE.load_from_disk(tmp_path)
    expected = theirs.decode(theirs.encode(h)).detach()
    assert (sae.reconstruct(h)[2] - expected).norm() / expected.norm() < 1e-6
    assert theirs.cfg.metadata.hook_name == "gpt_neox.layers.3" and theirs.cfg.architecture() == "topk"
    assert theirs.cfg.metadata.sinks == "drop"


def test_an_exported_sae_drives_saelens_store(tmp_path):
    """The hook is found in a model of the class that is named beside it, and its activations are ours."""
    hook = Hook(load_model("stdlib-s", torch.device("cpu"))[0], 2)
    sae = TopKSAE(torch.randn(F, 64), torch.zeros(F), torch.randn(F, 64), torch.zeros(64), K)
    saelens.write_saelens(tmp_path, sae, {"model": "stdlib-s", "layer": 2, "ctx": 16, "data": "stdlib"})
    theirs = LensSAE.load_from_disk(tmp_path)
    said = theirs.cfg.metadata
    model = load_lens_model(said.model_class_name, str(EMBEDDED[said.model_name]), "cpu")
    rows = torch.randint(50, 500, (8, said.context_size), generator=torch.Generator().manual_seed(0))
    store = ActivationsStore.from_sae(
        model,
        theirs,
        datasets.Dataset.from_dict({"tokens": rows.tolist()}),
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        train_batch_size_tokens=32,
        total_tokens=8,
    )
    tokens = store.get_batch_tokens()
    torch.testing.assert_close(store.get_activations(tokens).view(4, 16, 64), hook.head(tokens))
    assert next(store).shape[-1] == 64


@pytest.mark.parametrize(
    "write, load",
    [
        (write_gemma_scope, lens_loaders.gemma_2_sae_huggingface_loader),
        (write_gemma_scope_2, lens_loaders.gemma_3_sae_huggingface_loader),
    ],
)
def test_gemma_scope_is_what_saelens_makes_of_it(write, load, tmp_path, monkeypatch):
    file = the_file(write(tmp_path))
    at = file.fetch(file.weights).parent
    monkeypatch.setattr(
        lens_loaders, "hf_hub_download", lambda *_, filename="config.json", **__: at / filename
    )
    shapes = {"w_enc": H.shape[1:] + (WIDE,), "w_dec": (WIDE,) + H.shape[1:]}
    monkeypatch.setattr(lens_loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    repository, folder = str(at.relative_to(tmp_path)).split("/", 1)
    said, state, _ = load(f"google/{repository}", folder)
    config = lens_loaders.handle_config_defaulting(said | {"d_in": H.shape[1], "d_sae": WIDE})
    theirs = JumpReLUSAE(JumpReLUSAEConfig.from_dict(config))
    theirs.load_state_dict(state)
    expected, of = theirs(H).detach(), find_and_read.describe(file)
    h_hat = find_and_read.read(file).reconstruct(H)[2]
    assert (h_hat - expected).norm() < 1e-5 * expected.norm()
    hook = hook_of_lens(theirs.cfg.metadata.hook_name)
    assert (of.site, of.layer, of.bos, of.ctx) == (*hook, True, theirs.cfg.metadata.context_size)
    assert of.model == hub_name(theirs.cfg.metadata.model_name)
