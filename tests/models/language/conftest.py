"""What tests of language models share."""

import pytest
import torch


@pytest.fixture
def without_gradients():
    """And with nothing compiled before."""
    torch.compiler.reset()
    with torch.no_grad():
        yield
