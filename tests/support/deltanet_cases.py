"""Cases and float64 truth of a decode step of Gated DeltaNet, in NumPy: independent of the package."""

import itertools
from typing import Any

import numpy as np


def random_case(
    seed: int, *, rows: int, length: int, key_heads: int = 1, group: int = 2, key_dim: int = 16, value_dim: int = 16,
    width: int = 4, bias: bool = True, pool: int | None = None, extra: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Float64 operands of `gated_deltanet_step` by name, without lengths and slots; `extra` channels are not for it."""
    rng = np.random.default_rng(seed)
    features = 2 * key_dim + group * value_dim
    case = {
        "mixed": rng.standard_normal((rows, length, key_heads, features + extra)),
        "logits": 2.0 * rng.standard_normal((rows, length, key_heads, 2 * group)),
        "state": 0.3 * rng.standard_normal((pool or rows, key_heads * group, key_dim, value_dim)),
        "conv_state": rng.standard_normal((pool or rows, width, key_heads, features)),
        "conv_kernel": rng.uniform(-1.0, 1.0, (width, key_heads, features)) * width**-0.5,
        "A_log": np.log(rng.uniform(0.01, 16.0, (key_heads, group))),
        "dt_bias": rng.standard_normal((key_heads, group)),
    }
    if bias:
        case["conv_bias"] = 0.3 * rng.standard_normal((key_heads, features))
    return case


def nasty_case(seed: int, *, length: int, **sizes) -> dict[str, Any]:
    """Rows of extremes: full decay, none, every write at its strongest, no input at all."""
    case = random_case(seed, rows=5, length=length, **sizes)
    group = case["logits"].shape[-1] // 2
    case["logits"][0, ..., group:] = 40.0  # g down to -600
    case["logits"][1, ..., group:] = -40.0  # g of size 1e-17 and below
    case["logits"][2, ..., :group] = 20.0  # beta one rounding below 1 (or 2)
    both = np.where(case["logits"][3, ..., :group] > 0, 90.0, -90.0)  # exponentials overflow
    case["logits"][3] = np.concatenate([both, both], axis=-1)
    case["mixed"][4], case["conv_state"][4] = 0.0, 0.0
    return case


def truth(
    case, *, lengths=None, scale=None, use_qk_l2norm=True, allow_negative_eigenvalues=False
) -> tuple[np.ndarray, ...]:
    """`(out, final_state, final_conv_state, states)` in float64, head by head and token by token, without slots."""
    p = {name: np.asarray(x).astype(np.float64) for name, x in case.items()}
    rows, length = p["mixed"].shape[:2]
    heads, key_dim, value_dim = p["state"].shape[1:]
    group, features = p["A_log"].shape[1], p["conv_state"].shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    lengths = [length] * rows if lengths is None else lengths
    out = np.zeros((rows, length, heads, value_dim))
    states = np.zeros((rows, length, *p["state"].shape[1:]))
    final, windows = p["state"].copy(), p["conv_state"].copy()
    sigmoid = lambda x: np.exp(-np.logaddexp(0.0, -x))
    for b, t in itertools.product(range(rows), range(length)):
        if t < lengths[b]:
            windows[b] = np.concatenate([windows[b, 1:], p["mixed"][b, t, None, :, :features]])
            total = (p["conv_kernel"] * windows[b]).sum(0) + p.get("conv_bias", 0.0)
            feature = total * sigmoid(total)
            for h in range(heads):
                i, j = divmod(h, group)
                query, key = feature[i, :key_dim], feature[i, key_dim : 2 * key_dim]
                if use_qk_l2norm:
                    query, key = (x / np.sqrt((x * x).sum() + 1e-6) for x in (query, key))
                value = feature[i, 2 * key_dim + j * value_dim :][:value_dim]
                write, decay = p["logits"][b, t, i, j], p["logits"][b, t, i, group + j]
                beta = sigmoid(write) * (2.0 if allow_negative_eigenvalues else 1.0)
                g = -np.exp(p["A_log"][i, j]) * np.logaddexp(0.0, decay + p["dt_bias"][i, j])
                held = np.exp(g) * final[b, h]
                held = held + np.outer(key, beta * (value - held.T @ key))
                final[b, h], out[b, t, h] = held, scale * held.T @ query
        states[b, t] = final[b]
    return out, final, windows, states
