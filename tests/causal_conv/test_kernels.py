"""The Hopper kernel of `causal_conv1d_qkv`, interpreted with race detection against float64, and as machine code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch, aot, causal_conv1d_qkv, explain
from pallas_kernels.aot import hlo
from pallas_kernels.causal_conv import aot_cases, tuning
from pallas_kernels.causal_conv.tuning import ROWS
from tests.support.aot import require
from tests.support.compare import assert_bitwise_equal, assert_close
from tests.support.conv_cases import oracle_qkv, random_qkv, segments
from tests.support.mosaic_gpu_interpreter import interpreted

NAMES = ("query", "key", "value", "final_state")
DIMS: dict[str, Any] = {"key_dim": 64, "value_dim": 64}


def run(operands, ids, *, implementation="mosaic_gpu", **options):
    """The public operator in one program; outputs that the kernel does not write stay NaN."""

    def call(operands, ids):
        mixed, weight, bias, state = operands
        return causal_conv1d_qkv(
            mixed, weight, bias=bias, initial_state=state, segment_ids=ids,
            implementation=implementation, **options,
        )  # fmt: skip

    with interpreted():
        return jax.block_until_ready(jax.jit(call)(operands, ids))


def check(
    length, *, ids=None, width=4, dtype="float32", bias=True, state=True, normalise=True, dims=DIMS, seed=0,
    **sizes,
):  # fmt: skip
    sizes = dict(batch=1, heads=1, group=1) | sizes
    operands = random_qkv(seed, length, width, dtype=jnp.dtype(dtype), **dims, **sizes)
    mixed, weight, filter_bias, before = operands
    places = np.zeros((sizes["batch"], length), int) if ids is None else ids
    expected = oracle_qkv(
        mixed, weight, filter_bias * bias, before * state, places, **dims, normalise=normalise
    )
    mixed = np.where((places < 0)[..., None, None], np.nan, mixed)
    mixed[..., weight.shape[-1] :] = np.nan
    narrow = [jnp.asarray(a, dtype) for a in (mixed, weight, filter_bias, before)]
    narrow = [*narrow[:2], narrow[2] if bias else None, narrow[3] if state else None]
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    result = run(narrow, ids, use_qk_l2norm=normalise, **dims)
    error = float(jnp.finfo(dtype).eps)
    for name, actual, wanted in zip(NAMES, result, expected, strict=True):
        assert actual.dtype == jnp.dtype(dtype)
        assert_close(actual, wanted, atol=5e-6, rtol=error, what=name)


@pytest.mark.parametrize(
    "length, width, group", [(1, 4, 1), (ROWS, 2, 2), (ROWS + 1, 1, 1), (3 * ROWS + 1, 4, 1)]
)
def test_lengths_and_widths(length, width, group):
    check(length, width=width, group=group, bias=length > 1, state=length % 2 == 1)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", ["packed", "left padding", "right padding", "everywhere"])
def test_packed_documents_and_padding(kind, state):
    """Padding holds NaN. With left padding the initial state ends inside of a tile, or in the next one."""
    ids = segments(kind, ROWS + 5, 2)
    check(ROWS + 5, ids=ids, batch=2, state=state, bias=state)


def test_the_initial_state_anywhere():
    """It ends at every place around a tile's border, in a row of its own; the last row is all padding."""
    first = np.array([0, 1, ROWS - 1, ROWS, ROWS + 2, ROWS + 5])
    ids = np.where(np.arange(ROWS + 5) < first[:, None], -1, 3)
    check(ROWS + 5, ids=ids, batch=len(first))


@pytest.mark.parametrize(
    "dtype, key_dim, value_dim",
    [("bfloat16", 64, 128), ("float16", 128, 64), ("bfloat16", 256, 64)],
)
def test_dtypes_and_dims(dtype, key_dim, value_dim):
    dims = {"key_dim": key_dim, "value_dim": value_dim}
    check(70, dtype=dtype, dims=dims, heads=2, group=2, spare=64)


def test_zero_rows_and_no_norm():
    operands = [jnp.zeros((1, 9, 1, 192)), jnp.ones((4, 1, 192)), None, None]
    for part in run(operands, None, use_qk_l2norm=True, **DIMS):
        assert not np.asarray(part).any()
    check(9, normalise=False)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1, ROWS + 9, 3))
