"""Behaviour of `gated_delta_rule` and `gated_delta_rule_step`: padding, packing, decode, transforms, errors, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain, gated_delta_rule, gated_delta_rule_step
from tests.support import delta_cases
from tests.support.compare import assert_bitwise_equal, assert_close, relative_error
from tests.support.delta_properties import cast, evaluate


def operands(seed, batch, length, heads=2, dim=8):
    return cast(delta_cases.random_case(seed, batch, length, 1, heads, dim, dim), jnp.float32)


rule = jax.jit(
    gated_delta_rule,
    static_argnames=("scale", "use_qk_l2norm", "chunk_size", "implementation"),
)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_padding_is_inert_whatever_it_holds(implementation):
    *tokens, state = operands(0, 2, 40)
    lengths = np.array([23, 40])
    real = np.arange(40)[None] < lengths[:, None]
    ids = jnp.asarray(np.where(real, 0, -1))
    poisoned = [jnp.where(real.reshape(2, 40, *(1,) * (x.ndim - 2)), x, jnp.nan) for x in tokens]

    def loss(tokens):
        out, final = gated_delta_rule(
            *tokens, initial_state=state, segment_ids=ids, use_qk_l2norm=True,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(out) + jnp.sum(final), (out, final)

    grads, (out, final) = jax.jit(jax.grad(loss, has_aux=True))(tuple(poisoned))
    short = [x[:1, :23] for x in tokens]
    expected = rule(*short, initial_state=state[:1], use_qk_l2norm=True)
    assert_close(out[:1, :23], expected.out, atol=1e-6, what="out")
    assert_close(final[:1], expected.final_state, atol=1e-6, what="final state")
    assert not np.asarray(out[0, 23:]).any()
    for grad in grads:
        assert np.isfinite(np.asarray(grad)).all()
        assert not np.asarray(grad[0, 23:]).any()


def test_left_padding_is_the_unpadded_row():
    *tokens, state = operands(1, 1, 40)
    ids = jnp.where(jnp.arange(40) < 17, -1, 4)[None]
    padded = rule(*tokens, initial_state=state, segment_ids=ids)
    alone = rule(*(x[:, 17:] for x in tokens), initial_state=state)
    assert_close(padded.out[:, 17:], alone.out, atol=1e-6)
    assert_close(padded.final_state, alone.final_state, atol=1e-6)


def test_many_short_documents_packed_equal_each_alone():
    case = delta_cases.random_case(2, 2050, 16, 1, 1, 8, 8)
    flat = lambda x: x.reshape(1, -1, *x.shape[2:])
    arrays = {n: flat(getattr(case, n)) for n in (*delta_cases.NAMES[:5], "d_out")}
    bounds = np.arange(0, 2051) * 16
    packed = delta_cases.Case(
        **arrays, initial_state=case.initial_state, d_final=case.d_final, cu_seqlens=bounds
    )
    out, final, grads = evaluate(packed)
    alone_out, alone_final, alone = evaluate(case, chunk_size=16)
    assert_close(out, flat(alone_out), atol=1e-6)
    assert_close(final, alone_final, atol=1e-6)
    for name in delta_cases.NAMES:
        expected = alone[name] if name == "initial_state" else flat(alone[name])
        assert_close(grads[name], expected, atol=1e-6, rtol=1e-6, what=name)

    fresh = delta_cases.Case(
        **arrays, initial_state=0 * case.initial_state[:1], d_final=0 * case.d_final[:1],
        segment_ids=np.repeat(np.arange(2050), 16)[None],
    )  # fmt: skip
    by_ids = evaluate(fresh)[0]
    from_zero = rule(*(x for x in cast(case, jnp.float32)[:5]), chunk_size=16).out
    assert_close(by_ids, flat(from_zero), atol=1e-6)


def test_prefill_in_random_splits_is_the_whole():
    *tokens, state = operands(3, 2, 80)
    whole = rule(*tokens, initial_state=state)
    cuts = [0, *np.sort(np.random.default_rng(3).choice(np.arange(1, 80), 2, replace=False)), 80]
    outs = []
    for begin, end in itertools.pairwise(cuts):
        part = rule(*(x[:, begin:end] for x in tokens), initial_state=state)
        outs.append(part.out)
        state = part.final_state
    assert_close(jnp.concatenate(outs, 1), whole.out, atol=1e-6)
    assert_close(state, whole.final_state, atol=1e-6)


def test_decoding_token_by_token_is_the_chunk_form():
    *tokens, state = operands(4, 2, 70)
    whole = rule(*tokens, initial_state=state, use_qk_l2norm=True, implementation="chunked")
    step = jax.jit(lambda state, *token: gated_delta_rule_step(*token, state, use_qk_l2norm=True))
    for t in range(70):
        result = step(state, *(x[:, t : t + 1] for x in tokens))
        assert_close(result.out, whole.out[:, t : t + 1], atol=1e-6)
        state = result.final_state
    assert_close(state, whole.final_state, atol=1e-6)


def test_step_returns_the_state_after_every_token():
    *tokens, state = operands(5, 2, 5)
    result = gated_delta_rule_step(*tokens, state, return_states=True)
    assert result.states.shape == (2, 5, 2, 8, 8)
    assert_bitwise_equal(result.states[:, -1], result.final_state)
    rolled_back = gated_delta_rule_step(*(x[:, :3] for x in tokens), state)
    assert_close(result.states[:, 2], rolled_back.final_state, atol=1e-6)
    assert gated_delta_rule_step(*tokens, state, return_states=False).states is None


def test_step_in_a_pool_of_slots():
    *tokens, _ = operands(6, 3, 2)
    pool = jnp.asarray(np.random.default_rng(6).standard_normal((7, 2, 8, 8)), jnp.float32)
    slots = jnp.array([5, -1, 0])
    result = gated_delta_rule_step(*tokens, pool, slots=slots, return_states=True)
    expected = gated_delta_rule_step(*tokens, pool[jnp.array([5, 1, 0])])
    for row, slot in ((0, 5), (2, 0)):
        assert_close(result.out[row], expected.out[row], atol=1e-6)
        assert_close(result.final_state[slot], expected.final_state[row], atol=1e-6)
    assert not np.asarray(result.out[1]).any()
    for slot in (1, 2, 3, 4, 6):
        assert_bitwise_equal(result.final_state[slot], pool[slot], what=f"slot {slot}")


@pytest.mark.parametrize("implementation", [None, "chunked", "reference"])
@pytest.mark.parametrize("length", [0, 1])
def test_no_token_and_one_token(length, implementation):
    *tokens, state = operands(7, 2, length)
    result = rule(*tokens, initial_state=state, implementation=implementation)
    assert result.out.shape == (2, length, 2, 8)
    if length == 0:
        assert_bitwise_equal(result.final_state, state)
    else:
        assert_close(
            result.final_state, gated_delta_rule_step(*tokens, state).final_state, atol=1e-6
        )


def test_every_default_may_be_passed():
    *tokens, state = operands(8, 1, 20)
    plain = rule(*tokens)
    passed = gated_delta_rule(
        *tokens, initial_state=0 * state, segment_ids=None, cu_seqlens=None, scale=8**-0.5,
        use_qk_l2norm=False, chunk_size=None, implementation=None,
    )  # fmt: skip
    assert_close(plain.out, passed.out, atol=1e-6)
    assert_close(plain.final_state, passed.final_state, atol=1e-6)
    step = gated_delta_rule_step(*(x[:, :1] for x in tokens), state)
    again = gated_delta_rule_step(
        *(x[:, :1] for x in tokens), state, slots=None, return_states=False, scale=None,
        use_qk_l2norm=False, implementation=None,
    )  # fmt: skip
    assert_bitwise_equal(step.out, again.out)


def test_a_batch_is_its_rows_and_a_repetition_is_bitwise_equal():
    *tokens, state = operands(9, 3, 70)
    batch = rule(*tokens, initial_state=state)
    assert_bitwise_equal(rule(*tokens, initial_state=state).out, batch.out)
    for row in range(3):
        alone = rule(*(x[row : row + 1] for x in tokens), initial_state=state[row : row + 1])
        assert_close(alone.out, batch.out[row : row + 1], atol=1e-6)


def test_gradients_repeat_bitwise_and_see_no_later_token():
    case = delta_cases.random_case(10, 1, 70, 1, 2, 8, 8)
    case.d_out[:, 30:] = 0
    case.d_final[:] = 0
    first, second = (evaluate(case)[2] for _ in range(2))
    for name in delta_cases.NAMES:
        assert_bitwise_equal(first[name], second[name], what=name)
        if name != "initial_state":
            assert not np.asarray(first[name][:, 30:]).any(), f"{name} reads the future"


def _loss(tokens):
    out, final = gated_delta_rule(*tokens, implementation="chunked", chunk_size=16)
    return jnp.sum(jnp.sin(out)) + jnp.sum(final * final)


def test_transforms_compose():
    stack = [jnp.stack([x, 0.5 * x, 0.9 * x]) for x in operands(11, 2, 20)[:5]]
    single = jax.jit(jax.grad(_loss))
    expected = jax.tree.map(
        lambda *x: jnp.stack(x), *(single([x[i] for x in stack]) for i in range(3))
    )
    mapped = {
        "vmap(grad)": jax.vmap(jax.grad(_loss)),
        "grad(vmap)": jax.grad(lambda s: jnp.sum(jax.vmap(_loss)(s))),
        "remat": jax.vmap(jax.grad(jax.checkpoint(_loss))),
        "scan": lambda s: jax.lax.scan(lambda c, x: (c, jax.grad(_loss)(x)), 0, s)[1],
    }
    for name, transformed in mapped.items():
        for got, want in zip(jax.jit(transformed)(stack), expected, strict=True):
            assert_close(got, want, atol=2e-6, rtol=1e-5, what=name)


def test_second_order_is_that_of_the_reference(x64):
    tokens = cast(delta_cases.random_case(12, 1, 20, 1, 1, 4, 4), jnp.float64)[:5]

    def inner(tokens, implementation):
        return jnp.sum(jnp.sin(gated_delta_rule(*tokens, implementation=implementation).out))

    def outer(tokens, implementation):
        grads = jax.grad(inner)(tokens, implementation)
        return sum(jnp.sum(jnp.cos(x)) for x in grads)

    second = jax.jit(jax.grad(outer), static_argnums=1)
    for got, want in zip(second(tokens, "chunked"), second(tokens, "reference"), strict=True):
        assert relative_error(got, want) < 1e-10
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda *x: inner(x, "chunked"), tokens, tokens)
    jax.jvp(lambda *x: inner(x, "reference"), tokens, tokens)


def test_the_backward_keeps_inputs_inverses_and_one_state():
    *tokens, state = operands(13, 1, 256, heads=2, dim=32)
    run = lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], implementation="chunked")
    _, pull = jax.vjp(run, *tokens, state)
    inputs = sum(x.nbytes for x in (*tokens, state))
    kept = sum(x.nbytes for x in jax.tree.leaves(pull)) - inputs
    inverses = 256 * 2 * 64 * 4  # T, heads, chunk, float32: 256 bytes per token and head
    assert kept <= inverses + state.nbytes


def test_messages_name_the_argument():
    query, key, value, g, beta, state = operands(14, 1, 6)
    good = (query, key, value, g, beta)
    bounds = jnp.array([0, 6])
    with pytest.raises(ValueError, match=r"`key` must have shape \[B=1, T=6"):
        gated_delta_rule(query, key[:, :5], value, g, beta)
    with pytest.raises(TypeError, match="`beta` must be floating point, got int32"):
        gated_delta_rule(query, key, value, g, beta.astype(jnp.int32))
    with pytest.raises(ValueError, match="`Hv=3` must be a positive multiple of `Hk=2`"):
        gated_delta_rule(*(jnp.ones((1, 2, h, 4)) for h in (2, 2, 3)), *[jnp.ones((1, 2, 3))] * 2)
    with pytest.raises(ValueError, match="`chunk_size` must be one of 16, 32, 64, 128, got 48"):
        gated_delta_rule(*good, chunk_size=48)
    with pytest.raises(ValueError, match="`cu_seqlens` must be None when `segment_ids` is given"):
        gated_delta_rule(*good, segment_ids=jnp.zeros((1, 6), jnp.int32), cu_seqlens=bounds)
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to at most T=6"):
        gated_delta_rule(*good, cu_seqlens=jnp.array([0, 7]))
    with pytest.raises(ValueError, match="`cu_seqlens` must come with B=1, got B=2"):
        gated_delta_rule(*operands(14, 2, 6)[:5], cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \[num_sequences=2"):
        gated_delta_rule(*good, initial_state=state, cu_seqlens=jnp.array([0, 2, 6]))
    with pytest.raises(TypeError, match="`segment_ids` must be an integer array"):
        gated_delta_rule(*good, segment_ids=jnp.zeros((1, 6)))
    with pytest.raises(NotImplementedError, match="`chunk_size` has no meaning"):
        gated_delta_rule(*good, chunk_size=16, implementation="reference")
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        gated_delta_rule(*good, implementation="fast")
    with pytest.raises(ValueError, match="`query` must hold 1 to 8 tokens, got T=9"):
        gated_delta_rule_step(*operands(14, 1, 9))
    with pytest.raises(TypeError, match="`slots` must be an integer array"):
        gated_delta_rule_step(*good, state, slots=jnp.zeros((1,)))


def test_explain_names_what_runs():
    *long, state = operands(15, 1, 40)
    short = [x[:, :1] for x in long]
    assert explain("gated_delta_rule", *long).chosen == "chunked"
    assert explain("gated_delta_rule", *short).chosen == "reference"
    assert explain("gated_delta_rule", *short, chunk_size=16).chosen == "chunked"
    assert explain("gated_delta_rule_step", *short, state).chosen == "reference"
