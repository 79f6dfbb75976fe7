"""A GPT-NeoX small enough for float64 truths, and a tokenizer-free data set for it."""

import subprocess
import sys

import common
from transport_geometry import text
from transport_geometry.sae import cache_folder, load_sae
from transport_geometry.train import train_missing

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def tiny_model(d: int = 16, layers: int = 3, vocab: int = 41, seed: int = 0, dtype=torch.float64):
    """Random weights of a size that makes every term matter; float64 so that closed forms can be met to
    1e-9.
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


def log_probs_64(logits):
    """`common.log_probs`, in the logits' own precision."""
    return torch.log_softmax(logits[:, :-1], -1)


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.fixture
def rows():
    return torch.randint(0, 41, (3, 12), generator=torch.Generator().manual_seed(1))


def get_saes(model, tokenizer, jobs, cache):
    """The SAEs of one hook, trained or from the cache."""
    train_missing(model, tokenizer, jobs, cache, text.find(jobs[0]["data"]))
    return [load_sae(cache_folder(cache, job), torch.device("cpu")) for job in jobs]


def measured(code: str, *arguments) -> tuple[list[str], float]:
    """(lines printed, peak memory in MB) of Python code in a process of its own.

    Not a child of this one, whose own peak Linux would count in: sh is small.
    """
    code += "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    ran = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=common.ROOT,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    *lines, peak = ran.stdout.splitlines()
    return lines, int(peak) / (2**20 if sys.platform == "darwin" else 2**10)
