"""`causal_conv1d_qkv` by implementation: XLA, or the Hopper kernel with gradients by recomputation in XLA."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import reference, tuning


class Operands(NamedTuple):
    """The arrays of a call; None where it has no such operand."""

    mixed: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    initial_state: jax.Array | None
    segment_ids: jax.Array | None


class Options(NamedTuple):
    """Everything static about a call."""

    key_dim: int
    value_dim: int
    use_qk_l2norm: bool


def causal_conv_qkv(
    implementation: str, options: Options, operands: Operands
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(query, key, value, final_state)`."""
    if implementation == "reference":
        return _reference(options, operands)
    return _program(options, operands)


def _reference(options: Options, operands: Operands):
    return reference.causal_conv_qkv(**operands._asdict(), **options._asdict())


# Outside `jit`, one program for the operator, not one per operation.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _program(options: Options, operands: Operands):
    # Outside the custom derivative: a final state that nobody uses costs nothing, in the backward pass neither.
    final_state = reference.final_state(
        operands.mixed, operands.weight, operands.initial_state, operands.segment_ids
    )
    made: Any = _kernel(options, operands)
    return *made, final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(options: Options, operands: Operands):
    return _mapped(options)(operands)


def _forward(options, operands):
    # The wrapped function itself, not its body: a second derivative comes back to `_backward`.
    return _kernel(options, operands), operands


def _backward(options, operands, cotangents):
    segment_ids = operands.segment_ids

    def plain(floats):
        return _reference(options, floats._replace(segment_ids=segment_ids))[:3]

    _, pull = jax.vjp(plain, operands._replace(segment_ids=None))
    return pull(cotangents)


_kernel.defvjp(_forward, _backward)


def _mapped(options: Options):
    """The kernel, whose `vmap` is more rows of the same kernel (a kernel for each filter, where filters differ)."""

    @jax.custom_batching.custom_vmap
    def call(operands):
        return _launch(options, operands)

    @call.def_vmap
    def _(size, batched, operands):
        (is_batched,) = batched
        filters = jax.tree.leaves((is_batched.weight, is_batched.bias))
        if any(filters):
            spread = jax.tree.map(_spread(size), operands, is_batched)
            out = jax.lax.map(call, spread)
        else:
            merge: Any = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
            rows = jax.tree.map(_spread(size), operands, is_batched)
            rows = Operands(*map(merge, rows))
            out = call(rows._replace(weight=operands.weight, bias=operands.bias))
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _spread(size: int):
    return lambda x, is_batched: x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))


def _launch(options: Options, operands: Operands) -> Any:
    # A kernel's file is imported where it is called: a machine without it never reads it.
    from pallas_kernels.causal_conv import mosaic_gpu_fwd

    mixed, weight, bias, initial_state, segment_ids = operands
    taps, first = None, None
    if segment_ids is not None:
        taps, first = reference.taps(
            segment_ids, weight.shape[0], has_state=initial_state is not None, multiple=tuning.ROWS
        )
    if initial_state is not None:
        initial_state = initial_state.astype(mixed.dtype)
    return mosaic_gpu_fwd.forward(
        mixed, weight, bias=bias, taps=taps, first=first, initial_state=initial_state, **options._asdict()
    )  # fmt: skip
