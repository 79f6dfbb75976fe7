"""SAEs of --sae: which of them read a hook that was asked for, and whether they read it as their files say.
One that cannot be used is refused with its reason, and the others go on.
"""

import dataclasses
import fnmatch
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry import torchrun
from transport_geometry.errors import UserError
from transport_geometry.formats import find_and_read
from transport_geometry.formats.computed_sae import fused, sae_fingerprint
from transport_geometry.formats.contract import Declared
from transport_geometry.formats.find_and_read import SaeFile
from transport_geometry.formats.hook_names import hub_name
from transport_geometry.formats.known_fields import Fields
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import readable_names
from transport_geometry.saes import basis_gate
from transport_geometry.saes.sae import SAE

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Chosen:
    """An SAE file and the block that it reads."""

    file: SaeFile
    declared: Declared
    model: str
    layer: int
    basis: str | None = None  # where --basis says


@dataclass(frozen=True)
class Refused:
    """An SAE, or all that a part of --sae names, that cannot be used, and why not, in one line."""

    label: str
    why: str


@dataclass(frozen=True, eq=False)
class ExternalSAE:
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
    fields: Fields = Fields()  # of its files, that nothing is computed with
    differs: tuple[str, ...] = ()  # what of the language model is another than it was trained on

    def in_settings(self) -> dict[str, Any]:
        """What a results folder keeps of it, so that a run is not continued with another one of its name."""
        declared = dataclasses.asdict(self.declared)
        del declared["model_facts"]
        own = {"unseen": list(self.declared.unseen), "fingerprint": self.fingerprint}
        own |= {"differs": list(self.differs)} if self.differs else {}
        return declared | own | {name: list(of) for name, of in vars(self.fields).items() if of}

    def load(self) -> SAE:
        """On the CPU."""
        sae = find_and_read.read(self.file, self.fields.ignored)
        sae.centred = self.declared.basis == "centred"
        return fused(sae)


def choose(
    specs: Sequence[str],
    models: Sequence[tuple[str, int | None]],
    basis: Sequence[tuple[str, str]] = (),
) -> tuple[list[Chosen], list[Refused]]:
    """The SAEs of --sae that read a hook asked for, by label, and those refused; says which read another.

    Without --models the files name the model; without @LAYER each file its layer. basis: of --basis, (NAME
    or "", basis). Raises UserError where none reads such a hook, and for a NAME that none has.
    """
    asked: dict[str, set[int | None]] = {}
    for name, layer in models:
        asked.setdefault(name, set()).add(layer)
    taken, left, refused, files = [], [], [], []
    for spec in specs:
        try:
            files += find_and_read.find(spec)
        except UserError as why:
            refused.append(refused_for(spec, why))
    for file in tqdm(named_apart(files), desc="what SAE files say", leave=False, disable=None):
        try:
            declared = find_and_read.describe(file)
            model = model_of(file, declared, asked)
            layer, why_not = layer_of(file, declared, model, asked)
        except UserError as why:
            refused.append(refused_for(file.label, why))
            continue
        if layer is None:
            left.append(f"{file.label} ({why_not})")
        else:
            taken.append(Chosen(file, declared, model, layer))
    if left:
        torchrun.say(f"left out: {', '.join(left)}")
    if not taken and not refused:
        raise UserError(
            f"--sae {','.join(specs)}: none of its {len(left)} SAEs reads a hook that --models asks for: "
            + left[0]
        )
    if not taken:
        say(refused, any_left=False)
    labels = [chosen.file.label for chosen in taken]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"--sae: {twice[0]} is named twice, or two revisions of it; one at a time, please")
    return in_their_basis(sorted(taken, key=lambda chosen: chosen.file.label), basis), refused


def named_apart(files: Sequence[SaeFile]) -> list[SaeFile]:
    """Files of one label get as many of their folders as tell them apart."""
    out = []
    for file in files:
        same = [one.path.split("/") for one in files if one.label == file.label and one.path != file.path]
        own, n = file.path.split("/"), 1
        while n < len(own) and any(own[-n:] == other[-n:] for other in same):
            n += 1
        out.append(dataclasses.replace(file, label="/".join(own[-n:])) if same else file)
    return out


