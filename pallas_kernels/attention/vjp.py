"""What the backward keeps: the inputs, the output and its lse. Nothing of size T S."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import algebra, blockwise, reference
from pallas_kernels.attention.hopper import tuning


class Fused(NamedTuple):
    """The differentiable half of self-attention from the fused buffer: `[B, T, K, R + 2, D]`, `[N]`."""

    qkv: jax.Array
    sinks: jax.Array | None = None

    def split(self) -> algebra.Inputs:
        """The same as separate arrays."""
        batch, length, num_kv_heads, width, head_dim = self.qkv.shape
        query = self.qkv[:, :, :, :-2].reshape(batch, length, num_kv_heads * (width - 2), head_dim)
        return algebra.Inputs(query, self.qkv[:, :, :, -2], self.qkv[:, :, :, -1], None, self.sinks)


def _without_gradient(context: algebra.Context) -> algebra.Context:
    return jax.tree.map(lambda _: None, context)


def _differentiable(forward, backward, plain) -> Callable[..., Any]:
    """`forward(inputs, context, options)` with `backward(inputs, context, options, saved, cotangents)` as its
    derivative, whose own derivative is that of the gradient of `plain`: O(T S) memory."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def attention(inputs, context, options):
        return forward(inputs, context, options)

    def attention_fwd(inputs, context, options):
        # The wrapped function itself, not its body: a second derivative comes back to `attention_bwd`.
        saved = attention(inputs, context, options)
        return saved, (inputs, context, saved)

    def attention_bwd(options, residuals, cotangents):
        inputs, context, saved = residuals
        return gradient(inputs, saved, cotangents, context, options), _without_gradient(context)

    attention.defvjp(attention_fwd, attention_bwd)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def gradient(inputs, saved, cotangents, context, options):
        return backward(inputs, context, options, saved, cotangents)

    def gradient_fwd(inputs, saved, cotangents, context, options):
        out = gradient(inputs, saved, cotangents, context, options)
        return out, (inputs, saved, cotangents, context)

    def gradient_bwd(options, residuals, cotangents_of_gradient):
        inputs, saved, cotangents, context = residuals

        def plain_gradient(inputs, cotangents):
            value_and_lse, pullback = jax.vjp(
                lambda inputs: plain(inputs, context, options), inputs
            )
            cotangents = jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, value_and_lse)
            return pullback(cotangents)[0]

        _, pullback = jax.vjp(plain_gradient, inputs, cotangents)
        d_inputs, d_cotangents = pullback(cotangents_of_gradient)
        # `saved` is a function of `inputs`, whose cotangent above is already the total one.
        d_saved = jax.tree.map(jnp.zeros_like, saved)
        return d_inputs, d_saved, d_cotangents, _without_gradient(context)

    gradient.defvjp(gradient_fwd, gradient_bwd)
    # Outside `jit`, one program for the operator, not one per operation.
    return functools.partial(jax.jit, static_argnums=2, inline=True)(attention)


# --- Mosaic GPU ------------------------------------------------------------------------------------------------------
# The kernels' files are imported where they are called: a machine without them never reads them.


def _kernel_options(context: algebra.Context, options: algebra.Options) -> dict[str, Any]:
    return {
        "scale": options.scale,
        "is_causal": options.is_causal,
        "sliding_window": options.sliding_window,
        "offset": options.q_offset if context.q_offsets is None else context.q_offsets,
        "logits_soft_cap": options.logits_soft_cap,
    }


def _forward_config(query_shape, key_shape, context: algebra.Context, options: algebra.Options):
    batch, q_len, num_heads, head_dim = query_shape
    kv_len, kv_heads = key_shape[1:3]
    return tuning.forward_config(
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        group=num_heads // kv_heads,
        batch=batch,
        kv_heads=kv_heads,
        segments=context.query_segment_ids is not None,
        is_causal=options.is_causal,
    )


