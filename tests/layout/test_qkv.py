"""Every pair of QKV layouts, bit for bit, against explicit index formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_jax import layout
from tests.support.compare import assert_bitwise_equal

UNGATED, GATED = ("grouped", "concat"), ("grouped_gated", "hf_gated_q")
PAIRS = [(s, t) for family in (UNGATED, GATED) for s in family for t in family]


def feature(name, part, head, channel, *, groups, q_per_kv, head_dim):
    """Where channel `channel` of head `head` of `part` lives; for hf_gated_q within the concatenation q, k, v."""
    heads = groups * q_per_kv
    if name == "concat":
        start = {"query": 0, "key": heads * head_dim, "value": (heads + groups) * head_dim}[part]
        return start + head * head_dim + channel
    if name == "hf_gated_q":
        if part in ("query", "gate"):
            return head * 2 * head_dim + (head_dim if part == "gate" else 0) + channel
        start = 2 * heads * head_dim + (groups * head_dim if part == "value" else 0)
        return start + head * head_dim + channel
    r = q_per_kv
    width = (r + 2 if name == "grouped" else 2 * r + 2) * head_dim
    g, j = divmod(head, r) if part in ("query", "gate") else (head, 0)
    before = {"query": 0, "gate": r, "key": r, "value": r + 1}[part]
    if name == "grouped_gated" and part in ("key", "value"):
        before += r
    return g * width + (before + j) * head_dim + channel


def reference(name, parts, *, groups, q_per_kv, head_dim):
    """The features of `parts` (name -> 1-D) in layout `name`, element by element."""
    total = sum(len(part) for part in parts.values())
    fused = np.zeros(total, next(iter(parts.values())).dtype)
    for part, features in parts.items():
        for index, value in enumerate(features):
            head, channel = divmod(index, head_dim)
            at = feature(
                name, part, head, channel, groups=groups, q_per_kv=q_per_kv, head_dim=head_dim
            )
            fused[at] = value
    return fused


def separate(draw_gate, *, groups, q_per_kv, head_dim):
    names = ["query", "key", "value"] + (["gate"] if draw_gate else [])
    heads = {"query": q_per_kv, "gate": q_per_kv, "key": 1, "value": 1}
    parts, start = {}, 0
    for name in names:
        size = groups * heads[name] * head_dim
        parts[name] = np.arange(start, start + size, dtype=np.int32)
        start += size
    return parts


def as_layout(name, fused, *, groups, q_per_kv, head_dim, axis=0):
    if name != "hf_gated_q":
        return fused
    cuts = np.cumsum([2 * groups * q_per_kv * head_dim, groups * head_dim])
    return layout.HFGatedQ(*np.split(fused, cuts, axis=axis))


def joined(name, fused, axis=0):
    return np.concatenate(fused, axis=axis) if name == "hf_gated_q" else np.asarray(fused)


sizes = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 7),
        "q_per_kv": st.integers(1, 16),
        "head_dim": st.sampled_from([1, 2, 3, 4, 8]),
    }
)


@pytest.mark.parametrize("source, target", PAIRS)
@settings(max_examples=25, deadline=None)
@given(size=sizes)
def test_every_pair_equals_the_index_formula(source, target, size):
    parts = separate(source in GATED, **size)
    fused = as_layout(source, reference(source, parts, **size), **size)
    spec = {"q_per_kv": size["q_per_kv"], "head_dim": size["head_dim"]}
    converted = layout.convert(fused, source=source, target=target, axis=0, **spec)
    assert_bitwise_equal(joined(target, converted), reference(target, parts, **size))
    back = layout.convert(converted, source=target, target=source, axis=0, **spec)
    assert_bitwise_equal(joined(source, back), joined(source, fused))


@pytest.mark.parametrize("source, target", PAIRS)
@settings(max_examples=15, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**32 - 1), width=st.integers(1, 3))
def test_orientation_and_rank(source, target, size, seed, width):
    """Torch weights and LoRA B's (axis 0), JAX kernels (axis -1) and biases agree; float bits survive, NaN too."""
    rng = np.random.default_rng(seed)
    spec = {"q_per_kv": size["q_per_kv"], "head_dim": size["head_dim"]}
    gates = size["q_per_kv"] if source in GATED else 0
    features = size["groups"] * (size["q_per_kv"] + 2 + gates) * size["head_dim"]
    weight = rng.integers(0, 2**16, (features, width), dtype=np.uint16).view(jnp.bfloat16)
    order = layout.convert(
        as_layout(source, np.arange(features), **size),
        source=source,
        target=target,
        axis=0,
        **spec,
    )
    expected = weight[joined(target, order)]

    torch_form = as_layout(source, weight, **size)
    converted = layout.convert(torch_form, source=source, target=target, axis=0, **spec)
    assert_bitwise_equal(joined(target, converted), expected)

    jax_form = as_layout(source, weight.T, axis=1, **size)
    converted = layout.convert(jax_form, source=source, target=target, **spec)
    assert_bitwise_equal(joined(target, converted, axis=1), expected.T)

    bias = as_layout(source, weight[:, 0], **size)
    converted = layout.convert(bias, source=source, target=target, axis=-1, **spec)
    assert_bitwise_equal(joined(target, converted), expected[:, 0])


