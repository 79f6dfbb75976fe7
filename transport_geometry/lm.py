"""TODO lm."""

import contextlib
from collections.abc import Callable, Iterator

from transport_geometry import kernels
from transport_geometry.errors import Fault, UserError

import torch


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
    """Compare h, CE, g and TopK values of one batch between `device` and the CPU before any number from
    `device` is believed.

    MPS matmuls have returned 10-30% errors silently and depending on what lay in memory (pytorch #193487),
    and its topk has given zeros (#78915), so this is called again for every hook. rows [B,T] on the CPU; the
    model is left on `device`. Raises Fault where the norm of the error exceeds 0.1% of the norm, 5% for a
    model in bfloat16, whose own rounding is of that size.
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
        return {
            name: t.cpu().double()
            for name, t in (("h", h), ("CE", cross_entropy(log_p, x)), ("g", g), ("TopK values", values))
        }

    here, there = measure(torch.device("cpu")), measure(device)
    for name, truth in here.items():
        error = ((there[name] - truth).norm() / truth.norm()).item()
        if not error <= tolerance:
            raise Fault(
                f"{device} disagrees with the CPU on {name} at layer {layer} (relative error {error:.1e}, allowed "
                f"{tolerance:.0e}): its numbers cannot be believed; use --device cpu"
            )


def blocks(model) -> list[torch.nn.Module]:
    """The transformer blocks. Raises UserError for an architecture without a list of them."""
    n = getattr(model.config, "num_hidden_layers", None)
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) == n:
                return list(child)
    raise UserError(f"{type(model).__name__}: no list of transformer blocks found")


# M1 and M2 read past the operands of longer ones (pytorch #195163); the unembedding's backward has V
MPS_LONGEST_DOT = 32_767


class _Stop(Exception):
    pass


@contextlib.contextmanager
def _computing(modules: list[torch.nn.Module], function: Callable) -> Iterator[None]:
    """Within, the modules compute `function`. They stay what and where they are, for a forward that looks at
    them.
    """
    for module in modules:
        module.forward = function
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)  # a block may stand in the list twice


def _block_output(model, layer: int, rows: torch.Tensor):
    """What block `layer` returns: h [B,T,d], or a tuple of h and other things. Nothing is computed after
    it.
    """
    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        raise _Stop

    with blocks(model)[layer].register_forward_hook(keep), torch.no_grad(), contextlib.suppress(_Stop):
        model(rows, use_cache=False)
    return kept[0]


def _logits(model, layer: int, rows: torch.Tensor, h: torch.Tensor, way: str) -> torch.Tensor:
    """The model's own forward on rows with h as the output of block `layer`, so that nothing of it is written
    a second time.

    way, `skip`: the blocks 0..layer do not run, each gives h. `tuple`: each gives (h,), for families whose
    blocks return tuples (all, in transformers 4). `replace`: all run, and the output of block `layer` is
    replaced.
    """
    first, h = blocks(model)[: layer + 1], h.to(model.dtype)
    if way == "replace":
        patch = first[-1].register_forward_hook(
            lambda module, inputs, output: (h, *output[1:]) if isinstance(output, tuple) else h
        )
    else:
        patch = _computing(first, lambda *args, **kwargs: (h,) if way == "tuple" else h)
    with patch:
        return model(rows, use_cache=False).logits


def way_to_patch(model, layer: int, rows: torch.Tensor) -> str:
    """The way of `_logits` in which tail(head) is the full forward; looked for once per model and layer, on
    the first of rows [B,T].

    `replace` costs a full forward a patch; it is for families whose later blocks read more of the earlier
    ones than h. Raises UserError where that is not the full forward either: blocks that run more than once.
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
                # what is not finite is found, and said, later
                if not norm(split - whole) > 1e-3 * norm(whole):
                    break
        else:
            raise UserError(
                f"{name}: its logits are no function of what block {layer} puts out, so nothing can be patched there"
            )
    if way == "replace":
        print(f"{name} does not split after block {layer}: every patched run is a full forward")
    return known.setdefault(layer, way)


