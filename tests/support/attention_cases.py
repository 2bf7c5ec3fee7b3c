"""Attention requests for property tests: their arrays, the float64 truth, and the implementations to hold against it.

Another implementation joins by one entry in `IMPLEMENTATIONS`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import tuning

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
# name -> whether it can run a case; a case it cannot run must raise NotImplementedError.
IMPLEMENTATIONS = {"reference": lambda case: True, "blockwise": lambda case: True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One request; every field but the shapes names an option that is on."""

    batch: int = 2
    lengths: tuple[int, int] = (37, 37)
    heads: tuple[int, int] = (2, 2)  # K, R
    dims: tuple[int, int] = (16, 16)  # D, Dv
    places: str = "all"
    mask: str = "none"
    bias: str = "none"
    sinks: bool = False
    soft_cap: float | None = None
    dropout: float = 0.0
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }
        return "-".join(
            f"{k}={v}".replace(" ", "").replace("(", "").replace(")", "")
            for k, v in changed.items()
        )

    def arrays(self, dtype=np.float64) -> tuple[dict[str, np.ndarray], dict]:
        """Differentiable arrays (numpy, rounded to `dtype`) and the other keyword arguments."""
        draw = np.random.default_rng(self.seed)
        (q_len, kv_len), (groups, group), (dim, value_dim) = self.lengths, self.heads, self.dims
        heads = groups * group
        normal = lambda *shape: np.asarray(jnp.asarray(draw.normal(size=shape)).astype(dtype))
        arrays = {
            "query": normal(self.batch, q_len, heads, dim),
            "key": normal(self.batch, kv_len, groups, dim),
            "value": normal(self.batch, kv_len, groups, value_dim),
        }
        shapes = {
            "full": (self.batch, heads, q_len, kv_len),
            "heads": (1, heads, q_len, kv_len),
            "keys": (self.batch, 1, 1, kv_len),
            "queries": (1, 1, q_len, 1),
        }
        if self.bias != "none":
            arrays["bias"] = normal(*shapes[self.bias])
        if self.sinks:
            arrays["sinks"] = normal(heads)
        options: dict = self._places(draw)
        if self.mask != "none":
            options["mask"] = draw.random(shapes[self.mask]) < 0.6
        if self.soft_cap is not None:
            options["logits_soft_cap"] = self.soft_cap
        if self.scale is not None:
            options["scale"] = self.scale
        if self.dropout:
            options |= {"dropout_rate": self.dropout, "dropout_key": jax.random.key(self.seed)}
        return arrays, options

    def _places(self, draw) -> dict:
        q_len, kv_len = self.lengths
        causal = {"is_causal": True}
        ids = lambda length: np.sort(draw.integers(-1, 3, (self.batch, length)), 1).astype(np.int32)
        order = lambda length: np.stack([draw.permutation(length) for _ in range(self.batch)])
        positions = {"query_positions": order(q_len), "kv_positions": order(kv_len)}
        segments = {"query_segment_ids": ids(q_len), "kv_segment_ids": ids(kv_len)}
        match self.places:
            case "all":
                return {}
            case "causal":
                return causal
            case "bottom_right":
                return causal | {"causal_alignment": "bottom_right"}
            case "window":
                return causal | {"sliding_window": 5}
            case "offset":
                return causal | {"q_offset": 7}
            case "offsets":
                return causal | {"q_offset": draw.integers(-3, kv_len, (self.batch,))}
            case "positions":
                return causal | positions | {"sliding_window": 9}
            case "segments":
                return segments
            case "documents":
                return causal | segments | {"sliding_window": 6}
            case "shuffled":
                return causal | segments | positions
            case "packed":
                assert self.batch == 1
                cuts = lambda length: np.array([0, *np.sort(draw.integers(0, length + 1, 3))])
                return causal | {"query_cu_seqlens": cuts(q_len), "kv_cu_seqlens": cuts(kv_len)}
        raise AssertionError(self.places)


def small_blocks(monkeypatch) -> None:
    """Tiles of 16 by 16, so that short sequences need many."""
    monkeypatch.setattr(tuning, "TILE_ROWS", 16)
    monkeypatch.setattr(tuning, "TILE_KEYS", 16)
    monkeypatch.setattr(tuning, "TILE_ELEMENTS", 512)


FACTORS = {
    "lengths": [(37, 37), (1, 1), (1, 41), (53, 29), (23, 64), (7, 1)],
    "heads": [(2, 2), (1, 16), (3, 1), (2, 5)],
    "dims": [(16, 16), (24, 17), (5, 3)],
    "places": [
        "all", "causal", "bottom_right", "window", "offset", "offsets", "positions", "segments",
        "documents", "shuffled", "packed",
    ],
    "mask": ["none", "full", "keys", "heads"],
    "bias": ["none", "full", "heads", "keys", "queries"],
    "sinks": [False, True],
    "soft_cap": [None, 2.0],
    "dropout": [0.0, 0.3],
    "scale": [None, -0.4],
}  # fmt: skip

