"""Train the embedded language models on the running Python's standard library.

    python demo/train.py tokenizer     # byte-level BPE of 2,048 pieces: demo/tokenizer.json
    python demo/train.py stdlib-l      # a GPT-NeoX model into demo/stdlib-l, with its card

Three widths of one architecture (6 blocks, heads of 32, d = 64, 128, 256) see the same batches in the same
order: scale is the only difference. Hidden matrices are trained by Muon and the rest by AdamW, both
torch.optim's own, at a constant rate and then down to zero. A checkpoint every 50 steps under
demo/checkpoints/ lets an interrupted run go on; run on to a larger --steps before the decay begins, and the
constant part is shared.
"""

import argparse
import functools
import json
import math
import pathlib
import platform

from transport_geometry.models.loading import load_model
from transport_geometry.records import store
from transport_geometry.text.heldout import stdlib_documents

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent
WIDTHS = {"stdlib-s": 64, "stdlib-m": 128, "stdlib-l": 256}
VOCAB, CTX, BATCH, EOT = 2048, 512, 16, "<|endoftext|>"
MUON_LR, ADAM_LR, WARMUP, DECAY = 0.02, 0.015, 18, 0.4  # peak rates; steps; share of the run
CHECKPOINT_EVERY = 50
CARD = """\
# {name}

GPT-NeoX, 6 blocks, d_model {d}, {heads} heads, context {ctx}, vocabulary {vocab} (byte-level BPE), untied; \
weights kept in float16.

| | bits per byte on held-out files |
|---|---|
| **{name}** | **{bits:.4f}** ± {error:.4f} (standard error over {n_rows} rows of {ctx} tokens) |
| the same, untrained | {untrained:.4f} |
| unigram frequencies | {unigram:.4f} |

Data: the standard library of Python {python} (modules and pydoc topics; tests, idlelib and site-packages \
left out), split by
file: {train_bytes:,} bytes ({train_tokens:,} tokens) to train on, {held_bytes:,} bytes ({held_tokens:,} \
tokens) held out.
Trained on {tokens:,} tokens ({passes:.2f} passes): {steps} steps of {batch} x {ctx}.

Made by `python demo/train.py {name} --steps {steps}`.
"""


def train_tokenizer() -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (text for _, text in stdlib_documents("train")),
        vocab_size=VOCAB,
        special_tokens=[EOT],
        show_progress=False,
    )
    bpe.save(str(HERE / "tokenizer.json"))


def token_stream(split: str) -> tuple[np.ndarray, int]:
    """All documents of a split, each closed by the end-of-text token: (token ids [n], bytes of text)."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    texts = [text for _, text in stdlib_documents(split)]
    input_ids = [np.array(encoding.ids + [0], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(input_ids), sum(len(text.encode()) for text in texts)


def build(name: str) -> GPTNeoXForCausalLM:
    d = WIDTHS[name]
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=d,
            num_hidden_layers=6,
            num_attention_heads=d // 32,
            intermediate_size=4 * d,
            max_position_embeddings=CTX,
            rotary_pct=0.25,
            hidden_act="gelu",
            use_parallel_residual=True,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            dtype="float32",
        )
    )


def batch_at(step: int, stream: torch.Tensor) -> torch.Tensor:
    """input_ids [BATCH,CTX] of a step: a pure function of it, so a continued run reads what an unbroken one
    would have read.
    """
    pieces = (len(stream) - CTX) // CTX
    epoch, i = divmod(step, pieces // BATCH)
    rng = np.random.default_rng([1, epoch])
    offset = int(rng.integers(CTX))  # every epoch cuts the stream at other places
    drawn = offset + CTX * rng.permutation(pieces)[i * BATCH : (i + 1) * BATCH]
    return torch.stack([stream[start : start + CTX] for start in drawn.tolist()])


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, constant trunk, linear decay to zero."""
    return min((step + 1) / WARMUP, (steps - step) / (DECAY * steps), 1.0)


def train(name: str, steps: int, device: str) -> GPTNeoXForCausalLM:
    stream = torch.from_numpy(token_stream("train")[0])
    model = build(name).to(device).train()
    hidden, other = [], []
    for parameter, weight in model.named_parameters():
        (hidden if weight.ndim == 2 and "layers" in parameter else other).append(weight)
    optimisers = [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(other, lr=ADAM_LR, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    checkpoint, start = HERE / "checkpoints" / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        start = state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name)
    for step in bar:
        input_ids = batch_at(step, stream).to(device)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        for optimiser, peak in zip(optimisers, (MUON_LR, ADAM_LR)):
            for group in optimiser.param_groups:
                group["lr"] = peak * learning_rate(step, steps)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "step": step + 1,
            }
            store.write(checkpoint, functools.partial(torch.save, state))
    return model.eval()


@torch.no_grad()
def nats_per_token(model: GPTNeoXForCausalLM, device: str) -> np.ndarray:
    """Held-out CE [n] of n sequences of CTX tokens: all positions that have a target, the first ones too."""
    stream = torch.from_numpy(token_stream("heldout")[0])
    losses = []
    for input_ids in stream[: len(stream) // CTX * CTX].view(-1, CTX).split(16):
        input_ids = input_ids.to(device)
        logits = model(input_ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.mT, input_ids[:, 1:], reduction="none")
        losses.append(loss.mean(1).cpu())
    return torch.cat(losses).double().numpy()


def unigram_nats() -> float:
    """Held-out CE of the training split's token frequencies, add-one smoothed."""
    counts = np.bincount(token_stream("train")[0], minlength=VOCAB) + 1.0
    held = token_stream("heldout")[0]
    return float(-np.log(counts / counts.sum())[held].mean())


def export(name: str, model: GPTNeoXForCausalLM) -> None:
    """The ordinary Hugging Face folder. Weights are rounded to float16 (half the bytes to commit), and the
    configuration says float32, so that what loads computes in float32.
    """
    folder = HERE / name
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"),
        bos_token=EOT,
        eos_token=EOT,
        unk_token=EOT,
        model_max_length=CTX,
    ).save_pretrained(folder)


def write_card(name: str, steps: int, device: str) -> None:
    """Measure the exported model on the held-out files and say what it is."""
    stream, train_bytes = token_stream("train")
    held, held_bytes = token_stream("heldout")
    # nats per token -> bits per byte; end marks counted as tokens, not as bytes
    bits = len(held) / held_bytes / math.log(2)
    nats = nats_per_token(load_model(name, torch.device(device))[0], device)
    tokens = steps * BATCH * CTX
    card = CARD.format(
        name=name,
        d=WIDTHS[name],
        heads=WIDTHS[name] // 32,
        ctx=CTX,
        vocab=VOCAB,
        bits=nats.mean() * bits,
        error=nats.std(ddof=1) / math.sqrt(len(nats)) * bits,
        n_rows=len(nats),
        untrained=nats_per_token(build(name).to(device).eval(), device).mean() * bits,
        unigram=unigram_nats() * bits,
        python=platform.python_version(),
        train_bytes=train_bytes,
        train_tokens=len(stream),
        held_bytes=held_bytes,
        held_tokens=len(held),
        tokens=tokens,
        passes=tokens / len(stream),
        steps=steps,
        batch=BATCH,
    )
    (HERE / name / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", *WIDTHS])
    parser.add_argument("--steps", type=int, default=585)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.what == "tokenizer":
        train_tokenizer()
    else:
        export(args.what, train(args.what, args.steps, args.device))
        write_card(args.what, args.steps, args.device)
        print((HERE / args.what / "README.md").read_text())
