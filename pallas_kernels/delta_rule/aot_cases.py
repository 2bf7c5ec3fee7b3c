"""The programs of the gated delta rule in XLA that `pallas_kernels.aot` knows by name."""

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels.aot.case import Case, Program


def _delta_rule(backward: bool, length: int = 4096) -> Case:
    """The heads of Qwen3-Next; 2 products of state and token per token, forward."""
    key_heads, heads, dim, struct = 16, 32, 128, jax.ShapeDtypeStruct

    def build() -> Program:
        key = struct((1, length, key_heads, dim), jnp.bfloat16)
        value = struct((1, length, heads, dim), jnp.bfloat16)
        gate = struct((1, length, heads), jnp.float32)
        arrays = (key, key, value, gate, gate)

        def gated_delta_rule(*arrays):
            return pk.gated_delta_rule(*arrays, implementation="chunked").out

        def gated_delta_rule_backward(*arrays):
            *arrays, d_out = arrays
            return jax.vjp(gated_delta_rule, *arrays)[1](d_out)

        if backward:
            return gated_delta_rule_backward, (*arrays, value)
        return gated_delta_rule, arrays

    inputs = length * (2.0 * dim * (2 * key_heads + heads) + 8.0 * heads)
    out = 2.0 * length * heads * dim
    flops = 6.0 * length * heads * dim * dim
    direction = "backward" if backward else "forward"
    return Case(
        f"gated_delta_rule/{direction}/t{length}",
        build,
        flops * (3 if backward else 1),
        2 * inputs + out if backward else inputs + out,
    )


def cases() -> list[Case]:
    """Every registered case."""
    return [_delta_rule(False), _delta_rule(True)]
