"""One thread a process, so that tests that run side by side do not slow each other down; without a GPU, Triton's
interpreter."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
