"""--device mps without a Mac: the pipeline on a pretend MPS device (pretend.py)."""

from helpers import one_line, script
from pretend import (
    CPU,
    FAMILIES,
    LONG,
    MPS,
    PretendMps,
    Refused,
    files,
    one_hook,
    patched_sums,
    tiny_model,
    tiny_rows,
)
from transport_geometry import errors
from transport_geometry.audit import audit
from transport_geometry.measuring import metrics
from transport_geometry.measuring.r2_by_library import LIBRARIES
from transport_geometry.models import lm
from transport_geometry.models.lm import Hook
from transport_geometry.records.condition import Condition
from transport_geometry.running import check_device

import numpy as np
import pytest
import torch

NAMES = [metric.name for metric in metrics.METRICS]


# ------------------------------------------------------------------------------------------- the guard itself
REFUSED = {
    "float64 made": ("float64", lambda x: torch.zeros(2, dtype=torch.float64, device=x.device)),
    "float64 moved": ("float64", lambda x: torch.ones(2, dtype=torch.float64).to(x.device)),
    "float64 inside": ("float64", lambda x: x.sum(dtype=torch.float64)),
    "float64 before home": ("float64", lambda x: x.to(CPU, torch.float64)),
    "another dtype on the way home": ("on its way", lambda x: x.to(CPU, torch.bfloat16)),
    "another dtype, copied home": ("on its way", lambda x: torch.ones(4, 4, dtype=torch.bfloat16).copy_(x)),
    "complex128": ("complex128", lambda x: torch.zeros(2, dtype=torch.complex128, device=x.device)),
    "mm": ("transposed", lambda x: x.t() @ x),
    "addmm": ("transposed", lambda x: torch.addmm(x, x.t(), x)),
    "bmm": ("transposed", lambda x: x[None].expand(2, 4, 4).transpose(1, 2) @ x[None].expand(2, 4, 4)),
    "a gradient": ("transposed", lambda x: (x @ x.clone().requires_grad_()).square().sum().backward()),
    "long product": ("32767", lambda x: x[:, :1].expand(4, LONG) @ x[:1].expand(LONG, 4)),
    "eigh": ("no MPS kernel", lambda x: torch.linalg.eigh(x)),
    "fallback to the CPU": ("no MPS kernel", lambda x: torch.geqrf(x)),
    "CPU operand": ("a CPU tensor", lambda x: x + torch.ones(4, 4)),
}


@pytest.mark.parametrize("why, call", REFUSED.values(), ids=REFUSED)
def test_the_pretend_device_refuses_what_a_real_one_gets_wrong(why, call):
    with PretendMps(), pytest.raises(Refused, match=why):
        call(torch.ones(4, 4).to(MPS))


