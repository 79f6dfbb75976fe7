"""The rule for fields of other libraries' SAE files: one that is not known is refused by name.

A field that is not read may be the one that changes the result. `--ignore-field NAME` lets one pass. Which
fields are known stands in the module of each format.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError, brief

import torch


@dataclass(frozen=True)
class Known:
    """Names of one format's fields; a.b is b among the named values of a."""

    read: frozenset[str]  # of the configuration: they change the result, or say where the SAE belongs
    unused: frozenset[str]  # of the configuration: how it was trained and kept; the report names them
    tensors: frozenset[str]  # of the weights' file: computed with
    idle: frozenset[str]  # of the weights' file: counters and the like


@dataclass(frozen=True)
class Fields:
    """Names in one SAE's files that nothing is computed with."""

    unused: tuple[str, ...] = ()  # known to change nothing
    ignored: tuple[str, ...] = ()  # not known, and let pass


def known(read: str = "", unused: str = "", tensors: str = "", idle: str = "") -> Known:
    """Each argument: names with spaces between them."""
    return Known(*(frozenset(names.split()) for names in (read, unused, tensors, idle)))


def inside(outer: str, names: str) -> str:
    """The names as they are called within the named values `outer`, with a space at the end."""
    return "".join(f"{outer}.{name} " for name in names.split())


def says_nothing(value: Any) -> bool:
    """Is it null, false, "none" or empty?"""
    if isinstance(value, torch.Tensor):
        return not value.numel()
    if isinstance(value, str):
        return value.lower() in ("", "none")
    return value is None or value is False or (isinstance(value, (dict, list, tuple)) and not value)


def said(content: Mapping[str, Any], of: frozenset[str], outer: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every field that says something; also of those within a field, where `of` has names
    within it.
    """
    for key, value in content.items():
        name = f"{outer}{key}"
        if isinstance(value, Mapping) and any(one.startswith(f"{name}.") for one in of):
            yield from said(value, of, f"{name}.")
        elif not says_nothing(value):
            yield name, value


def is_called(name: str, typed: str) -> bool:
    """Does --ignore-field mean this field? It may be typed without what it lies in."""
    return f".{name}".endswith(f".{typed}")


def check(of: Known, config: Mapping[str, Any], tensors: Mapping[str, Any], ignore: Sequence[str]) -> Fields:
    """The fields that nothing is computed with. Raises UserError, which names them, for unknown ones.

    config: with the files beside it, by name. ignore: of --ignore-field.
    """
    unused, strange = set(), {}
    for content, read, idle in ((config, of.read, of.unused), (tensors, of.tensors, of.idle)):
        for name, value in said(content, read | idle):
            if name in idle:
                unused.add(name)
            elif name not in read:
                strange[name] = value
    refused = [name for name in strange if not any(is_called(name, typed) for typed in ignore)]
    if refused:
        shown = ", ".join(f"{in_words(name)} ({in_words(strange[name])})" for name in refused[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(f"not known, so not computed: {shown}{more}; --ignore-field NAME goes on without")
    return Fields(tuple(sorted(unused)), tuple(sorted(strange)))


def check_all_taken(of: Known, tensors: Mapping[str, Any], taken: set[str], ignore: Sequence[str]) -> None:
    """Raises UserError for a tensor that the format has and that this SAE was not computed with."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not value.numel() or name not in of.tensors - taken:
            continue
        if not any(is_called(name, typed) for typed in ignore):
            raise UserError(f"{name} is there, and not in the formula of what the file says that it is")


def in_words(value: Any) -> str:
    """A field's name or value, short and on one line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return brief(ascii(value)[1:-1] if isinstance(value, str) else ascii(value), 80)