def head(model, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """resid_post of block `layer`, [B,T,d], float32 at least, and nothing computed after it. rows [B,T].
    Raises UserError.

    The block's own output, not `hidden_states[layer + 1]`: for the last block that one is after the final
    norm.
    """
    way_to_patch(model, layer, rows)  # so that nothing is trained on what cannot be evaluated
    output = _block_output(model, layer, rows)
    h = output[0] if isinstance(output, tuple) else output
    return h.to(torch.promote_types(h.dtype, torch.float32))


def tail(model, layer: int, rows: torch.Tensor, h: torch.Tensor, unembedded: bool = True) -> torch.Tensor:
    """Logits [B,T,V] of the blocks after `layer`, fed h [B,T,d]. rows [B,T] are those h came from.
    Differentiable in h.

    In the model's dtype; h may have any. unembedded=False: what the unembedding would be given, [B,T,d].
    """
    way, unembed, compute = way_to_patch(model, layer, rows), model.get_output_embeddings(), None
    if not unembedded:
        compute = lambda y: y
    elif h.device.type == "mps" and unembed.bias is None and len(unembed.weight) >= MPS_LONGEST_DOT:
        compute = lambda y: torch.cat(
            [torch.nn.functional.linear(y, W) for W in unembed.weight.split(MPS_LONGEST_DOT // 2)], -1
        )
    with _computing([unembed], compute) if compute else contextlib.nullcontext():
        return _logits(model, layer, rows, h, way)


def cross_entropy(log_p: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Next-token CE [B,T-1] in nats from log-probabilities [B,T-1,V]."""
    return -log_p.gather(-1, rows[:, 1:, None]).squeeze(-1)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """log p [B,T-1,V] at the positions that have a target."""
    return torch.log_softmax(logits[:, :-1].float(), -1)


def clean_pass(
    model, layer: int, rows: torch.Tensor, h: torch.Tensor, uniforms: torch.Tensor | None = None
) -> tuple:
    """(log_p [B,T-1,V], [g, g_y1, g_y2, ...] each [B,T,d]) of the unpatched run.

    g is the gradient at the hook of the CE *summed* over a sequence's tokens (a mean would make it depend on
    the batch); sequences do not touch each other, so one backward serves the batch. g_y is the same with
    labels drawn from the model's own p: uniforms [m,B,T-1] in [0,1) pick them by the inverse of the
    cumulative distribution, so that the CPU's random numbers serve every device. g at the last position is
    exactly 0.
    """
    x = h.detach().requires_grad_()
    log_p = log_probs(tail(model, layer, rows, x))
    draws = [] if uniforms is None else list(uniforms)
    labels = [rows[:, 1:]]
    with torch.no_grad():
        cdf = log_p.exp().cumsum(-1) if draws else None
        for u in draws:
            labels.append(
                torch.searchsorted(cdf, u[..., None] * cdf[..., -1:], right=True)
                .squeeze(-1)
                .clamp_(max=cdf.shape[-1] - 1)
            )
    gradients = []
    for i, y in enumerate(labels):
        loss = -log_p.gather(-1, y[..., None]).sum()
        gradients.append(torch.autograd.grad(loss, x, retain_graph=i + 1 < len(labels))[0])
    return log_p.detach(), gradients


def kl_divergence(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per position, [B,T-1], in nats, right in float32 down to 1e-7.

    Summing p (log p - log q) cancels to nothing for small KL. There, with c = dz - E_p dz, KL =
    log1p(E_p[expm1(c) - c]), and the bracket by its series where |c| < 0.05. For large changes the plain sum
    is exact and expm1 would overflow.
    """
    change = log_q - log_p
    kl = -torch.einsum("btv,btv->bt", p, change)
    small = kl < 0.01
    if small.any():
        c = (change[small] + kl[small][:, None]).clamp(max=10.0)
        series = c * c * (0.5 + c * (1 / 6 + c * (1 / 24 + c / 120)))
        kl[small] = torch.log1p((p[small] * torch.where(c.abs() < 0.05, series, torch.expm1(c) - c)).sum(-1))
    return kl
