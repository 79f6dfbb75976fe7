"""Every number of a condition, from one pass over the evaluation sequences of one hook.

Quantities are formed per token and summed per sequence, so that metrics under any re-weighting of the
sequences (a bootstrap resample, a half) are ratios of weighted sums. One mask for everything: the positions
that have a target, 0..T-2. Shapes: B sequences of a batch, T positions, N = B*(T-1), d = d_model; S sequences
in all.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transport_geometry import kernels
from transport_geometry.errors import Fault
from transport_geometry.measuring.metrics import METRICS
from transport_geometry.measuring.patch import Clean, Patch
from transport_geometry.models.lm import Hook, Kept, kl_divergence, log_softmax, text_key
from transport_geometry.progress import Progress, line
from transport_geometry.saes.sae import SAE, TopKSAE, must_vary
from transport_geometry.saes.sinks import sinks_of

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

DRAWS = 4  # of sampled labels
# a reconstruction's runs: as it is, with sinks clean, and an isotropic error on half of the sequences
PATCHED_RUNS = 2.5
# an SAE, or a function (h [N,d], mean [d]) -> h_hat [N,d]
Reconstruction = SAE | Callable[[Tensor, Tensor], Tensor]
Terms = Callable[[Patch], dict[str, Tensor]]
Name = TypeVar("Name")  # what a reconstruction goes by


@dataclass(frozen=True, eq=False)
class Activations:
    """What all SAEs of a hook share."""

    h: Tensor  # [S,T,d] on the CPU
    sink: Tensor  # [S,T-1] bool on the CPU
    mean: Tensor  # [d], over the evaluated positions
    calm_mean: Tensor  # [d], without sinks
    top: Tensor  # [d], first eigenvector of the covariance
    ln_mean: Tensor  # [d], mean after LayerNorm
    calm_share: float  # largest share of SST at one position that is no sink; nan where all are sinks

    def batches(self, hook: Hook, input_ids: Tensor, uniforms: Tensor, batch: int) -> Iterator[Clean]:
        """The clean run, forward and backward, a batch at a time. uniforms [S,m,T-1]: see
        `Hook.clean_pass`.
        """
        for start in range(0, len(input_ids), batch):
            here, device = slice(start, start + batch), hook.device
            x, h = input_ids[here].to(device), self.h[here].to(device)
            final, gradients = clean_run(hook, x, h, uniforms[here].transpose(0, 1).to(device))
            g, *g_sampled = [gradient[:, :-1].flatten(0, 1) for gradient in gradients]
            yield Clean(hook, x, h, self.sink[here], final, g, g_sampled)


_runs = Kept()  # (layer, final, gradients)


def keeping_clean_runs() -> contextlib.AbstractContextManager[None]:
    """Within, the clean run of a hook continues from that of a later hook of the same model on the same text
    and labels, through the blocks between only: a model's hooks in descending order cost one run. The weights
    must not change. At most KEPT_BYTES bytes are kept.
    """
    return _runs.on()


def clean_run(hook: Hook, input_ids: Tensor, h: Tensor, uniforms: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`Hook.clean_pass`; h is the head's."""
    if not _runs.keeping or not hook.splits(input_ids):
        return hook.clean_pass(input_ids, h, uniforms)
    key = (*text_key(hook, input_ids), hashlib.sha256(uniforms.cpu().numpy().tobytes()).digest())
    known = _runs.get(key)
    if known is None or known[0] < hook.layer:
        final, gradients = hook.clean_pass(input_ids, h, uniforms)
    else:
        layer, final, gradients = known
        if layer > hook.layer:
            gradients = hook.pull_back(layer, input_ids, h, gradients)
    _runs.put(key, (hook.layer, final, gradients), final.nbytes + sum(g.nbytes for g in gradients))
    return final, gradients


def activations(hook: Hook, input_ids: Tensor, batch: int) -> Activations:
    """Of input_ids [S,T]. Means and the covariance (mean-centred, over the evaluated positions) in float64.

    Raises Fault on an activation that is not finite, or where all are equal.
    """
    device = hook.device
    h = torch.cat([hook.head(chunk.to(device)).cpu() for chunk in input_ids.split(batch)])
    if not torch.isfinite(h).all():
        raise Fault(f"layer {hook.layer}: an activation is not finite in the evaluation text")
    used = h[:, :-1]
    sink = sinks_of(used)
    flat = used.flatten(0, 1).double()
    must_vary(flat, f"layer {hook.layer}")
    mean, calm = flat.mean(0), ~sink.flatten()
    top = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -1]
    calm_mean = flat[calm].mean(0)
    ln_mean = layer_norm(flat, flat.shape[-1:]).mean(0)
    square = (flat - mean).square().sum(1)
    calm_share = float(square[calm].max() / square.sum()) if calm.any() else math.nan
    mean, calm_mean, top, ln_mean = (t.float().to(device) for t in (mean, calm_mean, top, ln_mean))
    return Activations(h, sink, mean, calm_mean, top, ln_mean, calm_share)


