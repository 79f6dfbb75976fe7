"""A pretend MPS device, for tests and bench/mps_operators.py: it refuses what a real one cannot be trusted
with.

It is a wrapper tensor that says "mps" and holds a CPU tensor, under a dispatch mode. Every operator that
touches one, those inside PyTorch's composite kernels included, must have an MPS kernel in this PyTorch's own
list, stay clear of float64, take nothing from the CPU, and be none of the matrix products that MPS has got
silently wrong.
"""

import contextlib
import json
import pathlib
import re
import types

import expc_fisher
from transport_geometry.formats import find_and_read
from transport_geometry.formats.contract import Declared
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.models.lm import Hook
from transport_geometry.progress import Progress
from transport_geometry.records.condition import Condition
from transport_geometry.running import run
from transport_geometry.running.grid import Candidate, EvalSet, null_conditions
from transport_geometry.running.run import Experiment
from transport_geometry.saes.external_saes import ExternalSAE
from transport_geometry.saes.recipes import TRAIN_VERSION
from transport_geometry.saes.sae import TrainingSpec
from transport_geometry.text import heldout

import numpy as np
import torch
import torchgen
import transformers
from safetensors.torch import save_file
from torch._C import DispatchKey, _current_autograd_node, _dispatch_has_kernel_for_dispatch_key
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# without an index torch would ask the MPS runtime for one
MPS, CPU = torch.device("mps", 0), torch.device("cpu")
WIDE = {torch.float64, torch.complex128}
COPIES = {"aten::_to_copy", "aten::copy_"}  # every device has them, and they are the only way across
COMPOSITE = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)
# where the left operand stands
LEFT = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1}
# terms, at which an M1 or M2 adds what lies behind the operands (pytorch #195163, the cause of #193487)
LONG = 32767


def mps_kernels() -> set[str]:
    """Operators with an MPS kernel in the native_functions.yaml of this PyTorch, their own or their out=
    form's.
    """
    text = (pathlib.Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry[: entry.index("(")]: entry for entry in text.split("\n- func: ")[1:]}
    own = {name for name, entry in entries.items() if re.search(r"^    [\w, ]*\bMPS\b[\w, ]*:", entry, re.M)}
    shared = {name: re.search(r"structured_delegate: (\S+)", entry) for name, entry in entries.items()}
    return {f"aten::{name}" for name in entries if name in own or shared[name] and shared[name][1] in own}


class Refused(Exception):
    """Raised where a real MPS device would fail, or would answer and be wrong."""


class OnMps(torch.Tensor):
    """Python sees device mps; C++ sees meta, a device of every build: autograd runs on it, and sdpa is
    composed.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            device="meta",
            dtype=held.dtype,
            storage_offset=held.storage_offset(),
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Refused(f"{func}: not under PretendMps")


class PretendMps(TorchDispatchMode):
    """Runs what touches an OnMps tensor on the tensors held, or raises Refused. The CPU's own work passes."""

    def __init__(self):
        super().__init__()
        self.native, self.inside = mps_kernels() | COPIES, False  # inside: of a composite kernel
        self.ran: dict[str, set[torch.dtype]] = {}  # every operator, and what its tensors held
        self.served: dict[str, str] = {}  # by what: "MPS" a kernel, "view" none, "parts" other operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        goal = kwargs.get("device")
        to_mps = goal is not None and goal.type in ("mps", "meta")
        if not (self.inside or to_mps or any(isinstance(x, OnMps) for x in tensors)):
            return func(*args, **kwargs)
        if not (self.inside or func.name() in COPIES or all(isinstance(x, OnMps) for x in tensors)):
            raise Refused(f"{func}: a CPU tensor among those on the device")
        self.check_copy(func, args, kwargs)
        if goal is not None:
            kwargs["device"] = CPU
        # an in-place operator gives back what it was given
        known = {id(getattr(x, "held", x)): x for x in tensors}
        args, kwargs = tree_map_only(OnMps, lambda x: x.held, (args, kwargs))
        self.check_product(func, args)
        result = self.run(func, args, kwargs)
        dtypes = {x.dtype for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if wide := dtypes & WIDE:
            raise Refused(f"{func}: {wide.pop()}")
        self.ran.setdefault(func.name(), set()).update(dtypes)
        if self.inside or (goal is not None and not to_mps):
            return result
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnMps(x), result)

    def check_copy(self, func, args, kwargs):
        """A copy home that changes the dtype has overwritten its source (pytorch #189563)."""
        if func.name() == "aten::copy_" and not isinstance(args[0], OnMps):
            target, source = args[0].dtype, args[1]
        elif func.name() == "aten::_to_copy" and kwargs.get("device") == CPU:
            target, source = kwargs.get("dtype"), args[0]
        else:
            return
        if isinstance(source, OnMps) and target not in (None, source.dtype, *WIDE):
            raise Refused(f"{func}: {source.dtype} becomes {target} on its way to the CPU")

    def check_product(self, func, args):
        position = LEFT.get(func._schema.name.removeprefix("aten::").removesuffix("_"))
        if position is None:
            return
        left, node = args[position], _current_autograd_node()
        if left.shape[-1] >= LONG:
            raise Refused(f"{func}: dot products of {left.shape[-1]} terms")
        if node is not None and node.name() == "BmmBackward0":
            # the attention's backward: autograd transposes there, and sums over T or a head's width only
            return
        if left.stride(-2) == 1 < left.stride(-1) and min(left.shape[-2:]) > 1:
            raise Refused(f"{func}: the left operand is a transposed view")

    def run(self, func, args, kwargs):
        if func.name() in self.native or func.is_view:  # a view computes nothing
            self.served[func.name()] = "view" if func.is_view else "MPS"
            return func(*args, **kwargs)
        for key in COMPOSITE:
            if _dispatch_has_kernel_for_dispatch_key(func.name(), key):
                self.served[func.name()] = "parts"
                before, self.inside = self.inside, True
                try:
                    with self:  # each operator that this one is made of comes back to __torch_dispatch__
                        return func._op_dk(getattr(DispatchKey, key), *args, **kwargs)
                finally:
                    self.inside = before
        raise Refused(f"{func}: no MPS kernel")


