"""Memory grows with T for the tiles and with T squared for the reference, as compiled."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.suites.attention_memory import temp_bytes


def test_blockwise_memory_is_linear_and_the_reference_is_quadratic():
    short, long = (temp_bytes("blockwise", t) for t in (8192, 32768))
    assert long < 4.2 * short
    short, long = (temp_bytes("reference", t) for t in (2048, 8192))
    assert long > 14 * short
    assert temp_bytes("blockwise", 8192) < long / 30


@pytest.mark.parametrize("option", ["window", "segments", "dropout"])
def test_options_keep_memory_linear(option):
    def of(length):
        ids = jnp.zeros((1, length), jnp.int32)
        options = {
            "window": {"sliding_window": 100},
            "segments": {"query_segment_ids": ids, "kv_segment_ids": ids},
            "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        }[option]
        return temp_bytes("blockwise", length, **options)

    assert of(16384) < 2.2 * of(8192)