def test_a_document_that_starts_anywhere(start):
    ids = np.where(np.arange(ROWS + 9) < start, 1, 2)[None]
    check(ROWS + 9, ids=ids, width=4, group=4, seed=start)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 3, 5, 9])
@pytest.mark.parametrize("kind", ["packed", "everywhere"])
def test_widths_of_packed_rows(width, kind):
    ids = segments(kind, 2 * ROWS + 3, 2)
    check(2 * ROWS + 3, ids=ids, batch=2, width=width, seed=width)


def test_repetition_and_vmap():
    """A batch under `vmap`, with a filter for all and with one for each, is the calls one by one."""
    stack = [random_qkv(seed, 5, 3, batch=1, heads=1, group=1, **DIMS) for seed in (0, 1)]
    mixed, weight, bias, state = (
        jnp.asarray(np.stack(x), jnp.float32) for x in zip(*stack, strict=True)
    )

    def call(mixed, weight, bias, state):
        return causal_conv1d_qkv(
            mixed, weight, bias=bias, initial_state=state, implementation="mosaic_gpu", **DIMS
        )

    with interpreted():
        one = [jax.jit(call)(mixed[i], weight[0], bias[0], state[i]) for i in (0, 1, 1)]
        shared = jax.jit(jax.vmap(call, (0, None, None, 0)))(mixed, weight[0], bias[0], state)
        each = jax.jit(jax.vmap(call))(mixed, weight[:1].repeat(2, 0), bias[:1].repeat(2, 0), state)
        jax.block_until_ready((one, shared, each))
    for i in (0, 1):
        for name, *results in zip(NAMES, one[i], shared, each, strict=True):
            assert_bitwise_equal(results[1][i], results[0], what=name)
            assert_bitwise_equal(results[2][i], results[0], what=name)
    for name, left, right in zip(NAMES, one[1], one[2], strict=True):
        assert_bitwise_equal(left, right, what=name)


def loss(operands, ids, implementation, dims):
    """Every result has a cotangent of its own."""
    mixed, weight, bias, state = operands
    out = causal_conv1d_qkv(
        mixed, weight, bias=bias, initial_state=state, segment_ids=ids, use_qk_l2norm=True,
        implementation=implementation, **dims,
    )  # fmt: skip
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32) + i)) for i, x in enumerate(out))


def check_gradients(
    length, *, ids=None, width=4, dtype="float32", dims=DIMS, bias=True, state=True, **sizes
):
    """Against XLA's in float32: through the kernels the outputs' errors reach the cotangents."""
    sizes = dict(batch=1, heads=1, group=1) | sizes
    operands = random_qkv(length, length, width, dtype=jnp.dtype(dtype), **dims, **sizes)
    operands = [jnp.asarray(x, dtype) for x in operands]
    operands = [*operands[:2], operands[2] if bias else None, operands[3] if state else None]
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    with interpreted():
        found = jax.jit(lambda x: jax.grad(loss)(x, ids, "mosaic_gpu", dims))(operands)
        found = jax.block_until_ready(found)
    wide = [None if x is None else x.astype(jnp.float32) for x in operands]
    expected = jax.grad(loss)(wide, ids, "reference", dims)
    error = max(4 * float(jnp.finfo(dtype).eps), 5e-6)
    for name, actual, wanted in zip(("mixed", "weight", "bias", "state"), found, expected, strict=True):  # fmt: skip
        if wanted is not None:
            assert actual.dtype == jnp.dtype(dtype)
            size = float(jnp.max(jnp.abs(wanted)))
            assert_close(actual, wanted, atol=error * size, rtol=error, what=name)


@pytest.mark.parametrize(
    "length, width, dtype, key_dim, value_dim",
    [(1, 4, "float32", 64, 64), (ROWS + 1, 2, "bfloat16", 64, 128), (35, 1, "float16", 256, 64)],
)
def test_gradients(length, width, dtype, key_dim, value_dim):
    dims = {"key_dim": key_dim, "value_dim": value_dim}
    check_gradients(
        length, width=width, dtype=dtype, dims=dims, bias=width == 4, state=width != 2, spare=8
    )


def test_gradients_of_packed_and_padded_rows():
    ids = segments("everywhere", ROWS + 7, 1)
    check_gradients(ROWS + 7, ids=ids, group=2)


