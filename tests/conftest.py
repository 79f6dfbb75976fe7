"""Fixtures that several test files take.

Nothing is imported here that takes long: where several processes run the tests, one more gives them out.
"""

import os
import random

import pytest


def pytest_configure(config):
    """Where several processes run the tests (-n 2), each takes one thread, and so does what it starts."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same alone and in any order of the tests."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    from helpers import tiny_model

    return tiny_model()


@pytest.fixture
def rows():
    import torch

    return torch.randint(0, 41, (3, 12), generator=torch.Generator().manual_seed(1))
