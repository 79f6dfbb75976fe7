"""Which positions are sinks: they can own the variance that R² divides by.

SINK_FACTOR is part of what an SAE is (--sinks drop leaves sinks out of its training): to change it is a new
`recipes.TRAIN_VERSION`, and a new version of the rows.
"""

import torch
from torch import Tensor

SINK_FACTOR = 10  # a position whose norm exceeds this many medians is a sink, and so is position 0
RULE = f"position 0 and norms above {SINK_FACTOR} medians"


def sink_positions(norms: Tensor, median: float) -> Tensor:
    """[B,T] bool: position 0, and every position whose norm exceeds SINK_FACTOR times the median over
    positions >= 1.
    """
    sinks = norms > SINK_FACTOR * median
    sinks[:, 0] = True
    return sinks


def sinks_of(h: Tensor) -> Tensor:
    """`sink_positions` [B,T] of h [B,T,d], by its own median norm."""
    norms = torch.linalg.vector_norm(h, dim=-1)
    return sink_positions(norms, norms[:, 1:].median().item())