# ----------------------------------------------------------------------------------------------- the pipeline
def test_saes_from_files_have_the_numbers_of_the_cpu(tmp_path):
    with PretendMps():
        there = files(tmp_path, MPS)
    for a, b in zip(there, files(tmp_path, CPU), strict=True):
        numbers = [m for m in (*NAMES, *LIBRARIES) if not (a["sae"] == "null-gaussian" and m in LIBRARIES)]
        np.testing.assert_allclose([a[m] for m in numbers], [b[m] for m in numbers], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_whole_pipeline_has_the_numbers_of_the_cpu(tmp_path):
    """Nothing in it is refused, and its numbers are those of the CPU."""
    with PretendMps() as guard:
        there = one_hook(tmp_path, MPS)
    # encode, sparse backward, sampled labels, g and Adam were on the device
    operators = "topk scatter_add_ searchsorted.Tensor native_layer_norm_backward addcdiv_".split()
    assert {f"aten::{name}" for name in operators} <= guard.ran.keys()
    here = one_hook(tmp_path, CPU)
    for a, b in zip(there, here, strict=True):
        assert Condition.of(a) == Condition.of(b)
        np.testing.assert_allclose([a[m] for m in NAMES], [b[m] for m in NAMES], rtol=1e-3, atol=1e-5)


def test_training_steps_are_those_of_the_cpu():
    """Few, some and most latents dead: every way through AuxK."""
    with PretendMps():
        errors = check_device.training(MPS)
    assert len(errors) == 8 and max(errors.values()) < 1e-5


def test_a_large_vocabulary_needs_no_long_products():
    """Pythia's 50,304 tokens: nothing must come from dot products that an M1 or M2 gets wrong."""
    with PretendMps():
        there = patched_sums(tiny_model(50304), MPS)
    here = patched_sums(tiny_model(50304), CPU)
    for quantity in here:
        np.testing.assert_allclose(there[quantity], here[quantity], rtol=1e-3, atol=1e-5, err_msg=quantity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_pass_the_parity_check(family, dtype):
    """What real models are made of; an honest device passes the check in bfloat16 too, where roundings
    exchange latents.
    """
    model = tiny_model(family=family, dtype=dtype)
    with PretendMps():
        lm.check_parity(Hook(model, 1), tiny_rows(), MPS)
        # in 16 bits torch's fused attention lets positions see later ones there
        assert (model.config._attn_implementation == "eager") == (
            family == "Gemma2" or dtype == torch.bfloat16
        )
        patched_sums(model, MPS)


def test_audit_refuses_attention_that_looks_ahead():
    with PretendMps(), pytest.raises(errors.UserError, match="set_attn_implementation"):
        audit(tiny_model(dtype=torch.bfloat16).to(MPS), 1, lambda h: 0.5 * h, tiny_rows())


WRONG = {  # a block before the hook, one after it, and one that is wrong only in its gradient
    "h": (0, lambda y: 1.05 * y),
    "CE": (2, lambda y: y * torch.nan),
    "g": (2, lambda y: y + 0.1 * (y - y.detach())),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_device_that_gets_a_block_wrong_is_not_believed(what):
    """An honest device passes; one that gets a block wrong is not believed."""
    model, (layer, wrong) = tiny_model(), WRONG[what]

    def mistake(module, inputs, y):
        return wrong(y) if y.device.type == "mps" else None

    with PretendMps():
        lm.check_parity(Hook(model, 1), tiny_rows(), MPS)
        model.gpt_neox.layers[layer].mlp.register_forward_hook(mistake)
        with pytest.raises(errors.Fault, match=f"on {what} at layer 1"):
            lm.check_parity(Hook(model, 1), tiny_rows(), MPS)


# -------------------------------------------------------------------------------- python common.py check
@pytest.fixture
def pretended(monkeypatch):
    """The pretend device is there, and the check takes it."""
    monkeypatch.setattr(check_device, "pick_device", lambda wanted: MPS)
    with PretendMps():
        yield


def off(function):
    """A function that is wrong where MPS computes it."""

    def wrong(*args, **kwargs):
        found = function(*args, **kwargs)
        return found + 1 if found.device.type == "mps" else found

    return wrong


@pytest.mark.slow
def test_an_honest_device_agrees(pretended, capsys):
    assert check_device.check("mps") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"mps agrees with the CPU: {len(said) - 3} of {len(said) - 3} within tolerance"


@pytest.mark.parametrize(
    "module, name, wrong, named",
    [
        (torch, "searchsorted", off(torch.searchsorted), "searchsorted (relative error"),
        (check_device, "kl_divergence", off(check_device.kl_divergence), "KL (relative error"),
    ],
)
def test_check_names_what_is_wrong(pretended, monkeypatch, capsys, module, name, wrong, named):
    """One operator wrong, and one that is not there; the evaluation is left out for its time."""
    for part in ("training", "model", "evaluation"):
        monkeypatch.setattr(check_device, part, lambda device: {})
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setitem(check_device.OPERATORS, "eigenvectors", lambda draw: torch.linalg.eigh(draw(4, 4))[1])
    assert check_device.check("mps") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("mps disagrees with the CPU on ") and named in last
    assert "; eigenvectors (Refused aten._linalg_eigh" in last
    assert len([line for line in lines if line.startswith("WRONG")]) == 2 and last.count("allowed 1e-03") == 1


@pytest.mark.slow
def test_the_cpu_agrees_with_itself():
    """The CPU agrees with itself, in float32 against float64; what is not there is one line."""
    said = script("common.py", "check", "--device", "cpu").stdout.splitlines()
    assert said[-1] == f"cpu agrees with the CPU: {len(said) - 3} of {len(said) - 3} within tolerance"
    assert {"R²", "CE_rec", "KL of the patch", "SWD"} <= {line[7:].split(":")[0] for line in said}
    if not torch.backends.mps.is_available():
        none = script("common.py", "check", "--device", "mps", check=2)
        assert one_line(none).startswith("common.py: --device mps: this machine has none")
