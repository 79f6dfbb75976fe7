"""What the files of a language model say: its size, read before any memory is spent (a stranger's
configuration may count out more than there is), and the token that its tokenizer puts before a text.
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

# what a config.json counts out
COUNTED, MOST_MODULES = r"(n|num)_(\w+_)?(layers?|experts)|attention_types", 1024
MASKS = 2**26  # numbers; GPT-Neo's are context^2 a block


def read_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a local folder, GGUF file or hub id. Raises what transformers raises,
    and UserError.

    What it counts out (blocks, experts) is bounded first: transformers would make lists of them before any
    size is known.
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
        if re.fullmatch(COUNTED, name) and not value <= MOST_MODULES:
            raise UserError(
                f"by config.json {name} is {value:.6g}: more than the {MOST_MODULES} that are read"
            )
    config = transformers.AutoConfig.from_pretrained(source, **how, trust_remote_code=False)
    if (n := getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)) < 1:
        raise UserError(f"by config.json num_hidden_layers is {n}")
    return config


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(field, number) of all that a JSON value holds; an item of a list goes by the list's name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, (int, float)):
        yield name, content


def numbers_in(files: Sequence[pathlib.Path]) -> int:
    """How many numbers safetensors hold."""
    from safetensors import safe_open

    there = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            there += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return there


def check_size(config: Any, there: int) -> None:
    """Raises UserError for a model by `config` that is larger than its files, which hold `there` numbers,
    before its memory is spent.

    Up to twice the size goes on, to be told which weight is missing; MASKS allows for buffers, which no file
    holds.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * there + MASKS:
        raise UserError(
            f"by config.json it has {wanted:.3g} parameters and buffers, and its files hold {there:.3g} "
            "numbers"
        )


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors that transformers takes a folder's weights from. Raises UserError where it would read
    anything else.

    An index may name pickles, which transformers then unpickles, and files outside the folder.
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
    """The token that the tokenizer puts before a text, None where it puts none. Looked at in an encoding:
    Gemma 3's attribute `add_bos_token` reads False, and it puts one.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids[0] for special in (False, True))
    return None if whole == plain else whole