@dataclass(frozen=True, eq=False)
class Result:
    """The measurements of one reconstruction."""

    sums: dict[str, np.ndarray]  # {quantity: [S] float64}
    # [2,F]: how often each latent fired in the halves of the documents; None without a code
    fired: np.ndarray | None
    tokens: dict[str, np.ndarray]  # {quantity: [S,T-1] float32}, with keep_tokens
    harm: np.ndarray  # [S,T-1] float32: patched CE less clean CE, nats


def evaluate(
    hook: Hook,
    input_ids: Tensor,
    reconstructions: Mapping[Name, Reconstruction],
    batch: int,
    seed: int = 0,
    keep_tokens: bool = False,
    leave_sinks: bool = False,
    terms: Terms | None = None,
    shared: Activations | None = None,
    document: np.ndarray | None = None,
    label: str = "",
    bar: Progress | None = None,
) -> dict[Name, Result]:
    """Patch every reconstruction into every batch of input_ids [S,T].

    The clean forward, g and its sampled twins are computed once per batch for all of them. An experiment's
    own quantities [B,T-1] come from terms(patch). Per-token values are formed in float32 on the model's
    device, summed in float64 on the CPU. leave_sinks: sinks keep their activation, in the patch and in every
    score. shared: `activations`, if known. document [S], default one a sequence: the halves are its even and
    odd numbers. bar counts every sequence of every reconstruction. Raises Fault on a loss that is not finite.

    One tile of logits is held at a time (`Hook.tiles`), for all reconstructions: about 6 x 4 V bytes a
    position of the tile. A batch holds 4 N (4 d + 3 k) bytes for each reconstruction. Where the logits are
    more than an unembedding, the batch is the tile, and reconstructions come one at a time.
    """
    half = (np.arange(len(input_ids)) if document is None else document) % 2
    compared = torch.arange(len(input_ids)) // 2 % 2 == 0  # with an isotropic error: see `isotropic`
    shared = shared or activations(hook, input_ids, batch)
    uniforms = label_uniforms(input_ids, seed)
    pieces: dict[Name, list] = {name: [] for name in reconstructions}
    fired: dict[Name, np.ndarray] = {}
    start, everyone = 0, list(reconstructions)
    with line(bar, f"patching {label}", len(input_ids) * len(pieces)) as bar, torch.no_grad():
        ce_zero, _ = ablated(hook, input_ids, torch.zeros_like(shared.mean), batch)
        ce_mean, final_mean = ablated(hook, input_ids, shared.mean, batch)
        at_once = len(pieces) if hook.model.unembeds else 1
        for clean in shared.batches(hook, input_ids, uniforms, batch):
            here = slice(start, start + len(clean.input_ids))
            common = clean_quantities(clean, shared) | {"ce_zero": ce_zero[here], "ce_mean": ce_mean[here]}
            drawn = directions(clean, torch.arange(here.start, here.stop)[compared[here]], seed)
            for first in range(0, len(everyone), at_once):
                names = everyone[first : first + at_once]
                patches = [
                    patched(clean, reconstructions[name], shared, final_mean, leave_sinks) for name in names
                ]
                calm = [patch.final if leave_sinks else sinks_clean(patch) for patch in patches]
                random = [isotropic(patch, drawn, compared[here]) for patch in patches]
                losses = outcomes(clean, [patch.final for patch in patches], calm, random, compared[here])
                for name, patch, outcome in zip(names, pop_each(patches), losses):
                    quantities = common | patch_quantities(patch, common, shared) | outcome
                    if terms is not None:
                        quantities |= {q: clean.per_token(v) for q, v in terms(patch).items()}
                    sums = {q: v.sum(1).numpy() for q, v in quantities.items()}
                    # all positions move together, so the sampled form squares the sequence's sum
                    sampled = [v.sum(1).square() for v in patch.g_delta_sampled]
                    sums["gd_sampled_seq"] = torch.stack(sampled).mean(0).numpy()
                    if not np.isfinite(sums["ce_recon"]).all():
                        raise Fault(
                            f"{label} {name}: patched CE is not finite in evaluation sequences {here.start} "
                            f"to {here.stop - 1}"
                        )
                    kept = {q: v.float().numpy() for q, v in quantities.items()} if keep_tokens else {}
                    harm = (outcome["ce_recon"] - outcome["ce_orig"]).float().numpy()
                    pieces[name].append((sums, kept, harm))
                    if isinstance(sae := reconstructions[name], SAE):
                        counts = fired_in(patch, len(sae.W_dec), half[here])
                        fired[name] = fired.get(name, 0) + counts
                    bar.update(here.stop - here.start)
            start = here.stop
    return {
        name: Result(joined(sums), fired.get(name), joined(kept), np.concatenate(harm))
        for name, (sums, kept, harm) in ((name, zip(*parts)) for name, parts in pieces.items())
    }


