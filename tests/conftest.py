"""Fixtures that several test files take.

Nothing is imported here that takes long: where several processes run the tests, one more gives them out.
"""

import os
import random

import pytest

# files that take minutes: begun last, one of them would keep one process busy and the others idle
LONG = "real_models experiments packaging ranks identity audit gguf bench cuda expa".split()


def pytest_configure(config):
    """Where several processes run the tests (-n 2), each takes one thread, and so does what it starts. Files
    are given out in the order below, not by how many tests they hold.
    """
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


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
