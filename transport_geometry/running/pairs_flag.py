"""Which models or hooks are compared: --pairs, and otherwise the smallest and the largest model."""

import dataclasses
import itertools
from typing import Any

from transport_geometry.errors import UserError, brief, printable
from transport_geometry.models.loading import readable_names
from transport_geometry.models.plant import split
from transport_geometry.running.grid import Command

FLAGS: dict[str, dict[str, Any]] = {
    "--pairs": dict(
        metavar="A:B,...",
        help="hooks to compare, the second with the first: layers of the one model of --models (10:11), or "
        "MODEL@LAYER:MODEL@LAYER (default: equal depths of the smallest and the largest model)",
    )
}


def with_pairs(command: Command, default: str) -> Command:
    """The command with the hooks of --pairs as its grid, and the pairs, as results call them, among its
    settings. default: the --models of a command that names none. Raises UserError.
    """
    if (typed := command.own["pairs"]) is None:
        return dataclasses.replace(command, own={})
    if command.finished:
        raise UserError("--pairs: with --from they are those of the run")
    typed_none = command.grid.models == tuple((name, None) for name in default.split(","))
    models = [] if typed_none else [name for name, _ in command.grid.models]
    pairs = [pair_of(printable(text, "--pairs"), models) for text in typed.split(",")]
    if len(set(pairs)) < len(pairs):
        raise UserError(f"--pairs {brief(typed)}: the same pair twice")
    hooks = tuple(dict.fromkeys(itertools.chain(*pairs)))
    called = readable_names(list(dict.fromkeys(name for name, _ in hooks)))
    own = {"pairs": [[f"{called[name]}@{layer}" for name, layer in pair] for pair in pairs]}
    return dataclasses.replace(command, grid=dataclasses.replace(command.grid, models=hooks), own=own)


def pair_of(text: str, models: list[str]) -> tuple[tuple[str, int], ...]:
    """(model, layer) of both hooks, as typed. models: of --models, none where it was not typed. Raises
    UserError.
    """
    ends = text.split(":")
    if all(end.isdecimal() for end in ends):
        if len(set(models)) != 1:
            raise UserError(f"--pairs {brief(text)}: layers of which model? --models NAME, please")
        ends = [f"{models[0]}@{end}" for end in ends]
    parts = [end.rpartition("@") for end in ends]
    if not all(name and layer.isdecimal() and len(layer) < 5 for name, _, layer in parts):
        raise UserError(f"--pairs {brief(text)}: two hooks, please, as 10:11 or MODEL@10:MODEL@11")
    hooks = tuple((name, int(layer)) for name, _, layer in parts)
    if len(hooks) != 2 or len(set(hooks)) != 2:
        raise UserError(f"--pairs {brief(text)}: two different hooks, please")
    if models and (others := [name for name, _ in hooks if name not in models]):
        raise UserError(f"--pairs {brief(text)}: {others[0]} is not among --models")
    return hooks


def compared(models: list[str]) -> list[list[str]]:
    """Of models from the smallest to the largest, the sets that a verdict is about: those in which nothing is
    planted, and for each planted twin the same with it in its model's place, or beside it where that is
    alone.
    """
    plain = [model for model in models if not split(model)[1]]
    twins = [model for model in models if split(model)[1] and split(model)[0] in plain]
    others = {twin: [model for model in plain if model != split(twin)[0]] or plain for twin in twins}
    sets = [plain] * (len(plain) > 1) + [[*others[twin], twin] for twin in twins]
    return sets or [models]
