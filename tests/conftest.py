"""Fixtures that several test files take."""

import random

from helpers import get_saes, log_probs_64, measured, tiny_model  # noqa: F401

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same alone and in any order of the tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.fixture
def rows():
    return torch.randint(0, 41, (3, 12), generator=torch.Generator().manual_seed(1))
