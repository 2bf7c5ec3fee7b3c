"""Truth and inputs for the causal convolution's tests."""

from typing import Any

import numpy as np

KINDS = ("none", "packed", "right padding", "left padding", "everywhere")


def oracle(x, weight, bias, silu, initial_state, ids):
    """Float64, one token at a time; each row's history is a list of (segment, input)."""
    batch, _, features = x.shape
    width = len(weight)
    out, final = np.zeros_like(x), np.zeros((batch, width, features))

    def window(places, t, own):
        taps = (places.get(s, (None, None)) for s in range(t - width + 1, t + 1))
        return [tap if segment == own else np.zeros(features) for segment, tap in taps]

    for b in range(batch):
        real = np.flatnonzero(ids[b] >= 0)
        own = ids[b, real[0]] if len(real) else 0
        begin = real[0] if len(real) else 0
        places = {begin - width + w: (own, initial_state[b, w]) for w in range(width)}
        places |= {t: (ids[b, t], x[b, t]) for t in real}
        for t in real:
            total = (
                sum(w * tap for w, tap in zip(weight, window(places, t, ids[b, t]), strict=True))
                + bias
            )
            out[b, t] = total / (1 + np.exp(-total)) if silu else total
        end = real[-1] if len(real) else -1
        final[b] = window(places, end, ids[b, end] if len(real) else own)
    return out, final


def arrays(seed, length, width, features=3, batch=4):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, features), (width, features), (features,), (batch, width, features)
    return tuple(rng.standard_normal(s).astype(np.float32).astype(np.float64) for s in shapes)


def segments(kind, length, batch=4):
    rng = np.random.default_rng(length)
    place, cut = np.arange(length)[None], rng.integers(0, length + 1, (batch, 1))
    return {
        "none": np.zeros((batch, length), int),
        "packed": np.sort(rng.integers(0, 4, (batch, length)), axis=1),
        "right padding": np.where(place < cut, 5, -1),
        "left padding": np.where(place < cut, -2, 5),
        "everywhere": np.where(rng.random((batch, length)) < 0.4, -1, np.sort(rng.integers(0, 3, (batch, length)), 1)),
    }[kind]  # fmt: skip


def random_qkv(
    seed,
    length,
    width,
    *,
    key_dim,
    value_dim,
    batch=2,
    heads=2,
    group=2,
    spare=0,
    dtype: Any = "float32",
):
    """`(mixed, weight, bias, initial_state)` as values of `dtype`, in float64."""
    rng = np.random.default_rng(seed)
    channels = 2 * key_dim + group * value_dim
    shapes = (
        (batch, length, heads, channels + spare),
        (width, heads, channels),
        (heads, channels),
        (batch, width, heads, channels),
    )
    return tuple(rng.standard_normal(s).astype(dtype).astype(np.float64) for s in shapes)


def oracle_qkv(mixed, weight, bias, initial_state, ids, *, key_dim, value_dim, normalise):
    """`(query, key, value, final_state)` of the fused operator in float64."""
    width, heads, channels = weight.shape
    batch, length = ids.shape
    flat = lambda x: x.reshape(*x.shape[:-2], heads * channels)
    out, final = oracle(
        flat(mixed[..., :channels]), flat(weight), flat(bias), True, flat(initial_state), ids
    )
    out = out.reshape(batch, length, heads, channels)
    query, key, value = np.split(out, (key_dim, 2 * key_dim), axis=-1)
    if normalise:
        query, key = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (query, key))
    value = value.reshape(batch, length, heads * (value.shape[-1] // value_dim), value_dim)
    return query, key, value, final.reshape(batch, width, heads, channels)
