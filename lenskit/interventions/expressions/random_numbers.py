"""Random numbers in expressions: the same in every run and on every machine, by their seed."""

from lenskit.interventions.expressions.nodes import Call, Expression


def rand(*shape: int, seed: int) -> Call:
    """Numbers drawn evenly from 0 to 1: what `torch.rand` draws on the CPU with a generator of this seed.

    Args:
        shape: of the result, in float32.
        seed: from 0 on.

    Raises:
        ExpressionError: no shape of ints, or no seed.
    """
    return Call("rand", shape, {"seed": seed})


def randn(*shape: int, seed: int) -> Call:
    """Numbers of mean 0 and variance 1: what `torch.randn` draws on the CPU with a generator of this seed.

    Args:
        shape: of the result, in float32.
        seed: from 0 on.

    Raises:
        ExpressionError: no shape of ints, or no seed.
    """
    return Call("randn", shape, {"seed": seed})


def rand_like(x: Expression, *, seed: int) -> Call:
    """`rand` in the shape of `x`: drawn in float32, then cast to its dtype, which is a floating one.

    Raises:
        ExpressionError: no seed.
    """
    return Call("rand_like", (x,), {"seed": seed})


def randn_like(x: Expression, *, seed: int) -> Call:
    """`randn` in the shape of `x`: drawn in float32, then cast to its dtype, which is a floating one.

    Raises:
        ExpressionError: no seed.
    """
    return Call("randn_like", (x,), {"seed": seed})
