"""generate: equal to the slow way, ragged, streamed, stopped; the cache is updated in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import Decoder, generate, stream
from gqa_jax.models.generation import _decode, _Options, _start
from tests.support.tiny_decoders import HYBRID, REPEATING, build

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8], [2, 7, 1]]
NEW = 6
CALL = jax.jit(Decoder.__call__)


def without_cache(decoder: Decoder, prompt: list[int]) -> list[int]:
    """Greedy, by a whole call per token."""
    tokens = list(prompt)
    for _ in range(NEW):
        padded = jnp.asarray([tokens + [0] * (24 - len(tokens))], jnp.int32)
        tokens.append(int(CALL(decoder, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build(HYBRID, 21)


@pytest.fixture(scope="module")
def greedy(decoder) -> list[list[int]]:
    return [without_cache(decoder, prompt) for prompt in PROMPTS]


def test_ragged_greedy_equals_argmax_without_cache(decoder, greedy):
    result = generate(decoder, PROMPTS, max_new_tokens=NEW)
    assert result.tokens.dtype == jnp.int32
    assert result.lengths.tolist() == [NEW] * 3
    assert result.to_lists() == greedy


def test_prefill_in_pieces_arrays_and_capacity_change_nothing(decoder, greedy):
    longest = max(map(len, PROMPTS))
    array = np.asarray([prompt + [-1] * (longest - len(prompt)) for prompt in PROMPTS])
    result = generate(
        decoder,
        array,
        prompt_lengths=[len(prompt) for prompt in PROMPTS],
        max_new_tokens=NEW,
        prefill_chunk=4,
        max_length=40,
    )
    assert result.to_lists() == greedy
    ring = generate(decoder, PROMPTS, max_new_tokens=NEW, prefill_chunk=4, cache_policy="ring")
    assert ring.to_lists() == greedy


def test_scanned_layers_generate_the_same():
    decoder = build(dataclasses.replace(REPEATING, scan_layers=True), 22)
    expected = [without_cache(decoder, prompt) for prompt in PROMPTS[1:]]
    assert generate(decoder, PROMPTS[1:], max_new_tokens=NEW).to_lists() == expected


def test_stop_tokens_end_rows_one_by_one(decoder, greedy):
    stops = (greedy[0][2], greedy[2][0])
    result = generate(decoder, PROMPTS, max_new_tokens=NEW, stop_tokens=stops, pad_token=39)
    for row, expected in enumerate(greedy):
        ends = [i + 1 for i, token in enumerate(expected) if token in stops]
        length = ends[0] if ends else NEW
        assert int(result.lengths[row]) == length
        assert result.tokens[row].tolist() == expected[:length] + [39] * (NEW - length)


@pytest.mark.parametrize("options", [{}, dict(temperature=1.3, top_k=7, top_p=0.9)])
def test_streaming_equals_generate(decoder, options):
    if options:
        options = options | dict(key=jax.random.key(5))
    whole = generate(decoder, PROMPTS, max_new_tokens=NEW, stop_tokens=(7, 11), **options)
    steps = list(stream(decoder, PROMPTS, max_new_tokens=NEW, stop_tokens=(7, 11), **options))
    rows = [[int(s.tokens[b]) for s in steps if s.active[b]] for b in range(3)]
    assert rows == whole.to_lists()
    if options:
        again = generate(decoder, PROMPTS, max_new_tokens=NEW, stop_tokens=(7, 11), **options)
        assert again.to_lists() == rows
        other = options | dict(key=jax.random.key(6))
        assert generate(decoder, PROMPTS, max_new_tokens=NEW, **other).to_lists() != rows


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_decode_loop_updates_its_cache_in_place(scan_layers):
    config = dataclasses.replace(REPEATING, scan_layers=scan_layers, moe=None, moe_layers=None)
    start = _start(build(config), PROMPTS[1:], _Options(max_new_tokens=NEW, max_length=64))
    compiled = _decode.lower(*start, max_new_tokens=NEW).compile()
    text = compiled.as_text()
    cache = start[2]
    leaves = len(jax.tree.leaves(cache))
    header = text.splitlines()[0]
    aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
    assert len(aliases) >= leaves, f"{len(aliases)} aliases for {leaves} leaves of the cache"
    keys = next(entry.key for entry in cache if hasattr(entry, "key"))
    shape = "f32[" + ",".join(map(str, keys.shape)) + "]"
    copies = [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]
    assert not copies, copies
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    "error, message, prompts, options",
    [
        (ValueError, "`max_new_tokens` must be a positive int, got 0", [[1]], dict(max_new_tokens=0)),
        (ValueError, "`prefill_chunk` must be a positive int, got 0", [[1]], dict(prefill_chunk=0)),
        (ValueError, "`prompts` must hold at least one prompt of at least one token", [], {}),
        (ValueError, "at least one token, got lengths [1, 0]", [[1], []], {}),
        (ValueError, "`prompts` must lie in [0, vocab_size=40), got 40", [[1, 40]], {}),
        (TypeError, "`prompts` must hold integers, got float64", [[1.5]], {}),
        (ValueError, "`prompts` must have shape [B, T]", np.zeros((3,), int), {}),
        (
            ValueError,
            "`prompt_lengths` must lie in [1, T=2], got [3]",
            np.zeros((1, 2), int),
            dict(prompt_lengths=[3]),
        ),
        (ValueError, "`prompt_lengths` must be integers of shape [B=1]", np.zeros((1, 2), int),
         dict(prompt_lengths=[1, 1])),
        (ValueError, "`prompt_lengths` must be None for prompts given as lists", [[1]],
         dict(prompt_lengths=[1])),
        (ValueError, "`max_length` must hold the longest prompt and `max_new_tokens`, 2 + 4, got 5",
         [[1, 2]], dict(max_length=5)),
        (ValueError, "`stop_tokens` must lie in [0, vocab_size=40), got 99", [[1]],
         dict(stop_tokens=(3, 99))),
        (ValueError, "`stop_tokens` must be a token id or a collection of them, got '</s>'", [[1]],
         dict(stop_tokens=["</s>"])),
        (ValueError, "`stop_tokens` must be a token id or a collection of them, got 1.5", [[1]],
         dict(stop_tokens=1.5)),
        (ValueError, "`stop_tokens` must lie in [0, vocab_size=40), got 40", [[1]],
         dict(stop_tokens=np.int64(40))),
        (ValueError, "`cache_policy` must be one of ('full', 'ring', 'int8', 'fp8'), got 'fp4'", [[1]],
         dict(cache_policy="fp4")),
        (ValueError, "`cache_dtype` must be None or a floating dtype, got 'floaty'", [[1]],
         dict(cache_dtype="floaty")),
        (ValueError, "`cache_dtype` must be None or a floating dtype, got <class 'jax.numpy.int32'>", [[1]],
         dict(cache_dtype=jnp.int32)),
        (ValueError, "`pad_token` must be a token id, got 0.5", [[1]], dict(pad_token=0.5)),
        (ValueError, "`max_new_tokens` must be a positive int, got 2.0", [[1]], dict(max_new_tokens=2.0)),
        (ValueError, "`max_new_tokens` must be a positive int, got True", [[1]], dict(max_new_tokens=True)),
        (ValueError, "`max_length` must be a positive int, got '9'", [[1]], dict(max_length="9")),
        (ValueError, "one list of token ids per row, got 1; one prompt alone is [[1, 2, 3]]", [1, 2, 3], {}),
        (ValueError, "one list of token ids per row, got [[1], [2, 3]]", [[[1], [2, 3]]], {}),
        (TypeError, "`prompts` must hold token ids, not text: encode 'abc' first", ["abc"], {}),
        (TypeError, "`prompts` must hold lists of token ids, got 'abc'", "abc", {}),
        (TypeError, "`prompts` must hold lists of token ids, got 3", 3, {}),
        (ValueError, "`prompts` must lie in [0, vocab_size=40), got", [np.asarray([2**64 - 1], np.uint64)], {}),
        (ValueError, "`temperature` must be a number, got 'hot'", [[1]], dict(temperature="hot", key=0)),
        (ValueError, "`temperature` must be 0 or in [1.18e-38, 3.4e+38], got inf", [[1]],
         dict(temperature=np.inf, key=0)),
        (ValueError, "3.4e+38], got 1e-45", [[1]], dict(temperature=1e-45, key=0)),
        (ValueError, "`top_p` must be a number, got [0.5]", [[1]], dict(top_p=[0.5], temperature=1.0, key=0)),
        (TypeError, "`key` must be one key, as `jax.random.key(seed)` makes it, got int of shape None", [[1]],
         dict(temperature=1.0, key=0)),
        (TypeError, "got float32 of shape (2,)", [[1]], dict(temperature=1.0, key=np.zeros(2, np.float32))),
        (TypeError, "got key<fry> of shape (3,)", [[1]],
         dict(temperature=1.0, key=jax.random.split(jax.random.key(0), 3))),
        (ValueError, "`key` must be given when `temperature=0.5`, got None", [[1]],
         dict(temperature=0.5)),
        (ValueError, "`top_k` must be None when `temperature=0` (greedy), got 3", [[1]], dict(top_k=3)),
        (ValueError, "`top_k` must be at most vocab_size=40, got 41", [[1]],
         dict(top_k=41, temperature=1.0, key=0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_input_is_refused_by_name(decoder, function, error, message, prompts, options):
    with pytest.raises(error, match=re.escape(message)):
        function(decoder, prompts, **{"max_new_tokens": 4, **options})


def test_only_decoders_generate(decoder):
    with pytest.raises(TypeError, match="`decoder` must be a Decoder, got list"):
        generate([[1, 2]], decoder, 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stop'"):
        stream(decoder, [[1]], 3, stop=2)


SMALL = dataclasses.replace(
    HYBRID, layers=("full_attention",), gated_deltanet=None, sliding_window=None
)


def test_the_config_says_when_a_text_ends():
    free = build(SMALL, 5)
    endless = generate(free, PROMPTS, NEW).to_lists()
    stop = endless[0][2]
    expected = generate(free, PROMPTS, NEW, stop_tokens=stop, pad_token=39)
    assert expected.lengths.tolist() != [NEW] * 3
    told = build(dataclasses.replace(SMALL, stop_tokens=(stop, 39), pad_token=39), 5)
    result = generate(told, PROMPTS, np.int64(NEW))
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    steps = list(stream(told, PROMPTS, NEW))
    np.testing.assert_array_equal(
        np.stack([s.tokens for s in steps], 1), expected.tokens[:, : len(steps)]
    )
    assert generate(told, PROMPTS, NEW, stop_tokens=()).to_lists() == endless
    padded = generate(free, PROMPTS, NEW, stop_tokens={np.int32(stop)}).tokens
    assert int(padded[0, 3]) == stop  # the first stop token pads where nothing else is said


def test_numbers_come_in_any_integer_type():
    decoder = build(SMALL, 6)
    expected = generate(decoder, PROMPTS, NEW, stop_tokens=(7,)).to_lists()
    rows = [np.asarray(PROMPTS[0], np.uint64), np.asarray(PROMPTS[1], np.int8), tuple(PROMPTS[2])]
    options = dict(stop_tokens=np.asarray([7], np.uint8), max_length=np.int16(24))
    assert generate(decoder, rows, np.uint8(NEW), **options).to_lists() == expected
    drawn = dict(temperature=np.float32(0.8), top_k=np.int64(9), top_p=np.float16(0.75))
    typed = generate(decoder, PROMPTS, NEW, key=jax.random.key(3), **drawn).to_lists()
    raw = generate(decoder, PROMPTS, NEW, key=jax.random.PRNGKey(3), **drawn).to_lists()
    assert raw == typed
