"""The decode kernels of the gated delta rule that `pallas_kernels.aot` knows by name, alone and behind a convolution.

Mosaic GPU ones compile for Hopper only, Triton ones for Ampere too (`--target a100 --case '*step_triton*'`; their
machine code comes by way of `aot.triton_ptx`). None has tensor-core instructions: a token is two sums over the state.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import pallas_kernels as pk
from pallas_kernels.aot.case import Case, Program

IMPLEMENTATIONS = ("mosaic_gpu", "triton")


@dataclasses.dataclass(frozen=True)
class DeltaStepShape:
    """A decode step of the heads of Qwen3-Next."""

    label: str
    rows: int = 64
    length: int = 1
    key_heads: int = 16
    group: int = 2
    dim: int = 128
    width: int = 4
    state_dtype: DTypeLike = jnp.float32
    dtype: DTypeLike = jnp.bfloat16

    @property
    def value_heads(self) -> int:
        return self.key_heads * self.group

    @property
    def state(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (self.rows, self.value_heads, self.dim, self.dim), self.state_dtype
        )

    @property
    def flops(self) -> float:
        """Two sums over the state and an outer product per token; as one multiplication and addition each."""
        return 6.0 * self.rows * self.length * self.value_heads * self.dim**2

    def rule(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Operands of `gated_delta_rule_step`."""
        struct, tokens = jax.ShapeDtypeStruct, (self.rows, self.length)
        key = struct((*tokens, self.key_heads, self.dim), self.dtype)
        value = struct((*tokens, self.value_heads, self.dim), self.dtype)
        gate = struct((*tokens, self.value_heads), jnp.float32)
        return {
            "query": key,
            "key": key,
            "value": value,
            "g": gate,
            "beta": gate,
            "state": self.state,
        }

    def layer(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Operands of `gated_deltanet_step`; weights have a leading axis, as every argument of a case does.

        `mixed` is the layer's whole projection, output gates included.
        """
        struct, features = jax.ShapeDtypeStruct, (2 + self.group) * self.dim
        tokens, heads = (self.rows, self.length, self.key_heads), (1, self.key_heads, self.group)
        return {
            "mixed": struct((*tokens, features + self.group * self.dim), self.dtype),
            "logits": struct((*tokens, 2 * self.group), self.dtype),
            "state": self.state,
            "conv_state": struct((self.rows, self.width, self.key_heads, features), self.dtype),
            "conv_kernel": struct((1, self.width, self.key_heads, features), self.dtype),
            "A_log": struct(heads, jnp.float32),
            "dt_bias": struct(heads, jnp.float32),
        }


SHAPES = (
    DeltaStepShape("b1", rows=1),
    DeltaStepShape("b64"),
    DeltaStepShape("b64-bf16-state", state_dtype=jnp.bfloat16),
    DeltaStepShape("b8-t8", rows=8, length=8),
)


def _bytes(arrays) -> float:
    return float(sum(x.size * x.dtype.itemsize for x in arrays))


def _rule(shape: DeltaStepShape, implementation: str) -> Case:
    arrays = shape.rule()

    def build() -> Program:
        def gated_delta_rule_step(*given):
            step = pk.gated_delta_rule_step(
                *given, use_qk_l2norm=True, implementation=implementation
            )
            return step.out, step.final_state

        return gated_delta_rule_step, tuple(arrays.values())

    moved = _bytes((*arrays.values(), shape.state, arrays["value"]))
    name = f"gated_delta_rule/step_{implementation}/{shape.label}"
    return Case(name, build, shape.flops, moved, (0,), donated=(5,))


def _layer(shape: DeltaStepShape, implementation: str) -> Case:
    arrays = shape.layer()

    def build() -> Program:
        def gated_deltanet_step(mixed, logits, state, conv_state, *weights):
            names = ("conv_kernel", "A_log", "dt_bias")
            named = {name: x[0] for name, x in zip(names, weights, strict=True)}
            step = pk.gated_deltanet_step(
                mixed, logits, state, conv_state, **named, implementation=implementation
            )
            return step.out, step.final_state, step.final_conv_state

        return gated_deltanet_step, tuple(arrays.values())

    # In: all but the output gates in `mixed`. Out: both states and the outputs, as many as there are gates.
    moved = _bytes((*arrays.values(), shape.state, arrays["conv_state"]))
    name = f"gated_deltanet/step_{implementation}/{shape.label}"
    return Case(name, build, shape.flops, moved, (0,), donated=(2,))


def _chosen(batch: int = 32) -> Case:
    """One token per row; the state is donated, so it is updated in place."""
    key_heads, heads, dim, struct = 16, 32, 128, jax.ShapeDtypeStruct

    def build() -> Program:
        key = struct((batch, 1, key_heads, dim), jnp.bfloat16)
        value = struct((batch, 1, heads, dim), jnp.bfloat16)
        gate = struct((batch, 1, heads), jnp.float32)
        state = struct((batch, heads, dim, dim), jnp.float32)

        def gated_delta_rule_step(*arrays):
            found = pk.gated_delta_rule_step(*arrays)
            return found.out, found.final_state

        return gated_delta_rule_step, (key, key, value, gate, gate, state)

    state = 4.0 * batch * heads * dim * dim
    moved = 2 * state + 2.0 * batch * dim * (2 * key_heads + 2 * heads) + 8.0 * batch * heads
    flops = 6.0 * batch * heads * dim * dim
    return Case(f"gated_delta_rule/step/b{batch}", build, flops, moved, donated=(5,))


def cases() -> list[Case]:
    """Every registered case: what runs by default, then the kernels by name."""
    return [_chosen(), *kernel_cases()]


def kernel_cases() -> list[Case]:
    """The kernels."""
    makers: tuple[Callable[..., Case], ...] = (_rule, _layer)
    return [make(shape, name) for make in makers for name in IMPLEMENTATIONS for shape in SHAPES]
