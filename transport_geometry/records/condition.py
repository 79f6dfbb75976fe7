"""A condition: one SAE, or one null row, as every table calls it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

NO_SINKS = "-nosinks"  # ends the name of an SAE that was trained here with --sinks drop


def without_sinks(sae: Any) -> bool:
    """Is this the name of an SAE that was trained here without sinks?"""
    return str(sae).endswith(NO_SINKS)


def hook_of(row: Mapping[str, Any]) -> str:
    """model@layer of a row, as settings and reports call its hook."""
    return f"{row['model']}@{row['layer']}"


@dataclasses.dataclass(frozen=True, order=True)
class Condition:
    """The key of a row of conditions.csv, in the order in which rows are sorted."""

    model: str  # as results call it
    layer: int
    sae: str
    recipe: str  # of an SAE from a file, its format; of a null row, `null`
    d_sae: int
    k: int  # 0: none
    seed: int
    tokens: int  # 0: not trained here

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Condition":
        return cls(**{name: row[name] for name in KEY})

    def __str__(self) -> str:
        return " ".join(map(str, dataclasses.astuple(self)))

    @property
    def hook(self) -> str:
        return hook_of(vars(self))

    @property
    def within_hook(self) -> str:
        """What tells it from the others of its hook."""
        return "-".join(map(str, dataclasses.astuple(self)[2:]))


KEY = [field.name for field in dataclasses.fields(Condition)]
NULLS = ("null-identity", "null-mean", "null-random", "null-gaussian")  # how the null rows' saes begin
