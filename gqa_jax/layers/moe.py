"""Top-k mixture of SwiGLU experts, dropless: tokens sorted by expert, then one ragged matrix product per layer.

Routing as in Qwen3-MoE, Qwen3-Next and Qwen3.5-MoE (transformers): softmax over all experts in float32, then the k
largest, then (where configured) division by their sum, then the cast to the dtype of the model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gqa_jax.config import MoEConfig
from gqa_jax.layers.mlp import MLP, swiglu
from gqa_jax.layers.projection import Projection, compute_dtype


class RouterStatistics(NamedTuple):
    """What the load-balancing loss needs; adds up over layers, micro-batches and devices.

    Attributes:
      assignments: `[E]` float32, how often each expert was among a token's k.
      probability: `[E]` float32, sum over tokens of the router's probability.
      num_tokens: `[]` float32.
    """

    assignments: Float[Array, "E"]
    probability: Float[Array, "E"]
    num_tokens: Float[Array, ""]

    def merge(self, other: "RouterStatistics") -> "RouterStatistics":
        """The statistics of both."""
        return RouterStatistics(*(a + b for a, b in zip(self, other, strict=True)))

    @classmethod
    def empty(cls, num_experts: int) -> "RouterStatistics":
        """The statistics of no token."""
        zeros = jnp.zeros((num_experts,), jnp.float32)
        return cls(zeros, zeros, jnp.zeros((), jnp.float32))


class MoEOutput(NamedTuple):
    """Result of a mixture block.

    Attributes:
      out: the input's shape.
      statistics: of the router, padding excluded.
    """

    out: Array
    statistics: RouterStatistics


def load_balancing_loss(statistics: RouterStatistics) -> Float[Array, ""]:
    """`E * sum_e fraction_e * probability_e` (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    With statistics merged over all layers this is `transformers`' `load_balancing_loss_func`: k at perfect balance,
    more otherwise. Gradients flow through the probabilities. 0 where no token was routed.
    """
    tokens = jnp.maximum(statistics.num_tokens, 1.0)
    num_experts = statistics.assignments.shape[0]
    shares = (statistics.assignments / tokens) * (statistics.probability / tokens)
    return num_experts * jnp.sum(shares)


class Experts(nnx.Module):
    """Parameters of E SwiGLU blocks and their product with tokens that are sorted by expert.

    Attributes:
      gate_up: `[E, M, F, 2]`.
      down: `[E, F, M]`.
    """

    def __init__(
        self, config: MoEConfig, model_dim: int, *, rngs: nnx.Rngs, dtype=None, param_dtype
    ):
        self.dtype = dtype
        experts, width = config.num_experts, config.intermediate_size

        def kernel(shape: tuple[int, ...], fan_in: int) -> nnx.Param:
            wide = np.promote_types(param_dtype, np.float32)
            draw = jax.random.truncated_normal(rngs.params(), -2, 2, shape, wide)
            return nnx.Param((draw * (fan_in**-0.5 / 0.8796)).astype(param_dtype))

        self.gate_up = kernel((experts, model_dim, width, 2), model_dim)
        self.down = kernel((experts, width, model_dim), width)

    def __call__(self, x: Float[Array, "n M"], group_sizes: Int[Array, "E"]) -> Array:
        """Row i of x goes through the expert of its group; `[n, M]`."""
        gate_up, down = self.gate_up[...], self.down[...]
        dtype = compute_dtype(x, gate_up, self.dtype)
        experts, model_dim, width, _ = gate_up.shape
        fused = gate_up.astype(dtype).reshape(experts, model_dim, 2 * width)
        hidden = jax.lax.ragged_dot(x.astype(dtype), fused, group_sizes)
        hidden = swiglu(hidden.reshape(-1, width, 2))
        return jax.lax.ragged_dot(hidden, down.astype(dtype), group_sizes)


class MoE(nnx.Module):
    """Mixture block: k of E experts per token, and an always-on expert behind a sigmoid gate if configured.

    No token is ever dropped and no token sees another, so padding needs no care.

    Attributes:
      router: kernel `[M, E]`.
      experts: gate_up `[E, M, F, 2]`, down `[E, F, M]`.
      shared: an `MLP`, or None.
      shared_gate: kernel `[M, 1]`, or None.
    """

    def __init__(
        self,
        config: MoEConfig,
        model_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        """Builds the block: its config and M, then as for `SelfAttention`."""
        self.config = config
        common = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.router = Projection((model_dim,), (config.num_experts,), **common)
        self.experts = Experts(config, model_dim, **common)
        width = config.shared_intermediate_size
        self.shared = None if width is None else MLP(model_dim, width, **common)
        self.shared_gate = None if width is None else Projection((model_dim,), (1,), **common)

    def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
        """Maps the last axis; same shape."""
        return self.with_statistics(x).out

    def with_statistics(
        self, x: Float[Array, "... M"], *, real: Bool[Array, "..."] | None = None
    ) -> MoEOutput:
        """Output, and the router's statistics over the tokens where `real` is True (None: all); x is 0 elsewhere."""
        if real is not None:
            x = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
        flat = x.reshape(-1, x.shape[-1])
        weights, experts, probabilities = self._route(flat)
        out = self._mix(flat, weights, experts)
        if self.shared is not None and self.shared_gate is not None:
            out = out + jax.nn.sigmoid(self.shared_gate(flat)) * self.shared(flat)
        counted = jnp.ones(flat.shape[:1], jnp.float32)
        if real is not None:
            counted = real.reshape(-1).astype(jnp.float32)
        hits = jnp.repeat(counted, self.config.num_experts_per_token)
        statistics = RouterStatistics(
            assignments=jnp.zeros((self.config.num_experts,), jnp.float32)
            .at[experts.reshape(-1)]
            .add(hits),
            probability=counted @ probabilities,
            num_tokens=counted.sum(),
        )
        return MoEOutput(out.reshape(x.shape), statistics)

    def _route(self, x: Array) -> tuple[Array, Array, Array]:
        """Weights and indices `[n, k]` of each token's experts, and all probabilities `[n, E]` float32."""
        logits = self.router(x)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.config.num_experts_per_token)
        if self.config.normalize_top_k:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.astype(logits.dtype), experts, probabilities

    def _mix(self, x: Array, weights: Array, experts: Array) -> Array:
        """Sum over each token's experts, accumulated in float32, `[n, M]` in the dtype of the experts' output."""
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)  # slot -> (token, choice), sorted by expert
        group_sizes = jnp.bincount(flat, length=self.config.num_experts).astype(jnp.int32)
        out = self.experts(x[order // self.config.num_experts_per_token], group_sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        out = out.reshape(*weights.shape, out.shape[-1])
        wide = np.promote_types(out.dtype, np.float32)
        mixed = jnp.einsum("nkm,nk->nm", out, weights, preferred_element_type=wide)
        return mixed.astype(out.dtype)
