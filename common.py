"""What every experiment shares: arguments, language models split at the hook, tables and figures.

    python common.py diff A B      # are two results folders one run? identical, same SAEs, reproduced (exit 0) or different (1)

Shapes: B sequences, T positions, N = B*(T-1) evaluated tokens, d = d_model, V = vocabulary.
"""
import os
import platform

# Before torch loads OpenMP: threads that wait asleep. Spinning at the end of every small operation costs ten times the
# work itself as soon as anything else runs on the machine. Hence scripts import common before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # under torchrun one rank draws bars

# What numerical libraries read when they are loaded. Left alone, each picks code by the processor's maker and generation, and
# the last bits differ from machine to machine. ANY_X86=1 ties them to code that every x86-64 processor with AVX2 runs alike:
# the same bytes everywhere, at 1.6 times the CPU time (bench/RESULTS.md). numpy calls AVX-512 by other names in other
# versions, and passes over those that it does not know.
ANY_X86 = os.environ.get("ANY_X86") == "1" and platform.machine() in ("x86_64", "AMD64")
FIXED_CODE = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
              "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL"}
if ANY_X86:
    os.environ.update(FIXED_CODE)

import argparse
import contextlib
import hashlib
import io
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

import kernels
from errors import Fault, UserError, brief, one_line, printable, said
from store import cell

ROOT = pathlib.Path(__file__).resolve().parent
EMBEDDED = {name: ROOT / "demo" / name for name in ("stdlib-s", "stdlib-m", "stdlib-l")}
PRESETS = {  # the published grids, all on pythia and the Pile at 32x (published numbers: README)
    "fast2": dict(models="EleutherAI/pythia-70m@1,EleutherAI/pythia-70m@3,EleutherAI/pythia-70m@5,EleutherAI/pythia-410m@4,"
                         "EleutherAI/pythia-410m@12,EleutherAI/pythia-410m@20", k="8,16,32,64,128,256", tokens="10M", seeds="0"),
    "fast3": dict(models="EleutherAI/pythia-70m,EleutherAI/pythia-160m,EleutherAI/pythia-410m", k="8,16,32,64", tokens="10M",
                  seeds="0"),
    "phase2": dict(models="EleutherAI/pythia-70m,EleutherAI/pythia-410m", k="8,16", tokens="10M,50M,100M", seeds="0,1,2"),
}
# of each number on the command line: far above what can be computed, and below what overflows (torch seeds a piece of a run
# by seed x 1000003 + its number, in 63 bits)
MOST = dict(k=10 ** 6, seeds=2 ** 32 - 1, tokens=10 ** 12, expansion=10 ** 9, eval_seqs=10 ** 6, ctx=2 ** 20)
PRESET_ALL = dict(data="NeelNanda/pile-small-tokenized-2b", expansion=32, eval_seqs=200, ctx=256)


# ------------------------------------------------------------------------------------------ arguments
def parse_count(text: str) -> int:
    """'250k' -> 250000, '10M' -> 10000000."""
    scale = {"k": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:], 1)
    try:
        count = float(text if scale == 1 else text[:-1]) * scale
    except ValueError:
        raise UserError(f"--tokens {brief(text)} is not a number of tokens: write 300000, 300k or 10M") from None
    if not count >= 1:
        raise UserError(f"--tokens {brief(text)} is not a positive number of tokens")
    if count > MOST["tokens"]:
        raise UserError(f"--tokens {brief(text)}: at most {readable_count(MOST['tokens'])}")
    return round(count)


def readable_count(n: int) -> str:
    """300000 -> '300k'; the inverse of parse_count for round numbers."""
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{letter}"
    return str(n)


def parse_int(text: str, flag: str, least: int) -> int:
    name = flag.removeprefix("--").replace("-", "_")
    try:
        value = int(text) if len(text) < 100 else float(text)  # int() refuses more than 4300 digits
    except ValueError:
        raise UserError(f"{flag} {brief(text)}: whole numbers, please") from None
    if not least <= value <= MOST[name]:
        raise UserError(f"{flag} {brief(text)}: must be at least {least} and at most {MOST[name]}")
    return int(value)


