"""What the module of one format provides (`Format`), and what those modules share.

Shapes: d = d_model, F = d_sae.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.known_fields import Known

import torch

Named = Mapping[str, Any]  # a configuration; tensors, and in a pickle plain values among them


@dataclass(frozen=True)
class Declared:
    """What an SAE's files say about it; None where they do not say."""

    format: str
    site: str | None = None  # of its hook
    layer: int | None = None
    model: str | None = None  # the language model's name
    ctx: int | None = None  # tokens of a training sequence
    bos: bool | None = None  # whether every sequence began with the beginning-of-text token
    basis: str = "raw"  # of its activations; or `centred`: TransformerLens' processed weights
    width: int | None = None  # F
    unseen: tuple[str, ...] = ()  # settings that kept some positions out of training
    # of an SAE trained here: hashes of the model's `weights` and of its `tokenizer`, `dtype`, the `bos` token
    model_facts: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Format:
    """One format of SAE files. `find_and_read.FORMATS` lists them all.

    declares(configuration, path, beside): what the files say, without reading the weights. path: the SAE's
    folder or file, which may name the hook. beside: {name: content} of the files of `beside` that are there.
    computes(tensors, configuration, beside): arguments of `FileSAE`.
    known(configuration): the fields that such files may have.
    All raise UserError for what they do not support, and KeyError for what is missing.
    """

    name: str
    weights: Mapping[str, str | None]  # name of the weights' file -> of the configuration beside it
    declares: Callable[[Named, str, Named], Declared]
    computes: Callable[[Named, Named, Named], dict[str, Any]]
    known: Callable[[Named], Known]
    beside: tuple[str, ...] = ()  # other files that are read where they are there
    needs_config: bool = True
    has_key: str | None = None  # a configuration without this key is not an SAE's
    # (path of a file of another name, whether --sae names that very file) -> are these weights?
    is_weights: Callable[[str, bool], bool] = lambda path, asked: False
    # the configuration in the weights' file, where there is none beside it
    config_within: Callable[[Named], Named] = lambda tensors: {}


KINDS = {
    str: "text",
    int: "a whole number of at least 0",
    float: "a number above 0",
    bool: "true or false",
    dict: "named values",
    list: "true, false or a list",
}


def began(made: Named) -> bool | None:
    """Did the rows of an SAE trained here begin with BOS? None where nothing is known: of another's SAE, and
    of rows that came as token ids and had none put before them.
    """
    if not made or "bos" not in made and made.get("as_ids"):
        return None
    return "bos" in made


def differences(trained_on: Named, here: Named) -> tuple[str, ...]:
    """What an SAE trained here was trained on otherwise than it is measured. Weights are hashed in their
    dtype, so that another dtype alone is named as that.

    >>> differences({"weights": "a", "dtype": "float32", "bos": 0}, {"weights": "b", "dtype": "float32"})
    ('weights',)
    >>> differences({"weights": "a", "dtype": "float32"}, {"weights": "b", "dtype": "bfloat16"})
    ('dtype',)
    """
    other = [name for name, value in trained_on.items() if here.get(name, value) != value]
    return tuple(name for name in other if name != "weights" or "dtype" not in other)


def field(config: Named, name: str, kind: type, default: Any = None) -> Any:
    """config[name], or the default where it is null or missing. Raises UserError where it is of another kind.

    JSON has one kind of number, so 128.0 is whole. Python takes true for a number; here it is none.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and 0 <= value < 2**31:  # and so finite
            if value > 0 if kind is float else value == int(value):
                return kind(value)
    elif isinstance(value, kind) or kind is list and isinstance(value, bool):
        return value
    raise UserError(f"{name} is {repr(value)[:60]}, where {KINDS[kind]} belongs")


def rescaled(args: dict[str, Any], factor: float) -> dict[str, Any]:
    """The SAE of h, from one whose activations are h / factor: biases and thresholds grow by the factor."""
    grow = ("b_enc", "b_dec", "b_in", "b_mag", "threshold")
    return args | {name: args[name] * factor for name in grow if args.get(name) is not None}


def check_scaling(t: Named, config: Named) -> None:
    """Raises UserError for a fine-tuned scaling factor other than 1; files may hold one of ones."""
    scaling = t.get("scaling_factor")
    ones = scaling is not None and bool((scaling == 1).all())
    if not ones and (config.get("finetuning_scaling_factor") or scaling is not None):
        raise UserError("a finetuning scaling factor other than 1 (scaling_factor) is not supported")