def in_their_basis(taken: list[Chosen], basis: Sequence[tuple[str, str]]) -> list[Chosen]:
    """Each with what --basis says of it, and of no other. Raises UserError: a bare word where there are
    several SAEs, or a NAME (the end of a label, or a pattern) that none has.
    """
    for name, word in basis:
        if not name and len(taken) > 1:
            raise UserError(
                f"--basis {word}: of which of the {len(taken)} SAEs? NAME={word} says, '*={word}' of all"
            )
        labels = [one.file.label for one in taken]
        meant = [at for at in labels if not name or fnmatch.fnmatchcase(f"/{at}", f"*/{name}")]
        meant += [at for at in labels if f"/{at}".endswith(f"/{name}")]  # a name may hold a [
        if taken and not meant:
            raise UserError(f"--basis {name}={word}: no SAE is called so; one is {taken[0].file.label}")
        taken = [dataclasses.replace(one, basis=word) if one.file.label in meant else one for one in taken]
    return taken


def refused_for(label: str, why: UserError) -> Refused:
    """What a results folder may keep of it: nothing of where things lie on this machine, and nothing that
    another try would say otherwise.
    """
    text = " ".join(str(why).split()).removeprefix(f"--sae {label}: ")
    text = re.sub(r" \(Request ID: [^)]*\)", "", text)
    text = re.sub(r"(?<![\w.:/-])/(?:[^/\s'\"]+/)+", "", text)
    at = pathlib.Path(label)
    return Refused("/".join(at.parts[-2:]) if at.is_absolute() else label, text)


def refusal(chosen: Chosen, why: UserError) -> Refused:
    return refused_for(chosen.file.label, why)


def say(refused: Sequence[Refused], any_left: bool = True) -> None:
    """Which are refused, a line each. Raises UserError where no SAE is left."""
    if refused and not any_left:
        first = f"--sae {refused[0].label}: {refused[0].why}"
        more = "" if len(refused) == 1 else f"; and {len(refused) - 1} more, all that were asked for"
        raise UserError(first + more)
    for one in refused:
        torchrun.say(f"refused: {one.label}: {one.why}")


def model_of(file: SaeFile, declared: Declared, asked: dict[str, set[int | None]]) -> str:
    if len(asked) == 1:
        return next(iter(asked))
    if declared.model is None:
        raise UserError(f"--sae {file.label}: its files name no model; name one with --models")
    # an SAE trained here names a folder as results do
    called = [name for name, short in readable_names(list(asked)).items() if short == declared.model]
    return called[0] if called else hub_name(declared.model)


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
    device: torch.device,
    ignore: Sequence[str] = (),
) -> tuple[list[ExternalSAE], list[Refused]]:
    """The SAEs of one hook, each read, of the model's width, and past the basis gate; and those that are not.

    input_ids [4,T], a few of the evaluation's; ctx and bos: how these SAEs are evaluated. ignore: of
    --ignore-field.
    """
    hook.to(device)
    near = basis_gate.near(hook, input_ids.to(device))
    hook.to(torch.device("cpu"))
    out, refused = [], []
    for one in tqdm(chosen, desc=f"reading SAEs of {name} L{hook.layer}", leave=False, disable=None):
        try:
            out.append(checked(one, near, hook.layer, name, ctx, bos, device, ignore))
        except UserError as why:
            refused.append(refusal(one, why))
    return out, refused


def checked(
    one: Chosen,
    near: Mapping[int, torch.Tensor],
    layer: int,
    name: str,
    ctx: int,
    bos: bool,
    device: torch.device,
    ignore: Sequence[str],
) -> ExternalSAE:
    """One of them. near: see `basis_gate.near`. Raises UserError."""
    label, h = one.file.label, near[layer]
    sae = find_and_read.read(one.file, ignore).to(device)
    F, d = sae.W_enc.shape
    if d != h.shape[1]:
        raise UserError(f"--sae {label}: reads {d} dimensions, and {name} has {h.shape[1]}")
    model = one.declared.model
    if model and os.path.isabs(model):  # results do not keep where it lay on somebody's machine
        model = os.path.basename(model)
    declared = dataclasses.replace(
        one.declared, model=model, basis=one.basis or one.declared.basis, ctx=ctx, bos=bos
    )
    readings = [math.nan]
    if not one.basis:
        readings = list(basis_gate.check_basis(sae, declared.basis, label, layer, near).values())
    sae.centred = declared.basis == "centred"
    active = (sae.encode(h)[0] != 0).sum(1).double().mean().item()
    return ExternalSAE(
        one.file,
        declared,
        sae_fingerprint(sae),
        d_sae=F,
        k=sae.k or 0,
        typical_k=max(1, round(active)),
        mean=h.mean(0).cpu(),
        fvu_as_said=readings[0],
        fvu_otherwise=min(readings[1:], default=math.nan),
        fields=sae.fields,
    )
