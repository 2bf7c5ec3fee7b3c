"""Cases and float64 truth of the gated delta rule, in NumPy: independent of the package."""

import dataclasses

import numpy as np

NAMES = ("query", "key", "value", "g", "beta", "initial_state")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: float64 operands, cotangents, and where the tokens belong."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    initial_state: np.ndarray
    d_out: np.ndarray
    d_final: np.ndarray
    segment_ids: np.ndarray | None = None
    cu_seqlens: np.ndarray | None = None

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """In the order of `NAMES`."""
        return tuple(getattr(self, name) for name in NAMES)


def random_case(
    seed: int, batch: int, length: int, key_heads: int, value_heads: int, key_dim: int,
    value_dim: int, *, cu_seqlens=None, segment_ids=None, decay: float = 0.3,
) -> Case:  # fmt: skip
    """Unit keys and queries, moderate gates; float32-representable numbers in float64 arrays."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = (sequences, value_heads, key_dim, value_dim)
    arrays = {
        "query": unit(normal(batch, length, key_heads, key_dim)),
        "key": unit(normal(batch, length, key_heads, key_dim)),
        "value": normal(batch, length, value_heads, value_dim),
        "g": -decay * rng.exponential(size=(batch, length, value_heads)),
        "beta": rng.uniform(0.05, 0.95, (batch, length, value_heads)),
        "initial_state": 0.3 * normal(*states),
        "d_out": normal(batch, length, value_heads, value_dim),
        "d_final": normal(*states),
    }
    arrays = {name: x.astype(np.float32).astype(np.float64) for name, x in arrays.items()}
    return Case(**arrays, segment_ids=segment_ids, cu_seqlens=cu_seqlens)


def nasty_cases(seed: int, length: int, dim: int = 32) -> dict[str, Case]:
    """Inputs that break chunked implementations."""
    case = random_case(seed, 1, length, 1, 2, dim, dim)
    rng = np.random.default_rng(seed + 1)
    single = lambda x: np.asarray(x, np.float32).astype(np.float64)
    change = lambda **arrays: dataclasses.replace(case, **{k: single(v) for k, v in arrays.items()})
    same_key = np.broadcast_to(case.key[:, :1], case.key.shape)
    near = same_key + 1e-3 * rng.standard_normal(case.key.shape)
    jumps = np.where(rng.random(case.g.shape) < 0.05, -60.0, case.g)
    holes = rng.random((*case.key.shape[:3], 1)) < 0.2
    near_unit = near / np.linalg.norm(near, axis=-1, keepdims=True)
    return {
        "equal keys": change(key=same_key, beta=np.full_like(case.beta, 0.99), g=0 * case.g),
        "near-identical keys": change(
            key=near_unit, beta=np.full_like(case.beta, 0.99), g=0 * case.g
        ),
        "beta above 1": change(beta=2 * case.beta),
        "no decay": change(g=0 * case.g),
        "steps of -60": change(g=jumps),
        "strong decay": change(g=-16 * np.log1p(np.exp(rng.standard_normal(case.g.shape)))),
        "zero rows": change(key=np.where(holes, 0, case.key), query=np.where(holes, 0, case.query)),
        "positive keys": change(key=np.abs(case.key)),
    }


def recurrence(case: Case, *, scale: float | None = None):
    """`(out, final_state, gradients by name)` of a case, token by token in float64, differentiated by hand.

    The gradients are those of `sum(out * d_out) + sum(final_state * d_final)`.
    """
    scale = case.query.shape[-1] ** -0.5 if scale is None else scale
    group = case.value.shape[2] // case.key.shape[2]
    out, final = np.zeros_like(case.value), case.initial_state.copy()
    grads = {name: np.zeros_like(x) for name, x in zip(NAMES, case.operands, strict=True)}
    grads["initial_state"][:] = case.d_final  # passes through where there is no token
    for row, tokens, enter, leave in _sequences(case):
        for head in range(case.value.shape[2]):
            place = (row, tokens, head)
            shared = (row, tokens, head // group)
            nothing = np.zeros_like(final[0, head])
            start = nothing if enter is None else case.initial_state[enter, head]
            d_last = nothing if leave is None else case.d_final[leave, head]
            per_channel = case.g.ndim == 4
            result = _one_head(
                case.query[shared], case.key[shared], case.value[place],
                case.g[shared if per_channel else place], case.beta[place], start,
                case.d_out[place], d_last, scale,
            )  # fmt: skip
            out[place] = result["out"]
            if leave is not None:
                final[leave, head] = result["final"]
            grads["query"][shared] += result["query"]
            grads["key"][shared] += result["key"]
            grads["value"][place] = result["value"]
            grads["g"][shared if per_channel else place] += result["g"]
            grads["beta"][place] = result["beta"]
            if enter is not None:
                grads["initial_state"][enter, head] = result["state"]
    return out, final, grads


def _sequences(case: Case):
    """Yields `(row, token indices, state it starts from or None, state it yields or None)`."""
    if case.cu_seqlens is not None:
        bounds = zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True)
        for i, (begin, end) in enumerate(bounds):
            yield 0, np.arange(begin, end), i, i
        return
    for row in range(case.value.shape[0]):
        tokens = np.arange(case.value.shape[1])
        ids = np.zeros_like(tokens) if case.segment_ids is None else case.segment_ids[row]
        tokens = tokens[ids >= 0]
        parts = np.split(tokens, np.flatnonzero(np.diff(ids[tokens])) + 1)
        for i, part in enumerate(parts):
            yield row, part, row if i == 0 else None, row if i == len(parts) - 1 else None


def _one_head(q, k, v, g, beta, state, d_out, d_final, scale):
    """One sequence of one head, forward and backward. g is `[T]` or `[T, Dk]`."""
    decays = np.exp(g[..., None] if g.ndim == 2 else g[..., None, None])
    before, residuals, writes, states, out = [], [], [], [], np.zeros_like(v)
    for t in range(len(v)):
        decayed = decays[t] * state
        residual = v[t] - decayed.T @ k[t]
        state = decayed + np.outer(k[t], beta[t] * residual)
        out[t] = scale * state.T @ q[t]
        before.append(decayed)
        residuals.append(residual)
        writes.append(beta[t] * residual)
        states.append(state)
    grads = {n: np.zeros_like(x) for n, x in zip(NAMES, (q, k, v, g, beta), strict=False)}
    d_state = d_final.copy()
    for t in reversed(range(len(v))):
        d_state = d_state + scale * np.outer(q[t], d_out[t])
        grads["query"][t] = scale * states[t] @ d_out[t]
        d_write = d_state.T @ k[t]
        grads["value"][t] = beta[t] * d_write
        grads["beta"][t] = d_write @ residuals[t]
        grads["key"][t] = d_state @ writes[t] - beta[t] * before[t] @ d_write
        d_decayed = d_state - beta[t] * np.outer(k[t], d_write)
        per_channel = (d_decayed * before[t]).sum(1)
        grads["g"][t] = per_channel if g.ndim == 2 else per_channel.sum()
        d_state = decays[t] * d_decayed
    grads = {name: grads[name] for name in NAMES[:5]}
    return {**grads, "out": out, "final": state, "state": d_state}
