import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
