"""`python common.py check --device mps`: whether a device computes what the CPU computes.

It compares the operators that the experiments need with float64 on the CPU; and with the CPU a training step
of each recipe, the language model before and after a hook, and a patched evaluation of four rows of the
standard library. Dot products are as long as the experiments' (`lm.MPS_LONGEST_DOT`). No network is needed.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import reason
from transport_geometry.machine import processor
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import (
    MPS_LONGEST_DOT,
    Hook,
    kl_divergence,
    log_softmax,
    parity,
    pick_device,
)
from transport_geometry.models.loading import load_model
from transport_geometry.saes.recipes import RECIPES, Statistics, transposed
from transport_geometry.saes.sae import tied_init
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import torch

Tensor = torch.Tensor
ALLOWED = 1e-3  # relative error; summing in another order stays below a tenth of it
CPU = torch.device("cpu")
ROWS, CTX, LAYER = 4, 64, 2
VOCABULARY, FEW_ROWS = 50_304, 32  # Pythia's vocabulary, and for how many tokens
N, D, F, K = 192, 64, 1024, 24


def check(wanted: str) -> int:
    """Print every comparison and the answer. Returns 0 if the device agrees with the CPU, else 1. Raises
    UserError for a device that this machine does not have.
    """
    device = pick_device(wanted)
    print(f"{processor(device)}, {platform.platform()}, Python {platform.python_version()}")
    print(kernels.describe())
    operators = {name: functools.partial(operator, name) for name in OPERATORS}
    parts: dict[str, Callable] = operators | dict(training=training, model=model, evaluation=evaluation)
    n, wrong = 0, []
    for part, measure in parts.items():
        try:
            found = [
                (name, error <= ALLOWED, f"relative error {error:.1e}, allowed {ALLOWED:.0e}")
                for name, error in measure(device).items()
            ]
        except Exception as fault:  # the device lacks an operator: go on with the others
            found = [(part, False, reason(fault))]
        for name, agrees, what in found:
            print(f"{'ok' if agrees else 'WRONG':5}  {name}: {what}", flush=True)
            wrong += [] if agrees else [f"{name} ({what})"]
        n += len(found)
    if wrong:
        print(f"{device.type} disagrees with the CPU on {'; '.join(wrong)}")
    else:
        print(f"{device.type} agrees with the CPU: {n} of {n} within tolerance")
    return int(bool(wrong))


# ------------------------------------------------------------------------------------------------ operators
Draw = Callable[..., Tensor]  # (*shape) -> normal numbers on the device under test


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth, in float64 on the CPU."""
    found, truth = found.cpu().double(), truth.cpu().double()
    return ((found - truth).norm() / truth.norm()).item()