# ----------------------------------------------------------------------------------------------- the pipeline
FAMILIES = ("GPTNeoX", "Llama", "Gemma2", "Qwen2")


def tiny_model(vocab: int = 128, family: str = "GPTNeoX", dtype: torch.dtype = torch.float32):
    """Random weights. The other families have grouped heads; Gemma 2 caps its logits and its attention."""
    torch.manual_seed(0)
    grouped = {} if family == "GPTNeoX" else {"num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,
        **grouped,
    )
    architecture = getattr(transformers, f"{family}ForCausalLM")
    return architecture._from_config(config, dtype=dtype).eval().requires_grad_(False)


def tiny_rows() -> torch.Tensor:
    return torch.randint(128, (6, 16), generator=torch.Generator().manual_seed(0))


def one_hook(
    folder: pathlib.Path, device: torch.device, experiment: Experiment = expc_fisher.EXPERIMENT, model=None
) -> list[dict]:
    """The rows that an experiment has for one hook: parity check, SAEs of both recipes trained, null rows,
    evaluation, metrics.
    """
    document = folder / "text.txt"
    document.write_text("\n".join(str(i * 7919 % 10007) for i in range(20000)))

    def tokenizer(document, add_special_tokens):
        return types.SimpleNamespace(input_ids=[ord(c) for c in document])

    tokenizer.eos_token_id = 0
    names = dict(model="tiny", weights="", tokenizer="", data=str(document), data_content="", split="train")
    size = dict(dtype="float32", layer=1, ctx=16, tokens=1280, trunk=(), d_sae=128, seed=0, sinks="drop")
    size |= dict(device=device.type, version=TRAIN_VERSION)
    both = [(recipe, k) for recipe in ("base", "saelens") for k in (2, 4)]
    specs = [TrainingSpec(**names, **size, recipe=recipe, k=k) for recipe, k in both]
    candidates = [Candidate(Condition("tiny", 1, "x", one.recipe, 128, one.k, 0, 1280), one) for one in specs]
    eval_set = tiny_eval_set(candidates, tokenizer, heldout.find(str(document)), model)
    share = run.Share(eval_set, candidates, with_nulls=True)
    cache, training = folder / device.type, run.training_shares([share])
    with contextlib.closing(Progress(1.0)) as bar:
        run.train(training, [one.flops(cache) for one in training], cache, device, bar)
    saes = types.SimpleNamespace(save_tokens=True, leave_sinks=False, saes=())
    command = types.SimpleNamespace(grid=saes, cache=folder / device.type)
    return run.measure(share, command, device, experiment).rows


def patched_sums(model, device: torch.device) -> dict[str, np.ndarray]:
    """Every quantity of one patched run, a sum for each sequence."""
    hook, half = Hook(model, 1).to(device), {"half": lambda h, mean: 0.5 * h}
    return evaluate(hook, tiny_rows(), half, 6)["half"].sums


def tiny_eval_set(candidates, tokenizer=None, source=None, model=None) -> EvalSet:
    nulls = null_conditions("tiny", 1, "", candidates[0])
    held = heldout.HeldOut(tiny_rows(), np.arange(len(tiny_rows())), "")
    return EvalSet("tiny", Hook(model or tiny_model(), 1), tokenizer, source, held, tuple(candidates), nulls)


def files(folder: pathlib.Path, device: torch.device) -> list[dict]:
    """The rows of SAEs from files, by each rule and norm there is."""

    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 4

    common_tensors = {"W_enc": random(32, 64), "W_dec": random(64, 32), "b_dec": random(32)}
    kinds = {
        "jumprelu": {"threshold": random(64).abs(), "b_enc": random(64)},
        "gated": {"b_gate": random(64), "r_mag": random(64), "b_mag": random(65)[1:].clone()},
        "topk": {"b_enc": random(64)},
    }
    candidates = []
    for (kind, tensors), norm in zip(kinds.items(), ("none", "constant_norm_rescale", "layer_norm")):
        (folder / kind).mkdir(exist_ok=True)
        config = {"architecture": kind, "k": 4, "normalize_activations": norm}
        config["metadata"] = {"sae_lens_version": "6.0.0"}
        (folder / kind / "cfg.json").write_text(json.dumps(config))
        save_file(common_tensors | tensors, folder / kind / "sae_weights.safetensors")
        for file in find_and_read.find(str(folder / kind)):
            size = dict(fingerprint="", d_sae=64, k=4, typical_k=4, mean=random(32))
            declared = Declared("saelens", basis="centred")
            of_file = ExternalSAE(file, declared, **size, fvu_as_said=0.5, fvu_otherwise=0.6)
            condition = Condition("tiny", 1, file.label, "saelens", 64, 4, 0, 0)
            candidates.append(Candidate(condition, of_file))
    eval_set = tiny_eval_set(candidates)
    grid = types.SimpleNamespace(save_tokens=False, leave_sinks=False, saes=("x",))
    command = types.SimpleNamespace(grid=grid, cache=None)
    return run.measure(run.Share(eval_set, candidates, True), command, device, Experiment("expb")).rows
