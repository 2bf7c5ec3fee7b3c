"""A hybrid decoder: full-attention, sliding-attention and linear-attention layers with dense or mixture blocks."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gqa_jax.cache import AttentionCache, GatedDeltaNetState, Policy
from gqa_jax.config import DecoderConfig
from gqa_jax.layers import dropout, masks, records
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.layers.moe import RouterStatistics
from gqa_jax.layers.norms import RMSNorm
from gqa_jax.layers.projection import Projection
from gqa_jax.models.checks import check_cache, check_token_range, checked_marks, checked_tokens
from gqa_jax.models.checks import pattern_length as pattern_length
from gqa_jax.models.decoder_layer import DecoderLayer, Embedding
from gqa_jax.parallel import decoder as on_mesh
from gqa_jax.parallel.context import ContextParallel
from gqa_jax.parallel.sharding import MeshAxes

LayerCache = AttentionCache | GatedDeltaNetState
DecoderCache = tuple[LayerCache, ...]


class StepOutput(NamedTuple):
    """Result of `Decoder.step`.

    Attributes:
      logits: `[B, T, V]`, or `[B, 1, V]` with `last_only`.
      cache: the advanced cache.
    """

    logits: Array
    cache: DecoderCache


class DecoderOutput(NamedTuple):
    """Result of `Decoder.with_router_statistics`.

    Attributes:
      logits: `[B, T, V]`.
      router: statistics merged over all mixture layers, padding excluded; see `moe.load_balancing_loss`.
    """

    logits: Array
    router: RouterStatistics


class Decoder(nnx.Module):
    """Embedding, layers, final norm, output projection: `__call__` trains, `step` advances a cache.

    Attributes:
      embed: embedding `[V, M]`.
      layers: one `DecoderLayer` per layer; with `scan_layers` one per layer of the repeating pattern, its
        parameters stacked over the repeats on a leading axis (layer r * pattern + i is row r of `layers[i]`).
      norm: scale `[M]`.
      lm_head: kernel `[M, V]`, or None where embeddings are tied.
      rngs: the stream for dropout, as in `SelfAttention`, or None; the layers have none.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gqa_jax import AttentionConfig, DecoderConfig
      >>> attention = AttentionConfig(model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
      >>> config = DecoderConfig(
      ...     vocab_size=64, model_dim=32, layers=("full_attention",) * 2, attention=attention, intermediate_size=48
      ... )
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> decoder(jnp.zeros((1, 5), jnp.int32)).shape
      (1, 5, 64)
      >>> logits, cache = decoder.step(jnp.zeros((1, 5), jnp.int32), decoder.init_cache(1, 16))
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype=None,
        param_dtype=jnp.float32,
        logits_dtype=None,
        axes: MeshAxes | None = None,
        context_parallel: ContextParallel | None = None,
        keep_rngs: bool = True,
    ):
        """Builds the decoder.

        Args:
          config: sizes and switches.
          rngs, keep_rngs: as for `SelfAttention`.
          dtype: dtype of the computation; None means that of the parameters.
          param_dtype: dtype of the parameters (decay parameters of Gated DeltaNet are always float32).
          axes: names of the mesh axes that calls run on; None for one device.
          context_parallel: how, where `axes.seq` splits the tokens, which then come from `to_layout`.
          logits_dtype: the output projection accumulates and returns this; None means `dtype`, as Hugging Face.

        Raises:
          ValueError: `config.scan_layers` and layers that do not repeat; `axes.seq` without `context_parallel`.
        """
        on_mesh.check_axes(axes, context_parallel)
        self.axes, self.context_parallel = axes, context_parallel
        self.config = config
        self.logits_dtype = logits_dtype
        common: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.embed = Embedding(config.vocab_size, config.model_dim, **common)

        def layer(index: int, rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, index, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        if config.scan_layers:
            self.pattern = pattern_length(config)
            repeats = len(config.layers) // self.pattern
            layers = [
                jax.vmap(lambda key, i=i: layer(i, nnx.Rngs(params=key)))(
                    jax.random.split(rngs.params(), repeats)
                )
                for i in range(self.pattern)
            ]
        else:
            self.pattern = len(config.layers)
            layers = [layer(i, rngs) for i in range(self.pattern)]
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(
            config.model_dim,
            eps=config.norm_eps,
            zero_centred=config.norm_zero_centred,
            param_dtype=param_dtype,
        )
        tied = config.tie_embeddings
        self.lm_head = (
            None if tied else Projection((config.model_dim,), (config.vocab_size,), **common)
        )
        rate = 0.0 if config.attention is None else config.attention.dropout_rate
        self.rngs = dropout.kept_stream(rngs, rate, keep=keep_rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each token.

        Args:
          tokens: `[B, T]` integer.
          positions: for the rotary embedding; None counts from 0 in each row, or in each segment.
          segment_ids: `[B, T]`; tokens see only their own segment; negative ids are padding, anywhere, whose logits
            hold no meaning.
          deterministic: False applies the configured dropout; None asks each layer, which `train()` and `eval()` set.
          dropout_key, rngs: as for `SelfAttention`; one key for all layers.

        Returns:
          `[B, T, V]`.

        Raises:
          TypeError, ValueError: naming the argument.
        """
        marks = dict(positions=positions, segment_ids=segment_ids)
        drop = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        return self._dispatch(tokens, **marks, **drop)[0]

    def with_router_statistics(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "3 B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool | None = None,
        dropout_key: Array | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> DecoderOutput:
        """As `__call__`, with what the load-balancing loss needs.

        Raises:
          ValueError: besides those of `__call__`, no layer is a mixture.
        """
        if self.config.moe is None:
            raise ValueError("`config.moe` must be given for router statistics, got None")
        marks = dict(positions=positions, segment_ids=segment_ids)
        drop = dict(deterministic=deterministic, dropout_key=dropout_key, rngs=rngs)
        logits, router = self._dispatch(tokens, **marks, **drop)
        assert router is not None
        return DecoderOutput(logits, router)

    def init_cache(
        self, batch_size: int, max_length: int, *, dtype=None, policy: Policy = "full"
    ) -> DecoderCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens.

        Args:
          batch_size, max_length: B and S.
          dtype: of keys, values and convolution inputs; None means the dtype of the computation.
          policy: of attention layers, see `gqa_jax.cache.allocate`; "ring" holds for those with a sliding window,
            the others keep every token.

        Returns:
          one entry per layer; with `scan_layers` one per layer of the pattern, stacked over the repeats.

        Raises:
          ValueError: sizes that are not positive, an unknown policy, or "ring" without a sliding window anywhere.
        """
        attention = [layer.mixer for layer in self.layers if isinstance(layer.mixer, SelfAttention)]
        windowed = any(mixer.config.sliding_window is not None for mixer in attention)
        if policy == "ring" and not windowed:
            raise ValueError("`policy` must not be 'ring' for a decoder without sliding windows")

        def make(layer: DecoderLayer) -> LayerCache:
            mixer = layer.mixer
            if isinstance(mixer, GatedDeltaNet):
                return mixer.init_cache(batch_size, max_length, dtype=dtype)
            full = policy == "ring" and mixer.config.sliding_window is None
            return mixer.init_cache(
                batch_size, max_length, dtype=dtype, policy="full" if full else policy
            )

        if not self.config.scan_layers:
            return tuple(make(layer) for layer in self.layers)
        return tuple(jax.vmap(make, axis_size=self._repeats)(layer) for layer in self.layers)

    def step(
        self,
        tokens: Int[Array, "B T"],
        cache: DecoderCache,
        *,
        lengths: Int[Array, "B"] | None = None,
        padding_side: Literal["right", "left"] = "right",
        last_only: bool = False,
    ) -> StepOutput:
        """Appends T >= 1 tokens to each row: prefill, in any split, and decoding.

        Args:
          tokens: `[B, T]` integer.
          cache: what `init_cache` or the last step returned. Donate it, and it is updated in place.
          lengths: `[B]`, how many of the T tokens are real; None means all.
          padding_side: where the others are. The cache itself never holds padding.
          last_only: logits of each row's last real token only, `[B, 1, V]`; of no meaning for rows without any.

        Returns:
          logits (of no meaning on padding) and the advanced cache.

        Raises:
          TypeError, ValueError: naming the argument; a cache too short, where its lengths can be read. Inside
            `jit`, rows that overflow return NaN instead.
        """
        if padding_side not in ("right", "left"):
            raise ValueError(f"`padding_side` must be 'right' or 'left', got {padding_side!r}")
        tokens = checked_tokens(tokens)
        lengths = check_cache(cache, len(self.layers), tokens, lengths)
        real = None
        if lengths is not None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            if padding_side == "left":
                tokens = _roll(tokens, index - lengths[:, None])
            real = index < lengths[:, None]
        check_token_range(tokens, self.config.vocab_size, real)
        advance = self.advance if self.axes is None else functools.partial(on_mesh.advance, self)
        left = padding_side == "left"
        return advance(tokens, cache, lengths=lengths, last_only=last_only, left=left)

    def advance(
        self,
        tokens: Array,
        cache: DecoderCache,
        *,
        lengths: Array | None,
        last_only: bool,
        left: bool,
    ) -> StepOutput:
        """`step` on this device, of right-padded and checked tokens; `left` moves the logits' padding there."""
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        segment_ids = None
        if lengths is not None:
            segment_ids = masks.right_padding_segment_ids(lengths, tokens.shape[1])
        x = self.embed(tokens, segment_ids)
        if self.config.scan_layers:
            x, cache = self._scan_step(x, cache, lengths)
        else:
            advanced = []
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                x, layer_cache = layer.step(x, layer_cache, lengths=lengths)
                advanced.append(layer_cache)
            cache = tuple(advanced)
        if last_only:
            batch, num_new = tokens.shape
            last = jnp.full((batch,), num_new, jnp.int32) if lengths is None else lengths
            x = _roll(x, last[:, None] - 1)
        elif lengths is not None and left:
            x = _roll(x, index + lengths[:, None])
        return StepOutput(self.logits(self.norm(x)), cache)

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` of the model; with `scan_layers`, a copy of its row of the stack.

        Raises:
          ValueError: there is no such layer.
        """
        if not 0 <= index < len(self.config.layers):
            raise ValueError(f"`index` must lie in [0, {len(self.config.layers)}), got {index}")
        repeat, position = divmod(index, self.pattern)
        layer = self.layers[position]
        return jax.tree.map(lambda x: x[repeat], layer) if self.config.scan_layers else layer

    @property
    def _repeats(self) -> int:
        return len(self.config.layers) // self.pattern

    def _dispatch(
        self, tokens, *, positions, segment_ids, deterministic, dropout_key, rngs
    ) -> tuple[Array, RouterStatistics | None]:
        """`forward` of checked arguments: here, or on the devices of a mesh."""
        tokens = checked_tokens(tokens)
        positions, segment_ids = checked_marks(tokens, positions, segment_ids)
        real = None if segment_ids is None else segment_ids >= 0
        check_token_range(tokens, self.config.vocab_size, real)
        attention = [layer.mixer for layer in self.layers if isinstance(layer.mixer, SelfAttention)]
        quiet = all(m.deterministic for m in attention) if deterministic is None else deterministic
        rate = self.config.attention.dropout_rate if attention and self.config.attention else 0.0
        drop = dict(deterministic=quiet, dropout_key=dropout_key, rngs=rngs)
        key = dropout.key_of_call(self.rngs, rate, **drop)
        marks = dict(positions=positions, segment_ids=segment_ids)
        call: dict[str, Any] = dict(deterministic=deterministic, dropout_key=key, **marks)
        if self.axes is None:
            return self.forward(tokens, **call)
        return on_mesh.forward(self, tokens, **call)

    def forward(
        self,
        tokens: Array,
        *,
        positions: Array | None,
        segment_ids: Array | None,
        deterministic: bool | None,
        dropout_key: Array | None,
        dropout_offset: Array | None = None,
    ) -> tuple[Array, RouterStatistics | None]:
        """Logits on this device and the router's statistics; arguments as of `__call__` and `SelfAttention`."""
        if segment_ids is not None and positions is None:
            positions = masks.positions_in_segments(segment_ids)
        marks = dict(positions=positions, segment_ids=segment_ids)
        options = dict(deterministic=deterministic, dropout_offset=dropout_offset, **marks)

        def run(layer, x, key):
            return *layer(x, dropout_key=key, **options), records.records(layer)

        remat = self.config.remat
        if remat:
            run = jax.checkpoint(run, policy=None if remat is True else remat)

        def run_pattern(carry, repeat):
            (x, router), (first, layers) = carry, repeat
            for i, layer in enumerate(layers):
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, first + i)
                x, statistics, recorded = run(layer, x, key)
                records.put_records(layer, recorded)
                if statistics is not None:
                    router = router.merge(statistics)
            return (x, router), records.records(layers)

        moe = self.config.moe
        router = None if moe is None else RouterStatistics.empty(moe.num_experts)
        carry = self.embed(tokens, segment_ids), router
        if self.config.scan_layers:
            firsts = jnp.arange(self._repeats, dtype=jnp.int32) * self.pattern
            carry, recorded = jax.lax.scan(run_pattern, carry, (firsts, self.layers))
            records.put_records(self.layers, recorded)
        else:
            carry, _ = run_pattern(carry, (0, self.layers))
        x, router = carry
        return self.logits(self.layers[0].gather(self.norm(x))), router

    def _scan_step(self, x, cache, lengths) -> tuple[Array, DecoderCache]:
        """`step` of all layers with the stacked cache as the scan's carry, so that it is one buffer throughout."""

        def body(carry, repeat):
            x, cache = carry
            index, layers = repeat
            take = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
            put = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, index, 0)
            advanced = []
            for layer, stack in zip(layers, cache, strict=True):
                x, layer_cache = layer.step(x, jax.tree.map(take, stack), lengths=lengths)
                advanced.append(jax.tree.map(put, stack, layer_cache))
            return (x, tuple(advanced)), None

        index = jnp.arange(self._repeats, dtype=jnp.int32)
        return jax.lax.scan(body, (x, cache), (index, self.layers))[0]

    def logits(self, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
        """Output projection of what the final norm returned."""
        if self.lm_head is None:
            kernel, spec = self.embed.embedding[...], "btm,vm->btv"
        else:
            kernel, spec = self.lm_head.kernel[...], "btm,mv->btv"
        dtype = self.logits_dtype or x.dtype
        return jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _roll(x: Array, source: Array) -> Array:
    """`x[b, source[b, t] mod T]` of `[B, T, ...]`."""
    source = source % x.shape[1]
    return jnp.take_along_axis(
        x, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip"
    )
