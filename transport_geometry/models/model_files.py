"""Read a language model's files without building it: check its size before memory is spent, and find the
token that its tokenizer puts before a text.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transport_geometry.errors import UserError, one_line

import torch

# fields of config.json that are numbers of modules
COUNTED, MAX_MODULES = r"(n|num)_(\w+_)?(layers?|experts)|attention_types", 1024
MAX_BUFFERS = 2**26  # numbers, such as GPT-Neo's masks of context^2 in each block


def read_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a local folder, GGUF file or hub id. Raises what transformers raises,
    and UserError.

    Numbers of blocks and experts are bounded first: transformers makes lists of that length.
    """
    import transformers

    how: dict[str, Any] = {"revision": revision}
    if source.endswith(".gguf"):
        source, how["gguf_file"] = os.path.split(os.path.abspath(source))
    raw, _ = transformers.PretrainedConfig.get_config_dict(source, **how)
    if "transformers_weights" in raw:
        raise UserError(
            "config.json names transformers_weights, and only model.safetensors or its index are read"
        )
    for name, value in _numbers(raw):
        if re.fullmatch(COUNTED, name) and not value <= MAX_MODULES:
            raise UserError(
                f"by config.json {name} is {value:.6g}: more than the {MAX_MODULES} that are read"
            )
    config = transformers.AutoConfig.from_pretrained(source, **how, trust_remote_code=False)
    if (n := getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)) < 1:
        raise UserError(f"by config.json num_hidden_layers is {n}")
    return config


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(field, number) of every number in a JSON value; items of a list have the list's field."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, (int, float)):
        yield name, content


def numbers_in(files: Sequence[pathlib.Path]) -> int:
    """How many numbers these safetensors files hold."""
    from safetensors import safe_open

    there = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            there += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return there


def check_size(config: Any, there: int) -> None:
    """Raises UserError if the model of `config` would be larger than its files, which hold `there` numbers.

    Up to twice their size passes (loading then names the missing weight), and MAX_BUFFERS for buffers, which
    are not in files.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * there + MAX_BUFFERS:
        raise UserError(
            f"by config.json it has {wanted:.3g} parameters and buffers, and its files hold {there:.3g} "
            "numbers"
        )


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder's weights. Raises UserError if transformers would read anything else:
    an index may name pickles, and files outside the folder.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError("it is an adapter to another model (adapter_config.json), or holds one")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise UserError("no model.safetensors there, and other weights, such as pickled ones, are not read")
    with one_line(index.name):
        names = set(map(str, json.loads(index.read_text())["weight_map"].values()))
    for name in sorted(names):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"its index names {name}, and only safetensors beside it are read")
    return [folder / name for name in sorted(names)]


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text, or None. Found by encoding a text: Gemma 3's
    `add_bos_token` is False although it puts one.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids[0] for special in (False, True))
    return None if whole == plain else whole
