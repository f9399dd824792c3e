"""Functions of single numbers in kernels, by `exp2`: a card computes it in one instruction, `exp` takes five."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp2(tl.minimum(x * -LOG2E, 126.0)))  # no infinity


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp2(tl.minimum(x, 20.0) * LOG2E)))
