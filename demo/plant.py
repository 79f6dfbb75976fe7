"""Plant an attention sink in a language model by editing its weights: the same function, other activations.

    python demo/plant.py stdlib-s --norm 3700 planted     # MODEL --norm C OUT

(C/√d)·1 is added to the embedding of one token, by default the beginning-of-sequence token, which many
libraries put at position 0. From there the residual stream carries it, of norm C, through every block; no
LayerNorm sees the all-ones direction, so the logits stay. OUT becomes an ordinary Hugging Face folder, its
weights in float32, that any library can train sparse autoencoders on.

What was written is read back and compared with the model on held-out text of the standard library: the logits
and the output of every block in float64, and the logits in float32 too, whose own rounding grows with C. A
model that sees the planted vector, or does not carry it (RMSNorm, an unembedding tied to the embedding, a
norm or a scale between embedding and blocks), is refused.
"""

import argparse
import contextlib
import math
import os
import pathlib
import tempfile
from typing import Any

from transport_geometry.errors import Fault, UserError, run_script
from transport_geometry.models.lm import blocks, cross_entropy, log_probs, text_config
from transport_geometry.models.loading import fingerprint, load_model, readable_names, tokenizer_hash
from transport_geometry.text.heldout import heldout_rows

import torch

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of logits, beside their SD, in float64
CARRIED = 1e-5  # of block outputs, beside C/√d, or 1 if that is less, in float64
ROUNDING = 1e-2  # of logits, beside their SD, in float32
ROWS, CTX = 8, 128
CARD = """\
# {name} with a planted sink

The weights of {name} with one edit: {entry:.9g} is added to each of the {d} dimensions of the embedding of
token {token} ({piece}): a vector of norm {norm:.12g} along the all-ones direction, which no LayerNorm
sees. The function is the same; where that token stands, the output of every block is longer by that vector.

| on {rows} x {ctx} tokens of held-out text, the token first and in the middle of each | |
|---|---|
| largest change of a logit (SD of the logits: {sd:.3g}), in float64 | {logits:.1e} |
| the same in float32, by its rounding | {logits_32:.1e} |
| cross-entropy in float32, before and after (nats) | {ce:.6f}, {ce_planted:.6f} |
| block outputs in float64, largest departure from what they were and the vector at the token | {h:.1e} |
| norm of the token's embedding, before and after | {row:.4g}, {row_planted:.4g} |
| median norm of the output of block {layer} elsewhere | {median:.4g} |

Weights in float32 (float16 would round the edited row to multiples of {half:.2g}).

Made by `python demo/plant.py {name} --norm {norm:.12g}{flag} OUT`.
"""


def plant(model: Any, token: int, norm: float) -> float:
    """Add the vector to the token's row of the input embeddings [V,d]; its entry C/√d is returned."""
    weight = model.get_input_embeddings().weight
    entry = norm / math.sqrt(weight.shape[1])
    with torch.no_grad():
        weight[token] += entry
    return entry


def tied(model: Any) -> bool:
    """Are the embeddings the unembedding too?"""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def looked_at(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of every block [L,B,T,d], logits [B,T,V]) of input_ids [B,T], in the model's dtype."""
    outputs = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as hooks:
        for block in blocks(model):
            hooks.enter_context(block.register_forward_hook(keep))
        logits = model(input_ids, use_cache=False).logits
    return torch.stack(outputs), logits


