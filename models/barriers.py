"""The barrier that compiled kernels need to read back what they have stored, where PyTorch leaves it out.

A kernel by torch.compile may store a tensor in one loop and load it in the next, by other threads. Before PyTorch's
issue 190517 was closed nothing made these wait: timm's DeiT-Ti, compiled in bf16, gave wrong logits for one to three of
16 images in most calls on one NVIDIA H200, by PyTorch 2.11.
"""

import inspect
import warnings
from functools import wraps
from typing import Any

import torch

_TAG = "read back behind barriers"  # of the compiler's caches, whose kernels from before have none


def read_back_behind_barriers() -> None:
    """From here on, kernels that are compiled in this process have it.

    Where PyTorch's own code sees to that nothing changes, and where its code is another there is a warning.
    """
    from torch._inductor.codegen.triton import TritonKernel  # takes seconds, which what is not compiled need not wait

    before_access = getattr(TritonKernel, "_handle_pdl_before_access", None)
    if "invalidated_stores" in inspect.getsource(TritonKernel.load) or hasattr(before_access, "__wrapped__"):
        return
    if before_access is None:
        warnings.warn(
            f"PyTorch {torch.__version__} may lack barriers in compiled kernels: see its issue 190517", stacklevel=2
        )
        return

    @wraps(before_access)
    def with_barrier(kernel: TritonKernel, lines: Any, *names: str, consider_reads: bool = False) -> None:
        # comes right before every load; before a store, where no barrier is needed, it considers reads
        if not consider_reads and not kernel.cse.invalidated_stores.isdisjoint(names):  # stored in an earlier loop
            lines.writeline("tl.debug_barrier()")
        before_access(kernel, lines, *names, consider_reads=consider_reads)

    TritonKernel._handle_pdl_before_access = with_barrier  # type: ignore[method-assign]
    torch.compiler.config.cache_key_tag += _TAG