def operator(name: str, device: torch.device) -> dict[str, float]:
    """Error of the device in float32 against the CPU in float64; for indices, the share that differs."""

    def on(device: torch.device, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return OPERATORS[name](lambda *shape: torch.randn(shape, generator=generator).to(device, dtype))

    found, truth = on(device, torch.float32), on(CPU, torch.float64)
    if not truth.is_floating_point():
        return {name: (found.cpu() != truth).double().mean().item()}
    return {name: relative_error(found, truth)}


def code(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values [N,K], latents [N,K] without repeats in a row, W [F,D], h [N,D]."""
    values = draw(N, K)
    latents = (5 * torch.arange(N)[:, None] + 37 * torch.arange(K)) % F
    return values, latents.to(values.device), draw(F, D) / D**0.5, draw(N, D)


def joined(*results: Tensor) -> Tensor:
    return torch.cat([x.flatten() for x in results])


def dots(draw: Draw) -> Tensor:
    _, latents, W, h = code(draw)
    return kernels.gather_dot(h, W, latents)


def encode(draw: Draw) -> Tensor:
    """Sorted, since rounding may exchange two latents."""
    return kernels.topk_encode(draw(N, D), draw(F, D), draw(F), K)[0].cpu().sort(dim=1).values


def encode_ties(draw: Draw) -> Tensor:
    """On integers, which are exact in any order of summing: among equal values the lowest latents win."""
    return kernels.topk_encode(draw(N, 4).round(), draw(F, 4).round(), draw(F).round(), K)[1]


def gradients(draw: Draw) -> Tensor:
    """Through encode and decode. Few rows, so that in none the k-th and the next value nearly tie."""
    leaves = [x.requires_grad_() for x in (draw(FEW_ROWS, D), draw(F, D), draw(F), draw(F, D), draw(D))]
    h, W_enc, b_enc, W_dec, b_dec = leaves
    values, indices = kernels.topk_encode(h, W_enc, b_enc, K)
    h_hat = kernels.sparse_decode(values, indices, W_dec, b_dec)
    return joined(*torch.autograd.grad(h_hat.square().sum(), leaves))


def adam(draw: Draw) -> Tensor:
    coef, latents, W, x = code(draw)
    W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)
    moments, step = (draw(F, D), draw(F, D).square()), kernels.Adam(1e-2, 3, 1e-8)
    more = latents[0], draw(K, D)
    return joined(*kernels.adam_rows(W, moments, step, coef, latents, x, more, unit=True), W, *moments)


def adam_vector(draw: Draw) -> Tensor:
    w, moments = draw(F), (draw(F), draw(F).square())
    kernels.adam_vector(w, moments, kernels.Adam(1e-2, 3, 1e-8), draw(F))
    return joined(w, *moments)


def distortion(draw: Draw) -> Tensor:
    values, latents, W, h = code(draw)
    stats, h_hat = kernels.gradient_weighted_distortion(values, latents, W, draw(D), h, draw(N, D), True)
    return joined(stats, h_hat)


def unembedding(draw: Draw) -> Tensor:
    x, W = draw(FEW_ROWS, D), draw(VOCABULARY, D)
    return torch.mm(x, W.T, out=x.new_empty(FEW_ROWS, VOCABULARY))


def label(draw: Draw) -> Tensor:
    """On integers, which are exact: where each number belongs in an ascending row."""
    row = torch.arange(VOCABULARY).to(draw(1)).expand(FEW_ROWS, -1).contiguous()
    return torch.searchsorted(row, draw(FEW_ROWS, 4).mul(1e4).round(), right=True)


def divergence(draw: Draw) -> Tensor:
    """From tokens that hardly change to tokens that change much."""
    z = draw(FEW_ROWS, VOCABULARY)
    size = torch.linspace(-3, 0, FEW_ROWS).to(z.device, z.dtype)[:, None]
    log_p, log_q = log_softmax(z), log_softmax(z + 10**size * draw(FEW_ROWS, VOCABULARY))
    return kl_divergence(log_p.exp(), log_p, log_q).log()


def chosen(draw: Draw) -> Tensor:
    x = draw(N, D)
    return joined(x[x > 0], (x > 1).nonzero(), x.median())


OPERATORS: dict[str, Callable[[Draw], Tensor]] = {
    "topk_encode": encode,
    "topk_encode, equal values": encode_ties,
    "sparse_decode": lambda draw: kernels.sparse_decode(*code(draw)[:3], draw(D)),
    "gather_dot": dots,
    "scatter_rows": lambda draw: joined(*kernels.scatter_rows(*code(draw)[:2], draw(N, D), F)),
    "reconstruction_error": lambda draw: joined(
        *kernels.reconstruction_error(*code(draw)[:3], draw(D), draw(N, D))
    ),
    "gradient_weighted_distortion": distortion,
    "gradients of encode and decode": gradients,
    "adam_rows": adam,
    "adam_vector": adam_vector,
    "matmul, left operand transposed": lambda draw: transposed(draw(4096, D)) @ draw(4096, D),
    "matmul, the longest dot products": lambda draw: (
        draw(D, MPS_LONGEST_DOT // 2) @ draw(MPS_LONGEST_DOT // 2, D)
    ),
    f"unembedding, {VOCABULARY:,} tokens": unembedding,
    "log_softmax": lambda draw: log_softmax(draw(FEW_ROWS, VOCABULARY)),
    "cumsum": lambda draw: draw(FEW_ROWS, VOCABULARY).softmax(-1).cumsum(-1),
    "searchsorted": label,
    "KL": divergence,
    "mask, nonzero, median": chosen,
}


# ----------------------------------------------------------------------------- training, model, evaluation
def training(device: torch.device) -> dict[str, float]:
    there, here = trained(device), trained(CPU)
    return {name: relative_error(there[name], truth) for name, truth in here.items()}


def trained(device: torch.device) -> dict[str, Tensor]:
    """{step: weights} after a step of each recipe with none, few, some and most latents dead: every branch
    of AuxK.
    """
    h = torch.randn(48, 16, generator=torch.Generator().manual_seed(0)).to(device)
    statistics = Statistics.of(h, torch.zeros(48, dtype=torch.bool, device=device))
    found = {}
    for recipe in RECIPES:
        for dead in (0, 6, 24, 50):
            step = RECIPES[recipe](statistics, 64, 4, 0, [480])
            step.idle[:dead] = 10**6
            step.one_step(h)
            found[f"a step of {recipe}, {dead} of 64 latents dead"] = joined(*step.finished().parameters())
    return found


@functools.cache
def embedded() -> tuple[Any, Tensor]:
    """(stdlib-s, rows of held-out text [ROWS,CTX])."""
    small, tokenizer = load_model("stdlib-s", CPU)
    return small, heldout_rows("stdlib", tokenizer, ctx=CTX, n=ROWS).input_ids


def model(device: torch.device) -> dict[str, float]:
    """h, CE, g and TopK values of an embedded model and of one with a large vocabulary."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small, rows = embedded()
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=D,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    wide = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    errors = {f"{what} of stdlib-s": x for what, x in parity(Hook(small, LAYER), rows, device).items()}
    return errors | {
        f"{what}, {VOCABULARY:,} tokens": x for what, x in parity(Hook(wide, 0), rows, device).items()
    }


def evaluation(device: torch.device) -> dict[str, float]:
    """Scores of an untrained SAE."""
    there, here = scores(device), scores(CPU)
    return {name: abs(there[name] / truth - 1) for name, truth in here.items()}


def scores(device: torch.device) -> dict[str, float]:
    small, rows = embedded()
    hook = Hook(small, LAYER).to(device)
    d = small.config.hidden_size
    sae = tied_init(d, 4 * d, 16, 0, torch.zeros(d)).requires_grad_(False).to(device)
    sums = {q: x[None] for q, x in evaluate(hook, rows, {"sae": sae}, ROWS)["sae"].sums.items()}
    values = computed(Sums(sums, np.ones((1, ROWS)), d))
    names = {"R²": "r2", "CE_rec": "ce_rec", "KL of the patch": "kl", "SWD": "swd_tok"}
    return {name: float(values[metric][0, 0]) for name, metric in names.items()}