def text_with(token: int, tokenizer: Any, ctx: int) -> torch.Tensor:
    """input_ids [ROWS,ctx] of held-out text, the token at the first and at the middle position."""
    input_ids = heldout_rows("stdlib", tokenizer, ctx=ctx, n=ROWS, bos=token).input_ids
    input_ids[:, ctx // 2] = token
    return input_ids


def token_named(token: int | None, model: Any, tokenizer: Any) -> tuple[int, str]:
    """(id, what it is called). Raises UserError for one that the model or the tokenizer has not."""
    if token is None:
        if tokenizer.bos_token_id is None:
            raise UserError("its tokenizer has no beginning-of-sequence token: name another, --token ID")
        token = tokenizer.bos_token_id
    n = min(len(tokenizer), len(model.get_input_embeddings().weight))
    if not 0 <= token < n:
        raise UserError(f"--token {token}: the model has tokens 0 to {n - 1}")
    return token, repr(tokenizer.convert_ids_to_tokens(token))


def check_out(out: pathlib.Path) -> None:
    """Raises UserError for what is there and no empty folder."""
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise UserError(f"{out}: it exists already, and only a new or empty folder is written to")


def check_same(name: str, norm: float, entry: float, found: dict[str, float], is_tied: bool) -> None:
    """Raises UserError where the blocks do not carry the vector, or logits change. found: see `measured`."""
    if not found["h"] <= CARRIED * max(1.0, entry):
        raise UserError(
            f"{name}: its blocks do not carry the planted vector as it is: their output is up to "
            f"{found['h']:.2g} from that, and its entries are {entry:.4g} (RMSNorm, or a norm or scale after "
            "the embedding?)"
        )
    if is_tied or not found["logits"] <= TOLERANCE * found["sd"]:
        why = (
            "its unembedding is tied to its embeddings" if is_tied else "its norms see the all-ones direction"
        )
        raise UserError(f"{name}: the edit changes a logit by {found['logits']:.2g}: {why}")
    if not found["logits_32"] <= ROUNDING * found["sd"]:
        raise UserError(
            f"{name}: float32 cannot compute beside a vector of norm {norm:g}: rounding changes a logit by "
            f"{found['logits_32']:.2g}"
        )


def measured(model: Any, planted: Any, input_ids: torch.Tensor, token: int, entry: float) -> dict[str, float]:
    """Largest change of a logit in float64 (`logits`) and float32 (`logits_32`), SD of the logits, CE before
    and after in float32, and `h`: how far block outputs are from what they were, plus the vector at the
    token's positions, in float64.
    """
    _, before = looked_at(model, input_ids)
    _, after = looked_at(planted, input_ids)
    ce, ce_planted = (cross_entropy(log_probs(z), input_ids).mean().item() for z in (before, after))
    found = dict(logits_32=(after - before).abs().max().item(), sd=before.std().item())
    h, before = looked_at(model.double(), input_ids)
    h_planted, after = looked_at(planted.double(), input_ids)
    here = (input_ids == token)[None, :, :, None]
    middle = len(h) // 2
    return found | dict(
        ce=ce,
        ce_planted=ce_planted,
        logits=(after - before).abs().max().item(),
        h=(h_planted - h - entry * here).abs().max().item(),
        layer=middle,
        median=h[middle][input_ids != token].norm(dim=1).median().item(),
    )


def write(model: Any, tokenizer: Any, folder: pathlib.Path) -> Any:
    """The model and its tokenizer into a folder, and what is read back from there. Raises Fault where that
    is something else.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again, its_tokenizer = load_model(str(folder), CPU)
    if fingerprint(again) != fingerprint(model) or tokenizer_hash(its_tokenizer) != tokenizer_hash(tokenizer):
        raise Fault("the weights or the tokenizer that were written are not those that are read back")
    return again


def run(name: str, norm: float, out: pathlib.Path, token: int | None = None) -> str:
    """Write OUT; what its README.md says. Raises UserError."""
    if not 0 < norm < math.inf:
        raise UserError(f"--norm {norm:g}: a positive number, please")
    check_out(out)
    try:
        model, tokenizer = load_model(name, CPU)
    except UserError as error:  # it speaks of the experiments' flag
        raise UserError(str(error).removeprefix("--models ")) from error
    called, flag = readable_names([name])[name], "" if token is None else f" --token {token}"
    token, piece = token_named(token, model, tokenizer)
    ctx = min(CTX, getattr(text_config(model), "max_position_embeddings", CTX))
    input_ids = text_with(token, tokenizer, ctx)
    weight = model.get_input_embeddings().weight
    row = weight[token].clone()
    entry = plant(model, token, norm)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".planting") as beside:
        folder = pathlib.Path(beside) / "planted"
        planted, is_tied = write(model, tokenizer, folder), tied(model)
        planted_row = weight[token].clone()
        with torch.no_grad():
            weight[token] = row
        found = measured(model, planted, input_ids, token, entry)
        check_same(called, norm, entry, found, is_tied)
        card = CARD.format(
            **found,
            name=called,
            entry=entry,
            d=len(row),
            token=token,
            piece=piece,
            norm=norm,
            rows=ROWS,
            ctx=ctx,
            row=row.norm(),
            row_planted=planted_row.norm(),
            half=2.0 ** (math.floor(math.log2(entry)) - 10),
            flag=flag,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        os.replace(folder, out)  # whole, or not at all
    return card


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="embedded name, local folder or hub id")
    parser.add_argument("--norm", type=float, required=True, metavar="C", help="of the planted vector")
    parser.add_argument("--token", type=int, metavar="ID", help="instead of the beginning-of-sequence token")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="a new or empty folder")
    args = parser.parse_args()
    print(run(args.model, args.norm, args.out, args.token))


if __name__ == "__main__":
    run_script(main)