EACH_OPTION_ALONE = [
    *(Case(places=p, batch=1 if p == "packed" else 2) for p in FACTORS["places"]),
    *(Case(mask=m) for m in FACTORS["mask"][1:]),
    *(Case(bias=b) for b in FACTORS["bias"][1:]),
    Case(sinks=True),
    Case(soft_cap=1.5),
    Case(dropout=0.3),
    Case(scale=0.7),
    Case(scale=-0.7),
    Case(heads=(1, 16)),
    Case(heads=(3, 1)),
    Case(heads=(2, 7)),
    *(Case(dims=d, lengths=(19, 35)) for d in ((64, 64), (96, 96), (128, 64), (256, 256), (17, 5))),
    *(Case(lengths=n) for n in ((1, 1), (1, 61), (61, 1), (127, 131))),
]


def covering(seed: int) -> list[Case]:
    """Cases in which every pair of values of two factors occurs at least once, greedily few."""
    draw = np.random.default_rng(seed)
    names = list(FACTORS)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(FACTORS[names[a]]))
        for j in range(len(FACTORS[names[b]]))
    }
    cases = []
    while pairs:
        best, best_new = None, set()
        for _ in range(60):
            row = [int(draw.integers(len(FACTORS[n]))) for n in names]
            a, i, b, j = min(pairs)
            row[a], row[b] = i, j
            new = {
                (a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)
            } & pairs
            if len(new) > len(best_new):
                best, best_new = row, new
        pairs -= best_new
        values = {n: FACTORS[n][i] for n, i in zip(names, best, strict=True)}
        batch = 1 if values["places"] == "packed" else 2
        cases.append(Case(batch=batch, seed=seed + len(cases), **values))
    return cases


def truth(arrays: dict[str, np.ndarray], options: dict) -> tuple[np.ndarray, np.ndarray]:
    """`(out, lse)` in float64 numpy, one query at a time; written from the contract, without dropout."""
    query, key, value = (np.asarray(arrays[n], np.float64) for n in DIFFERENTIABLE[:3])
    batch, q_len, heads, dim = query.shape
    kv_len, groups = key.shape[1:3]
    scale = options.get("scale", dim**-0.5)
    cap = options.get("logits_soft_cap")
    out = np.zeros((batch, q_len, heads, value.shape[-1]))
    lse = np.full((batch, q_len, heads), -np.inf)
    broadcast = lambda array: np.broadcast_to(array, (batch, heads, q_len, kv_len))
    bias = broadcast(np.asarray(arrays.get("bias", np.zeros((1, 1, 1, 1))), np.float64))
    seen = broadcast(options.get("mask", np.ones((1, 1, 1, 1), bool)))
    for b, t, h in np.ndindex(batch, q_len, heads):
        logits = scale * key[b, :, h // (heads // groups)] @ query[b, t, h]
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
        logits = logits + bias[b, h, t]
        keys = [
            s for s in range(kv_len) if seen[b, h, t, s] and _sees(options, b, t, s, q_len, kv_len)
        ]
        logits, values = logits[keys], value[b, keys, h // (heads // groups)]
        if "sinks" in arrays:
            logits = np.append(logits, np.float64(arrays["sinks"][h]))
            values = np.concatenate([values, np.zeros((1, value.shape[-1]))])
        if len(logits):
            lse[b, t, h] = np.logaddexp.reduce(logits)
            out[b, t, h] = np.exp(logits - lse[b, t, h]) @ values
    return out, lse


def _sees(options: dict, b: int, t: int, s: int, q_len: int, kv_len: int) -> bool:
    """Whether position and segment let query t see key s."""
    if "query_cu_seqlens" in options:
        starts, kv_starts = options["query_cu_seqlens"], options["kv_cu_seqlens"]
        inside = [
            i
            for i in range(len(starts) - 1)
            if starts[i] <= t < starts[i + 1] and kv_starts[i] <= s < kv_starts[i + 1]
        ]
        if not inside:
            return False
        query_position, position = t - starts[inside[0]], s - kv_starts[inside[0]]
        if options.get("causal_alignment") == "bottom_right":
            lengths, kv_lengths = np.diff(starts), np.diff(kv_starts)
            query_position += kv_lengths[inside[0]] - lengths[inside[0]]
    elif "query_positions" in options:
        query_position, position = options["query_positions"][b, t], options["kv_positions"][b, s]
    else:
        offset = options.get("q_offset", 0)
        if options.get("causal_alignment") == "bottom_right":
            offset = kv_len - q_len
        query_position, position = t + (offset if np.ndim(offset) == 0 else offset[b]), s
    if options.get("is_causal") and position > query_position:
        return False
    if "sliding_window" in options and position <= query_position - options["sliding_window"]:
        return False
    if "query_segment_ids" in options:
        mine, other = options["query_segment_ids"][b, t], options["kv_segment_ids"][b, s]
        return bool(mine == other and mine >= 0)
    return True