def parse_ints(text: str, flag: str, least: int) -> list[int]:
    """Whole numbers separated by commas, each once, ascending."""
    return sorted({parse_int(part, flag, least) for part in text.split(",")})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{brief(message, 280)} (see --help)")


def parse_args(doc: str, argv: list[str] | None = None, **defaults) -> argparse.Namespace:
    """The flags that mean the same in every script; `defaults` are the script's own grid.

    Returns models as [(name, layer or None)] (none: the files of --sae name it), k, seeds, tokens as sorted lists of int, recipe, sinks and sae
    as lists. Raises UserError.
    """
    parser = _OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    grid = parser.add_argument_group("the grid")
    grid.add_argument("--models", metavar="NAME[@LAYER],...", help="embedded name, local folder or hub id; layer: the middle one")
    grid.add_argument("--revision", help="of the models, where they come from the hub: a branch, tag or commit")
    grid.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the language model; sums are in float32 or better")
    grid.add_argument("--data", help="stdlib, a local file or folder (txt, jsonl, parquet, arrow), or a hub data set")
    grid.add_argument("--split", help="of the data set: train")
    grid.add_argument("--sae", metavar="PATH_OR_ID,...", help="SAEs to evaluate instead of training some: local, or hub id with sub-path or pattern")
    grid.add_argument("--basis", choices=["raw", "centred"], help="of the activations that --sae were trained on, against what their files say")
    grid.add_argument("--k", help="active latents, e.g. 8,16,32")
    grid.add_argument("--seeds", help="e.g. 0,1,2")
    grid.add_argument("--tokens", help="SAE training budgets, e.g. 300k,10M")
    grid.add_argument("--expansion", help="SAE width = expansion x d_model")
    grid.add_argument("--recipe", help="how SAEs are trained: base, saelens, or both, the first being the one the verdict is about")
    grid.add_argument("--sinks", help="sink positions in SAE training: keep, drop, or both")
    grid.add_argument("--eval-seqs", help="held-out sequences")
    grid.add_argument("--ctx", help="tokens per sequence")
    grid.add_argument("--preset", choices=sorted(PRESETS), help="a published grid on Pythia and the Pile; other flags override it")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--out", type=parse_path, default=pathlib.Path("outputs") / pathlib.Path(sys.argv[0]).stem, help="results folder")
    add("--cache", type=parse_path, default=pathlib.Path("outputs/cache"), help="trained SAEs")
    add("--fresh", action="store_true", help="start the results folder over (what a run wrote there goes, and nothing else)")
    add("--from", dest="from_dir", type=parse_path, help="recompute tables, verdict and plots of a finished folder; no model")
    add("--verdict", type=parse_path, help="Exp-A's verdict, which opens the gate: outputs/expa/verdict.json, where there is one")
    add("--save-tokens", action="store_true", help="also keep per-token arrays")
    add("--dry-run", action="store_true", help="print the grid and what it would cost, and stop")
    args = parser.parse_args(argv)
    preset = {**PRESET_ALL, **PRESETS[args.preset]} if args.preset else {}
    if args.sae:  # they are what they are: nothing of the grid applies
        training = ("k", "seeds", "tokens", "expansion", "recipe", "sinks", "preset")
        if given := [f"--{name}" for name in training if getattr(args, name) is not None]:
            raise UserError(f"--sae evaluates SAEs that exist; {', '.join(given)} would train some")
        defaults = defaults | {"models": None, "k": "1", "seeds": "0", "tokens": "1", "expansion": 1}
    elif args.basis:
        raise UserError("--basis is about the SAEs of --sae")
    for name, value in {"data": "stdlib", "split": "train", "recipe": "base", "sinks": "keep", "seeds": "0", **defaults, **preset}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.models = parse_models(args.models) if args.models else []
    args.sae = [printable(spec, "--sae") for spec in dict.fromkeys((args.sae or "").split(",")) if spec]
    for name in ("revision", "data", "split", "out", "cache", "from_dir", "verdict"):
        printable(str(getattr(args, name)), f"--{name.removesuffix('_dir')}")
    if not (args.models or args.sae):
        raise UserError("--sae: a path or a hub id, please")
    args.recipe = parse_choices(args.recipe, "--recipe", ("base", "saelens"))
    args.sinks = parse_choices(args.sinks, "--sinks", ("keep", "drop"))
    args.k = parse_ints(args.k, "--k", 1)
    args.seeds = parse_ints(args.seeds, "--seeds", 0)
    args.tokens = sorted({parse_count(part) for part in args.tokens.split(",")})
    for name, least in (("expansion", 1), ("eval_seqs", 2), ("ctx", 2)):
        setattr(args, name, parse_int(str(getattr(args, name)), f"--{name.replace('_', '-')}", least))
    return args


