"""A language model split at a hook: the blocks before it, the blocks after it, and the clean run's gradients.

Shapes: B sequences, T positions, d = d_model, V = vocabulary. A hook is the output of transformer block
`layer`, `resid_post`; input_ids are [B,T], int64.
"""

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import Fault, UserError

import torch

# terms of a dot product: M1 and M2 read past the operands of longer ones (pytorch #195163), and the
# unembedding's backward has one term per token of the vocabulary
MPS_LONGEST_DOT = 32_767
KEPT_BYTES = 2**30  # of activations that `keeping_heads` keeps, and as many of gradients


def pick_device(wanted: str) -> torch.device:
    """auto: cuda, else mps, else cpu. Raises UserError for a device that this machine lacks."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if has[name])
    elif not has[wanted]:
        raise UserError(f"--device {wanted}: this machine has none (torch {torch.__version__})")
    return torch.device(wanted)


def text_config(model: Any) -> Any:
    """The configuration of the language model; in a multimodal model, of the part that reads text."""
    return model.config.get_text_config(decoder=True)


def blocks(model: Any) -> list[torch.nn.Module]:
    """The transformer blocks; in a multimodal model, of the part that reads text (its vision tower may have
    as many). Raises UserError for an architecture without a list of them.
    """
    config = text_config(model)
    n, kind = getattr(config, "num_hidden_layers", None), config.model_type
    readers = (m for m in model.modules() if hasattr(m, "config") and m.config.model_type == kind)
    for parent in next(readers, model).modules():
        for child in parent.children():
            if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) == n:
                return list(child)
    raise UserError(f"{type(model).__name__}: no list of transformer blocks found")


# ------------------------------------------------------------------------------------------ the hook
@dataclass(frozen=True, eq=False)
class Hook:
    """The output of block `layer` of a causal language model of transformers."""

    model: Any  # of AutoModelForCausalLM; its own forward is run, nothing of it is written a second time
    layer: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> "Hook":
        """Move the model, with plain attention where `fused_attention_errs`."""
        if fused_attention_errs(self.model, device):
            self.model.set_attn_implementation("eager")
        self.model.to(device)
        return self

    @property
    def is_last(self) -> bool:
        """Whether this is the last block, so that no attention follows."""
        return self.layer == text_config(self.model).num_hidden_layers - 1

    def head(self, input_ids: torch.Tensor) -> torch.Tensor:
        """h [B,T,d], float32 at least; nothing after the block is computed. Raises UserError.

        This is the block's own output. `hidden_states[layer + 1]` of the last block is after the final norm.
        """
        self.way_to_patch(input_ids)  # nothing is trained on a hook that cannot be evaluated
        if not _heads.keeping:
            return block_outputs(self.model, [self.layer], input_ids)[self.layer]
        if (h := _heads.get(key := (*text_key(self, input_ids), self.layer))) is None:
            earlier = {one.layer for one in _asked if one.model is self.model and one.layer < self.layer}
            for layer, h in block_outputs(self.model, sorted({*earlier, self.layer}), input_ids).items():
                _heads.put((*key[:-1], layer), h, h.nbytes)
        return h

    def tail(self, input_ids: torch.Tensor, h: torch.Tensor, unembedded: bool = True) -> torch.Tensor:
        """Logits [B,T,V], in the model's dtype, of the blocks after the hook, fed h [B,T,d] of any dtype.
        Differentiable in h.

        input_ids are the tokens that h came from. unembedded=False: the input of the unembedding, [B,T,d].
        """
        way, unembed = self.way_to_patch(input_ids), self.model.get_output_embeddings()
        on_mps = h.device.type == "mps"

        def replacement(y: torch.Tensor) -> torch.Tensor:
            if not unembedded:
                return y
            pieces = unembed.weight.split(MPS_LONGEST_DOT // 2)
            return torch.cat([torch.nn.functional.linear(y, W) for W in pieces], -1)

        too_long = on_mps and unembed.bias is None and len(unembed.weight) >= MPS_LONGEST_DOT
        with _replaced([unembed] if too_long or not unembedded else [], replacement):
            return self._logits(input_ids, h, way)

    def log_probs(self, input_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """log p [B,T-1,V] of the run that is fed h [B,T,d] at the hook."""
        return log_probs(self.tail(input_ids, h))

    # ------------------------------------------------------------------------ a run without its logits
    def final(self, input_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Input of the unembedding [B,T-1,d], at the positions that have a target, of the run that is fed h
        [B,T,d]: `logits` makes logits of it, a few positions at a time. Differentiable in h.

        For a family that does more than unembed (a cap), the logits themselves, [B,T-1,V].
        """
        return self.tail(input_ids, h, unembedded=not self.unembeds(input_ids))[:, :-1]

    def logits(self, final: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n,V] of n positions of `final`'s result. They may be written to `out` [n,V], of the model's
        dtype; that has no gradient.
        """
        if not self.model.unembeds:
            return final
        unembed = self.model.get_output_embeddings()
        if out is None:
            return torch.nn.functional.linear(final, unembed.weight, unembed.bias)
        if unembed.bias is None:
            return torch.mm(final, unembed.weight.T, out=out)
        return torch.addmm(unembed.bias, final, unembed.weight.T, out=out)

    def unembeds(self, input_ids: torch.Tensor) -> bool:
        """Whether the logits are the unembedding's output and nothing else (no cap, scale or cut). Tested
        once per model, on the first of input_ids.

        They must be equal bit for bit, both as they are and scaled up to 10,000: small logits would pass
        through a cap nearly unchanged.
        """
        if "unembeds" not in vars(self.model):
            unembed = self.model.get_output_embeddings()
            linear = type(unembed) is torch.nn.Linear
            vars(self.model)["unembeds"] = linear and all(
                self._returns_output(unembed, input_ids[:1], larger) for larger in (False, True)
            )
        return self.model.unembeds

    def _returns_output(self, unembed: torch.nn.Module, one: torch.Tensor, larger: bool) -> bool:
        """Whether the model returns exactly what its unembedding puts out, here scaled up if `larger`."""
        outputs: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            most = output.abs().max().clamp(min=torch.finfo(output.dtype).tiny)
            outputs.append(output / most * 1e4 if larger else output)
            return outputs[-1]

        with unembed.register_forward_hook(keep), torch.no_grad():
            logits = self.model(one, use_cache=False).logits
        return len(outputs) == 1 and torch.equal(outputs[0].to(logits.dtype), logits)

    def tiles(self, n: int) -> list[slice]:
        """Slices of n positions whose logits are held at a time: 4 MB of them on the CPU (more leaves the
        cache), 128 MB elsewhere, and never under 128 positions, since each slice reads the whole unembedding.
        """
        most = 2 ** (20 if self.device.type == "cpu" else 25)
        step = max(128, most // text_config(self.model).vocab_size)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def clean_pass(
        self, input_ids: torch.Tensor, h: torch.Tensor, uniforms: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(`final` [B,T-1,d], [g, g_y1, g_y2, ...] each [B,T,d]) of the unpatched run.

        g is the gradient at the hook of the CE *summed* over a sequence's tokens (with a mean it would depend
        on the batch). Sequences do not affect each other, so one backward serves the batch. g_y is the same
        with labels drawn from the model's own p: uniforms [m,B,T-1] in [0,1), the CPU's on every device,
        select them by the inverse of the cumulative distribution. g is exactly 0 at the last position.

        At the unembedding's input the gradient of -log p_y is p W_U - W_U[y]; p W_U is computed tile by tile
        and serves all labels: 2 V d multiplications a position for any m, and 1 + m backward passes.
        """
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            final = self.final(input_ids, x)
        flat = final.detach().flatten(0, 1)
        u = [] if uniforms is None else list(uniforms.flatten(1))
        labels = [input_ids[:, 1:].flatten(), *(torch.empty_like(one, dtype=torch.int64) for one in u)]
        expected = torch.empty_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        with torch.no_grad():
            for tile in self.tiles(len(flat)):
                p = log_softmax(self.logits(flat[tile])).exp_()
                expected[tile] = self._expected_row(p)
                cdf = p.cumsum(-1) if u else p
                for y, uniform in zip(labels[1:], u):
                    at = torch.searchsorted(cdf, uniform[tile, None] * cdf[:, -1:], right=True)
                    y[tile] = at.squeeze(-1).clamp_(max=cdf.shape[-1] - 1)
        upstream = (self._less_row(expected, y).view_as(final).to(final.dtype) for y in labels)
        return final.detach(), _gradients(final, x, upstream, len(labels))

    def _expected_row(self, p: torch.Tensor) -> torch.Tensor:
        """E_p of the unembedding's rows, p W_U [n,d] for p [n,V]; p itself where `final` is the logits."""
        if not self.model.unembeds:
            return p
        pieces = self.model.get_output_embeddings().weight.split(MPS_LONGEST_DOT // 2)
        parts = p.split(MPS_LONGEST_DOT // 2, -1)
        return functools.reduce(torch.add, (part @ W.to(p.dtype) for part, W in zip(parts, pieces)))

    def _less_row(self, expected: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`expected` [n,.] less the unembedding's rows of the labels y [n]."""
        if not self.model.unembeds:
            return expected.scatter_add(-1, y[:, None], expected.new_full((len(y), 1), -1))
        return expected - self.model.get_output_embeddings().weight.index_select(0, y)

    # ---------------------------------------------------------------------- how the model is run in parts
    def splits(self, input_ids: torch.Tensor) -> bool:
        """Whether everything after the hook is a function of h."""
        return self.way_to_patch(input_ids) != "replace"

    def pull_back(
        self, layer: int, input_ids: torch.Tensor, h: torch.Tensor, gradients: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Gradients [B,T,d] at the output of a later block, pulled back to this hook, in the run that is fed
        h: one forward and one backward for each through the blocks between. For families that `splits`.
        """
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            later = x.to(self.model.dtype)
            if layer != self.layer:
                first, way = blocks(self.model)[: self.layer + 1], self.way_to_patch(input_ids)
                with _replaced(first, _giving(later, way)):
                    later = _first(_raw_outputs(self.model, [layer], input_ids)[layer])
        return _gradients(later, x, (g.to(later.dtype) for g in gradients), len(gradients))

    def _logits(self, input_ids: torch.Tensor, h: torch.Tensor, way: str) -> torch.Tensor:
        """The model's own forward with h as the output of the hook's block.

        way "skip": the blocks up to the hook do not run, each returns h. "tuple": each returns (h,), for
        families whose blocks return tuples (all, in transformers 4). "replace": all run, and the output of
        the last of them is replaced.
        """
        first, h = blocks(self.model)[: self.layer + 1], h.to(self.model.dtype)

        def replaced(module: Any, inputs: Any, output: Any) -> Any:
            return (h, *output[1:]) if isinstance(output, tuple) else h

        whole = way == "replace"
        with first[-1].register_forward_hook(replaced) if whole else _replaced(first, _giving(h, way)):
            return self.model(input_ids, use_cache=False).logits

    def way_to_patch(self, input_ids: torch.Tensor) -> str:
        """The way of `_logits` in which tail(head) equals the full forward; tested once per model and layer,
        on the first of input_ids.

        "replace" costs a full forward per patch; families need it whose later blocks read more of the earlier
        ones than h. Raises UserError where it differs too (blocks that run more than once).
        """
        known = self.model.__dict__.setdefault("ways_to_patch", {})
        if self.layer in known:
            return known[self.layer]
        name, norm, one = type(self.model).__name__, torch.linalg.vector_norm, input_ids[:1]
        with torch.no_grad():
            whole = self.model(one, use_cache=False).logits
            output = _raw_outputs(self.model, [self.layer], one)[self.layer]
            h, passed = (output[0], "tuple") if isinstance(output, tuple) else (output, "skip")
            if h.ndim != 3 or h.shape[:2] != one.shape:
                raise UserError(
                    f"{name}: block {self.layer} puts out {list(h.shape)} for {list(one.shape)} tokens, and "
                    "[sequences, positions, d] is needed to patch there"
                )
            for way in (passed, "replace"):
                with contextlib.suppress(Exception):  # this family's blocks do not take a bare h
                    split = self._logits(one, h, way)
                    # per position and without the mean over the vocabulary, which could hide a difference;
                    # logits that are not finite pass here and are reported later
                    apart, of = (norm(z - z.mean(-1, keepdim=True), dim=-1) for z in (split - whole, whole))
                    if not (apart > 1e-3 * of).any():
                        known[self.layer] = way
                        break
            else:
                raise UserError(
                    f"{name}: its logits are no function of what block {self.layer} puts out, so nothing can "
                    "be patched there"
                )
        if known[self.layer] == "replace":
            print(f"{name} does not split after block {self.layer}: every patched run is a full forward")
        return known[self.layer]


def block_outputs(model: Any, layers: Sequence[int], input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """{layer: h [B,T,d]}, float32 at least, from one forward that ends at the deepest of the layers."""
    with torch.no_grad():
        found = {layer: _first(out) for layer, out in _raw_outputs(model, layers, input_ids).items()}
    return {layer: h.to(torch.promote_types(h.dtype, torch.float32)) for layer, h in found.items()}


def _raw_outputs(model: Any, layers: Sequence[int], input_ids: torch.Tensor) -> dict[int, Any]:
    """{layer: what the block returns}: h [B,T,d], or a tuple that begins with it. The forward stops at the
    last of them.
    """
    kept: dict[int, Any] = {}

    def keep(layer: int, module: Any, inputs: Any, output: Any) -> None:
        kept.setdefault(layer, output)
        if len(kept) == len(layers):
            raise _Stop

    with contextlib.ExitStack() as hooks, contextlib.suppress(_Stop):
        for layer in layers:
            block = blocks(model)[layer]
            hooks.enter_context(block.register_forward_hook(functools.partial(keep, layer)))
        model(input_ids, use_cache=False)
    return kept


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):
    """Ends a forward early."""


def _gradients(
    output: torch.Tensor, x: torch.Tensor, upstream: Iterable[torch.Tensor], n: int
) -> list[torch.Tensor]:
    """The gradient at x for each of n gradients at `output`."""
    return [torch.autograd.grad(output, x, g, retain_graph=i + 1 < n)[0] for i, g in enumerate(upstream)]


class Kept:
    """Results that one hook leaves for the next hook of the same model, while `keeping`: keyed by `text_key`
    (and more), for one model at a time, KEPT_BYTES at most.
    """

    def __init__(self) -> None:
        self.keeping, self.found = False, dict[tuple, Any]()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        before, self.keeping, self.found = (self.keeping, self.found), True, {}
        try:
            yield
        finally:
            self.keeping, self.found = before

    def get(self, key: tuple) -> Any:
        """The result, or None."""
        if next(iter(self.found), key)[0] != key[0]:
            self.found.clear()  # those of another model
        return self.found.get(key)

    def put(self, key: tuple, what: Any, nbytes: int) -> None:
        if key in self.found or (len(self.found) + 1) * nbytes <= KEPT_BYTES:
            self.found[key] = what


_heads = Kept()  # h
_asked: list[Hook] = []


@contextlib.contextmanager
def keeping_heads(hooks: Iterable[Hook]) -> Iterator[None]:
    """Within, `Hook.head` also keeps h at those of `hooks` that come earlier in the same model, so that its
    hooks in descending order cost one forward of a text. The weights must not change. KEPT_BYTES at most are
    kept; the rest is run again.
    """
    before, _asked[:] = list(_asked), hooks
    try:
        with _heads.on():
            yield
    finally:
        _asked[:] = before


def text_key(hook: Hook, input_ids: torch.Tensor) -> tuple:
    """A key for a model and a text. (Not the model's id, which the next model may get.)"""
    return (
        weakref.ref(hook.model),
        hook.device,
        input_ids.shape,
        hashlib.sha256(input_ids.cpu().numpy().tobytes()).digest(),
    )


def _giving(h: torch.Tensor, way: str) -> Callable:
    """A block's forward that returns h for any input: see `Hook._logits` for the ways."""
    return lambda *args, **kwargs: (h,) if way == "tuple" else h


@contextlib.contextmanager
def _replaced(modules: list[Any], forward: Callable) -> Iterator[None]:
    """Within, the modules compute `forward`. They stay in place, for models that look at their blocks."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)  # a block may stand in the list twice


# ------------------------------------------------------------------------------------------ attention
def fused_attention_errs(model: Any, device: torch.device) -> bool:
    """Whether positions see up to three later ones: torch's fused attention in 16 bits on MPS does that
    (pytorch #195910).
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    return device.type == "mps" and half and model.config._attn_implementation == "sdpa"


EXCHANGED = "transport_geometry"  # the name under which transformers knows our attention


@contextlib.contextmanager
def attending(model: Any, function: Callable) -> Iterator[None]:
    """Within, every attention of the model computes function(module, query, key, value, attention_mask,
    scaling, **more) -> (out [B,T,H,e], weights [B,H,T,T]), as transformers' own attention functions do.

    query [B,H,T,e]; key and value [B,H',T,e] with H' dividing H; attention_mask is added to the scores.
    Raises UserError for a family whose attention cannot be exchanged.
    """
    import transformers

    transformers.AttentionInterface.register(EXCHANGED, function)
    transformers.AttentionMaskInterface.register(EXCHANGED, transformers.masking_utils.eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(EXCHANGED)
    try:
        if model.config._attn_implementation != EXCHANGED or not model._supports_attention_backend:
            raise UserError(f"{type(model).__name__}: its attention cannot be exchanged or looked at")
        yield
    finally:
        model.set_attn_implementation(before)


def for_every_head(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, more: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """key and value [B,H',T,e], repeated for the H heads of query. Raises UserError where attention is more
    than a softmax of scaled scores.
    """
    if more.get("softcap") is not None or more.get("s_aux") is not None:
        raise UserError(
            f"{type(module).__name__}: soft-capped scores or attention sinks of its own, which are not "
            "understood"
        )
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(query key^T scaling + attention_mask) value [B,T,H,e], the softmax [B,H,T,T])."""
    key, value = for_every_head(module, query, key, value, more)
    plan = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, -1)
    return (plan @ value).transpose(1, 2).contiguous(), plan


# ------------------------------------------------------------------------------------------ log-probabilities
def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """log p [B,T-1,V] at the positions that have a target, from logits [B,T,V]."""
    return log_softmax(logits[:, :-1])


def log_softmax(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """log p of logits [...,V], float32 at least; in `out` where it is given."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if out is None:
        return torch.log_softmax(logits, -1, dtype=dtype)
    return torch.log_softmax(logits, -1, dtype=dtype, out=out)


def cross_entropy(log_p: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Next-token CE [B,T-1] in nats from log-probabilities [B,T-1,V]."""
    return -log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def kl_divergence(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [...] in nats from p, log p and log q [...,V], accurate in float32 down to 1e-7.

    The plain sum of p (log p - log q) cancels when KL is small. Then KL = log1p(E_p[expm1(c) - c]) is used
    with c = dz - E_p dz, and a series for the bracket where |c| < 0.05. expm1 overflows beyond 88, so c is
    clamped at 80: in a small KL, p is negligible there.
    """
    change = log_q - log_p
    if p.device.type == "mps":  # einsum is a bmm, with a dot product of V terms: see MPS_LONGEST_DOT
        kl = -(p * change).sum(-1)
    else:
        kl = -torch.einsum("...v,...v->...", p, change)
    small = kl < 0.01
    if small.any():
        c = (change[small] + kl[small][:, None]).clamp(max=80.0)
        series = c * c * (0.5 + c * (1 / 6 + c * (1 / 24 + c / 120)))
        kl[small] = torch.log1p((p[small] * torch.where(c.abs() < 0.05, series, torch.expm1(c) - c)).sum(-1))
    return kl


# ----------------------------------------------------------------------------- comparing a device to the CPU
def check_parity(hook: Hook, input_ids: torch.Tensor, device: torch.device) -> None:
    """Compare h, CE, g and TopK values of one batch between `device` and the CPU. Raises Fault where the
    error (`error_by_position`) exceeds 0.1%, or 5% for a model in bfloat16, whose own rounding is that large.

    MPS matmuls have returned errors of 10-30%, silently and depending on what lay in memory (pytorch
    #193487), and its topk has returned zeros (#78915), so every hook is checked. input_ids on the CPU; the
    model stays on `device`.
    """
    tolerance = 1e-3 if hook.model.dtype != torch.bfloat16 else 0.05
    for name, error in parity(hook, input_ids, device).items():
        if not error <= tolerance:
            raise Fault(
                f"{device} disagrees with the CPU on {name} at layer {hook.layer} (relative error "
                f"{error:.1e}, allowed {tolerance:.0e}): its numbers cannot be believed; use --device cpu"
            )


def parity(hook: Hook, input_ids: torch.Tensor, device: torch.device) -> dict[str, float]:
    """{quantity: `error_by_position` of the device's} for `check_parity`."""

    def measure(on: torch.device) -> dict[str, torch.Tensor]:
        hook.to(on)
        x = input_ids.to(on)
        h = hook.head(x)
        final, (g,) = hook.clean_pass(x, h)
        log_p = log_softmax(hook.logits(final))
        d = h.shape[-1]
        W = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0)).to(on)
        values, _ = kernels.topk_encode(h.flatten(0, 1), W, torch.zeros(4 * d, device=on), min(32, 4 * d))
        # sorted: rounding may exchange two latents, and so the values between them
        ranked = values.cpu().sort(dim=1).values
        return {"h": h, "CE": cross_entropy(log_p, x), "g": g, "TopK values": ranked}

    here, there = measure(torch.device("cpu")), measure(device)
    return {name: error_by_position(there[name], truth) for name, truth in here.items()}


def error_by_position(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square over positions of error / norm, the norm being the position's or the median's,
    whichever is larger: so the large norm of a sink does not hide errors at other positions.
    """
    found, truth = found.cpu().double(), truth.cpu().double()
    rows = truth.numel() // truth.shape[-1] if truth.ndim > 2 else truth.numel()
    error, norms = ((x.reshape(rows, -1)).norm(dim=1) for x in (found - truth, truth))
    return (error / torch.maximum(norms, norms.median())).square().mean().sqrt().item()
