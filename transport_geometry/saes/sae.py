"""Sparse autoencoders: the model, all that determines one trained here, and its folder.

Shapes: N tokens, d = d_model, F = d_sae, k = active latents. Gao et al. 2024, arXiv:2406.04093.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import Damaged, Fault
from transport_geometry.records import store
from transport_geometry.records.tables import as_json, readable_count

import torch
from safetensors.torch import load_file, save
from torch import Tensor


class SAE(torch.nn.Module):
    """Any SAE whose code is a function of single tokens, for raw activations."""

    W_enc: Tensor  # [F,d]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F,d]
    b_dec: Tensor  # [d]
    k: int | None  # active latents, where their number is fixed

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [N,d] -> values [N,K], 0 where a latent is not active, and indices [N,K], ascending within a
        token.
        """
        raise NotImplementedError

    def reconstruct(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(values, indices, h_hat [N,d])."""
        raise NotImplementedError


class TopKSAE(SAE):
    """z = TopK(W_enc (h - b_dec) + b_enc), h_hat = z W_dec + b_dec, for raw activations h [N,d].

    W_enc, W_dec [F,d]; b_enc [F]; b_dec [d].
    """

    k: int

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int):
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            torch.nn.Parameter(t) for t in (W_enc, b_enc, W_dec, b_dec)
        )
        self.k = k

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.topk_encode(h - self.b_dec, self.W_enc, self.b_enc, self.k)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """h_hat [N,d]."""
        return kernels.sparse_decode(values, indices, self.W_dec, self.b_dec)

    def reconstruct(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, indices = self.encode(h)
        return values, indices, self.decode(values, indices)


def tied_init(d: int, d_sae: int, k: int, seed: int, b_dec: Tensor) -> TopKSAE:
    """Decoder rows of unit norm in random directions, the encoder their copy (drawn on the CPU: the same on
    every device).
    """
    rows = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed))
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(b_dec.device)
    return TopKSAE(rows.clone(), torch.zeros(d_sae, device=b_dec.device), rows, b_dec.clone(), k)


# ------------------------------------------------------------------------------------------- activations
def must_vary(h: Tensor, about: str) -> None:
    """Raises Fault where the activations h [n,d] are all equal, up to float32's rounding."""
    if not (h - h.mean(0)).square().sum() > 1e-10 * h.square().sum():
        raise Fault(
            f"{about}: the activations of {len(h)} tokens do not vary, so there is nothing to train or to "
            "measure"
        )


# ------------------------------------------------------------------------------------------------- cache
WEIGHTS, CHECKPOINT = "sae.safetensors", "checkpoint.pt"


def save_sae(folder: pathlib.Path, sae: TopKSAE, made_by: Mapping[str, Any], **seen: Any) -> None:
    """Write a folder in EleutherAI sparsify's format (cfg.json, sae.safetensors), with provenance.json: what
    determined it, and what else was seen. Raises Fault.
    """
    d_sae, d = sae.W_dec.shape
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config = {
        "activation": "topk",
        "d_in": d,
        "expansion_factor": d_sae // d,
        "k": sae.k,
        "multi_topk": False,
        "normalize_decoder": True,
        "num_latents": d_sae,
        "skip_connection": False,
        "transcode": False,
    }
    weights = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    store.put(
        folder / store.PROVENANCE,
        {"cfg.json": as_json(config), WEIGHTS: weights, CHECKPOINT: None},
        **made_by,
        **seen,
    )


def load_sae(folder: pathlib.Path, device: torch.device) -> TopKSAE:
    """Raises Damaged."""
    record = folder / store.PROVENANCE
    t = load_file(store.checked(record, WEIGHTS))
    k = json.loads(store.checked(record, "cfg.json").read_text(encoding="utf-8"))["k"]
    return (
        TopKSAE(t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"], k)
        .requires_grad_(False)
        .to(device)
    )


@dataclass(frozen=True)
class TrainingSpec:
    """All that determines an SAE trained here."""

    model: str  # its name in results
    weights: str  # hash of what the model computes
    tokenizer: str  # hash
    dtype: str
    layer: int
    data: str  # the name of its text, which determines nothing, as `as_ids`
    data_content: str  # hash or commit
    split: str
    ctx: int
    device: str
    version: int
    tokens: int
    trunk: tuple[int, ...]  # the smaller budgets on its way
    d_sae: int
    k: int
    seed: int
    recipe: str
    sinks: str
    bos: int | None = None  # the token that was put at the beginning of rows, if any
    as_ids: bool | None = None  # True for rows that came as token ids, begun by whatever they begin with
    instructions: str | None = None  # `any x86-64` where the bytes are the same on every one

    def facts(self) -> dict[str, Any]:
        """In JSON's types, as in provenance.json."""
        facts = dataclasses.asdict(self) | {"trunk": list(self.trunk)}
        return {name: value for name, value in facts.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """All that determines the SAE: not the name of its text, nor what `data_content` covers."""
        return {name: value for name, value in self.facts().items() if name not in ("data", "as_ids")}

    def folder(self, cache: pathlib.Path) -> pathlib.Path:
        """A readable name with a short hash of everything that determines it."""
        short = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        # a file name has 255 bytes at most
        model = pathlib.Path(self.model.replace("/", "--").lstrip(".-")).name[:100]
        tokens = readable_count(self.tokens)
        return cache / f"{model}-L{self.layer}-F{self.d_sae}-k{self.k}-{tokens}-s{self.seed}-{short}"


def is_whole(folder: pathlib.Path, spec: TrainingSpec) -> bool:
    """Is this SAE in its folder? Raises Damaged where the folder holds another or its files have changed."""
    record = folder / store.PROVENANCE
    there = store.load(record)
    other = [name for name, value in spec.identity().items() if there and there.get(name) != value]
    if other:
        raise Damaged(f"{record}: says another {', '.join(other)} than the SAE that is asked for")
    if there.get("coming") or WEIGHTS not in there.get("files", {}) or not os.path.lexists(folder / WEIGHTS):
        return False
    return all(store.checked(record, name) for name in (WEIGHTS, "cfg.json"))
