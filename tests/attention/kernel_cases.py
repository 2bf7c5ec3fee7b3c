"""Random attention problems and their float32 truth, shared by the tests of the Mosaic GPU kernels."""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk


def inputs(seed, *, q_len, kv_len=None, batch=1, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16):
    """Query, key, value and the gradient of the output."""
    random = np.random.default_rng(seed)
    kv_len = q_len if kv_len is None else kv_len
    shapes = [(batch, q_len, heads, dim)] + [(batch, kv_len, kv_heads, dim)] * 2
    shapes.append(shapes[0])
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def packed_ids(seed, batch, length, documents=3, padding=True):
    """Ids of packed documents of random lengths; with `padding` the last one is negative."""
    random = np.random.default_rng(seed)
    cuts = np.sort(random.integers(1, length, (batch, documents - 1)), axis=1)
    ids = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
    if padding:
        ids = np.where(ids == documents - 1, -1, ids)
    return jnp.asarray(ids, jnp.int32)


def truth(query, key, value, *, offset=None, **options):
    """The reference in float32: `(out, lse)`."""
    arrays = (x.astype(jnp.float32) for x in (query, key, value))
    return tuple(
        pk.gqa_attention_with_lse(*arrays, q_offset=offset, implementation="reference", **options)
    )


def gradients(query, key, value, cotangent, *, sinks=None, lse_cotangent=None, **options):
    """Float32 gradients of the reference with respect to query, key, value (and sinks)."""
    extra = () if sinks is None else (sinks,)

    def run(query, key, value, *sinks):
        return truth(query, key, value, sinks=sinks[0] if sinks else None, **options)

    arrays = [x.astype(jnp.float32) for x in (query, key, value, *extra)]
    (out, lse), pull = jax.vjp(run, *arrays)
    if lse_cotangent is None:
        lse_cotangent = jnp.zeros_like(lse)
    return pull((cotangent.astype(out.dtype), lse_cotangent))
