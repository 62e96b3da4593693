"""What stands between the two layers of an MLP, with its derivative, entry by entry in float32."""

import triton
import triton.language as tl


@triton.jit
def activate(y, NAME: tl.constexpr):
    """The activation of this name."""
    if NAME == "gelu":
        return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return y * tl.sigmoid(_twice_the_argument(y))
    elif NAME == "relu":
        return tl.maximum(y, 0.0)
    else:
        tl.static_assert(NAME == "silu")
        return y * tl.sigmoid(y)


@triton.jit
def slope(y, NAME: tl.constexpr):
    """Its derivative."""
    if NAME == "gelu":
        density = tl.exp(-0.5 * y * y) * 0.3989422804014327
        return 0.5 * (1 + tl.erf(y * 0.7071067811865476)) + y * density
    elif NAME == "gelu_tanh":
        gate = tl.sigmoid(_twice_the_argument(y))
        return gate + y * gate * (1 - gate) * 1.5957691216057308 * (1 + 3 * 0.044715 * y * y)
    elif NAME == "relu":
        return tl.where(y > 0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "silu")
        gate = tl.sigmoid(y)
        return gate + y * gate * (1 - gate)


@triton.jit
def _twice_the_argument(y):
    """2·√(2/π)·(y + 0.044715·y³), since 0.5·(1 + tanh z) = sigmoid(2z): Hendrycks and Gimpel, arXiv 1606.08415."""
    return 1.5957691216057308 * (y + 0.044715 * y * y * y)
