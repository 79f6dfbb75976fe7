"""One run on several processes under torchrun: each rank's share of the work, and where ranks wait.

    torchrun --nproc-per-node 2 expb.py

Without torchrun there is one rank, 0, and these functions do nothing.
"""

import datetime
import os
from collections.abc import Sequence

from transport_geometry.errors import UserError

import numpy as np
import torch

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Connect to the other ranks: gloo on the CPU; nccl on CUDA, with one GPU per local rank. Raises
    UserError.
    """
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    if device.type == "mps":
        raise UserError("torchrun: MPS serves one process; --device cpu takes several")
    if device.type == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise UserError(
                f"torchrun: {int(os.environ['LOCAL_WORLD_SIZE'])} ranks on a machine of "
                f"{torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
    # a rank may wait for hours while another trains; torchrun notices at once if one dies
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=30)
    )


def wait() -> None:
    """Until every rank is here."""
    if WORLD > 1:
        torch.distributed.barrier()


def leave() -> None:
    """Wait for all ranks a last time and disconnect."""
    wait()
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def say(text: str) -> None:
    """Print on rank 0 only."""
    if RANK == 0:
        print(text, flush=True)  # flushed, for logs


def share(items: list, weights: Sequence[float]) -> list:
    """This rank's items, with about an equal part of the weights. They are consecutive, so that a hook's
    conditions are on few ranks.
    """
    if not items:
        return []
    after = np.cumsum(weights, dtype=float)
    owner = np.minimum((after - np.asarray(weights) / 2) / after[-1] * WORLD, WORLD - 1).astype(int)
    return [item for item, rank in zip(items, owner) if rank == RANK]
