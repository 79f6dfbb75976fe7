"""What several test files share: small models, what a folder holds, the scripts run to an exit status."""

import collections
import os
import pathlib
import subprocess
import sys

import zygote
from transport_geometry.running.grid import Grid, plan
from transport_geometry.saes.recipes import Statistics, Training
from transport_geometry.saes.sae import load_sae
from transport_geometry.saes.train import train_missing
from transport_geometry.text import heldout

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
# three hooks of two models, three k: nine SAEs in half a minute
SMALL = (
    "--models stdlib-s@1,stdlib-s@3,stdlib-m@3 --k 2,4,8 --tokens 10k --expansion 4 --eval-seqs 8 --ctx 64"
).split()


# most kB that a subprocess has held; ru_maxrss would begin with what its parent holds
PEAK = """
import pathlib, re, resource

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # a Mac counts bytes
"""


# ----------------------------------------------------------------------------------------------- small models
def tiny_model(d: int = 16, layers: int = 3, vocab: int = 41, seed: int = 0, dtype=torch.float64):
    """A GPT-NeoX of random weights, so small that every term matters; float64 so that closed forms can be met
    to 1e-9.
    """
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * d,
        max_position_embeddings=64,
        rotary_pct=0.5,
        use_parallel_residual=True,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return GPTNeoXForCausalLM(config).to(dtype).eval().requires_grad_(False)


def log_probs_64(logits: torch.Tensor) -> torch.Tensor:
    """`lm.log_probs`, in the logits' own precision."""
    return torch.log_softmax(logits[:, :-1], -1)


class Largest(TorchDispatchMode):
    """most: elements of the largest tensor that an operation within makes, views of the weights aside."""

    def __init__(self, weights=()):
        super().__init__()
        self.most, self.weights = 0, {w.untyped_storage().data_ptr() for w in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.weights:
                self.most = max(self.most, one.untyped_storage().nbytes() // one.element_size())
        return out


def get_saes(model, tokenizer, specs, cache) -> list:
    """The SAEs of one model, trained or from the cache."""
    train_missing(model, tokenizer, specs, cache, heldout.find(specs[0].data))
    return [load_sae(spec.folder(cache), torch.device("cpu")) for spec in specs]


def hooked_columns(model, block, ids: torch.Tensor, reconstruct) -> dict[str, float]:
    """Columns of an SAE where a block puts out h: transformers' own forward, autograd, float64 sums, and
    nothing of this project. reconstruct: h [N,d] -> h_hat [N,d].
    """

    def forward(chunk, fed=None):
        """(log p [B,T-1,V], output of the block) of the run that is fed `fed` there."""
        met = []

        def at_the_block(module, inputs, output):
            h = output[0] if isinstance(output, tuple) else output
            met.append(h.detach().requires_grad_() if fed is None else fed)
            return (met[0], *output[1:]) if isinstance(output, tuple) else met[0]

        with block.register_forward_hook(at_the_block):
            return model(chunk).logits[:, :-1].double().log_softmax(-1), met[0]

    total, parts = collections.Counter(), []
    for chunk in ids.split(2):
        log_p, leaf = forward(chunk)
        target = chunk[:, 1:, None]
        ce = -log_p.gather(-1, target)
        (g,) = torch.autograd.grad(ce.sum(), leaf)
        with torch.no_grad():
            log_p, h, g = log_p.detach(), leaf.detach()[:, :-1], g[:, :-1].double()
            h_hat = reconstruct(h.flatten(0, 1)).view_as(h)
            log_q, _ = forward(chunk, torch.cat([h_hat, leaf.detach()[:, -1:]], 1))
            h, h_hat = h.double(), h_hat.double()
            along = (g * (h_hat - h)).sum(-1)
            sums = dict(ce_orig=ce, ce_recon=-log_q.gather(-1, target), swd_tok=along.square())
            sums |= dict(kl=(log_p.exp() * (log_p - log_q)).sum(-1), gd_abs=along.abs())
            sums |= dict(cosine=torch.cosine_similarity(h, h_hat, -1), sse=(h_hat - h).square().sum(-1))
            total.update({name: value.sum().item() for name, value in sums.items()})
        parts.append(h.flatten(0, 1))
    h = torch.cat(parts)
    mean = {name: value / len(h) for name, value in total.items()}
    mean["r2"] = 1 - mean.pop("sse") * len(h) / (h - h.mean(0)).square().sum().item()
    return mean | {"ce_rec": 2 - mean["ce_recon"] / mean["ce_orig"]}


def quick_sae(h: torch.Tensor, sink: torch.Tensor, k: int = 8):
    """An SAE of 256 latents, trained once over h [N,d]; sink [N]: tokens that its statistics leave out."""
    training = Training(Statistics.of(h, sink), 256, k, 0, [len(h)])
    training.feed(h, 0, tqdm(disable=True), "")
    return training.finished()


def small_grid(**more) -> Grid:
    """Of a command for one SAE of k = 8 and 50k tokens at block 3 of stdlib-s."""
    grid = dict(models=(("stdlib-s", 3),), k=(8,), seeds=(0,), tokens=(50_000,), expansion=4)
    grid |= dict(recipes=("base",), sinks=("keep",), saes=(), basis=(), data="stdlib", split="train")
    grid |= dict(revision=None, dtype="float32", leave_sinks=False, save_tokens=False)
    return Grid(**grid | more)


def one_hook(eval_seqs: int, ctx: int):
    """The evaluation set of `small_grid`."""
    return plan(small_grid(eval_seqs=eval_seqs, ctx=ctx), torch.device("cpu"), "test")[1][0]


# ---------------------------------------------------------------------------------------------------- folders
def contents(folder: pathlib.Path, but: str = "run.json") -> dict[str, bytes]:
    """Every file below a folder but run.json, the one that may differ between two runs."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != but
    }


# ---------------------------------------------------------------------------------------------------- scripts
def script(name: str, *arguments, check: int = 0, **how) -> subprocess.CompletedProcess:
    """`zygote.run`, to the exit status `check`."""
    done = zygote.run(name, *arguments, **how)
    assert done.returncode == check, done.stderr[-2000:]
    return done


def process(*command, check: int = 0, env: dict | None = None, **how) -> subprocess.CompletedProcess:
    """Python in a process of its own, for what is read when it starts; env: beside the environment here."""
    how = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}, **how}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **how)
    assert done.returncode == check, done.stderr[-3000:]
    return done


def one_line(done: subprocess.CompletedProcess) -> str:
    """All that a script said on stderr, progress bars aside."""
    lines = [line.rpartition("\r")[2] for line in done.stderr.splitlines()]
    (line,) = [line for line in lines if line.strip()]
    return line


def measured(code: str, *arguments) -> tuple[list[str], float]:
    """(lines printed, peak memory in MB) of Python code in a process of its own."""
    ran = process("-c", f"{PEAK}\n{code}\nprint(peak())", *arguments, timeout=100)
    *lines, peak = ran.stdout.splitlines()
    return lines, int(peak) / 2**10
