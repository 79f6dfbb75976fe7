"""SAEs that others trained, or that were trained here for others.

    python -m transport_geometry.formats list PATH_OR_ID      # the SAEs of a folder or hub repository
    python -m transport_geometry.formats export SAE_FOLDER TO # an SAE trained here, in SAELens' format

Reads SAELens (5 and 6), EleutherAI sparsify, dictionary_learning, Gemma Scope 1 and 2, OpenAI's
sparse_autoencoder and mlsae.
"""

import pathlib
import sys
from typing import Any

from transport_geometry.errors import UserError, one_line, run_script
from transport_geometry.formats import find_and_read
from transport_geometry.formats.saelens import write_saelens
from transport_geometry.records import store
from transport_geometry.records.tables import markdown
from transport_geometry.saes.sae import load_sae

import torch

COLUMNS = (*"sae format site layer model ctx bos basis width".split(), "why not")


def listed(spec: str) -> str:
    """A table of the SAEs of a folder or repository: what their files say, or why they cannot be read."""
    rows = []
    for file in find_and_read.find(spec):
        row: dict[str, Any] = {"sae": file.label, "format": file.format}
        try:
            row |= vars(find_and_read.describe(file))
            with one_line(f"--sae {file.label}"):
                config, beside = find_and_read.read_config(file), find_and_read.read_beside(file)
                find_and_read.check_fields(find_and_read.FORMATS[file.format], config, beside, {}, ())
        except UserError as error:
            row["why not"] = str(error).rpartition(": ")[2]
        rows.append({column: "" if row.get(column) is None else row[column] for column in COLUMNS})
    return markdown(rows, COLUMNS)


def export(source: str, to: str) -> str:
    """Writes the SAE of this cache folder to another, in SAELens' format. Raises UserError, Fault."""
    folder = pathlib.Path(source)
    if not (folder / store.PROVENANCE).exists():
        raise UserError(f"{source}: not an SAE trained here (no provenance.json); they lie in outputs/cache/")
    sae = load_sae(folder, torch.device("cpu"))
    write_saelens(pathlib.Path(to), sae, store.load(folder / store.PROVENANCE))
    return f"{to}: cfg.json, sae_weights.safetensors; SAE.load_from_disk({to!r}) reads it"


def main() -> None:
    match sys.argv[1:]:
        case ["list", spec]:
            print(listed(spec))
        case ["export", source, to]:
            print(export(source, to))
        case ["--help"] | ["-h"]:
            print(__doc__, end="")
        case _:
            raise UserError(
                "usage: python -m transport_geometry.formats list PATH_OR_ID | export SAE_FOLDER TO"
            )


if __name__ == "__main__":
    run_script(main)
