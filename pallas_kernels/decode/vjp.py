"""Values by the blockwise implementation, derivatives of any mode and order by the reference."""

import functools

import jax

from pallas_kernels.decode import algebra, blockwise, reference


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def decode_attention(operands: algebra.Operands, options: algebra.Options):
    """Returns `[B, T, N, Dv]`."""
    return blockwise.decode_attention(operands, options)


@decode_attention.defjvp
def _derivative(options, primals: tuple, tangents: tuple):
    exact = functools.partial(reference.decode_attention, options=options)
    return decode_attention(*primals, options), jax.jvp(exact, primals, tangents)[1]