def pop_each(patches: list[Patch]) -> Iterator[Patch]:
    """One after the other, each freed after use with what it has cached."""
    patches.reverse()
    while patches:
        yield patches.pop()


def label_uniforms(input_ids: Tensor, seed: int = 0) -> Tensor:
    """[S,DRAWS,T-1] in [0,1) that draw the labels of the sampled gradients: see `Hook.clean_pass`."""
    shape = len(input_ids), DRAWS, input_ids.shape[1] - 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The batches' arrays end to end."""
    return {q: np.concatenate([part[q] for part in parts]) for q in parts[0]}


# ------------------------------------------------------------------------------------------ one batch
def clean_quantities(clean: Clean, shared: Activations) -> dict[str, Tensor]:
    """{quantity: [B,T-1]} of the run without an SAE, its losses aside."""
    h, per_token, top = clean.h_flat, clean.per_token, shared.top
    centred, calm = h - shared.mean, h - shared.calm_mean
    keep, sst = (~clean.sink).double(), per_token(centred.square().sum(1))

    def fisher(x: Tensor) -> Tensor:
        return per_token(torch.stack([(g * x).sum(1).square() for g in clean.g_sampled]).mean(0))

    return {
        "n": torch.ones(clean.sink.shape, dtype=torch.float64),
        "n_nosink": keep,
        "h_sq": per_token(h.square().sum(1)),
        "sst": sst,
        "sst_sink": sst * (1 - keep),
        "sst_nosink": per_token(calm.square().sum(1)) * keep,
        "sst_defl1": per_token((centred - torch.outer(centred @ top, top)).square().sum(1)),
        "sst_ln": per_token((clean.ln - shared.ln_mean).square().sum(1)),
        "g_sq": per_token(torch.stack([g.square().sum(1) for g in clean.g_sampled]).mean(0)),
        "fisher_h": fisher(centred),
        "fisher_h_nosink": fisher(calm) * keep,
    }


