"""Causal depthwise convolution in `jax.numpy`: W shifted products, exact across packed segments and padding.

Shifted products fuse into one pass over x; a grouped `conv_general_dilated` is many times slower on CPU, forward and
backward (benchmark suite `delta_rule_cpu`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._inert import finite_part, guarded
from pallas_kernels._precision import compute_dtype, l2_normalize


@functools.partial(jax.jit, static_argnames="activation", inline=True)
def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None,
    activation,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
):
    """Returns `(out [B, T, F], final_state [B, W, F])`; sums in float32 (float64 for float64)."""
    made = _convolved(x, weight, bias, initial_state, segment_ids)
    out = made.total if activation is None else guarded(activation, made.total)
    return made.masked(out).astype(x.dtype), made.final_state


@functools.partial(jax.jit, static_argnames=("key_dim", "value_dim", "use_qk_l2norm"), inline=True)
def causal_conv_qkv(
    mixed: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    key_dim: int,
    value_dim: int,
    use_qk_l2norm: bool,
):
    """`(query, key, value, final_state)`; arguments as for the operator. Rounded once, after the norm."""
    batch, length = mixed.shape[:2]
    width, heads, channels = weight.shape
    flat = heads * channels
    made = _convolved(
        mixed[..., :channels].reshape(batch, length, flat),
        weight.reshape(width, flat),
        None if bias is None else bias.reshape(flat),
        None if initial_state is None else initial_state.reshape(batch, width, flat),
        segment_ids,
    )
    out = made.masked(guarded(jax.nn.silu, made.total)).reshape(batch, length, heads, channels)
    query, key, value = jnp.split(out, (key_dim, 2 * key_dim), axis=-1)
    if use_qk_l2norm:
        query, key = l2_normalize(query), l2_normalize(key)
    value = value.reshape(batch, length, heads * (value.shape[-1] // value_dim), value_dim)
    final_state = made.final_state.reshape(batch, width, heads, channels)
    return *(part.astype(mixed.dtype) for part in (query, key, value)), final_state


@jax.custom_jvp
def _tap(window, weight: jax.Array):
    return window * weight


@_tap.defjvp
def _tap_jvp(primals: tuple, tangents: tuple):
    """An input that is not finite makes NaN of the outputs that see it, but of no weight's gradient by itself."""
    (window, weight), (d_window, d_weight) = primals, tangents
    return _tap(window, weight), d_window * weight + finite_part(window) * d_weight


class _Convolved(NamedTuple):
    """Sums of a convolution before activation and rounding.

    Attributes:
      total: `[B, T, F]`, in float32 or wider.
      real: None, or `[B, T]` bool: where it is not padding.
      final_state: `[B, W, F]`.
    """

    total: jax.Array
    real: jax.Array | None
    final_state: jax.Array

    def masked(self, out: jax.Array):
        """`out [B, T, F]`, 0 at padding."""
        return out if self.real is None else jnp.where(self.real[..., None], out, 0.0)


def _convolved(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> _Convolved:
    batch, length, features = x.shape
    width = weight.shape[0]
    compute = compute_dtype(x.dtype)
    if initial_state is None:
        before = jnp.zeros((batch, width, features), x.dtype)
    else:
        before = initial_state.astype(x.dtype)
    history = jnp.concatenate([before, x], axis=1)  # token t stands at W + t
    rows = None
    if segment_ids is not None:
        rows = _Rows.of(segment_ids, width)
        history = jax.vmap(_place)(history, before, rows.first)

    total = jnp.zeros((batch, length, features), compute)
    for lag in range(width):
        window = history[:, width - lag : width - lag + length]
        if rows is not None:
            same = rows.ids[:, width - lag : width - lag + length] == segment_ids
            window = jnp.where((same & rows.real)[..., None], window, 0)
        tap = weight[width - 1 - lag].astype(compute)[None, None]
        total = total + _tap(window.astype(compute), tap)
    if bias is not None:
        total = total + bias.astype(compute)[None, None]
    if rows is None:
        return _Convolved(total, None, history[:, length:])
    final = jax.vmap(_last_window, in_axes=(0, 0, 0, None))(history, rows.ids, rows.end, width)
    return _Convolved(total, rows.real, final)


def final_state(
    mixed: jax.Array,
    weight: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
):
    """The final state of `causal_conv_qkv` alone: W rows gathered, the rest of `mixed` not touched."""
    batch, length = mixed.shape[:2]
    width, _, channels = weight.shape
    before = initial_state
    if before is None:
        before = jnp.zeros((batch, *weight.shape), mixed.dtype)
    first, end = (jnp.full((batch,), n, jnp.int32) for n in (0, length))
    rows = None
    if segment_ids is not None:
        rows = _Rows.of(segment_ids, width)
        first, end = rows.first, rows.end

    def gather(x, places):
        return jnp.take_along_axis(x, places[:, :, None, None], axis=1, mode="clip")

    places = end[:, None] - width + jnp.arange(width, dtype=jnp.int32)[None]
    window = gather(mixed, places)[..., :channels]
    old = gather(before.astype(mixed.dtype), places - first[:, None] + width)
    window = jnp.where((places < first[:, None])[..., None, None], old, window)
    if rows is None:
        return window
    own = jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None))(rows.ids, rows.end, width)
    return jnp.where((own == own[:, -1:])[..., None, None], window, 0)


