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


def in_xla(options: Options, operands: Operands) -> Any:
    """`(query, key, value, final_state)`."""
    return reference.causal_conv_qkv(**operands._asdict(), **options._asdict())


# Outside `jit`, one program for the operator, not one per operation.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def mosaic_gpu(options: Options, operands: Operands) -> Any:
    """`(query, key, value, final_state)`."""
    # Outside the custom derivative: a final state that nobody uses costs nothing, in the backward pass neither.
    final_state = reference.final_state(
        operands.mixed, operands.weight, operands.initial_state, operands.segment_ids
    )
    made: Any = _kernel(options, operands)
    return *made, final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(options: Options, operands: Operands):
    return _over_rows(functools.partial(_launch_forward, options))(
        _filters(operands), _of_rows(operands)
    )


def _forward(options: Options, operands: Operands):
    # The wrapped function itself, not its body: a second derivative comes back to `_backward`.
    return _kernel(options, operands), operands


def _backward(options: Options, operands: Operands, cotangents: tuple):
    return (_gradient(options, operands, cotangents),)


_kernel.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(options: Options, operands: Operands, cotangents: tuple) -> Any:
    launch = _over_rows(functools.partial(_launch_backward, options))
    d_mixed, d_weight, d_bias = launch(_filters(operands), (_of_rows(operands), cotangents))
    spare = operands.mixed.shape[-1] - d_mixed.shape[-1]
    # Parts of rows are added here, where `vmap` sees them apart.
    total: Any = lambda parts, x: None if x is None else jnp.sum(parts, axis=0).astype(x.dtype)
    return Operands(
        jnp.pad(d_mixed, ((0, 0), (0, 0), (0, 0), (0, spare))),
        total(d_weight, operands.weight),
        total(d_bias, operands.bias),
        _d_initial_state(options, operands, cotangents),
        None,
    )


def _gradient_forward(options: Options, operands: Operands, cotangents: tuple):
    return _gradient(options, operands, cotangents), (operands, cotangents)


def _gradient_backward(options: Options, residuals: tuple, cotangents_of_gradient: tuple):
    """A second derivative recomputes in XLA."""
    operands, cotangents = residuals
    segment_ids = operands.segment_ids

    def gradient(floats, cotangents):
        def plain(floats):
            return in_xla(options, floats._replace(segment_ids=segment_ids))[:3]

        return jax.vjp(plain, floats)[1](cotangents)[0]

    _, pull = jax.vjp(gradient, operands._replace(segment_ids=None), cotangents)
    return pull(cotangents_of_gradient)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _d_initial_state(options: Options, operands: Operands, cotangents: tuple):
    """The initial state's gradient, in XLA: only the W - 1 tokens from the first real one on see it."""
    mixed, weight, bias, initial_state, segment_ids = operands
    if initial_state is None:
        return None
    batch, length = mixed.shape[:2]
    places = jnp.broadcast_to(
        jnp.arange(weight.shape[0] - 1, dtype=jnp.int32), (batch, weight.shape[0] - 1)
    )
    if segment_ids is not None:
        places = places + reference.first_real(segment_ids)[:, None]

    def gather(x):
        index = jnp.minimum(places, length - 1).reshape(*places.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    ids = jnp.zeros_like(places) if segment_ids is None else gather(segment_ids)
    ids = jnp.where(places < length, ids, -1)

    def plain(initial_state):
        head = Operands(gather(mixed), weight, bias, initial_state, ids)
        return in_xla(options, head)[:3]

    return jax.vjp(plain, initial_state)[1](tuple(map(gather, cotangents)))[0]


def _filters(operands: Operands):
    return operands.weight, operands.bias


def _of_rows(operands: Operands) -> Any:
    return operands._replace(weight=None, bias=None)  # pyright: ignore[reportArgumentType]


def _over_rows(launch):
    """`launch(filters, arrays)`, whose `vmap` is more rows of the same kernel, or a kernel for each filter, where
    filters differ."""

    @jax.custom_batching.custom_vmap
    def call(filters, arrays):
        return launch(filters, arrays)

    @call.def_vmap
    def _(size, batched, filters, arrays):
        def spread(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))

        if any(jax.tree.leaves(batched[0])):
            both = jax.tree.map(spread, (filters, arrays), tuple(batched))
            out = jax.lax.map(lambda pair: call(*pair), both)
        else:
            arrays = jax.tree.map(spread, arrays, batched[1])
            arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
            out = call(filters, arrays)
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _prepared(operands: Operands) -> dict[str, Any]:
    """What both kernels take beside `mixed` and `weight`."""
    mixed, weight, bias, initial_state, segment_ids = operands
    taps, first = None, None
    if segment_ids is not None:
        size = -(-mixed.shape[1] // tuning.ROWS) * tuning.ROWS + tuning.AFTER
        taps, first = reference.taps(
            segment_ids, weight.shape[0], has_state=initial_state is not None, size=size
        )
    if initial_state is not None:
        initial_state = initial_state.astype(mixed.dtype)
    return {"bias": bias, "taps": taps, "first": first, "initial_state": initial_state}


# The kernels' files are imported where they are called: a machine without them never reads them.


def _launch_forward(options: Options, filters, operands: Operands) -> Any:
    from pallas_kernels.causal_conv.hopper import fwd

    operands = operands._replace(weight=filters[0], bias=filters[1])
    return fwd.forward(operands.mixed, operands.weight, **_prepared(operands), **options._asdict())


def _launch_backward(options: Options, filters, arrays) -> Any:
    from pallas_kernels.causal_conv.hopper import bwd

    operands, cotangents = arrays
    operands = operands._replace(weight=filters[0], bias=filters[1])
    rows = tuning.backward_rows(
        max(options.key_dim, options.value_dim), itemsize=operands.mixed.dtype.itemsize
    )
    return bwd.backward(
        operands.mixed,
        operands.weight,
        cotangents,
        rows=rows,
        **_prepared(operands),
        **options._asdict(),
    )
