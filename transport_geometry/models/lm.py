"""The language model split at a hook: what comes before it, what comes after it, and the clean run's
gradients.

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

# M1 and M2 read past the operands of longer ones (pytorch #195163); the unembedding's backward has V
MPS_LONGEST_DOT = 32_767
# multiplications as long as what a token costs besides them in a block, or in the training of an SAE
# (measured on a CPU)
OVERHEAD = 2**17
HEADS = 2**30  # bytes of activations that `keeping_heads` keeps, and of gradients as many


def pick_device(wanted: str) -> torch.device:
    """auto = cuda, else mps, else cpu. Raises UserError for a device this machine has not."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if has[name])
    elif not has[wanted]:
        raise UserError(f"--device {wanted}: this machine has none (torch {torch.__version__})")
    return torch.device(wanted)


def text_config(model: Any) -> Any:
    """The configuration of the language model: of a multimodal one, of its part that reads text."""
    return model.config.get_text_config(decoder=True)


def blocks(model: Any) -> list[torch.nn.Module]:
    """The transformer blocks. Raises UserError for an architecture without a list of them.

    Of a multimodal model, those of the part that reads text: its vision tower may have as many.
    """
    config = text_config(model)
    n = getattr(config, "num_hidden_layers", None)
    reading = (
        part
        for part in model.modules()
        if hasattr(part, "config") and part.config.model_type == config.model_type
    )
    for parent in next(reading, model).modules():
        for child in parent.children():
            if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) == n:
                return list(child)
    raise UserError(f"{type(model).__name__}: no list of transformer blocks found")


def block_size(model: Any) -> int:
    """Parameters of one block."""
    parts = blocks(model)
    return sum(p.numel() for part in parts for p in part.parameters()) // len(parts)