def test_gradient_of_an_initial_state_anywhere():
    """Where it stands on padding, in this tile or the next, the padding's own gradient is 0."""
    first = np.array([ROWS - 1, ROWS + 3])
    ids = np.where(np.arange(ROWS + 5) < first[:, None], -1, 3)
    check_gradients(ROWS + 5, ids=ids, batch=len(first))


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 9])
@pytest.mark.parametrize("kind", ["packed", "left padding", "right padding"])
def test_gradients_of_any_width(width, kind):
    ids = segments(kind, 2 * ROWS + 3, 1)
    check_gradients(2 * ROWS + 3, ids=ids, width=width, group=2)


def test_a_zero_row_has_no_gradient():
    operands = [jnp.zeros((1, 3, 1, 192)), jnp.ones((2, 1, 192)), None, None]

    def query(operands):
        return jnp.sum(
            causal_conv1d_qkv(
                *operands[:2], use_qk_l2norm=True, implementation="mosaic_gpu", **DIMS
            ).query
        )

    with interpreted():
        found = jax.block_until_ready(jax.jit(jax.grad(query))(operands))
    assert not np.asarray(found[0]).any()


@pytest.mark.slow
def test_second_derivative():
    random = random_qkv(9, 3, 2, batch=1, heads=1, group=1, **DIMS)
    operands = [jnp.asarray(x, jnp.float32) for x in random]

    def bent(mixed, implementation):
        gradient = jax.grad(loss)([mixed, *operands[1:]], None, implementation, DIMS)[0]
        return jnp.sum(jnp.sin(gradient))

    with interpreted():
        found = jax.jit(lambda x: jax.grad(bent)(x, "mosaic_gpu"))(operands[0])
        found = jax.block_until_ready(found)
    expected = jax.grad(bent)(operands[0], "reference")
    assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_vmapped_gradients_are_those_of_each_row():
    stack = [random_qkv(seed, 5, 3, batch=1, heads=1, group=1, **DIMS) for seed in (0, 1)]
    mixed, weight, *_ = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*stack, strict=True))

    def gradients(mixed, weight, implementation):
        def value(mixed, weight):
            return loss((mixed, weight, None, None), None, implementation, DIMS)

        return jax.grad(value, (0, 1))(mixed, weight)

    with interpreted():
        each = jax.vmap(lambda m: gradients(m, weight[0], "mosaic_gpu"))
        found = jax.block_until_ready(jax.jit(each)(mixed))
    for i in (0, 1):
        for actual, wanted in zip(found, gradients(mixed[i], weight[0], "reference"), strict=True):
            assert_close(actual[i], wanted, atol=2e-5, rtol=1e-5)


# --- choice ----------------------------------------------------------------------------------------------------------


def reason(capability, *, dtype="bfloat16", width=4, channels=192, spare=0, length=4, **dims):
    struct = jax.ShapeDtypeStruct
    mixed = struct((1, length, 2, channels + spare), jnp.dtype(dtype))
    weight = struct((width, 2, channels), jnp.dtype(dtype))
    with _dispatch.targeting(_dispatch.Target("gpu", capability)):
        return explain("causal_conv1d_qkv", mixed, weight, **(DIMS | dims)).reasons["mosaic_gpu"]


def test_reasons(x64):
    assert reason("9.0") == "reference is preferred here"
    assert "this is 10.0" in reason("10.0")
    assert "got float64" in reason("9.0", dtype="float64")
    assert reason("9.0", key_dim=32) == "Dk must be one of 64, 128, 256, got 32"
    assert reason("9.0", value_dim=32) == "Dv must be one of 64, 128, 256, got 32"
    assert reason("9.0", width=10) == "W must be at most 9, got 10"
    assert reason("9.0", spare=4) == "F values must fill a multiple of 16 bytes, got F=196"
    assert reason("9.0", length=0) == "it needs at least one token"
    sizes = {"B": 1, "T": 4, "F": 192, "W": 4}
    with _dispatch.targeting(_dispatch.Target("gpu", "9.0")):
        varying = tuning.unsupported_reason(
            tuning.Call(jnp.dtype("bfloat16"), sizes, is_varying=True, **DIMS)
        )
    assert "`jax.shard_map(check_vma=False)`" in str(varying)
    mixed, weight = jnp.ones((1, 4, 2, 192)), jnp.ones((4, 2, 192))
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*cannot run this call.*9\.0"):
        causal_conv1d_qkv(mixed, weight, implementation="mosaic_gpu", **DIMS)