@pytest.mark.parametrize("name", UNGATED + GATED)
@settings(max_examples=15, deadline=None)
@given(size=sizes)
def test_split_fuse_and_group_axes(name, size):
    parts = separate(name in GATED, **size)
    fused = as_layout(name, reference(name, parts, **size), **size)
    spec = {"q_per_kv": size["q_per_kv"], "head_dim": size["head_dim"]}
    split = layout.split_qkv(fused, layout=name, axis=0, **spec)
    for part in ("query", "key", "value", "gate"):
        assert_bitwise_equal(getattr(split, part), parts[part]) if part in parts else None
    again = layout.fuse_qkv(*split[:3], gate=split.gate, layout=name, axis=0, **spec)
    assert_bitwise_equal(joined(name, again), joined(name, fused))

    ours = layout.to_group_axes(fused, layout=name, axis=0, **spec)
    k, r, d = size["groups"], size["q_per_kv"], size["head_dim"]
    assert ours.shape == (k, (2 * r if name in GATED else r) + 2, d)
    assert_bitwise_equal(ours[:, :r], parts["query"].reshape(k, r, d))
    assert_bitwise_equal(ours[:, -2], parts["key"].reshape(k, d))
    assert_bitwise_equal(ours[:, -1], parts["value"].reshape(k, d))
    if name in GATED:
        assert_bitwise_equal(ours[:, r : 2 * r], parts["gate"].reshape(k, r, d))
    back = layout.from_group_axes(ours, layout=name, q_per_kv=r, axis=0)
    assert_bitwise_equal(joined(name, back), joined(name, fused))


@pytest.mark.parametrize("name", UNGATED + GATED)
@settings(max_examples=15, deadline=None)
@given(size=sizes, count=st.integers(1, 4), data=st.data())
def test_shards_split_alone_and_merge_back(name, size, count, data):
    size["groups"] *= count
    parts = separate(name in GATED, **size)
    fused = as_layout(name, reference(name, parts, **size), **size)
    spec = {"q_per_kv": size["q_per_kv"], "head_dim": size["head_dim"], "axis": 0}
    shards = layout.split_shards(fused, count, layout=name, **spec)
    index = data.draw(st.integers(0, count - 1))
    alone = layout.split_qkv(shards[index], layout=name, **spec)
    for part in parts:
        expected = np.split(parts[part], count)[index]
        assert_bitwise_equal(getattr(alone, part), expected)
    merged = layout.merge_shards(shards, layout=name, **spec)
    assert_bitwise_equal(joined(name, merged), joined(name, fused))


def test_grouped_split_views_and_group_axes_copy_nothing():
    fused = np.arange(2 * 3 * 4 * 5).reshape(5, 24)
    spec = {"layout": "grouped", "q_per_kv": 1, "head_dim": 4}
    ours = layout.to_group_axes(fused, **spec)
    assert np.shares_memory(ours, fused)
    assert np.shares_memory(layout.from_group_axes(ours, layout="grouped", q_per_kv=1), fused)
    concat = layout.split_qkv(fused, **(spec | {"layout": "concat"}))
    assert all(np.shares_memory(part, fused) for part in concat[:3])


def test_jax_arrays_stay_jax_and_trace():
    fused = jnp.arange(48, dtype=jnp.float32).reshape(2, 24)
    spec = {"source": "concat", "target": "grouped", "q_per_kv": 2, "head_dim": 3}
    traced = jax.jit(lambda x: layout.convert(x, **spec))(fused)
    assert isinstance(traced, jax.Array)
    assert_bitwise_equal(traced, layout.convert(np.asarray(fused), **spec))


