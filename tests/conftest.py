"""Fixtures that several test files take."""

from helpers import get_saes, log_probs_64, measured, tiny_model  # noqa: F401

import pytest
import torch


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.fixture
def rows():
    return torch.randint(0, 41, (3, 12), generator=torch.Generator().manual_seed(1))