def ablated(hook: Hook, input_ids: Tensor, x: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
    """(CE [S,T-1] float64 on the CPU, `Hook.final` [1,T-1,d]) of the run that has x [d] at every position.

    Such a run does not depend on its text, so that one serves every sequence. In a family whose later blocks
    read the text themselves (checked with two sequences that differ at every position) every sequence has a
    run of its own, and None is returned.
    """
    device, (S, T) = hook.device, input_ids.shape
    fed, norm, first = x.expand(1, T, len(x)), torch.linalg.vector_norm, input_ids[:1]
    other = (first + 1) % hook.model.get_input_embeddings().weight.shape[0]
    two = [hook.final(one.to(device), fed) for one in (first, other)]
    alike = bool((norm(two[0] - two[1], dim=-1) <= 1e-5 * norm(two[0], dim=-1)).all())
    losses = []
    for chunk in input_ids.split(S if alike else batch):
        chunk = chunk.to(device)
        final = two[0] if alike else hook.final(chunk, fed.expand(len(chunk), T, len(x)))
        flat, targets = final.flatten(0, 1), chunk[:, 1:].reshape(-1, len(final) * (T - 1))
        log_q = (
            log_softmax(hook.logits(flat[tile])).gather(1, targets[:, tile].T)
            for tile in hook.tiles(len(flat))
        )
        losses.append(-torch.cat(list(log_q)).T.reshape(-1, T - 1).cpu().double())
    return torch.cat(losses), two[0] if alike else None


def patched(
    clean: Clean,
    reconstruction: Reconstruction,
    shared: Activations,
    final_mean: Tensor | None = None,
    leave_sinks: bool = False,
) -> Patch:
    """Replace the batch's h by one reconstruction, with leave_sinks except at sinks, and run the model on it.
    final_mean: `ablated`'s of the mean, if known.
    """
    h, values, indices, stats = clean.h_flat, None, None, None
    if isinstance(reconstruction, TopKSAE):
        sae = reconstruction
        values, indices = sae.encode(h)
        stats, h_hat = kernels.gradient_weighted_distortion(
            values, indices, sae.W_dec, sae.b_dec, h, clean.g, want_h_hat=True
        )
    elif isinstance(reconstruction, SAE):
        values, indices, h_hat = reconstruction.reconstruct(h)
    else:
        h_hat = reconstruction(h, shared.mean)
    if leave_sinks and h_hat is not h:
        h_hat, stats = torch.where(clean.sink.to(h.device).view(-1, 1), h, h_hat), None
    if stats is None:
        stats = dense_statistics(h, h_hat, clean.g)
    columns = {column: clean.per_token(stats[:, i]) for i, column in enumerate(kernels.STATS)}
    # the null rows, identity and mean, are runs that exist already
    if h_hat is h:
        final = clean.final
    elif final_mean is not None and h_hat.stride(0) == 0 and torch.equal(h_hat[0], shared.mean):
        final = final_mean.expand_as(clean.final)
    else:
        final = clean.final_of(h_hat)
    return Patch(clean, h_hat, values, indices, columns, final)


def sinks_clean(patch: Patch) -> Tensor:
    """`Hook.final` of the patched run in which sinks keep their clean activation."""
    clean, h = patch.clean, patch.clean.h_flat
    if patch.h_hat is h:
        return clean.final
    sink = clean.sink.to(h.device)
    # nothing after the last block mixes positions
    if clean.hook.is_last:
        return torch.where(sink[..., None], clean.final, patch.final)
    return clean.final_of(torch.where(sink.view(-1, 1), h, patch.h_hat))


def directions(clean: Clean, numbers: Tensor, seed: int) -> Tensor:
    """[b,T-1,d] of unit length, isotropic: one at every position of the sequences with these numbers [b], the
    same for all reconstructions and batch sizes.
    """
    _, T, d = clean.h.shape
    drawn = [
        torch.randn(T - 1, d, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(number)))
        for number in numbers
    ]
    x = torch.stack(drawn) if drawn else torch.empty(0, T - 1, d)
    return torch.nn.functional.normalize(x, dim=-1).to(clean.h)


def isotropic(patch: Patch, drawn: Tensor, compared: Tensor) -> Tensor:
    """`Hook.final` [b,T-1,d] of the run whose error has the patch's length at every position but the
    direction `drawn` [b,T-1,d]; sinks keep their clean activation. For the sequences in compared [B] bool.

    The epsilon-random substitution of Gurnee (2024), "SAE reconstruction errors are (empirically)
    pathological".
    """
    clean = patch.clean
    if patch.h_hat is clean.h_flat or not compared.any():  # nothing is measured in such a run
        return clean.final
    rows, sink = compared.to(clean.h.device), clean.sink.to(clean.h.device)
    h, size = clean.h[rows], torch.linalg.vector_norm(patch.delta[rows], dim=-1)[:, :-1]
    fed = h[:, :-1] + drawn * (size * ~sink[rows])[..., None]
    return clean.hook.final(clean.input_ids[rows], torch.cat([fed, h[:, -1:]], 1))