@pytest.mark.torch
def test_torch_tensors_stay_torch():
    torch = pytest.importorskip("torch")
    weight = torch.arange(48.0).reshape(24, 2).to(torch.bfloat16)
    spec = {"q_per_kv": 2, "head_dim": 3, "axis": 0}
    for source, target in PAIRS:
        fused = layout.HFGatedQ(weight, weight[:6], weight[6:12]) if source in GATED else weight
        if source == "grouped_gated":
            fused = torch.cat([weight, weight[:12]])
        converted = layout.convert(fused, source=source, target=target, **spec)
        back = layout.convert(converted, source=target, target=source, **spec)
        pairs = zip(back, fused, strict=True) if source == "hf_gated_q" else [(back, fused)]
        assert all(isinstance(a, torch.Tensor) and torch.equal(a, b) for a, b in pairs)
    parameter = torch.nn.Parameter(weight)
    assert layout.convert_rope_pairing(
        parameter, source="half", target="adjacent", head_dim=6, axis=0
    ).shape == (24, 2)


BAD = [
    (
        lambda: layout.split_qkv(np.zeros(18), layout="grouped", q_per_kv=2, head_dim=3),
        r"`fused` must hold whole groups of \(q_per_kv \+ 2\) \* head_dim = 12 features along axis 0, got 18",
    ),
    (
        lambda: layout.split_qkv(np.zeros(18), layout="rows", q_per_kv=2, head_dim=3),
        "`layout` must be one of .*, got 'rows'",
    ),
    (
        lambda: layout.split_qkv(np.zeros(18), layout="grouped", q_per_kv=0, head_dim=3),
        "`q_per_kv` must be positive, got 0",
    ),
    (
        lambda: layout.split_qkv(np.zeros(12), layout="grouped", q_per_kv=2, head_dim=3, axis=1),
        r"`axis` must index the 1 dimensions of `fused` \(12,\), got 1",
    ),
    (
        lambda: layout.convert(
            np.zeros(12), source="grouped", target="hf_gated_q", q_per_kv=2, head_dim=3
        ),
        "`target` must not be a gated layout because `source` 'grouped' has no gate",
    ),
    (
        lambda: layout.convert(
            np.zeros(18), source="grouped_gated", target="concat", q_per_kv=2, head_dim=3
        ),
        "`target` must be a gated layout because `source` 'grouped_gated' has a gate",
    ),
    (
        lambda: layout.fuse_qkv(
            np.zeros(6), np.zeros(3), np.zeros(3), layout="grouped_gated", q_per_kv=2, head_dim=3
        ),
        "`gate` must be given for layout 'grouped_gated'",
    ),
    (
        lambda: layout.fuse_qkv(
            *[np.zeros(6)] * 3, gate=np.zeros(6), layout="concat", q_per_kv=1, head_dim=3
        ),
        "`gate` must be None for layout 'concat'",
    ),
    (
        lambda: layout.fuse_qkv(
            np.zeros(6), np.zeros(6), np.zeros(3), layout="concat", q_per_kv=2, head_dim=3
        ),
        "`key` must have 1 heads of 3 features along axis 0 to match `query`, got 6",
    ),
    (
        lambda: layout.fuse_qkv(
            np.zeros((2, 6)), *[np.zeros((3, 3))] * 2, layout="concat", q_per_kv=2, head_dim=3
        ),
        r"`key` must have the sizes of `query` \(2, 6\) outside axis 1, got \(3, 3\)",
    ),
    (
        lambda: layout.merge_shards(
            [np.zeros(12), np.zeros(18)], layout="grouped", q_per_kv=2, head_dim=3
        ),
        r"`shards\[1\]`: `fused` must hold whole groups",
    ),
    (
        lambda: layout.merge_shards([], layout="grouped", q_per_kv=2, head_dim=3),
        "`shards` must hold at least one shard",
    ),
    (
        lambda: layout.split_shards(np.zeros(36), 2, layout="grouped", q_per_kv=2, head_dim=3),
        "`count` must divide the 3 groups of `fused`, got 2",
    ),
    (
        lambda: layout.from_group_axes(np.zeros((2, 5, 3)), layout="grouped", q_per_kv=2),
        r"`array` must have shape \[..., K, 4, D, ...\] with K on axis 0, got \(2, 5, 3\)",
    ),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_are_named():
    parts = [np.zeros(3, np.float32), np.zeros(3, np.float16), np.zeros(3, np.float32)]
    with pytest.raises(
        TypeError, match="`key` must have the dtype of `query`, float32, got float16"
    ):
        layout.fuse_qkv(*parts, layout="grouped", q_per_kv=1, head_dim=3)
    with pytest.raises(TypeError, match="`fused` must be an array, got list"):
        layout.split_qkv([0.0] * 12, layout="grouped", q_per_kv=2, head_dim=3)
    with pytest.raises(TypeError, match=r"`head_dim` must be an int, got 3.0"):
        layout.split_qkv(np.zeros(12), layout="grouped", q_per_kv=2, head_dim=3.0)
