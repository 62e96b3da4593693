"""What stands between the two layers of an MLP, with its derivative, entry by entry in float32."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activate(y, NAME: tl.constexpr, BITS: tl.constexpr):
    """The activation of this name, to the BITS that the significand of what is computed has in memory."""
    if NAME == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return y * _gate(y, NAME, BITS)


@triton.jit
def slope(y, NAME: tl.constexpr, BITS: tl.constexpr):
    """Its derivative."""
    if NAME == "relu":
        return tl.where(y <= 0, 0.0, 1.0)  # NaN has the gradient that PyTorch gives it
    elif NAME == "gelu":
        density = tl.exp2(-0.7213475204444817 * y * y) * 0.3989422804014327
        return _gate(y, NAME, BITS) + y * density
    elif NAME == "gelu_tanh":
        gate = _gate(y, NAME, BITS)
        return gate + y * gate * (1 - gate) * 1.5957691216057308 * (1 + 3 * 0.044715 * y * y)
    else:
        gate = _gate(y, NAME, BITS)
        return gate + y * gate * (1 - gate)


@triton.jit
def _gate(y, NAME: tl.constexpr, BITS: tl.constexpr):
    """What an activation that is no ReLU multiplies y with: Φ(y), or a sigmoid."""
    if NAME == "gelu" and BITS == 8:
        # Φ(y) = ½ + y·p(y²), where that is from 0 to 1; p is fitted: y·Φ(y) is within 3.9e-5, and takes products and
        # sums alone, of which a GPU computes eight in the time of one exponential or division.
        s = y * y
        p = 3.818013613599014e-11 * s - 3.95268262565196e-09
        p = (p * s + 1.8065061624383816e-07) * s - 4.840858764509903e-06
        p = (p * s + 8.54732861625962e-05) * s - 0.0010619328822940588
        p = (p * s + 0.009665379300713539) * s - 0.06611081212759018
        return _half_and(y, p * s + 0.39877939224243164)
    elif NAME == "gelu" and BITS < 24:
        # Φ as a sigmoid; its argument, in powers of two, is fitted: y·Φ(y) is within 3.1e-6, without erf's branches.
        s = y * y
        z = (3.22908648e-06 * s - 8.82397517e-05) * s - 3.60266812e-04
        return _sigmoid(y * ((z * s + 1.05226677e-01) * s + 2.30204539e00), BITS)
    elif NAME == "gelu":
        return 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    elif NAME == "gelu_tanh":
        # 0.5·(1 + tanh z) = sigmoid(2z): Hendrycks and Gimpel, arXiv 1606.08415
        return _sigmoid(y * (2.302208198144325 + 0.10294324 * y * y), BITS)
    else:
        tl.static_assert(NAME == "silu")
        return _sigmoid(1.4426950408889634 * y, BITS)


@triton.jit
def _half_and(y, p):
    """½ + y·p, from 0 to 1, in one instruction."""
    if INTERPRETED:
        return tl.clamp(0.5 + y * p, 0.0, 1.0)
    return tl.inline_asm_elementwise(
        "fma.rn.ftz.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [y, p], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sigmoid(z, BITS: tl.constexpr):
    """1/(1 + 2⁻ᶻ); for 16 bits without what guards subnormal numbers and huge divisors."""
    if BITS < 24 and not INTERPRETED:
        steps: tl.constexpr = """
            { .reg .f32 power;
              neg.f32 power, $1;
              ex2.approx.ftz.f32 power, power;
              add.f32 power, power, 0f3F800000;
              rcp.approx.ftz.f32 $0, power; }"""
        return tl.inline_asm_elementwise(steps, "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1 / (1 + tl.exp2(-z))