def outcomes(
    clean: Clean, finals: Sequence[Tensor], calm: Sequence[Tensor], random: Sequence[Tensor], compared: Tensor
) -> list[dict[str, Tensor]]:
    """Of each patched run, {ce_orig, ce_recon, kl, ce_sinkclean, kl_sinkclean, kl_isotropic: [B,T-1]}, tile
    by tile of positions, so that the clean run's part is computed once and little of the vocabulary is held.

    finals and calm: `Hook.final` [B,T-1,d] of the patched runs, and of those with clean sinks; random
    [b,T-1,d]: see `isotropic`. kl_sinkclean and kl_isotropic are 0 except in the sequences of compared [B].
    """
    hook, of_clean = clean.hook, clean.final.flatten(0, 1)
    n, wide = len(of_clean), torch.promote_types(of_clean.dtype, torch.float32)
    whole, part = (
        {id(final): final.flatten(0, 1) for final in runs if final is not clean.final}
        for runs in ((*finals, *calm), random)
    )
    ce = {key: of_clean.new_empty(n, dtype=wide) for key in (*whole, id(clean.final))}
    kl, kl_calm, kl_random = (
        {id(final): of_clean.new_zeros(n, dtype=wide) for final in runs} for runs in (finals, calm, random)
    )
    targets = clean.input_ids[:, 1:].reshape(-1, 1)
    of_compared = compared.to(of_clean.device).repeat_interleave(n // len(compared))
    tiles, seen = hook.tiles(n), 0
    # two runs are unembedded at once, into memory that is allocated once
    most, V = 2 * max(tile.stop - tile.start for tile in tiles), hook.logits(of_clean[:1]).shape[-1]
    z = of_clean.new_empty(most, V)
    log_q = z if z.dtype == wide else z.new_empty(z.shape, dtype=wide)

    def unembedded(runs: dict[int, Tensor], rows: slice) -> Iterator[tuple[int, Tensor]]:
        """(run, log q [rows,V]), valid until the next two."""
        for first in range(0, len(runs), 2):
            keys = list(runs)[first : first + 2]
            x = torch.cat([runs[key][rows] for key in keys])
            both = log_softmax(hook.logits(x, z[: len(x)]), log_q[: len(x)])  # of z in place
            yield from zip(keys, both.chunk(len(keys)))

    for tile in tiles:
        log_p = log_softmax(hook.logits(of_clean[tile]))
        p = log_p.exp()
        ce[id(clean.final)][tile] = -log_p.gather(1, targets[tile]).squeeze(1)
        inside = of_compared[tile].nonzero().squeeze(1)
        at, some, seen = inside + tile.start, slice(seen, seen + len(inside)), seen + len(inside)
        some_p, some_log_p = p[inside], log_p[inside]
        for key, one in unembedded(whole, tile):
            ce[key][tile] = -one.gather(1, targets[tile]).squeeze(1)
            if key in kl:
                kl[key][tile] = kl_divergence(p, log_p, one)
            if key in kl_calm and len(inside):
                kl_calm[key][at] = kl_divergence(some_p, some_log_p, one[inside])
        for key, one in unembedded(part, some) if len(inside) else ():
            kl_random[key][at] = kl_divergence(some_p, some_log_p, one)
    return [
        {
            "ce_orig": clean.per_token(ce[id(clean.final)]),
            "ce_recon": clean.per_token(ce[id(final)]),
            "kl": clean.per_token(kl[id(final)]),
            "ce_sinkclean": clean.per_token(ce[id(without)]),
            "kl_sinkclean": clean.per_token(kl_calm[id(without)]),
            "kl_isotropic": clean.per_token(kl_random[id(other)]),
        }
        for final, without, other in zip(finals, calm, random)
    ]


def patch_quantities(patch: Patch, common: dict[str, Tensor], shared: Activations) -> dict[str, Tensor]:
    """{quantity: [B,T-1]} of one patched run, its losses aside, with the registry's own terms."""
    clean, stats, delta, top = patch.clean, patch.stats, patch.delta_flat, shared.top
    h, per_token = clean.h_flat, clean.per_token
    keep, d = (~clean.sink).double(), h.shape[1]
    l0 = torch.full(clean.sink.shape, math.nan, dtype=torch.float64)
    if patch.values is not None:
        l0 = per_token((patch.values != 0).sum(1))
    found = {
        "sse": stats["delta_sq"],
        "sse_nosink": stats["delta_sq"] * keep,
        "sse_defl1": per_token((delta - torch.outer(delta @ top, top)).square().sum(1)),
        "sse_ln": per_token((layer_norm(patch.h_hat, (d,)) - clean.ln).square().sum(1)),
        "gd": stats["g_delta"],
        "gd_sq": stats["g_delta"].square(),
        "gd_abs": stats["g_delta"].abs(),
        "fisher": torch.stack([v.square() for v in patch.g_delta_sampled]).mean(0),
        "l0": l0,
        # the expectation for an error of this length in a random direction at every token; none is drawn
        "fisher_iso": common["g_sq"] * stats["delta_sq"] / d,
    }
    found |= {f"{form}_nosink": found[form] * keep for form in ("fisher", "fisher_iso")}
    return found | {metric.name: per_token(metric.term(patch)) for metric in METRICS if metric.term}


def dense_statistics(h: Tensor, h_hat: Tensor, g: Tensor) -> Tensor:
    """The columns kernels.STATS [N,5] of a reconstruction that has no code."""
    delta = h_hat - h
    terms = (g * delta, delta.square(), h_hat.square(), h * h_hat, h.square())
    return torch.stack([term.sum(1) for term in terms], 1)


def fired_in(patch: Patch, n_latents: int, half: np.ndarray) -> np.ndarray:
    """[2,F]: how often each latent fires in the sequences whose `half` [B] is 0 and 1."""
    assert patch.values is not None and patch.indices is not None
    fired = np.zeros((2, n_latents + 1))
    slots = torch.where(patch.values != 0, patch.indices, n_latents).cpu().view(len(half), -1).numpy()
    for which, row in zip(half, slots):
        fired[which] += np.bincount(row, minlength=n_latents + 1)
    return fired[:, :-1]