def taps(segment_ids, width: int, *, has_state: bool, size: int):
    """`(taps, first)`: what each token sees, for a kernel.

    Args:
      segment_ids: `[B, T]`.
      width: W.
      has_state: whether there is an initial state to see.
      size: T', the length of the result.

    Returns:
      taps: `[B, T']` int32; bit l is set if a token sees the place l before it. Padding sees nothing, not even itself.
      first: `[B]` int32, each row's first real token, before which the initial state ends.
    """
    length = segment_ids.shape[1]
    rows = _Rows.of(segment_ids, width)
    place = jnp.arange(length, dtype=jnp.int32)[None]
    seen = jnp.zeros(segment_ids.shape, jnp.int32)
    for lag in range(width):
        same = (rows.ids[:, width - lag : width - lag + length] == segment_ids) & rows.real
        if not has_state:
            same = same & (place - lag >= rows.first[:, None])
        seen = seen | jnp.where(same, jnp.int32(1 << lag), 0)
    return jnp.pad(seen, ((0, 0), (0, size - length))), rows.first


def first_real(segment_ids: jax.Array | None):
    """`[B]`, each row's first real token; 0 in a row of padding."""
    return _Rows.of(segment_ids, 1).first


class _Rows(NamedTuple):
    """Where the real tokens of each row lie.

    Attributes:
      real: `[B, T]` bool.
      first, end: `[B]`, the first real token and one past the last; both 0 in a row of padding.
      ids: `[B, W + T]`, the segment of each place of the history; the W places before the first real token, which
        the initial state fills, have that token's.
    """

    real: jax.Array
    first: jax.Array
    end: jax.Array
    ids: jax.Array

    @classmethod
    def of(cls, segment_ids, width: int) -> "_Rows":
        real = segment_ids >= 0
        length = segment_ids.shape[1]
        place = jnp.arange(length, dtype=jnp.int32)[None]
        end = jnp.max(jnp.where(real, place + 1, 0), axis=1, initial=0)
        first = jnp.min(jnp.where(real, place, length), axis=1, initial=length)
        first = jnp.where(end == 0, 0, first)
        own = jnp.zeros_like(segment_ids, shape=(segment_ids.shape[0], 1))
        if length:
            own = jnp.take_along_axis(segment_ids, first[:, None], axis=1)
        before = jnp.broadcast_to(own, (own.shape[0], width))
        ids = jnp.pad(segment_ids, ((0, 0), (width, 0)), constant_values=-1)
        return cls(real, first, end, jax.vmap(_place)(ids, before, first))


def _place(history, before, first):
    """One row's `history` with `before` written where it ends at the first real token."""
    return jax.lax.dynamic_update_slice_in_dim(history, before, first, axis=0)


def _last_window(history, ids, end, width: int):
    """The W inputs up to the last real token; those of other segments and of padding are 0."""
    window = jax.lax.dynamic_slice_in_dim(history, end, width, axis=0)
    own = jax.lax.dynamic_slice_in_dim(ids, end, width, axis=0)
    return jnp.where((own == own[-1])[:, None], window, 0)
