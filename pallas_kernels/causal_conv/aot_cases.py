"""The programs of the delta rule's convolution that `pallas_kernels.aot` knows by name."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels._precision import l2_normalize
from pallas_kernels.aot.case import Case, Program


def _conv(label: str, implementation: str, *, backward: bool, packed: bool = False) -> Case:
    """8192 tokens of a fused projection of 16 key heads and 32 value heads, output gates included."""
    length, heads, dim, width, struct = 8192, 16, 128, 4, jax.ShapeDtypeStruct
    channels = 4 * dim

    def build() -> Program:
        mixed = struct((1, length, heads, channels + 2 * dim), jnp.bfloat16)
        weight = struct((1, width, heads, channels), jnp.bfloat16)
        ids = struct((1, length), jnp.int32)
        key = struct((1, length, heads, dim), jnp.bfloat16)
        value = struct((1, length, 2 * heads, dim), jnp.bfloat16)

        def causal_conv1d_qkv(mixed, weight, *ids):
            if implementation == "apart":
                return _apart(mixed[..., :channels], weight[0], dim)
            return pk.causal_conv1d_qkv(
                mixed,
                weight[0],
                key_dim=dim,
                value_dim=dim,
                use_qk_l2norm=True,
                segment_ids=ids[0] if ids else None,
                implementation=implementation,
            )[:3]

        def causal_conv1d_qkv_backward(mixed, weight, *rest):
            *ids, d_query, d_key, d_value = rest
            _, pull = jax.vjp(lambda m, w: causal_conv1d_qkv(m, w, *ids), mixed, weight)
            return pull((d_query, d_key, d_value))

        operands = (mixed, weight, ids) if packed else (mixed, weight)
        if backward:
            return causal_conv1d_qkv_backward, (*operands, key, key, value)
        return causal_conv1d_qkv, operands

    # Bytes of the channels that are read, and of all outputs.
    values = 2.0 * length * heads * channels
    flops = 2.0 * width * length * heads * channels
    direction = "backward" if backward else "forward"
    return Case(
        f"causal_conv1d_qkv/{direction}/{label}",
        build,
        flops * (3 if backward else 1),
        values * (3 if backward else 2),
        (0,) if implementation == "mosaic_gpu" else (),
    )


def _apart(mixed, weight, dim: int):
    """The same by two operators: the convolution, then the norm as the delta rule's kernels have it made by XLA."""
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    out = pk.causal_conv1d(flat(mixed), flat(weight), activation="silu").out.reshape(mixed.shape)
    query, key = (l2_normalize(x) for x in (out[..., :dim], out[..., dim : 2 * dim]))
    value = out[..., 2 * dim :].reshape(*mixed.shape[:2], -1, dim)
    return query.astype(out.dtype), key.astype(out.dtype), value


def _causal_conv(length: int = 4096, width: int = 4, features: int = 8192) -> Case:
    """The short convolution in front of the delta rule, with the window of the tokens before."""
    struct = jax.ShapeDtypeStruct

    def build() -> Program:
        x = struct((1, length, features), jnp.bfloat16)
        window = struct((1, width, features), jnp.bfloat16)

        def causal_conv1d(x, window, weight):
            return tuple(pk.causal_conv1d(x, weight[0], activation="silu", initial_state=window))

        return causal_conv1d, (x, window, window)

    moved = 2.0 * features * (2 * length + 3 * width)
    name = f"causal_conv1d/forward/t{length}"
    return Case(name, build, 2.0 * length * features * width, moved, donated=(1,))


def cases() -> list[Case]:
    """Every registered case: the kernels, and what XLA makes of the same."""
    fused = [
        _conv(label, implementation, backward=backward, packed=packed)
        for backward in (False, True)
        for label, implementation, packed in (
            ("8k", "mosaic_gpu", False),
            ("8k-packed", "mosaic_gpu", True),
            ("8k-xla", "reference", False),
            ("8k-apart", "apart", False),
        )
    ]
    return [_causal_conv(), *fused]
