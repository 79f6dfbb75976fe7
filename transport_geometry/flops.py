"""FLOPs of a token in each part of a run: what the progress line counts and `--dry-run` adds up.

Matrix products are counted. `overhead`: as many multiplications more as what a token costs in a block, or in
the training of an SAE, besides them takes as long as; `--dry-run` leaves it out.
"""

from typing import Any

from transport_geometry.models.lm import Hook, blocks, text_config

OVERHEAD = 2**17  # measured on a CPU


def block_size(model: Any) -> int:
    """Parameters of one block."""
    parts = blocks(model)
    return sum(p.numel() for part in parts for p in part.parameters()) // len(parts)


def of_blocks(model: Any, n: int, overhead: int = OVERHEAD) -> float:
    """Of `n` blocks of the language model."""
    return 2 * n * (block_size(model) + overhead)


def of_training(d: int, d_sae: int, overhead: int = OVERHEAD) -> float:
    """Of training one SAE: the encode, and the sparse rest."""
    return 5 * d * d_sae + 2 * overhead


def of_evaluation(
    model: Any, layer: int, passes: float, label_sets: int, codes: int, overhead: int = OVERHEAD
) -> float:
    """Of a hook's evaluation: the clean run; through the blocks after the hook one backward pass for each set
    of labels, through the unembedding one for all, which the losses meet again; `passes` through the tail;
    the encoders of `codes` latents.
    """
    config = text_config(model)
    d, vocab = config.hidden_size, config.vocab_size
    after = config.num_hidden_layers - 1 - layer
    of_tails = of_blocks(model, layer + 1 + after * (1 + label_sets + passes), overhead)
    return of_tails + 2 * (vocab * d * (3 + passes) + d * codes)


def of_tail(hook: Hook) -> float:
    """Of one pass from the hook on, with its cross-entropy."""
    config = text_config(hook.model)
    after = config.num_hidden_layers - 1 - hook.layer
    return of_blocks(hook.model, after) + 2 * config.vocab_size * (config.hidden_size + 64)
