"""The audit of one SAE from Python, on a model that is loaded and tokens of yours.

    import torch
    from transport_geometry.audit import audit
    from transport_geometry.models.loading import load_model
    from transport_geometry.text.heldout import heldout_rows
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))  # or a transformers model of yours
    held = heldout_rows("stdlib", tokenizer, ctx=64, n=16)  # or token ids [S,T] of yours
    print(audit(model, 3, "my/sae", held.input_ids, held.document))

Shapes: S evaluation sequences, T positions of which T-1 are evaluated, N = S (T-1) tokens, d = d_model.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.formats import find_and_read
from transport_geometry.formats.computed_sae import fused
from transport_geometry.formats.contract import differences
from transport_geometry.measuring.evaluate import Reconstruction, activations, evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook, fused_attention_errs, text_config
from transport_geometry.models.loading import model_hash, pick_layer
from transport_geometry.records.tables import bounds, markdown
from transport_geometry.reporting.audit_report import number
from transport_geometry.reporting.console import sentence_case
from transport_geometry.reporting.sae_words import with_words
from transport_geometry.saes import basis_gate
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics.intervals import percentiles
from transport_geometry.statistics.resampling import ALL, RESAMPLES, document_weights

import numpy as np
import torch

N_RESAMPLES = 2000
RETURNED = (
    "r2 r2_nosink cosine ce_orig ce_recon dce ce_rec ce_rec_sinkclean frac_zero kl swd_tok swd_sampled l0 "
    "sink_share kl_excess fed_excess"
).split()
# SAELens' names of what is defined in the same way
SAELENS = {"explained_variance": "r2", "ce_loss_score": "frac_zero"}


class Audited(dict[str, Any]):
    """{metric: value, metric_lo, metric_hi: its 95% interval over documents}, word, also, says, read, n_tok,
    n_sink, documents. It prints as a table.
    """

    def records(self) -> list[dict[str, Any]]:
        """A row a metric, for a data frame."""
        return [
            {"metric": name, "value": self[name], "lo": self[f"{name}_lo"], "hi": self[f"{name}_hi"]}
            for name in self
            if f"{name}_lo" in self
        ]

    def __str__(self) -> str:
        rows = [
            {"metric": row["metric"], "value": number(row["value"]), "95%": bounds(row["lo"], row["hi"], 3)}
            for row in self.records()
        ]
        return "\n".join(
            [f"{sentence_case(self['word'])}. {self['says']} {self['read']}", "", markdown(rows)]
        )


def audit(
    model: Any,
    layer: int,
    sae: str | os.PathLike | SAE | Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    document: Sequence[int] | np.ndarray | None = None,
    basis: str | None = None,
    ignore_fields: Sequence[str] = (),
) -> Audited:
    """R², CE_rec, dCE (nats a token), KL, ... of one SAE at the output of block `layer`, on these tokens and
    a model that is loaded, and what is said of it.

    The numbers that `audit.py` writes for the same tokens. model: a causal language model of transformers,
    in eval mode. sae: a path or hub id of one SAE, whose basis is checked as its files say (`basis`, `raw`
    or `centred`, goes on regardless), an SAE of this package, or any function h [N,d] -> h_hat [N,d]
    (SAELens' SAEs are such). ignore_fields: of an SAE's files, that are not known and let pass. tokens
    [S,T], int64: as they are, a BOS only where they hold one. document [S], 0..D-1: of which document each
    row is, each its own by default; of one document there is no interval.

    Warns where the SAE's files say that it was trained on other rows or on another model than these. Raises
    UserError, Fault.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.dtype != torch.int64:
        raise UserError(
            f"tokens are {list(tokens.shape)} {tokens.dtype}: [S,T] of int64, please, T at least 2"
        )
    if model.training:
        raise UserError("the model is in training mode: model.eval()")
    of = np.arange(len(tokens)) if document is None else np.unique(document, return_inverse=True)[1]
    if len(of) != len(tokens):
        raise UserError(f"document has {len(of)} entries, and tokens {len(tokens)} rows")
    hook = Hook(model, pick_layer(model, type(model).__name__, layer))
    if fused_attention_errs(model, hook.device):
        raise UserError(
            "in 16 bits torch's fused attention sees later positions on MPS: model.set_attn_implementation"
            "('eager')"
        )
    tokens = tokens.to(hook.device)
    name, batch = "SAE", max(1, 2048 // tokens.shape[1])
    given, shared = _reconstruction(sae, hook, tokens, basis, ignore_fields), activations(hook, tokens, batch)
    result = evaluate(hook, tokens, {name: given}, batch, shared=shared, document=of)[name]
    weights = document_weights(int(of.max()) + 1, N_RESAMPLES, seed=0)[:, of]
    values = computed(
        Sums({q: v[None] for q, v in result.sums.items()}, weights, text_config(model).hidden_size)
    )
    n_doc, n_sink = int(of.max()) + 1, int(shared.sink.sum())
    row = {metric: float(value[ALL, 0]) for metric, value in values.items()}
    row |= dict(n_seq=len(tokens), n_tok=shared.sink.numel(), n_sink=n_sink, calm_share=shared.calm_share)
    (row,) = with_words([row], values, n_doc)
    out = Audited({name: row[name] for name in ("word", "also", "says", "read")})
    for name, metric in [*zip(RETURNED, RETURNED), *SAELENS.items()]:
        lo, hi = (float(end[0]) for end in percentiles(values[metric][RESAMPLES]))
        out |= {name: float(values[metric][ALL, 0]), f"{name}_lo": lo, f"{name}_hi": hi}
    return Audited(out | {"n_tok": row["n_tok"], "n_sink": n_sink, "documents": n_doc})


def _reconstruction(
    sae: Any, hook: Hook, tokens: torch.Tensor, basis: str | None, ignore_fields: Sequence[str]
) -> Reconstruction:
    """What `evaluate` takes. Raises UserError."""
    if isinstance(sae, (str, os.PathLike)):
        files = find_and_read.find(str(sae))
        if len(files) > 1:
            raise UserError(f"{sae}: {len(files)} SAEs, of which one is to be named: {files[0].label}, ...")
        read = find_and_read.read(files[0], ignore_fields).to(hook.device)
        near = basis_gate.near(hook, tokens[:4])
        if read.W_enc.shape[1] != near[hook.layer].shape[1]:
            raise UserError(f"{sae}: reads {read.W_enc.shape[1]} dimensions, of {near[hook.layer].shape[1]}")
        declared = find_and_read.describe(files[0])
        said = basis or declared.basis
        if declared.site not in (None, "resid_post") or declared.layer not in (None, hook.layer):
            of_block = "" if declared.layer is None else f" of block {declared.layer}"
            here = f"resid_post of block {hook.layer}"
            raise UserError(f"{sae}: its files say {declared.site or 'resid_post'}{of_block}, not {here}")
        begun = len(tokens[:, 0].unique()) == 1
        if len(tokens) > 1 and declared.bos not in (None, begun):
            theirs, these = ("", " not") if declared.bos else ("do not ", "")
            warnings.warn(
                f"{sae}: its files say that rows {theirs}begin with a BOS; these do{these}", stacklevel=3
            )
        if declared.ctx and tokens.shape[1] > declared.ctx:
            warnings.warn(f"{sae}: trained on {declared.ctx} positions, these rows have more", stacklevel=3)
        made = dict(declared.model_facts)
        this = {"dtype": str(hook.model.dtype).removeprefix("torch.")}
        this |= {"weights": model_hash(hook.model)} if "weights" in made else {}
        if other := differences(made, this):
            which = ", ".join(other).replace("weights", "weights or configuration")
            warnings.warn(f"{sae}: the model it was trained on differs from this one ({which})", stacklevel=3)
        if not basis:
            basis_gate.check_basis(read, said, files[0].label, hook.layer, near)
        read.centred = said == "centred"
        return fused(read)
    if basis:
        raise UserError("basis is about an SAE's files")
    if ignore_fields:
        raise UserError("ignore_fields is about an SAE's files")
    if isinstance(sae, SAE):
        return sae.to(hook.device)
    return lambda h, mean: sae(h)
