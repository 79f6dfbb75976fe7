"""SAEs that others trained: where their files lie, what these say, and reading them.

Reads the formats of `FORMATS`, each in a module of its own. Everything becomes float32.
"""

import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError, one_line, printable
from transport_geometry.formats import (
    dictionary_learning,
    gemma_scope,
    known_fields,
    mlsae,
    openai,
    saelens,
    sparsify,
    weights,
)
from transport_geometry.formats.computed_sae import FileSAE, check_args
from transport_geometry.formats.contract import Declared, Format, Named, field
from transport_geometry.models.loading import asking_hub
from transport_geometry.records import store

import torch
from safetensors.torch import load_file

MODULES = (saelens, sparsify, dictionary_learning, mlsae, gemma_scope, openai)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in MODULES}


@dataclass(frozen=True)
class SaeFile:
    """Where one SAE lies.

    label: what people and result files call it, a hub id with its sub-path or a local path as typed. path:
    the same in full, which may name the hook. weights, config and beside name files; fetch(name) is the local
    path of one, downloaded where it is the hub's.
    """

    label: str
    path: str
    format: str  # of FORMATS
    weights: str
    config: str | None
    beside: tuple[str, ...]
    fetch: Callable[[str], pathlib.Path]


# --------------------------------------------------------------------------------------------- where they lie
@dataclass(frozen=True)
class Place:
    """A local folder, or a hub repository, in which SAEs are looked for."""

    name: str  # as typed
    whole: str  # in full
    files: frozenset[str]  # all in it
    pattern: str  # the part of it that is asked for, "": all
    fetch: Callable[[str], pathlib.Path]


def find(spec: str) -> list[SaeFile]:
    """The SAEs that PATH_OR_ID[/SUB_PATH_OR_PATTERN][@REVISION] names, sorted by label. Raises UserError."""
    with one_line(f"--sae {spec}"):
        place = local_folder(spec) or repository(spec)
        found = [sae for file in sorted(place.files) if (sae := sae_at(place, file))]
        saes = [file for file in found if not language_model(file)]
        if not saes:
            raise UserError("it holds a language model, and no SAE" if found else nothing_in(place))
        return sorted(saes, key=lambda file: file.label)


def local_folder(spec: str) -> Place | None:
    """Where spec begins with a path that is there."""
    parts = pathlib.Path(spec).parts
    plain = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    root, pattern = pathlib.Path(*parts[:plain]), "/".join(parts[plain:])
    if not plain or not root.exists():
        return None
    if root.is_file():
        root, pattern = root.parent, root.name
    files = frozenset(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    # results do not keep where it lies on this machine
    name = "/".join(root.parts[-2:]) if root.is_absolute() else str(root)
    return Place(name, str(root.resolve()), files, pattern, root.joinpath)


def repository(spec: str) -> Place:
    """Of the hub. Raises UserError where spec is no hub id, and what the hub's client raises."""
    import huggingface_hub

    there, _, revision = spec.partition("@")
    parts = there.split("/")
    name, pattern = "/".join(parts[:2]), "/".join(parts[2:]).rstrip("/")
    # what begins as a path that is there is a path
    path = spec.startswith(".") or pathlib.Path(pathlib.Path(spec).parts[0]).exists()
    if path or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError("no such file or folder, and no hub id")

    def fetch(file: str) -> pathlib.Path:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, revision=revision or None))

    asking_hub(spec)
    files = huggingface_hub.HfApi().list_repo_files(name, revision=revision or None)
    return Place(name, name, frozenset(files), pattern, fetch)


def sae_at(place: Place, file: str) -> SaeFile | None:
    """The SAE whose weights this file is, if it is one and asked for. Raises UserError."""
    folder, last = os.path.split(file)
    for of in FORMATS.values():
        if last in of.weights or of.is_weights(file, file == place.pattern):
            break
    else:
        return None
    path = folder if last in of.weights else file
    asked = place.pattern in ("", path, file) or path.startswith(f"{place.pattern}/")
    if not asked and not fnmatch.fnmatchcase(path, place.pattern):
        return None

    def there(name: str | None) -> str | None:
        beside = name and os.path.join(folder, name)
        return beside if beside in place.files else None

    return SaeFile(
        label=printable("/".join(filter(None, (place.name, path))), "its name"),
        path="/".join(filter(None, (place.whole, path))),
        format=of.name,
        weights=file,
        config=there(of.weights.get(last, next(iter(of.weights.values()), None))),
        beside=tuple(filter(None, map(there, of.beside))),
        fetch=place.fetch,
    )


