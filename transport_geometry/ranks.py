"""One run on several processes, under torchrun: who does which share of the work, and where they wait for
each other.

    torchrun --nproc-per-node 2 expb.py

Without torchrun there is one rank, 0, and all of this does nothing.
"""

import datetime
import os
from collections.abc import Sequence

from transport_geometry.errors import UserError

import numpy as np
import torch

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Meet the other ranks (gloo on the CPU, nccl on CUDA, where each takes the GPU of its local rank).
    Raises UserError.
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
    # a rank may wait for hours while another trains; one that dies is torchrun's to notice, at once
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=30)
    )


def wait() -> None:
    """Until every rank is here."""
    if WORLD > 1:
        torch.distributed.barrier()


def leave() -> None:
    """The last wait."""
    wait()
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)  # at once in a log too


def share(items: list, weights: Sequence[float]) -> list:
    """This rank's items: consecutive ones, so that a hook is on few ranks, of about an equal part of the
    weight.
    """
    if not items:
        return []
    after = np.cumsum(weights, dtype=float)
    owner = np.minimum((after - np.asarray(weights) / 2) / after[-1] * WORLD, WORLD - 1).astype(int)
    return [item for item, rank in zip(items, owner) if rank == RANK]
