"""SAEs trained and saved by SAELens, sparsify and dictionary_learning themselves, each a few steps, on the
same activations.

Needs the extra: pip install -e '.[test,parity]' -c constraints.txt
"""

import contextlib
import os
import pathlib
from collections.abc import Callable

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where Triton is installed it would want a GPU

import torch  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402
from sae_lens import (  # noqa: E402  # noqa: E402
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer  # noqa: E402

STEP = 128  # activations


@contextlib.contextmanager
def quiet():
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def saelens(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int, kind: str, checkpoint: bool = False, **settings
) -> Callable:
    """What SAETrainer saves, finished or as a checkpoint; a checkpoint knows activations that are still to be
    scaled.
    """
    make, config, more = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": k}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": k}),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {"l0_coefficient": 0.1}),
        "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 1.0}),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 1.0}),
    }[kind]
    meta = SAEMetadata(
        model_name="stdlib-s", hook_name="blocks.3.hook_resid_post", prepend_bos=False, context_size=64
    )
    sae = make(config(d_in=h.shape[1], d_sae=F, metadata=meta, **more, **settings))
    batches = list(h.split(STEP))
    batches, estimate = (
        list(h.split(STEP)),
        settings.get("normalize_activations") == "expected_average_only_in",
    )  # from batches drawn first
    trainer = SAETrainer(
        SAETrainerConfig(
            len(h),
            STEP,
            lr_end=3e-5,
            n_batches_for_norm_estimate=10,
            n_checkpoints=int(checkpoint),
            checkpoint_path=str(folder) if checkpoint else None,
        ),
        sae,
        iter(batches[:10] * estimate + batches),
    )
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
        config = TrainConfig(
            SparseCoderConfig(
                num_latents=F,
                k=k,
                activation="groupmax" if kind == "groupmax" else "topk",
                skip_connection=kind == "skip",
            ),
            batch_size=1,
            hookpoints=["layers.3"],
            save_every=10**9,
            save_dir=str(folder),
            run_name="run",
            log_to_wandb=False,
        )
        Trainer(config, [{"input_ids": i} for i in torch.arange(len(h)).split(STEP)], StreamAsModel(h)).fit()
        torch.set_float32_matmul_precision("highest")  # fit() lowers it for the whole process
        saved = SparseCoder.load_from_disk(folder / "run/layers.3")
    return lambda x: saved(x).sae_out.detach()


def dictionary_learning(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int, kind: str, scaled: bool = False
) -> Callable:
    """What trainSAE saves."""
    trainer, make, more = {
        "topk": (TopKTrainer, AutoEncoderTopK, {"k": k}),
        "batchtopk": (BatchTopKTrainer, BatchTopKSAE, {"k": k, "threshold_start_step": 5}),
        "standard": (StandardTrainer, AutoEncoder, {}),
        "gated": (GatedSAETrainer, GatedAutoEncoder, {}),
        "jumprelu": (JumpReluTrainer, JumpReluAutoEncoder, {}),
    }[kind]
    steps = len(h) // STEP
    short = {"warmup_steps": 2} | (
        {"sparsity_warmup_steps": 2} if kind in ("standard", "gated", "jumprelu") else {}
    )
    config = dict(
        trainer=trainer,
        activation_dim=h.shape[1],
        dict_size=F,
        steps=steps,
        lr=1e-3,
        layer=3,
        lm_name="stdlib-s",
        device="cpu",
        submodule_name="resid_post_layer_3",
        seed=0,
        **more,
        **short,
    )
    stream = [batch.clone() for batch in h.split(STEP)]
    with quiet():
        trainSAE(
            iter(stream * 9) if scaled else iter(stream),
            [config],
            steps,
            save_dir=str(folder),
            device="cpu",
            normalize_activations=scaled,
        )
        file = folder / "trainer_0/ae.pt"
        saved = make.from_pretrained(str(file))
    return lambda x: saved(x).detach()


def everything(
    folder: pathlib.Path, h: torch.Tensor, F: int, k: int
) -> dict[str, tuple[pathlib.Path, Callable]]:
    """{library and architecture: (folder of the file it wrote, what the library computes)}."""
    out = {}
    for name, kind, settings in (
        ("topk", "topk", {}),
        ("topk, layer_norm", "topk", dict(normalize_activations="layer_norm")),
        ("topk, scaled", "topk", dict(normalize_activations="expected_average_only_in")),
        (
            "topk checkpoint, scaled",
            "topk",
            dict(normalize_activations="expected_average_only_in", checkpoint=True),
        ),
        ("batchtopk (saved as jumprelu)", "batchtopk", {}),
        ("jumprelu", "jumprelu", {}),
        ("standard", "standard", {}),
        ("gated", "gated", {}),
    ):
        at = folder / "saelens" / name.replace(" ", "-")
        out[f"SAELens {name}"] = at, saelens(at, h, F, k, kind, **settings)
    for kind in ("topk", "groupmax", "skip"):
        out[f"sparsify {kind}"] = (
            folder / "sparsify" / kind / "run/layers.3",
            sparsify(folder / "sparsify" / kind, h, F, k, kind),
        )
    for kind, scaled in (
        ("topk", False),
        ("topk", True),
        ("batchtopk", False),
        ("standard", False),
        ("gated", False),
        ("jumprelu", False),
    ):
        at = folder / "dictionary_learning" / f"{kind}{'-scaled' * scaled}"
        out[f"dictionary_learning {kind}{', scaled' * scaled}"] = (
            at / "trainer_0",
            dictionary_learning(at, h, F, k, kind, scaled),
        )
    return out
