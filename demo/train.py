"""Train the embedded language models on the running Python's standard library.

    python demo/train.py tokenizer                  # byte-level BPE, 2,048 pieces: demo/tokenizer.json
    python demo/train.py stdlib-l --tokens 10M      # a GPT-NeoX model into demo/stdlib-l
    python demo/train.py stdlib-l --score           # only measure what is there

Three sizes of one architecture (6 blocks, heads of 32, d = 64, 128, 256) see the same batches in the same order: scale
is the only difference. Hidden matrices are trained by Muon and the rest by AdamW (torch.optim's own). The run is
checkpointed every 50 steps under demo/checkpoints/ and goes on from there when started again.
"""
import argparse
import json
import math
import os
import pathlib
import platform
import sys
import time

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from common import stdlib_documents

HERE = pathlib.Path(__file__).resolve().parent
WIDTHS = {"stdlib-s": 64, "stdlib-m": 128, "stdlib-l": 256}
VOCAB, CTX, BATCH, EOT = 2048, 512, 16, "<|endoftext|>"
MUON_LR, ADAM_LR, WARMUP, DECAY = 0.02, 0.015, 18, 0.4  # peak rates; steps; share of the run


def train_tokenizer() -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((text for _, text in stdlib_documents("train")), vocab_size=VOCAB, special_tokens=[EOT],
                            show_progress=False)
    bpe.save(str(HERE / "tokenizer.json"))


def token_stream(split: str) -> tuple[np.ndarray, int]:
    """All documents of a split, each closed by the end-of-text token: (ids [n], bytes of text)."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    texts = [text for _, text in stdlib_documents(split)]
    ids = [np.array(encoding.ids + [0], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(ids), sum(len(text.encode()) for text in texts)


def build(name: str) -> GPTNeoXForCausalLM:
    d = WIDTHS[name]
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=d, num_hidden_layers=6, num_attention_heads=d // 32, intermediate_size=4 * d,
        max_position_embeddings=CTX, rotary_pct=0.25, hidden_act="gelu", use_parallel_residual=True,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, dtype="float32"))


def batch_at(step: int, stream: torch.Tensor) -> torch.Tensor:
    """Row starts are a pure function of the step, so a continued run reads what an unbroken one would have read."""
    rows_per_epoch = (len(stream) - CTX) // CTX
    steps_per_epoch = rows_per_epoch // BATCH
    epoch, i = divmod(step, steps_per_epoch)
    rng = np.random.default_rng([1, epoch])
    offset = int(rng.integers(CTX))  # every epoch cuts the stream at other places
    rows = rng.permutation(rows_per_epoch)[i * BATCH:(i + 1) * BATCH]
    return torch.stack([stream[offset + r * CTX: offset + (r + 1) * CTX] for r in rows.tolist()])


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, constant trunk, linear decay to zero."""
    return min((step + 1) / WARMUP, (steps - step) / (DECAY * steps), 1.0)


def train(name: str, steps: int, device: str) -> GPTNeoXForCausalLM:
    stream = torch.from_numpy(token_stream("train")[0])
    model = build(name).to(device).train()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    other = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimisers = [torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
                  torch.optim.AdamW(other, lr=ADAM_LR, weight_decay=0.01, betas=(0.9, 0.95))]
    checkpoint, start = HERE / "checkpoints" / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        start = state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name)
    for step in bar:
        rows = batch_at(step, stream).to(device)
        loss = model(input_ids=rows, labels=rows).loss
        for optimiser, peak in zip(optimisers, (MUON_LR, ADAM_LR)):
            for group in optimiser.param_groups:
                group["lr"] = peak * learning_rate(step, steps)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 50 == 0:
            checkpoint.parent.mkdir(exist_ok=True)
            torch.save({"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": step + 1},
                       checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return model.eval()


@torch.no_grad()
def nats_per_token(model: GPTNeoXForCausalLM, device: str) -> np.ndarray:
    """Held-out CE of every row of CTX tokens, [rows]; all positions that have a target, the first ones too."""
    ids = torch.from_numpy(token_stream("heldout")[0])
    rows = ids[:len(ids) // CTX * CTX].view(-1, CTX)
    out = []
    for chunk in rows.split(16):
        chunk = chunk.to(device)
        logits = model(chunk).logits[:, :-1].float()
        out.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none").mean(1).cpu())
    return torch.cat(out).double().numpy()


def unigram_nats() -> float:
    """Held-out CE of the training split's token frequencies, add-one smoothed."""
    counts = np.bincount(token_stream("train")[0], minlength=VOCAB) + 1.0
    held = token_stream("heldout")[0]
    return float(-np.log(counts / counts.sum())[held].mean())


def score(name: str, model: GPTNeoXForCausalLM, device: str) -> dict:
    """Bits per byte on the held-out files: nats/token over ln 2 times tokens per byte of text, end marks counted as tokens."""
    held, n_bytes = token_stream("heldout")
    bpb = len(held) / n_bytes / math.log(2)
    rows = nats_per_token(model, device)
    return {"bits_per_byte": rows.mean() * bpb, "se": rows.std(ddof=1) / math.sqrt(len(rows)) * bpb,
            "unigram": unigram_nats() * bpb, "untrained": nats_per_token(build(name).to(device).eval(), device).mean() * bpb,
            "heldout_bytes": n_bytes, "heldout_tokens": len(held)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", *WIDTHS])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.what == "tokenizer":
        train_tokenizer()
    else:
        t = time.time()
        model = train(args.what, args.steps, args.device)
        model.save_pretrained(HERE / "checkpoints" / args.what)
        print(args.what, time.time() - t, score(args.what, model, args.device))
