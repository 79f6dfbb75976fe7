"""SAEs that exist, of --sae: which of them read a hook that was asked for, and whether they read it as their
files say.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry import formats, ranks
from transport_geometry.errors import UserError
from transport_geometry.formats import Declared, SaeFile
from transport_geometry.lm import Hook
from transport_geometry.sae import SAE

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Chosen:
    """An SAE file and the block that it reads."""

    file: SaeFile
    declared: Declared
    model: str
    layer: int


@dataclass(frozen=True, eq=False)
class Given:
    """An SAE from a file that has been read, is of the model's width, and is past the basis gate."""

    file: SaeFile
    declared: Declared  # with the basis, context and BOS that it is evaluated in
    fingerprint: str
    d_sae: int
    k: int  # 0: none
    typical_k: int  # latents that are active on a few sequences
    mean: torch.Tensor  # [d] of these sequences' activations
    fvu_as_said: float  # unexplained variance there, read as its files say; nan where --basis says
    fvu_otherwise: float  # the least of other readings

    def in_settings(self) -> dict[str, Any]:
        """What a results folder keeps of it, so that a run is not continued with another one of its name."""
        declared = dataclasses.asdict(self.declared)
        return declared | {"unseen": list(self.declared.unseen), "fingerprint": self.fingerprint}

    def load(self) -> SAE:
        """On the CPU."""
        sae = formats.read(self.file)
        sae.centred = self.declared.basis == "centred"
        return formats.fused(sae)


def choose(specs: Sequence[str], models: Sequence[tuple[str, int | None]]) -> list[Chosen]:
    """The SAEs of --sae that read a hook asked for, by label; says which do not.

    Without --models the files name the model; without @LAYER each file its layer. Raises UserError.
    """
    asked: dict[str, set[int | None]] = {}
    for name, layer in models:
        asked.setdefault(name, set()).add(layer)
    taken, left = [], []
    files = [file for spec in specs for file in formats.find(spec)]
    for file in tqdm(files, desc="what SAE files say", leave=False, disable=None):
        declared = formats.describe(file)
        model = model_of(file, declared, asked)
        layer, why_not = layer_of(file, declared, model, asked)
        if layer is None:
            left.append(f"{file.label} ({why_not})")
        else:
            taken.append(Chosen(file, declared, model, layer))
    if left:
        ranks.say(f"left out: {', '.join(left)}")
    if not taken:
        raise UserError(
            f"--sae {','.join(specs)}: none of its {len(left)} SAEs reads a hook that --models asks for"
        )
    if len({chosen.file.label for chosen in taken}) < len(taken):
        raise UserError("--sae: two SAEs of one name; name folders apart")
    return sorted(taken, key=lambda chosen: chosen.file.label)


def model_of(file: SaeFile, declared: Declared, asked: dict[str, set[int | None]]) -> str:
    if len(asked) == 1:
        return next(iter(asked))
    if declared.model is None:
        raise UserError(f"--sae {file.label}: its files name no model; name one with --models")
    return formats.hub_name(declared.model)


def layer_of(
    file: SaeFile, declared: Declared, model: str, asked: dict[str, set[int | None]]
) -> tuple[int | None, str]:
    """(the block, "") or (None, why it is left out)."""
    if declared.site not in (None, "resid_post"):
        return None, f"{declared.site}, not resid_post"
    if asked and model not in asked:
        return None, f"of {model}"
    layers = asked.get(model, {None})
    layer = declared.layer
    if layer is None and len(layers) == 1:
        layer = next(iter(layers))
    if layer is None:
        raise UserError(f"--sae {file.label}: its files name no layer; name one with --models {model}@LAYER")
    if layer not in layers and None not in layers:
        return None, f"layer {layer}"
    return layer, ""


def check(
    chosen: Sequence[Chosen],
    hook: Hook,
    name: str,
    input_ids: torch.Tensor,
    ctx: int,
    bos: bool,
    basis: str | None,
    device: torch.device,
) -> list[Given]:
    """The SAEs of one hook, each read, of the model's width, and past the basis gate.

    input_ids [4,T], a few of the evaluation's; ctx and bos: how these SAEs are evaluated; basis: of --basis.
    Raises UserError.
    """
    hook.to(device)
    near = formats.near(hook, input_ids.to(device))
    hook.to(torch.device("cpu"))
    out = []
    for one in tqdm(chosen, desc=f"reading SAEs of {name} L{hook.layer}", leave=False, disable=None):
        label = one.file.label
        sae = formats.read(one.file).to(device)
        F, d = sae.W_enc.shape
        h = near[hook.layer]
        if d != h.shape[1]:
            raise UserError(f"--sae {label}: reads {d} dimensions, and {name} has {h.shape[1]}")
        model = one.declared.model
        if model and os.path.isabs(model):  # where it lay on somebody's machine is nobody's business
            model = os.path.basename(model)
        declared = dataclasses.replace(
            one.declared, model=model, basis=basis or one.declared.basis, ctx=ctx, bos=bos
        )
        readings = [math.nan]
        if not basis:
            found = formats.check_basis(sae, declared.basis, label, hook.layer, near)
            readings = list(found.values())
        sae.centred = declared.basis == "centred"
        active = (sae.encode(h)[0] > 0).sum(1).double().mean().item()
        out.append(
            Given(
                one.file,
                declared,
                formats.sae_fingerprint(sae),
                d_sae=F,
                k=sae.k or 0,
                typical_k=max(1, round(active)),
                mean=h.mean(0).cpu(),
                fvu_as_said=readings[0],
                fvu_otherwise=min(readings[1:], default=math.nan),
            )
        )
    return out
