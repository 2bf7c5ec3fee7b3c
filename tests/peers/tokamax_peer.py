"""tokamax's `XlaChunkedDotProductAttention` answered by `gqa_attention`."""

import functools

import jax
from tokamax._src import quantization
from tokamax._src.ops.attention import xla_chunked

import pallas_kernels as pk


def forward(
    self, q, k, v, *, precision, logits_dtype, logits_scale, bias, logits_soft_cap, mask, dropout_mask, dropout_rate,
    paging_info, q_indices, k_indices, normalize_output, return_residuals, config,
):  # fmt: skip
    """tokamax's arguments, `[*B, T, H, D]`; we have our own dropout, and our precision is always the highest."""
    del self, precision, logits_dtype, dropout_rate, config
    if (
        dropout_mask is not None
        or paging_info is not None
        or return_residuals
        or not normalize_output
    ):
        raise NotImplementedError(
            "dropout masks, pages, residuals and unnormalised outputs are not ours"
        )
    q, k, v = map(quantization.as_array, (q, k, v))
    rows, (length, heads, _), keys = q.shape[:-3], q.shape[-3:], k.shape[-3]
    flat = lambda x: x.reshape(-1, *x.shape[-3:])
    whole = lambda x: (
        None if x is None else flat(jax.numpy.broadcast_to(x, (*rows, heads, length, keys)))
    )
    visible = mask.as_array(
        length if q_indices is None else q_indices, keys if k_indices is None else k_indices
    )
    out = pk.gqa_attention(
        flat(q), flat(k), flat(v), scale=float(logits_scale), bias=whole(bias), mask=whole(visible),
        logits_soft_cap=logits_soft_cap,
    )  # fmt: skip
    return out.reshape(*rows, *out.shape[1:]), None


# They read the annotations of the method.
_theirs = xla_chunked.XlaChunkedDotProductAttention
_theirs._fwd = functools.wraps(_theirs._fwd)(forward)
