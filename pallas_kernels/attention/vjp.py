"""What the backward keeps: the inputs, the output and its lse. Nothing of size T S."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import algebra, blockwise, reference


def _without_gradient(context: algebra.Context) -> algebra.Context:
    return jax.tree.map(lambda _: None, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(
    inputs: algebra.Inputs, context: algebra.Context, options: algebra.Options
) -> tuple[jax.Array, jax.Array]:
    """`blockwise.forward` with `blockwise.backward` as its derivative."""
    return blockwise.forward(inputs, context, options)


def _attention_fwd(inputs, context, options):
    # The wrapped function itself, not its body: a second derivative comes back to `_attention_bwd`.
    saved = attention(inputs, context, options)
    return saved, (inputs, context, saved)


def _attention_bwd(options, residuals, cotangents):
    inputs, context, saved = residuals
    return _backward(inputs, saved, cotangents, context, options), _without_gradient(context)


attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _backward(inputs, saved, cotangents, context, options):
    return blockwise.backward(inputs, context, options, saved, cotangents)


def _backward_fwd(inputs, saved, cotangents, context, options):
    out = _backward(inputs, saved, cotangents, context, options)
    return out, (inputs, saved, cotangents, context)


def _backward_bwd(options, residuals, cotangents_of_gradient):
    """Derivative of the gradient, through the reference: O(T S) memory."""
    inputs, saved, cotangents, context = residuals

    def gradient(inputs, cotangents):
        value_and_lse, pullback = jax.vjp(
            lambda inputs: reference.attention(inputs, context, options), inputs
        )
        cotangents = jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, value_and_lse)
        return pullback(cotangents)[0]

    _, pullback = jax.vjp(gradient, inputs, cotangents)
    d_inputs, d_cotangents = pullback(cotangents_of_gradient)
    # `saved` is a function of `inputs`, whose cotangent above is already the total one.
    d_saved = jax.tree.map(jnp.zeros_like, saved)
    return d_inputs, d_saved, d_cotangents, _without_gradient(context)


_backward.defvjp(_backward_fwd, _backward_bwd)
