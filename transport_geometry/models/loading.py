"""Load language models and their tokenizers (embedded, from a local folder or GGUF file, or from the hub),
and identify them by hash and by name.

Files are not trusted: only safetensors are read, no code of a repository is run, and a model that is larger
than its files is refused before it is built.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from transport_geometry import ROOT, torchrun
from transport_geometry.errors import UserError, one_line
from transport_geometry.models import gguf_models, plant
from transport_geometry.models.gguf_models import PACKAGED
from transport_geometry.models.lm import blocks, text_config
from transport_geometry.models.model_files import check_size, numbers_in, read_config, weight_files

import torch

EMBEDDED = {name: ROOT / "demo" / name for name in ("stdlib-s", "stdlib-m", "stdlib-l")}
SHORT_NAMES = ", ".join([*EMBEDDED, *PACKAGED])
CACHE = pathlib.Path("outputs/cache")
# which files of a repository are downloaded: of its top level only
DOWNLOADED = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors"]
NOT_DOWNLOADED = ["*/*", "consolidated*"]


# -------------------------------------------------------------------------------------------------- loading
def load_model(
    name: str,
    device: torch.device,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    cache: pathlib.Path = CACHE,
) -> tuple[Any, Any]:
    """(model, tokenizer): frozen, in eval mode, in `dtype`. name: embedded, packaged, a local folder or GGUF
    file, or a hub id, with what `plant` plants in it. cache: where GGUF files are unpacked. Raises UserError,
    also for files that lack a weight (transformers would draw it at random).

    In bfloat16 only the model computes: h, g, log-probabilities and the rest are float32. The largest
    differences from float32, on 8 x 64 tokens at six hooks of stdlib-s and -m: R^2 0.003, CE 0.002, patched
    CE and dCE 0.03 nats, CE_rec 0.01, KL 2%, SWD over tokens 6%, exact Fisher forms 4%, `swd_sampled` (which
    draws other labels) a factor of 2, its own noise there.
    """
    import transformers

    _quiet()
    whole_name, (name, _) = name, plant.split(name)
    source = str(EMBEDDED.get(name, name))
    in_gguf = gguf_models.is_gguf(name)
    local = in_gguf or os.path.isdir(source)
    if revision and local:
        raise UserError(f"--revision {revision}: {name} does not come from the hub")
    about = f"--models {name}"
    if revision:
        about += f" at revision {revision}"
    if not local and "/" not in name:
        about += f" (known by name are {SHORT_NAMES})"
    if in_gguf:
        source = str(gguf_models.unpacked(name, cache))
    with one_line(about):
        folder = source if local else _download(name, revision)
        check_size(read_config(folder), numbers_in(weight_files(pathlib.Path(folder))))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,  # by default it would be the file's, for Pythia float16
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` reports them
        )
    with one_line(f"{about}: its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("Two or more words.", add_special_tokens=False).input_ids
    _check_weights(model, report, about)
    if len(set(ids)) < 2:  # transformers makes one up without tokenizer files
        raise UserError(f"{about}: it has no tokenizer, or one that knows no words")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{about}: its tokenizer has no end-of-text token to join documents with")
    blocks(model)
    model.eval().requires_grad_(False)
    with one_line(about):
        moved = looks_ahead(model)
    # masked language models load through the same class. Measured: causal ones at most 8e-7, 0 in bfloat16;
    # BERT's kind 3e-3 and 7e-3 before any training, and far more after it
    if moved > (3e-3 if dtype == torch.bfloat16 else 1e-4):
        raise UserError(f"{about}: not a causal language model: its logits depend on later tokens")
    if in_gguf:
        model.stored_as = gguf_models.stored_as(pathlib.Path(source))
    plant.planted(model, whole_name)
    return model.to(device), tokenizer


def _quiet() -> None:
    """Silence the loaders, but keep the progress bars of downloads."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    downloads_shown = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()  # which also disables the hub's
    if downloads_shown:
        huggingface_hub.utils.enable_progress_bars()