def parse_path(text: str) -> pathlib.Path:
    """An empty name would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    return pathlib.Path(text)


def parse_choices(text: str, flag: str, choices: tuple) -> list[str]:
    """Names separated by commas, in the order given."""
    values = list(dict.fromkeys(text.split(",")))
    if unknown := [v for v in values if v not in choices]:
        raise UserError(f"{flag} {brief(','.join(unknown))}: choose from {', '.join(choices)}")
    return values


def parse_models(text: str) -> list[tuple[str, int | None]]:
    models = []
    for part in text.split(","):
        name, at, layer = printable(part, "--models").partition("@")
        if not name or (at and not layer.isdecimal()):
            raise UserError(f"--models {brief(part)}: NAME or NAME@LAYER, please")
        if len(layer) > 4:
            raise UserError(f"--models {brief(part)}: no model has so many layers")
        models.append((name, int(layer) if at else None))
    if len(set(models)) < len(models):
        raise UserError(f"--models {brief(text, 280)}: the same model and layer twice")
    return models


def run_script(main) -> None:
    """Exit status: 0 done, 2 unusable arguments or input, 1 a fault; one line each, a traceback only for what nobody foresaw."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a locale without R² is no reason to stop
    name = pathlib.Path(sys.argv[0]).name + (f", rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else "")
    try:
        main()
    except UserError as error:
        status, message = 2, str(error)
    except Fault as error:
        status, message = 1, str(error)
    except OSError as error:  # a folder that went away, a disk that is full
        status, message = 1, said(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on from here"
    else:
        return
    print(f"{name}:", *message.split(), file=sys.stderr)
    sys.exit(status)


# --------------------------------------------------------------------------------------------- device
def pick_device(wanted: str) -> torch.device:
    """auto = cuda, else mps, else cpu. Raises UserError for a device this machine has not."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if has[name])
    elif not has[wanted]:
        raise UserError(f"--device {wanted}: this machine has none (torch {torch.__version__})")
    return torch.device(wanted)


def check_parity(model, layer: int, rows: torch.Tensor, device: torch.device) -> None:
    """Compare h, CE, g and TopK values of one batch between `device` and the CPU before any number from `device` is believed.

    MPS matmuls have returned 10-30% errors silently and depending on what lay in memory (pytorch #193487), and its topk has
    given zeros (#78915), so this is called again for every hook. rows [B,T] on the CPU; the model is left on `device`.
    Raises Fault where the norm of the error exceeds 0.1% of the norm, 5% for a model in bfloat16, whose own rounding is of that size.
    """
    tolerance = 1e-3 if model.dtype != torch.bfloat16 else 0.05

    def measure(where):
        model.to(where)
        x = rows.to(where)
        h = head(model, layer, x)
        log_p, (g,) = clean_pass(model, layer, x, h)
        d = h.shape[-1]
        W = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0)).to(where)
        values, _ = kernels.topk_encode(h.flatten(0, 1), W, torch.zeros(4 * d, device=where), min(32, 4 * d))
        return {name: t.cpu().double() for name, t in (("h", h), ("CE", cross_entropy(log_p, x)), ("g", g), ("TopK values", values))}

    here, there = measure(torch.device("cpu")), measure(device)
    for name, truth in here.items():
        error = ((there[name] - truth).norm() / truth.norm()).item()
        if not error <= tolerance:
            raise Fault(f"{device} disagrees with the CPU on {name} at layer {layer} (relative error {error:.1e}, allowed "
                        f"{tolerance:.0e}): its numbers cannot be believed; use --device cpu")


# ------------------------------------------------------------------------------------- language models
COUNTED, MOST_MODULES = r"(n|num)_(\w+_)?(layers?|experts)|attention_types", 1024  # what a config.json counts out
MASKS = 2 ** 26  # numbers; GPT-Neo's are context^2 a block


def load_model(name: str, device: torch.device, revision: str | None = None, dtype: torch.dtype = torch.float32) -> tuple:
    """(model, tokenizer): frozen, eval mode, in `dtype`. name: embedded, a local folder or a hub id. Raises UserError.

    The dtype is asked for by name: left to itself `from_pretrained` takes the file's, which for Pythia is float16. A stranger's
    files bring no code: safetensors only, and nothing of the repository is run. Every weight is the file's: transformers
    would draw at random what it lacks.

    bfloat16 is the model's only: h, g, log-probabilities and all that follows are float32. Measured on 8 x 64 tokens at six hooks of
    stdlib-s and -m, against float32, largest difference: R^2 0.003, CE 0.002, patched CE and dCE 0.03 nats, CE_rec 0.01,
    KL 2%, SWD over tokens 6%, exact Fisher forms 4%. `swd_sampled` draws other labels: within twofold, its own noise there.
    """
    import huggingface_hub
    import transformers
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    downloads_shown = not huggingface_hub.utils.are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads_shown:
        huggingface_hub.utils.enable_progress_bars()
    source = EMBEDDED.get(name, name)
    if revision and os.path.isdir(source):
        raise UserError(f"--revision {revision}: {name} does not come from the hub")
    where = f"--models {name}" + (f" at revision {revision}" if revision else "")
    where += "" if "/" in name or os.path.isdir(source) else f" (embedded are {', '.join(EMBEDDED)})"
    with one_line(where):
        folder = source if os.path.isdir(source) else _download(name, revision)
        check_size(read_config(folder), weight_files(pathlib.Path(folder)))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                                                                          output_loading_info=True, ignore_mismatched_sizes=True)
    with one_line(f"{where}: its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("Two or more words.", add_special_tokens=False).input_ids
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight, there, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{where}: {weight} is {list(there)} in the file and {list(wanted)} by config.json")
    if missing := sorted(report["missing_keys"] & parameters.keys()):
        raise UserError(f"{where}: the file lacks {len(missing)} of the model's weights ({missing[0]} ...)")
    for weight, tensor in parameters.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {weight} holds a number that is not finite")
    if len(set(ids)) < 2:  # what transformers makes of a folder without tokenizer files
        raise UserError(f"{where}: it has no tokenizer, or one that knows no words")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end-of-text token to join documents with")
    blocks(model)
    model.eval().requires_grad_(False)
    return model.to(device), tokenizer


def _download(name: str, revision: str | None) -> str:
    """The local folder of what is read of a hub repository. Whole before anything is read: left to itself, transformers takes a
    file that the hub fails to send for one that is not there, and has the hub unpickle weights that have no safetensors."""
    import huggingface_hub
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise OSError(f"no such folder (embedded: {', '.join(EMBEDDED)}; else a local folder or a hub id)")
    try:
        return huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=["*/*", "consolidated*"],
                                                 allow_patterns=["*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors"])
    except huggingface_hub.errors.LocalEntryNotFoundError as error:  # says what is not in the cache; its cause, why
        raise error.__cause__ or error


def read_config(source: str, revision: str | None = None):
    """transformers' configuration of a local folder or hub id. Raises what transformers raises, and UserError.

    What it counts out (blocks, experts) is bounded first: transformers would make lists of them before any size is known.
    """
    import transformers
    raw, _ = transformers.PretrainedConfig.get_config_dict(source, revision=revision)
    if "transformers_weights" in raw:
        raise UserError("config.json names transformers_weights, and only model.safetensors or its index are read")
    for name, value in _numbers(raw):
        if re.fullmatch(COUNTED, name) and not value <= MOST_MODULES:
            raise UserError(f"by config.json {name} is {value:.6g}: more than the {MOST_MODULES} that are read")
    config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if getattr(config, "num_hidden_layers", 1) < 1:
        raise UserError(f"by config.json num_hidden_layers is {config.num_hidden_layers}")
    return config


def _numbers(content, name: str = "") -> Iterator[tuple[str, float]]:
    """(field, number) of all that a JSON value holds; an item of a list goes by the list's name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, name)
    elif isinstance(content, (int, float)):
        yield name, content


def check_size(config, files: list[pathlib.Path]) -> None:
    """Raises UserError for a model by `config` that is larger than its safetensors, before its memory is spent.

    Up to twice the size goes on, to be told which weight is missing; MASKS allows for buffers, which no file holds.
    """
    import transformers
    from safetensors import safe_open
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted, there = sum(t.numel() for t in (*model.parameters(), *model.buffers())), 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            there += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    if wanted > 2 * there + MASKS:
        raise UserError(f"by config.json it has {wanted:.3g} parameters and buffers, and its files hold {there:.3g} numbers")


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors that transformers takes a folder's weights from. Raises UserError where it would read anything else.

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


def fingerprint(model) -> str:
    """Short hash of the weights, so that a model retrained under the same name does not meet another's SAEs."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return whole.hexdigest()[:16]


# of a configuration: what says where a model came from or how it is run, not what it computes
NOT_COMPUTED = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}


def model_hash(model) -> str:
    """Short hash of what a model computes: its weights as they are held (so the dtype too) and its configuration."""
    config = {key: value for key, value in model.config.to_dict().items() if value is not None and key not in NOT_COMPUTED}
    whole = json.dumps(config, sort_keys=True, default=str) + fingerprint(model)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer) -> str:
    """Short hash of what turns documents into tokens: the same weights see another text through another tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return hashlib.sha256(f"{tokenizer.eos_token_id} {tokenizer.bos_token_id} {rules}".encode()).hexdigest()[:16]


def readable_names(names: list[str]) -> dict[str, str]:
    """{name as typed: what results call it}. A local path is called by its last part, or by as many as tell it from the others.

    Results are for sharing: where a folder lies on this machine is nobody's business (run.json says it).
    """
    parts = {name: pathlib.Path(name).resolve().parts for name in names if name not in EMBEDDED and os.path.exists(name)}
    called = {}
    for name in names:
        own = parts.get(name, (name,))
        others = [other for other in (parts.get(n, (n,)) for n in names) if other != own]
        n = next(n for n in range(1, len(own) + 1) if n == len(own) or all(own[-n:] != other[-n:] for other in others))
        called[name] = "/".join(own[-n:])
    return called


def blocks(model) -> list[torch.nn.Module]:
    """The transformer blocks. Raises UserError for an architecture without a list of them."""
    n = getattr(model.config, "num_hidden_layers", None)
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) == n:
                return list(child)
    raise UserError(f"{type(model).__name__}: no list of transformer blocks found")


def pick_layer(model, name: str, layer: int | None) -> int:
    """The layer asked for, or the middle one. Raises UserError for one that the model has not."""
    n = model.config.num_hidden_layers
    if layer is None:
        return n // 2
    if layer >= n:
        raise UserError(f"--models {name}@{layer}: the model has layers 0 to {n - 1}")
    return layer


MPS_LONGEST_DOT = 32_767  # M1 and M2 read past the operands of longer ones (pytorch #195163); the unembedding's backward has V


class _Stop(Exception):
    pass


@contextlib.contextmanager
def _computing(modules: list[torch.nn.Module], function: Callable) -> Iterator[None]:
    """Within, the modules compute `function`. They stay what and where they are, for a forward that looks at them."""
    for module in modules:
        module.forward = function
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)  # a block may stand in the list twice


def _block_output(model, layer: int, rows: torch.Tensor):
    """What block `layer` returns: h [B,T,d], or a tuple of h and other things. Nothing is computed after it."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        raise _Stop

    with blocks(model)[layer].register_forward_hook(keep), torch.no_grad(), contextlib.suppress(_Stop):
        model(rows, use_cache=False)
    return kept[0]


def _logits(model, layer: int, rows: torch.Tensor, h: torch.Tensor, way: str) -> torch.Tensor:
    """The model's own forward on rows with h as the output of block `layer`, so that nothing of it is written a second time.

    way, `skip`: the blocks 0..layer do not run, each gives h. `tuple`: each gives (h,), for families whose blocks return tuples
    (all, in transformers 4). `replace`: all run, and the output of block `layer` is replaced.
    """
    first, h = blocks(model)[:layer + 1], h.to(model.dtype)
    if way == "replace":
        patch = first[-1].register_forward_hook(lambda module, inputs, output: (h, *output[1:]) if isinstance(output, tuple) else h)
    else:
        patch = _computing(first, lambda *args, **kwargs: (h,) if way == "tuple" else h)
    with patch:
        return model(rows, use_cache=False).logits


def way_to_patch(model, layer: int, rows: torch.Tensor) -> str:
    """The way of `_logits` in which tail(head) is the full forward; looked for once per model and layer, on the first of rows [B,T].

    `replace` costs a full forward a patch; it is for families whose later blocks read more of the earlier ones than h. Raises
    UserError where that is not the full forward either: blocks that run more than once.
    """
    known = model.__dict__.setdefault("ways_to_patch", {})
    if layer in known:
        return known[layer]
    name, norm = type(model).__name__, torch.linalg.vector_norm
    with torch.no_grad():
        whole, output = model(rows[:1], use_cache=False).logits, _block_output(model, layer, rows[:1])
        h, way = (output[0], "tuple") if isinstance(output, tuple) else (output, "skip")
        for way in (way, "replace"):
            with contextlib.suppress(Exception):  # a forward that does not take what it is given
                split = _logits(model, layer, rows[:1], h, way)
                if not norm(split - whole) > 1e-3 * norm(whole):  # what is not finite is found, and said, later
                    break
        else:
            raise UserError(f"{name}: its logits are no function of what block {layer} puts out, so nothing can be patched there")
    if way == "replace":
        print(f"{name} does not split after block {layer}: every patched run is a full forward")
    return known.setdefault(layer, way)


def head(model, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """resid_post of block `layer`, [B,T,d], float32 at least, and nothing computed after it. rows [B,T]. Raises UserError.

    The block's own output, not `hidden_states[layer + 1]`: for the last block that one is after the final norm.
    """
    way_to_patch(model, layer, rows)  # so that nothing is trained on what cannot be evaluated
    output = _block_output(model, layer, rows)
    h = output[0] if isinstance(output, tuple) else output
    return h.to(torch.promote_types(h.dtype, torch.float32))


def tail(model, layer: int, rows: torch.Tensor, h: torch.Tensor, unembedded: bool = True) -> torch.Tensor:
    """Logits [B,T,V] of the blocks after `layer`, fed h [B,T,d]. rows [B,T] are those h came from. Differentiable in h.

    In the model's dtype; h may have any. unembedded=False: what the unembedding would be given, [B,T,d].
    """
    way, unembed, compute = way_to_patch(model, layer, rows), model.get_output_embeddings(), None
    if not unembedded:
        compute = lambda y: y
    elif h.device.type == "mps" and unembed.bias is None and len(unembed.weight) >= MPS_LONGEST_DOT:
        compute = lambda y: torch.cat([torch.nn.functional.linear(y, W) for W in unembed.weight.split(MPS_LONGEST_DOT // 2)], -1)
    with _computing([unembed], compute) if compute else contextlib.nullcontext():
        return _logits(model, layer, rows, h, way)


def cross_entropy(log_p: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Next-token CE [B,T-1] in nats from log-probabilities [B,T-1,V]."""
    return -log_p.gather(-1, rows[:, 1:, None]).squeeze(-1)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """log p [B,T-1,V] at the positions that have a target."""
    return torch.log_softmax(logits[:, :-1].float(), -1)


def clean_pass(model, layer: int, rows: torch.Tensor, h: torch.Tensor, uniforms: torch.Tensor | None = None) -> tuple:
    """(log_p [B,T-1,V], [g, g_y1, g_y2, ...] each [B,T,d]) of the unpatched run.

    g is the gradient at the hook of the CE *summed* over a sequence's tokens (a mean would make it depend on the batch);
    sequences do not touch each other, so one backward serves the batch. g_y is the same with labels drawn from the
    model's own p: uniforms [m,B,T-1] in [0,1) pick them by the inverse of the cumulative distribution, so that the CPU's
    random numbers serve every device. g at the last position is exactly 0.
    """
    x = h.detach().requires_grad_()
    log_p = log_probs(tail(model, layer, rows, x))
    draws = [] if uniforms is None else list(uniforms)
    labels = [rows[:, 1:]]
    with torch.no_grad():
        cdf = log_p.exp().cumsum(-1) if draws else None
        for u in draws:
            labels.append(torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True).squeeze(-1).clamp_(max=cdf.shape[-1] - 1))
    gradients = []
    for i, y in enumerate(labels):
        loss = -log_p.gather(-1, y[..., None]).sum()
        gradients.append(torch.autograd.grad(loss, x, retain_graph=i + 1 < len(labels))[0])
    return log_p.detach(), gradients


def kl_divergence(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per position, [B,T-1], in nats, right in float32 down to 1e-7.

    Summing p (log p - log q) cancels to nothing for small KL. There, with c = dz - E_p dz, KL = log1p(E_p[expm1(c) - c]), and
    the bracket by its series where |c| < 0.05. For large changes the plain sum is exact and expm1 would overflow.
    """
    change = log_q - log_p
    kl = -torch.einsum("btv,btv->bt", p, change)
    small = kl < 0.01
    if small.any():
        c = (change[small] + kl[small][:, None]).clamp(max=10.0)
        series = c * c * (0.5 + c * (1 / 6 + c * (1 / 24 + c / 120)))
        kl[small] = torch.log1p((p[small] * torch.where(c.abs() < 0.05, series, torch.expm1(c) - c)).sum(-1))
    return kl


# --------------------------------------------------------------------------------------- tables and figures
def markdown(rows: list[dict], columns: list[str]) -> str:
    """A table that reads as text and renders as Markdown."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) and math.isfinite(v) else cell(v)
    table = [columns] + [[short(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["| " + " | ".join(f"{v:<{w}}" for v, w in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def signed(value: float | None, digits: int = 2) -> str:
    """+0.12; what is not a number says so."""
    return f"{value:+.{digits}f}" if value is not None and math.isfinite(value) else cell(None)


def bounds(lo: float | None, hi: float | None, digits: int = 2) -> str:
    """[+0.10, +0.14], or `undefined` where an end is."""
    ends = signed(lo, digits), signed(hi, digits)
    return cell(None) if cell(None) in ends else f"[{', '.join(ends)}]"


def span(value: float | None, lo: float | None, hi: float | None, digits: int = 2) -> str:
    """+0.12 [+0.10, +0.14]; where there is a value and no interval: +0.12 [undefined]."""
    number, interval = signed(value, digits), bounds(lo, hi, digits)
    return number if number == cell(None) else f"{number} {interval}" if interval != cell(None) else f"{number} [{interval}]"


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def model_colours(models: list[str]) -> dict:
    """{model: colour}, dark to light from the smallest to the largest: the same in every plot."""
    return dict(zip(models, pyplot().get_cmap("viridis")(np.linspace(0.1, 0.85, len(models)))))


def as_png(figure) -> bytes:
    """A PNG without the program's version in it: the same bytes from the same numbers."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return image.getvalue()


# -------------------------------------------------------------------------------------------------- command
def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1] != "diff":
        raise UserError("usage: python common.py diff FOLDER FOLDER")
    import rerun
    sys.exit(rerun.diff(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])))


if __name__ == "__main__":
    run_script(main)