# ------------------------------------------------------------------------------------------ the hook
@dataclass(frozen=True, eq=False)
class Hook:
    """The output of block `layer` of a causal language model of transformers."""

    model: Any  # AutoModelForCausalLM's; its forward is run as it is, nothing of it is written a second time
    layer: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device) -> "Hook":
        """The model moved there, with plain attention where its own `fused_attention_errs`."""
        if fused_attention_errs(self.model, device):
            self.model.set_attn_implementation("eager")
        self.model.to(device)
        return self

    @property
    def is_last(self) -> bool:
        """Is it the last block's, so that no attention follows it?"""
        return self.layer == text_config(self.model).num_hidden_layers - 1

    def head(self, input_ids: torch.Tensor) -> torch.Tensor:
        """h, [B,T,d], float32 at least, and nothing computed after it. Raises UserError.

        The block's own output, not `hidden_states[layer + 1]`: for the last block that one is after the final
        norm.
        """
        self.way_to_patch(input_ids)  # so that nothing is trained on what cannot be evaluated
        if not _heads.keeping:
            return block_outputs(self.model, [self.layer], input_ids)[self.layer]
        if (h := _heads.get(key := (*text_key(self, input_ids), self.layer))) is None:
            on_the_way = {one.layer for one in _asked if one.model is self.model and one.layer < self.layer}
            for layer, h in block_outputs(self.model, sorted({*on_the_way, self.layer}), input_ids).items():
                _heads.put((*key[:-1], layer), h, h.nbytes)
        return h

    def tail(self, input_ids: torch.Tensor, h: torch.Tensor, unembedded: bool = True) -> torch.Tensor:
        """Logits [B,T,V] of the blocks after the hook, fed h [B,T,d]. Differentiable in h.

        input_ids are those h came from. In the model's dtype; h may have any. unembedded=False: what the
        unembedding would be given, [B,T,d].
        """
        way, unembed = self.way_to_patch(input_ids), self.model.get_output_embeddings()
        too_long = unembed.bias is None and len(unembed.weight) >= MPS_LONGEST_DOT

        def in_pieces(y: torch.Tensor) -> torch.Tensor:
            pieces = unembed.weight.split(MPS_LONGEST_DOT // 2)
            return torch.cat([torch.nn.functional.linear(y, W) for W in pieces], -1)

        unembedding: contextlib.AbstractContextManager = contextlib.nullcontext()
        if not unembedded:
            unembedding = _computing([unembed], _unchanged)
        elif h.device.type == "mps" and too_long:
            unembedding = _computing([unembed], in_pieces)
        with unembedding:
            return self._logits(input_ids, h, way)

    def log_probs(self, input_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """log p [B,T-1,V] of the run that is fed h [B,T,d] at the hook."""
        return log_probs(self.tail(input_ids, h))

    # ------------------------------------------------------------------------ a run without its logits
    def final(self, input_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """[B,T-1,d] at the positions that have a target, of the run that is fed h [B,T,d]: all that `logits`
        needs to make logits of, a few positions at a time. Differentiable in h.

        The logits themselves, [B,T-1,V], for a family that does more to them than unembed (a cap).
        """
        return self.tail(input_ids, h, unembedded=not self.unembeds(input_ids))[:, :-1]

    def logits(self, final: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n,V] of n positions of what `final` gives; in `out` [n,V], of the model's dtype and
        without gradient, where it is given and they are not there already.
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
        """Are the logits what the unembedding puts out, and nothing else (no cap, no scale, nothing cut
        off)? Looked at once per model, on the clean run of the first of input_ids.
        """
        if "unembeds" not in vars(self.model):
            vars(self.model)["unembeds"] = self._returns_what_it_unembeds(input_ids[:1])
        return self.model.unembeds

    def _returns_what_it_unembeds(self, one: torch.Tensor) -> bool:
        """Does the model return, bit for bit, what its unembedding puts out: its own logits, and logits of up
        to 10,000? No tolerance is needed, and small logits would hide a cap from one that is.
        """
        unembed = self.model.get_output_embeddings()
        if type(unembed) is not torch.nn.Linear:
            return False
        put_out: list[torch.Tensor] = []

        def same(larger: bool) -> bool:
            def keep(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                most = output.abs().max().clamp(min=torch.finfo(output.dtype).tiny)
                put_out.append(output / most * 1e4 if larger else output)
                return put_out[-1]

            put_out.clear()
            with unembed.register_forward_hook(keep), torch.no_grad():
                logits = self.model(one, use_cache=False).logits
            return len(put_out) == 1 and torch.equal(put_out[0].to(logits.dtype), logits)

        return same(larger=False) and same(larger=True)

    def tiles(self, n: int) -> list[slice]:
        """Of n positions, as many at a time as are held with all of the vocabulary: 4 MB of logits on the CPU
        (more leaves the cache), but 128 positions, for which the unembedding is read once (below 32 MB malloc
        does not return it page by page); 128 MB elsewhere.
        """
        most = 2 ** (20 if self.device.type == "cpu" else 25)
        step = max(128, most // text_config(self.model).vocab_size)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def clean_pass(
        self, input_ids: torch.Tensor, h: torch.Tensor, uniforms: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(`final` [B,T-1,d], [g, g_y1, g_y2, ...] each [B,T,d]) of the unpatched run.

        g is the gradient at the hook of the CE *summed* over a sequence's tokens (a mean would make it depend
        on the batch); sequences do not touch each other, so one backward serves the batch. g_y is the same
        with labels drawn from the model's own p: uniforms [m,B,T-1] in [0,1) pick them by the inverse of the
        cumulative distribution, so that the CPU's random numbers serve every device. g at the last position
        is exactly 0.

        At the unembedding's input the gradient of -log p_y is p W_U - W_U[y]: of p a tile is held at a time,
        and its product serves all labels. 2 V d multiplications a position, whatever m, and 1 + m backward
        passes through the blocks.
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
        gradients = []
        for i, y in enumerate(labels):
            upstream = self._less_row(expected, y).view_as(final).to(final.dtype)
            gradients.append(torch.autograd.grad(final, x, upstream, retain_graph=i + 1 < len(labels))[0])
        return final.detach(), gradients

    def _expected_row(self, p: torch.Tensor) -> torch.Tensor:
        """E_p of the unembedding's rows, p W_U [n,d] for p [n,V]; p itself where `final` is the logits."""
        if not self.model.unembeds:
            return p
        pieces = self.model.get_output_embeddings().weight.split(MPS_LONGEST_DOT // 2)
        parts = p.split(MPS_LONGEST_DOT // 2, -1)
        products = (part @ W.to(p.dtype) for part, W in zip(parts, pieces))
        return functools.reduce(torch.add, products)

    def _less_row(self, expected: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`expected` [n,.] less the unembedding's rows of the labels y [n]."""
        if not self.model.unembeds:
            return expected.scatter_add(-1, y[:, None], expected.new_full((len(y), 1), -1))
        return expected - self.model.get_output_embeddings().weight.index_select(0, y)

    def plans(
        self, input_ids: torch.Tensor, h: torch.Tensor, look: Callable[[int, torch.Tensor], object]
    ) -> torch.Tensor:
        """Logits [B,T,V] of the run that is fed h; look(block, plan [B,H,T,T]) is called for every attention
        after the hook, each row of a plan being what one query gives to every key. No plan is kept.

        Raises UserError for a family whose attention cannot be exchanged.
        """

        def watched(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, plan = plain_attention(module, *args, **kwargs)
            look(module.layer_idx, plan)
            return out, plan

        with attending(self.model, watched):
            return self.tail(input_ids, h)

    # ---------------------------------------------------------------------- how the model is run in parts
    def up_to(self, layer: int, input_ids: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What block `layer`, this hook's or a later one, puts out in the run that is fed h [B,T,d] at the
        hook: [B,T,d] in the model's dtype. Differentiable in h. For families that `splits`.
        """
        h = h.to(self.model.dtype)
        if layer == self.layer:
            return h
        way = self.way_to_patch(input_ids)
        with _computing(blocks(self.model)[: self.layer + 1], _giving(h, way)):
            return _first(_raw_outputs(self.model, [layer], input_ids)[layer])

    def splits(self, input_ids: torch.Tensor) -> bool:
        """Is all that follows the hook a function of h, so that a hook may go on from an earlier one?"""
        return self.way_to_patch(input_ids) != "replace"

    def pull_back(
        self, layer: int, input_ids: torch.Tensor, h: torch.Tensor, gradients: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Gradients [B,T,d] at a later hook, that of block `layer`, as they are at this one, in the run that
        is fed h [B,T,d]: one forward and one backward for each through the blocks between.
        """
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            later = self.up_to(layer, input_ids, x)
        return [
            torch.autograd.grad(later, x, g.to(later.dtype), retain_graph=i + 1 < len(gradients))[0]
            for i, g in enumerate(gradients)
        ]

    def _logits(self, input_ids: torch.Tensor, h: torch.Tensor, way: str) -> torch.Tensor:
        """The model's own forward with h as the output of the hook's block.

        way, `skip`: the blocks up to the hook do not run, each gives h. `tuple`: each gives (h,), for
        families whose blocks return tuples (all, in transformers 4). `replace`: all run, and the output of
        the last of them is replaced.
        """
        first, h = blocks(self.model)[: self.layer + 1], h.to(self.model.dtype)

        def replaced(module: Any, inputs: Any, output: Any) -> Any:
            return (h, *output[1:]) if isinstance(output, tuple) else h

        whole = way == "replace"
        with first[-1].register_forward_hook(replaced) if whole else _computing(first, _giving(h, way)):
            return self.model(input_ids, use_cache=False).logits

    def way_to_patch(self, input_ids: torch.Tensor) -> str:
        """The way of `_logits` in which tail(head) is the full forward; looked for once per model and layer,
        on the first of input_ids.

        `replace` costs a full forward a patch; it is for families whose later blocks read more of the earlier
        ones than h. Raises UserError where that is not the full forward either: blocks that run more than
        once.
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
                with contextlib.suppress(Exception):  # a forward that does not take what it is given
                    split = self._logits(one, h, way)
                    # what is not finite is found, and said, later
                    # at every position, and without what all logits share: neither hides the rest
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
    """{layer: h [B,T,d]}, float32 at least, of one forward that ends at the deepest of the layers."""
    with torch.no_grad():
        found = {layer: _first(out) for layer, out in _raw_outputs(model, layers, input_ids).items()}
    return {layer: h.to(torch.promote_types(h.dtype, torch.float32)) for layer, h in found.items()}


def _raw_outputs(model: Any, layers: Sequence[int], input_ids: torch.Tensor) -> dict[int, Any]:
    """{layer: what the block returns}: h [B,T,d], or a tuple of h and other things. Nothing is computed
    after the last of them.
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
    pass


class Kept:
    """What one hook hands on to the next of the same model, under `text_key` (and more), while `keeping`: of
    a model at a time, and HEADS bytes at most.
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
        """None where there is nothing."""
        if next(iter(self.found), key)[0] != key[0]:
            self.found.clear()  # the model before this one
        return self.found.get(key)

    def put(self, key: tuple, what: Any, nbytes: int) -> None:
        if key in self.found or (len(self.found) + 1) * nbytes <= HEADS:
            self.found[key] = what


_heads = Kept()  # h
_asked: list[Hook] = []


@contextlib.contextmanager
def keeping_heads(hooks: Iterable[Hook]) -> Iterator[None]:
    """Within, `Hook.head` keeps what its forward gives at those of `hooks` that lie on its way, so that a
    model's hooks in descending order cost one forward of a text. The weights must stay as they are. HEADS
    bytes at most are kept: what is beyond runs from the start.
    """
    before, _asked[:] = list(_asked), hooks
    try:
        with _heads.on():
            yield
    finally:
        _asked[:] = before


def text_key(hook: Hook, input_ids: torch.Tensor) -> tuple:
    """What names a model and a text, for what is kept of them. Not the model's address: the next one may get
    it.
    """
    return (
        weakref.ref(hook.model),
        hook.device,
        input_ids.shape,
        hashlib.sha256(input_ids.cpu().numpy().tobytes()).digest(),
    )


def _giving(h: torch.Tensor, way: str) -> Callable:
    """A block's forward that gives h, whatever it is given: see `Hook._logits` for the ways."""

    def given(*args: Any, **kwargs: Any) -> Any:
        return (h,) if way == "tuple" else h

    return given


def _unchanged(y: torch.Tensor) -> torch.Tensor:
    return y


@contextlib.contextmanager
def _computing(modules: list[Any], function: Callable) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------ attention
def fused_attention_errs(model: Any, device: torch.device) -> bool:
    """Do positions see later ones there? Up to three, in 16 bits by torch's fused attention on MPS (pytorch
    #195910).
    """
    half = model.dtype in (torch.bfloat16, torch.float16)
    return device.type == "mps" and half and model.config._attn_implementation == "sdpa"


EXCHANGED = "transport_geometry"  # the name of our attention among those of transformers


@contextlib.contextmanager
def attending(model: Any, function: Callable) -> Iterator[None]:
    """Within, every attention of the model computes function(module, query, key, value, attention_mask,
    scaling, **more) -> (out [B,T,H,e], plan [B,H,T,T]), as transformers' own attention functions do.

    query [B,H,T,e], key and value [B,H',T,e] with H' dividing H, attention_mask added to the scores. Raises
    UserError for a family whose attention cannot be exchanged: it would go on unseen.
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
    """key and value [B,H',T,e] repeated for the H heads of query. Raises UserError where attention is more
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
    """softmax(query key^T scaling + attention_mask) value, in plain operations: (out [B,T,H,e], plan
    [B,H,T,T]).
    """
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
    """KL(p || q) [...] from p, log p and log q [...,V], in nats, right in float32 down to 1e-7.

    Summing p (log p - log q) cancels to nothing for small KL. There, with c = dz - E_p dz, KL =
    log1p(E_p[expm1(c) - c]), and the bracket by its series where |c| < 0.05. For large changes the plain sum
    is exact. expm1 overflows beyond 88, where p is too small to have risen to anything in a small KL.
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


# --------------------------------------------------------------------------------------- is the device right?
def check_parity(hook: Hook, input_ids: torch.Tensor, device: torch.device) -> None:
    """Compare h, CE, g and TopK values of one batch between `device` and the CPU before any number from
    `device` is believed.

    MPS matmuls have returned 10-30% errors silently and depending on what lay in memory (pytorch #193487),
    and its topk has given zeros (#78915), so this is called again for every hook. input_ids on the CPU; the
    model is left on `device`. Raises Fault where the error exceeds 0.1% (`error_by_position`), 5% for a model
    in bfloat16, whose own rounding is of that size.
    """
    tolerance = 1e-3 if hook.model.dtype != torch.bfloat16 else 0.05
    for name, error in parity(hook, input_ids, device).items():
        if not error <= tolerance:
            raise Fault(
                f"{device} disagrees with the CPU on {name} at layer {hook.layer} (relative error "
                f"{error:.1e}, allowed {tolerance:.0e}): its numbers cannot be believed; use --device cpu"
            )


def parity(hook: Hook, input_ids: torch.Tensor, device: torch.device) -> dict[str, float]:
    """{what: `error_by_position` of the device's} for `check_parity`."""

    def measure(on: torch.device) -> dict[str, torch.Tensor]:
        hook.to(on)
        x = input_ids.to(on)
        h = hook.head(x)
        final, (g,) = hook.clean_pass(x, h)
        log_p = log_softmax(hook.logits(final))
        d = h.shape[-1]
        W = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0)).to(on)
        values, _ = kernels.topk_encode(h.flatten(0, 1), W, torch.zeros(4 * d, device=on), min(32, 4 * d))
        # in order of size: a rounding may exchange two latents, and with them what lies between
        ranked = values.cpu().sort(dim=1).values
        return {"h": h, "CE": cross_entropy(log_p, x), "g": g, "TopK values": ranked}

    here, there = measure(torch.device("cpu")), measure(device)
    return {name: error_by_position(there[name], truth) for name, truth in here.items()}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the error over the norm, in float64 on the CPU."""
    found, truth = found.cpu().double(), truth.cpu().double()
    return ((found - truth).norm() / truth.norm()).item()


def error_by_position(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square over positions of the error over the position's norm (the median's, where that is
    larger): a sink as long as a hundred others does not hide what is wrong in them.
    """
    found, truth = found.cpu().double(), truth.cpu().double()
    rows = truth.numel() // truth.shape[-1] if truth.ndim > 2 else truth.numel()
    error, norms = ((x.reshape(rows, -1)).norm(dim=1) for x in (found - truth, truth))
    return (error / torch.maximum(norms, norms.median())).square().mean().sqrt().item()
