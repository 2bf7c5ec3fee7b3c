"""Decode steps of Gated DeltaNet: the composition in XLA, and the kernels with its derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import step as delta_rule
from pallas_kernels.delta_rule.step import tuning as delta_rule_tuning
from pallas_kernels.deltanet import reference
from pallas_kernels.deltanet.algebra import Inputs, Options

state_dtype = delta_rule.state_dtype


def run(
    implementation: str, options: Options, inputs: Inputs, state: jax.Array, slots: jax.Array | None
):
    """`(out, state after, states or None, conv_state after)` by a kernel; both states keep their dtype."""
    lengths = inputs.lengths
    return _program(implementation, options, inputs._replace(lengths=None), state, lengths, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(
    implementation: str,
    options: Options,
    inputs: Inputs,
    state: jax.Array,
    lengths: jax.Array | None,
    slots: jax.Array | None,
):
    tokens = (inputs.mixed, inputs.logits, lengths)
    weights = (inputs.conv_kernel, inputs.conv_bias, inputs.A_log, inputs.dt_bias)
    launch = functools.partial(_launch, implementation, options)
    out, after, states, windows = delta_rule.by_rows(launch)(
        tokens, (state, inputs.conv_state), slots, weights
    )
    if slots is not None:
        slots = delta_rule.in_pool(slots, state.shape[0])
        windows = delta_rule.into_pool(inputs.conv_state, windows, slots)
    return out, after, states, windows


def _forward(implementation: str, options: Options, *arrays):
    return _kernel(implementation, options, *arrays), arrays


def _backward(implementation: str, options: Options, residuals: tuple, cotangents: tuple):
    """By recomputation: a step is a handful of tokens."""
    inputs, state, lengths, slots = residuals

    def step(inputs, state):
        return reference.step(options, inputs._replace(lengths=lengths), state, slots)

    return *jax.vjp(step, inputs, state)[1](cotangents), None, None


_kernel.defvjp(_forward, _backward)
# Outside `jit`, one program for the operator, not one per operation.
_program = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)(_kernel)


def _launch(
    implementation: str,
    options: Options,
    tokens,
    pools,
    slots: jax.Array | None,
    weights: jax.Array,
):
    # A kernel's file is imported where it is called: a machine without it never reads it.
    if implementation == "triton":
        from pallas_kernels.delta_rule.step.triton import launch
        from pallas_kernels.deltanet.triton import convolved
    else:
        from pallas_kernels.delta_rule.step.mosaic_gpu import launch
        from pallas_kernels.deltanet.mosaic_gpu import Convolved as convolved
    mixed, logits, lengths = tokens
    state, conv_state = pools
    if lengths is not None:
        lengths = lengths.astype(jnp.int32)
    leaves, tree = jax.tree.flatten(Inputs(mixed, logits, conv_state, *weights, lengths=lengths))
    window = jax.ShapeDtypeStruct((mixed.shape[0], *conv_state.shape[1:]), mixed.dtype)
    source: Any = functools.partial(convolved, options.allow_negative_eigenvalues, tree)
    return launch(
        delta_rule_tuning.shapes(implementation, mixed.shape[:3], state, options),
        source,
        leaves,
        state,
        None if slots is None else slots.astype(jnp.int32),
        out_dtype=mixed.dtype,
        name="gated_deltanet_step",
        outputs=(window,),
    )