def _check_weights(model: Any, report: dict[str, Any], about: str) -> None:
    """Raises UserError if, by transformers' loading report, a weight is not the file's, or is not finite."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight, there, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{about}: {weight} is {list(there)} in the file and {list(wanted)} by config.json")
    if missing := sorted(report["missing_keys"] & parameters.keys()):
        raise UserError(f"{about}: the file lacks {len(missing)} of the model's weights ({missing[0]} ...)")
    for weight, tensor in parameters.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{about}: {weight} holds a number that is not finite")


@torch.no_grad()
def looks_ahead(model: Any) -> float:
    """Relative change of the logits of a few tokens when later tokens change."""
    config = text_config(model)
    T = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    ids[1, : T // 2] = ids[0, : T // 2]
    one, other = model(ids, use_cache=False).logits[:, : T // 2].float()
    return ((one - other).norm() / one.norm()).item()


def asking_hub(name: str) -> None:
    """Print that the hub is asked, which may take half a minute: the name may be a mistyped path."""
    if "/" in name:
        torchrun.say(f"{name}: no file or folder here of this name; asking the hub")


def _download(name: str, revision: str | None) -> str:
    """Download a hub repository's files and return the folder. All come before any is read: transformers
    alone takes a file that the hub fails to send for one that does not exist, and asks the hub to convert
    pickled weights.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise OSError(f"no such folder (known by name: {SHORT_NAMES}; else a folder, GGUF file or hub id)")
    asking_hub(name)
    try:
        return huggingface_hub.snapshot_download(
            name, revision=revision, ignore_patterns=NOT_DOWNLOADED, allow_patterns=DOWNLOADED
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise (error.__cause__ or error) from None  # the cause says why it was not downloaded


# ----------------------------------------------------------------------------------------- identity and names
# fields of a configuration that do not change what the model computes
NOT_COMPUTED = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(module: torch.nn.Module) -> str:
    """Short hash of the weights: a model retrained under the same name must not get the old one's SAEs."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        # numpy has no bfloat16
        whole.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def model_hash(model: Any) -> str:
    """Short hash of what a model computes: its configuration and its weights in their dtype."""
    fields = model.config.to_dict().items()
    config = {key: value for key, value in fields if value is not None and key not in NOT_COMPUTED}
    return short_hash(json.dumps(config, sort_keys=True, default=str) + fingerprint(model))


def tokenizer_hash(tokenizer: Any, of_chats: bool = False) -> str:
    """Short hash of a tokenizer's rules and special tokens; of_chats: of its chat template, too."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = backend.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    template = f" {getattr(tokenizer, 'chat_template', None)}" if of_chats else ""
    return short_hash(f"{tokenizer.eos_token_id} {tokenizer.bos_token_id} {rules}{template}")


def readable_names(names: Sequence[str]) -> dict[str, str]:
    """{name as typed: name in results}. A local path is shortened to its last part, or to as many as
    distinguish it from the others: results are shared, and should not show where folders lie here.
    """
    parts = {name: _parts(name) for name in names}
    called = {}
    for name, own in parts.items():
        others = [other for other in parts.values() if other != own]
        n = 1
        while n < len(own) and any(own[-n:] == other[-n:] for other in others):
            n += 1
        called[name] = "/".join(own[-n:])
    return called


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a local path, the last one with what is planted; any other name is one part."""
    path, planted = plant.split(name)
    if path in EMBEDDED or path in PACKAGED or not os.path.exists(path):
        return (name,)
    *folders, last = pathlib.Path(path).resolve().parts
    return (*folders, last + planted)


def block_name(name: str, layer: int) -> str | None:
    """The module name of block `layer`, such as gpt_neox.layers.3, from the model's configuration; None if
    that is not on this machine. name: as for `load_model`.
    """
    import transformers

    name, _ = plant.split(name)
    try:
        if name in PACKAGED:
            shape = dict(PACKAGED[name].shape)
            config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
        else:
            config = transformers.AutoConfig.from_pretrained(
                EMBEDDED.get(name, name), local_files_only=True, trust_remote_code=False
            )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        block = blocks(model)[layer]
    except (OSError, ValueError, LookupError, UserError):
        return None
    return next(path for path, module in model.named_modules() if module is block)


def pick_layer(model: Any, name: str, layer: int | None) -> int:
    """The layer asked for, by default the middle one. Raises UserError if the model has no such layer."""
    n = text_config(model).num_hidden_layers
    if layer is None:
        return n // 2
    if layer >= n:
        raise UserError(f"--models {name}@{layer}: the model has layers 0 to {n - 1}")
    return layer