def _backward_config(query_shape, context: algebra.Context, options: algebra.Options, atomic: bool):
    return tuning.backward_config(
        head_dim=query_shape[-1],
        atomic=atomic,
        q_len=query_shape[1],
        is_causal=options.is_causal,
        segments=context.query_segment_ids is not None,
    )


def _mosaic_gpu_forward(inputs, context: algebra.Context, options: algebra.Options):
    from pallas_kernels.attention.hopper import fwd

    query, key, value, _, sinks = inputs
    return fwd.forward(
        query,
        key,
        value,
        sinks=sinks,
        query_segment_ids=context.query_segment_ids,
        kv_segment_ids=context.kv_segment_ids,
        config=_forward_config(query.shape, key.shape, context, options),
        **_kernel_options(context, options),
    )


def _mosaic_gpu_backward(
    inputs,
    context: algebra.Context,
    options: algebra.Options,
    saved: tuple,
    cotangents: tuple,
    *,
    atomic: bool = False,
):
    from pallas_kernels.attention.hopper import bwd

    (out, lse), (d_out, d_lse) = saved, cotangents
    query, key, value, _, sinks = inputs
    config = _backward_config(query.shape, context, options, atomic)
    found = bwd.backward(
        query,
        key,
        value,
        out,
        lse,
        d_out,
        d_lse=d_lse,
        sinks=sinks,
        config=config,
        query_segment_ids=context.query_segment_ids,
        kv_segment_ids=context.kv_segment_ids,
        **_kernel_options(context, options),
    )
    return algebra.Inputs(found.query, found.key, found.value, None, found.sinks)


def _mosaic_gpu_qkv_forward(inputs: Fused, context: algebra.Context, options: algebra.Options):
    from pallas_kernels.attention.hopper import fwd

    split = jax.eval_shape(Fused.split, inputs)
    return fwd.forward_qkv(
        inputs.qkv,
        sinks=inputs.sinks,
        segment_ids=context.query_segment_ids,
        config=_forward_config(split.query.shape, split.key.shape, context, options),
        **_kernel_options(context, options),
    )


def _mosaic_gpu_qkv_backward(
    inputs: Fused,
    context: algebra.Context,
    options: algebra.Options,
    saved: tuple,
    cotangents: tuple,
    *,
    atomic: bool = False,
):
    from pallas_kernels.attention.hopper import bwd

    (out, lse), (d_out, d_lse) = saved, cotangents
    shape = jax.eval_shape(Fused.split, inputs).query.shape
    config = _backward_config(shape, context, options, atomic)
    return Fused(
        *bwd.backward_qkv(
            inputs.qkv,
            out,
            lse,
            d_out,
            d_lse=d_lse,
            sinks=inputs.sinks,
            config=config,
            segment_ids=context.query_segment_ids,
            **_kernel_options(context, options),
        )
    )


def splitting(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention`, which takes separate arrays, on the fused buffer."""

    def of_fused(inputs: Fused, context: algebra.Context, options: algebra.Options):
        return attention(inputs.split(), context, options)

    return of_fused


_plain_qkv = splitting(reference.attention)
attention = _differentiable(blockwise.forward, blockwise.backward, reference.attention)
mosaic_gpu = _differentiable(_mosaic_gpu_forward, _mosaic_gpu_backward, reference.attention)
mosaic_gpu_atomic = _differentiable(
    _mosaic_gpu_forward, functools.partial(_mosaic_gpu_backward, atomic=True), reference.attention
)
FUSED = {  # what reads the fused buffer in place
    "mosaic_gpu": _differentiable(_mosaic_gpu_qkv_forward, _mosaic_gpu_qkv_backward, _plain_qkv),
    "mosaic_gpu_atomic": _differentiable(
        _mosaic_gpu_qkv_forward,
        functools.partial(_mosaic_gpu_qkv_backward, atomic=True),
        _plain_qkv,
    ),
}
