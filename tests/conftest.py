"""One thread a process, so that tests that run side by side do not slow each other down; without a GPU, Triton's
interpreter."""

import os
from pathlib import Path

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton and kernels are imported
    from interpreter import patch_once

    patch_once()


def pytest_collection_modifyitems(items):
    """Those of whole programs, beside this file, first: they take longest, and at the end a worker would be alone."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