# --- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, dtype, packed",
    [
        pytest.param(128, "bfloat16", False, marks=pytest.mark.slow),
        (128, "bfloat16", True),
        pytest.param(64, "bfloat16", True, marks=pytest.mark.slow),
        pytest.param(256, "float16", True, marks=pytest.mark.slow),
        pytest.param(128, "float32", True, marks=pytest.mark.slow),
    ],
)
def test_every_byte_once_and_nothing_spilled(dim, dtype, packed):
    """The projection is read where it lies, gates included: no slice of it and no padded copy is written."""
    require()
    struct, dtype = jax.ShapeDtypeStruct, jnp.dtype(dtype)
    batch, length, heads, width, channels = 2, 1000, 16, 4, 4 * dim
    operands = [
        struct((batch, length, heads, channels + 2 * dim), dtype),
        struct((width, heads, channels), dtype),
        struct((batch, width, heads, channels), dtype),
        struct((batch, length), jnp.int32),
    ]

    def program(mixed, weight, state, ids):
        return causal_conv1d_qkv(
            mixed, weight, key_dim=dim, value_dim=dim, use_qk_l2norm=True, implementation="mosaic_gpu",
            initial_state=state if packed else None, segment_ids=ids if packed else None,
        )[:3]  # fmt: skip

    def gradient(mixed, weight, state, ids, *cotangents):
        _, pull = jax.vjp(lambda m, w: program(m, w, state, ids), mixed, weight)
        return pull(cotangents)

    report = aot.compile_program(program, *operands, target="h200")
    (kernel,) = report.kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert not kernel.slow_paths
    assert kernel.registers <= 80  # six blocks of 128 threads share a multiprocessor
    if dtype.itemsize == 2 and dim <= 128:
        assert 6 * kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES
    taps = 4 * batch * (length + 2 * ROWS)
    assert report.temporary_bytes <= 2 * taps

    key, value = (struct((batch, length, n, dim), dtype) for n in (heads, 2 * heads))
    report = aot.compile_program(gradient, *operands, key, key, value, target="h200")
    (kernel,) = (k for k in report.kernels if "backward" in k.name)
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert not kernel.slow_paths
    if dtype.itemsize == 2 and dim <= 128:  # three blocks share a multiprocessor
        assert kernel.registers <= 168
        assert 3 * kernel.shared_bytes <= aot.SHARED_MEMORY_BYTES


def moved_per_token(name: str) -> float:
    """KiB per token that the program of a registered case moves at least: the convolution's inputs (and cotangents)
    once, every array that a kernel or a fusion writes, and those that others read again, once for each reader."""
    (case,) = (c for c in aot_cases.cases() if c.name == name)
    function, arguments = case.build()
    mesh = aot.topology("h200")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in arguments]
    compiled = aot.compile_only(function, *arguments, mesh=mesh)
    module = hlo.parse(compiled.executable.as_text())
    body = module.computations[module.entry]
    made = {i.name: i for i in body if i.opcode not in ("parameter", "constant", "bitcast")}
    moved = case.hbm_bytes * (2 / 3 if "backward" in name else 1 / 2)
    for instruction in body:
        if instruction.opcode in ("fusion", "custom-call", "copy"):
            read = sum(made[operand].bytes for operand in instruction.operands if operand in made)
            moved += instruction.bytes + read
    return moved / 8192 / 1024


@pytest.mark.parametrize(
    "direction, kernel, xla, apart", [("forward", 32, 64.6, 48), ("backward", 92, 283, 227)]
)
def test_bytes_per_token(direction, kernel, xla, apart):
    """The table of docs/MEASURED_KERNELS.md; `-s` prints it."""
    require()
    for label, expected in (("8k", kernel), ("8k-xla", xla), ("8k-apart", apart)):
        found = moved_per_token(f"causal_conv1d_qkv/{direction}/{label}")
        print(f"{direction} {label}: {found:.1f} KiB per token")
        assert found == pytest.approx(expected, rel=0.05)
