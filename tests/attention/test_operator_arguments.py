"""Every argument of every public operator: what is wrong is refused by name, before anything is computed."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import _dispatch
from tests.support.compare import assert_bitwise_equal


def array(*shape, dtype=np.float32):
    size = int(np.prod(shape))
    if np.dtype(dtype).kind != "f":
        return np.zeros(shape, dtype)
    return np.linspace(-0.9, -0.1, size, dtype=dtype).reshape(shape)


ids = lambda *shape: array(*shape, dtype=np.int32)
ATTENTION = dict(
    is_causal=True, sliding_window=3, logits_soft_cap=2.0, scale=0.5, sinks=array(4), bias=array(1, 1, 6, 6),
    mask=np.ones((1, 1, 6, 6), bool),
)  # fmt: skip
APART = dict(query=array(2, 6, 4, 8), key=array(2, 6, 2, 8), value=array(2, 6, 2, 8)) | dict(
    query_segment_ids=ids(2, 6), kv_segment_ids=ids(2, 6), query_positions=ids(2, 6), kv_positions=ids(2, 6),
)  # fmt: skip
TOKENS = lambda length: dict(
    query=array(2, length, 2, 4), key=array(2, length, 2, 4), value=array(2, length, 4, 8),
    g=array(2, length, 4), beta=array(2, length, 4), scale=0.5, use_qk_l2norm=True,
)  # fmt: skip
VALID = {
    "gqa_attention": APART | ATTENTION,
    "gqa_attention_with_lse": APART | ATTENTION,
    "gqa_attention_qkv": dict(qkv=array(2, 6, 2, 4, 8), segment_ids=ids(2, 6), positions=ids(2, 6)) | ATTENTION,
    "decode_attention": dict(
        query=array(2, 1, 4, 8), key_cache=array(2, 2, 16, 8), value_cache=array(2, 2, 16, 8),
        lengths=ids(2) + 7, key_scale=array(2, 2, 16), value_scale=array(2, 2, 16), sliding_window=3,
        sinks=array(4), logits_soft_cap=2.0, scale=0.5,
    ),
    "gated_delta_rule": TOKENS(6) | dict(initial_state=array(2, 4, 4, 8), segment_ids=ids(2, 6), chunk_size=16),
    "gated_delta_rule_step": TOKENS(1) | dict(state=array(5, 4, 4, 8), slots=np.array([3, 1]), return_states=True),
    "causal_conv1d": dict(
        x=array(2, 5, 3), weight=array(4, 3), bias=array(3), activation="silu", initial_state=array(2, 4, 3),
        segment_ids=ids(2, 5),
    ),
    "causal_conv1d_qkv": dict(
        mixed=array(2, 5, 2, 24), weight=array(4, 2, 24), key_dim=4, value_dim=8, bias=array(2, 24),
        use_qk_l2norm=True, initial_state=array(2, 4, 2, 24), segment_ids=ids(2, 5),
    ),
    "gated_deltanet_step": dict(
        mixed=array(2, 1, 2, 24), logits=array(2, 1, 2, 4), state=array(5, 4, 4, 8), conv_state=array(5, 4, 2, 24),
        conv_kernel=array(4, 2, 24), conv_bias=array(2, 24), A_log=array(2, 2), dt_bias=array(2, 2),
        lengths=ids(2) + 1, slots=np.array([3, 1]), scale=0.5, use_qk_l2norm=True,
        allow_negative_eigenvalues=True, return_states=True,
    ),
}  # fmt: skip
# Not in VALID, because they exclude others: each alone.
OTHERS = {
    "dropout_rate": 0.5, "dropout_key": jax.random.key(0), "dropout_offset": (0, 1), "q_offset": 3,
    "causal_alignment": "bottom_right", "implementation": "reference",
    **dict.fromkeys(("cu_seqlens", "query_cu_seqlens", "kv_cu_seqlens"), np.array([0, 6])),
}  # fmt: skip
POSITIVE = {"sliding_window", "logits_soft_cap", "chunk_size", "key_dim", "value_dim"}


def test_explain_knows_every_public_operator():
    public = {
        name
        for name, value in vars(pk).items()
        if inspect.isfunction(value) and "implementation" in inspect.signature(value).parameters
    }
    assert public == set(_dispatch.OPERATORS) == set(VALID)
    for name in public:
        explanation = pk.explain(getattr(pk, name), **VALID[name])
        assert explanation.operator == name
        assert explanation.reasons["reference"] in ("", None) or explanation.chosen != "reference"
        parameters = set(inspect.signature(_dispatch.OPERATORS[name]).parameters)
        assert parameters <= set(VALID[name]) | set(OTHERS)


def test_explain_hears_what_is_asked_for():
    valid = VALID["causal_conv1d_qkv"]
    asked = pk.explain("causal_conv1d_qkv", **valid, implementation="mosaic_gpu")
    assert asked.chosen is None
    assert asked.reasons["reference"] == "mosaic_gpu is requested"
    asked = pk.explain("gqa_attention", **VALID["gqa_attention"], implementation="reference")
    assert (asked.chosen, asked.reasons["blockwise"]) == ("reference", "reference is requested")
    for name, valid in VALID.items():
        for wrong in ("fast", 3, ["reference"]):
            with pytest.raises(ValueError, match="`implementation` must be None or one of"):
                pk.explain(name, **valid, implementation=wrong)
    for wrong in ("attention", 3, lambda x: x):
        with pytest.raises(ValueError, match="`operator` must be one of gqa_attention, "):
            pk.explain(wrong)


def test_explain_computes_nothing_and_leaves_no_mode_behind():
    name, valid = "gated_delta_rule_step", VALID["gated_delta_rule_step"]
    shapes = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype) if hasattr(value, "shape") else value
        for key, value in valid.items()
    }
    assert pk.explain(name, **shapes).chosen == "reference"
    with pytest.raises(ValueError, match="`slots` must have shape"):
        pk.explain(name, **shapes | {"slots": np.zeros(3, int)})
    assert not _dispatch.EXPLAINING.get()


def wrong_values(name, valid):
    """What no implementation may take in place of `valid`."""
    if isinstance(valid, np.ndarray):
        yield from (valid.tolist(), "x", valid[None], valid[..., None], valid.astype(complex))
        yield valid.astype(object)
        yield valid.astype(np.float32) if valid.dtype.kind in "ib" else valid.astype(np.int32)
    elif isinstance(valid, bool):
        yield from ("yes", 1, None, np.ones(1, bool), 0.0)
    elif isinstance(valid, str):
        yield from ("x", 3, np.ones(3), ["silu"])
    elif isinstance(valid, int | float):
        yield from ("x", True, [valid], 1j, np.ones(2), jnp.ones(()), float("nan"), float("inf"))
        if name in POSITIVE:
            yield from (0, -1)
        if isinstance(valid, int):
            yield 1.5


@pytest.mark.parametrize("operator", VALID)
def test_what_is_wrong_is_refused_by_name(operator):
    valid = VALID[operator]
    for name, value in valid.items():
        for wrong in wrong_values(name, value):
            with pytest.raises((TypeError, ValueError)) as caught:
                pk.explain(operator, **(valid | {name: wrong}))
            assert f"`{name}`" in str(caught.value), (name, wrong, caught.value)
            assert not isinstance(caught.value, jax.errors.JAXTypeError)


@pytest.mark.parametrize("operator", VALID)
def test_what_is_traced_but_static_is_refused_by_name(operator):
    for name, value in VALID[operator].items():
        if not isinstance(value, int | float):
            continue
        call = lambda x, name=name: pk.explain(operator, **(VALID[operator] | {name: x})).chosen
        with pytest.raises(TypeError, match=f"`{name}` must be "):
            jax.eval_shape(call, jax.ShapeDtypeStruct((), jnp.asarray(value).dtype))


DROPOUT = dict(dropout_rate=0.5, dropout_key=OTHERS["dropout_key"])


@pytest.mark.parametrize("operator", [name for name in VALID if name.startswith("gqa")])
def test_dropout_is_refused_by_name(operator):
    valid = VALID[operator] | DROPOUT
    assert pk.explain(operator, **valid).chosen == "blockwise"
    assert pk.explain(operator, **valid | {"dropout_rate": np.float32(0.5)}).chosen == "blockwise"
    assert pk.explain(operator, **valid | {"dropout_key": jax.random.PRNGKey(0)}).chosen
    wrong = [
        *(("dropout_rate", value) for value in ("x", -0.1, 1, float("nan"), None, np.ones(1))),
        *(("dropout_key", value) for value in (3, "x", np.ones(2), jax.random.split(jax.random.key(0)))),
        *(("dropout_offset", value) for value in (3, "ab", (1,))),
        *(("causal_alignment", value) for value in ("left", 3, None, np.ones(2))),
    ]  # fmt: skip
    for name, value in wrong:
        with pytest.raises((TypeError, ValueError), match=f"`{name}"):
            pk.explain(operator, **valid | {name: value})


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("operator", VALID)
def test_numpy_arrays_and_numbers_work(operator, implementation):
    valid = dict(VALID[operator])
    if implementation == "reference" and "chunk_size" in valid:
        del valid["chunk_size"]
    scalars = {bool: np.bool_, int: np.int64, float: np.float32}
    numpy = {name: scalars.get(type(value), lambda x: x)(value) for name, value in valid.items()}
    jax_arrays = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in valid.items()
    }
    run = getattr(pk, operator)
    expected = run(**jax_arrays, implementation=implementation)
    found = run(**numpy, implementation=implementation)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(ours, jax.Array)
        assert_bitwise_equal(ours, wanted)
