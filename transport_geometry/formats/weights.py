"""Tensors from files that may be damaged or hostile."""

import pathlib
import pickle
import re
import warnings
import zipfile
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats.contract import Named

import numpy as np
import torch
from safetensors.torch import load_file


def read_tensors(path: pathlib.Path) -> Named:
    """What a weights file holds, by name. Raises UserError: a pickle that wants to run code, or a small file
    of large tensors.

    torch neither compresses its zips nor asks that a tensor's values are all stored: both would let some KB
    take all memory.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            inflated = sum(member.file_size for member in members.infolist())
        if inflated > path.stat().st_size:
            raise UserError(f"a zip of {path.stat().st_size} bytes whose members inflate to {inflated}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
    try:
        with warnings.catch_warnings(action="ignore"):  # of a newer pickle protocol
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            "a pickle that is damaged or wants to run code; only tensors and plain values are read"
        ) from error
    if not isinstance(tensors, dict):
        raise UserError(f"it holds a {type(tensors).__name__}, not tensors by name")
    for level in (tensors, *(value for value in tensors.values() if isinstance(value, dict))):
        for name, value in level.items():
            if isinstance(value, torch.Tensor):
                check_tensor(name, value)
    return tensors


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises UserError for anything but numbers that are all stored."""
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        raise UserError(f"{name} is no plain tensor of numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{name} claims {tensor.numel()} values, more than are stored")


class Watched(dict[str, Any]):
    """Knows which of its values were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return super().get(name, default)


def unwrapped(tensors: Named) -> Watched:
    """By the names that they have without torch's wrappers of a module. Raises UserError."""
    out = Watched()
    for name, value in tensors.items():
        plain = re.sub(r"^((module|_orig_mod)\.)+", "", name) if isinstance(name, str) else repr(name)
        if plain in out:
            raise UserError(f"{plain} is there twice, once as {name}")
        if isinstance(value, torch.Tensor) and value.ndim > 2:
            raise UserError(
                f"{plain} is {list(value.shape)}, where a matrix belongs: a crosscoder of several layers? "
                "SAEs of one layer are read"
            )
        out[plain] = unwrapped(value) if isinstance(value, dict) else value
    return out
