"""SAEs trained and saved by SAELens, sparsify and dictionary_learning themselves, each a few steps, on the
same activations.

Needs the extra: pip install -e '.[test,parity]' -c constraints.txt
"""

import contextlib
import os
import pathlib
from collections.abc import Callable

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where Triton is installed it would want a GPU

import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

STEP = 128  # activations


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def saelens(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int, kind: str, checkpoint: bool = False, **settings
) -> Callable:
    """What SAETrainer saves, finished or as a checkpoint; a checkpoint knows activations that are still to be
    scaled.
    """
    make, config = get_sae_training_class(kind)
    sparsity = {"jumprelu": {"l0_coefficient": 0.1}, "topk": {"k": k}, "batchtopk": {"k": k}}
    more = sparsity.get(kind, {"l1_coefficient": 1.0})
    meta = SAEMetadata(
        model_name="stdlib-s", hook_name="blocks.3.hook_resid_post", prepend_bos=False, context_size=64
    )
    sae = make(config(d_in=h.shape[1], d_sae=F, metadata=meta, **more, **settings))
    training = SAETrainerConfig(
        len(h),
        STEP,
        lr_end=3e-5,
        n_batches_for_norm_estimate=10,
        n_checkpoints=int(checkpoint),
        checkpoint_path=str(folder) if checkpoint else None,
    )
    batches = list(h.split(STEP))
    if settings.get("normalize_activations") == "expected_average_only_in":
        batches = batches[:10] + batches  # the scale is estimated from batches drawn first
    trainer = SAETrainer(training, sae, iter(batches))
    with quiet():
        finished = trainer.fit()
        if not checkpoint:
            finished.save_inference_model(folder)
            return SAE.load_from_disk(folder).requires_grad_(False)
        (there,) = folder.iterdir()  # named after its number of activations
        saved, scaler = SAE.load_from_disk(there).requires_grad_(False), ActivationScaler()
        scaler.load(there / "activation_scaler.json")
    return lambda x: scaler.unscale(saved(scaler.scale(x)))


class StreamAsModel(torch.nn.Module):
    """Stands for the language model that sparsify's Trainer insists on: "token" i is row i of h."""

    def __init__(self, h: torch.Tensor):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Embedding.from_pretrained(h) for _ in range(4))

    base_model = property(lambda self: self)
    device = property(lambda self: self.layers[0].weight.device)
    dummy_inputs = property(lambda self: {"input_ids": torch.zeros(1, 1, dtype=torch.long)})

    def forward(self, input_ids):
        return self.layers[3](input_ids)


def sparsify(folder: pathlib.Path, h: torch.Tensor, F: int, k: int, kind: str) -> Callable:
    """What its Trainer saves."""
    with quiet():
        activation = "groupmax" if kind == "groupmax" else "topk"
        coder = SparseCoderConfig(num_latents=F, k=k, activation=activation, skip_connection=kind == "skip")
        saving = dict(save_every=10**9, save_dir=str(folder), run_name="run", log_to_wandb=False)
        config = TrainConfig(coder, batch_size=1, hookpoints=["layers.3"], **saving)
        Trainer(config, [{"input_ids": i} for i in torch.arange(len(h)).split(STEP)], StreamAsModel(h)).fit()
        torch.set_float32_matmul_precision("highest")  # fit() lowers it for the whole process
        saved = SparseCoder.load_from_disk(folder / "run/layers.3")
    return lambda x: saved(x).sae_out.detach()


def dictionary_learning(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int, kind: str, scaled: bool = False
) -> Callable:
    """What trainSAE saves."""
    short = {"sparsity_warmup_steps": 2}
    trainer, make, more = {
        "topk": (TopKTrainer, AutoEncoderTopK, {"k": k}),
        "batchtopk": (BatchTopKTrainer, BatchTopKSAE, {"k": k, "threshold_start_step": 5}),
        "standard": (StandardTrainer, AutoEncoder, short),
        "gated": (GatedSAETrainer, GatedAutoEncoder, short),
        "jumprelu": (JumpReluTrainer, JumpReluAutoEncoder, short),
    }[kind]
    steps = len(h) // STEP
    config = dict(trainer=trainer, activation_dim=h.shape[1], dict_size=F, steps=steps, lr=1e-3, seed=0)
    config |= dict(layer=3, lm_name="stdlib-s", submodule_name="resid_post_layer_3", device="cpu")
    config |= dict(warmup_steps=2, **more)
    stream = [batch.clone() for batch in h.split(STEP)] * (9 if scaled else 1)
    kept = dict(save_dir=str(folder), device="cpu", normalize_activations=scaled)
    with quiet():
        trainSAE(iter(stream), [config], steps, **kept)
        saved = make.from_pretrained(str(folder / "trainer_0/ae.pt"))
    return lambda x: saved(x).detach()


LAYER_NORM = dict(normalize_activations="layer_norm")
SCALED = dict(normalize_activations="expected_average_only_in")
# name -> (what writes it, its kind there, how)
PEERS: dict[str, tuple[Callable, str, dict]] = {
    "SAELens topk": (saelens, "topk", {}),
    "SAELens topk, layer_norm": (saelens, "topk", LAYER_NORM),
    "SAELens topk, scaled": (saelens, "topk", SCALED),
    "SAELens topk checkpoint, scaled": (saelens, "topk", {**SCALED, "checkpoint": True}),
    "SAELens batchtopk (saved as jumprelu)": (saelens, "batchtopk", {}),
    "SAELens jumprelu": (saelens, "jumprelu", {}),
    "SAELens standard": (saelens, "standard", {}),
    "SAELens gated": (saelens, "gated", {}),
    "sparsify topk": (sparsify, "topk", {}),
    "sparsify groupmax": (sparsify, "groupmax", {}),
    "sparsify skip": (sparsify, "skip", {}),
    "dictionary_learning topk": (dictionary_learning, "topk", {}),
    "dictionary_learning topk, scaled": (dictionary_learning, "topk", {"scaled": True}),
    "dictionary_learning batchtopk": (dictionary_learning, "batchtopk", {}),
    "dictionary_learning standard": (dictionary_learning, "standard", {}),
    "dictionary_learning gated": (dictionary_learning, "gated", {}),
    "dictionary_learning jumprelu": (dictionary_learning, "jumprelu", {}),
}
BELOW = {saelens: "", sparsify: "run/layers.3", dictionary_learning: "trainer_0"}  # where its files then lie


def everything(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int
) -> dict[str, tuple[pathlib.Path, Callable]]:
    """{name: (folder of the file it wrote, what the library computes)}."""
    out = {}
    for number, (name, (train, kind, how)) in enumerate(PEERS.items()):
        at = folder / str(number)
        forward = train(at, h, F, k, kind, **how)
        out[name] = at / BELOW[train], forward
    return out