def language_model(file: SaeFile) -> bool:
    """Some formats' weights have the name of a language model's; the configuration tells them apart."""
    key = FORMATS[file.format].has_key
    if key is None or file.config is None:
        return False
    try:
        return key not in read_json(file, file.config)
    except UserError:  # said again where it is read
        return False


def nothing_in(place: Place) -> str:
    """What is said where no SAE is."""
    at = f"at {place.pattern} " if place.pattern else ""
    names = [name for of in FORMATS.values() for name in of.weights]
    line = f"no SAE {at}in it ({', '.join(names)} or OpenAI's autoencoders/*.pt)"
    if place.files:
        first = ", ".join(sorted(place.files)[:6])
        line += f"; it holds {first}{', ...' if len(place.files) > 6 else ''}"
    return line


# --------------------------------------------------------------------------------------------- files are read
def describe(file: SaeFile) -> Declared:
    """What an SAE's files say about it, without reading its weights. Raises UserError."""
    with one_line(f"--sae {file.label}"):
        declared = FORMATS[file.format].declares(read_config(file), file.path, read_beside(file))
        kinds = dict(site=str, layer=int, model=str, ctx=int, bos=bool, width=int)
        for name, kind in kinds.items():
            field(vars(declared), name, kind)
        for name in ("site", "model"):
            printable(getattr(declared, name) or "", name)
        if declared.ctx is not None and declared.ctx < 2:
            raise UserError(f"ctx is {declared.ctx}, and a sequence has at least 2 tokens")
        return declared


def read(file: SaeFile, ignore: Sequence[str] = ()) -> FileSAE:
    """The SAE on the CPU. ignore: fields that are not known and let pass. Raises UserError: unreadable, of
    wrong shapes, not finite, of an architecture that is not supported, or with a field that is not known.
    """
    of = FORMATS[file.format]
    with one_line(f"--sae {file.label}"):
        config, beside = read_config(file), read_beside(file)
        path = file.fetch(file.weights)
        if file.config and "files" in beside.get(store.PROVENANCE, {}):  # made here: it says what was written
            for written in (path, file.fetch(file.config)):
                store.checked(path.parent / store.PROVENANCE, written.name)
        tensors = weights.unwrapped(weights.read_tensors(path))
        config = config or of.config_within(tensors)
        fields = check_fields(of, config, beside, tensors, ignore)
        args = of.computes(tensors, config, beside)
        for level in (tensors, *tensors.values()):
            if isinstance(level, weights.Watched):
                known_fields.check_all_taken(of.known(config), level, level.taken, ignore)
        for name, value in args.items():
            if isinstance(value, torch.Tensor):
                args[name] = value.float().contiguous()
        check_args(args)
        sae = FileSAE(**args)
        sae.fields = fields
        return sae


def check_fields(
    of: Format, config: Named, beside: Named, tensors: Named, ignore: Sequence[str]
) -> known_fields.Fields:
    """Raises UserError for a field that is not known; see `sae_fields`."""
    others = {name: content for name, content in beside.items() if name != store.PROVENANCE}
    return known_fields.check(of.known(config), {**config, **others}, tensors, ignore)


def read_config(file: SaeFile) -> Named:
    """{} where the format may do without. Raises UserError."""
    if file.config is not None:
        return read_json(file, file.config)
    of = FORMATS[file.format]
    if of.needs_config:
        raise UserError(f"{of.weights[os.path.basename(file.weights)]} is missing beside {file.weights}")
    return {}


def read_beside(file: SaeFile) -> dict[str, Any]:
    """{name: content} of the other files. Raises UserError."""
    out: dict[str, Any] = {}
    for name in file.beside:
        tensors = name.endswith(".safetensors")
        out[os.path.basename(name)] = load_file(file.fetch(name)) if tensors else read_json(file, name)
    return out


def read_json(file: SaeFile, name: str) -> dict[str, Any]:
    """Named values. Raises UserError."""
    path = file.fetch(name)
    with one_line(os.path.basename(name)):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"{repr(content)[:60]}, where named values belong")
        return content
