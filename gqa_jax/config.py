"""Configurations: frozen, keyword-only, without behaviour; one that exists is valid. Errors name field, value, rule."""

import dataclasses
from collections.abc import Callable, Collection, Hashable
from typing import Any, Literal

from gqa_jax.config_checks import normalise, require, require_positive

QKNorm = Literal["none", "rms", "rms_zero_centred", "l2"]
CHUNK_SIZES = (16, 32, 64, 128)  # what `gated_delta_rule` takes
LayerKind = Literal["full_attention", "sliding_attention", "linear_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float

    def __post_init__(self):
        normalise(self)
        require(self.factor >= 1, f"`factor` must be at least 1, got {self.factor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        normalise(self)
        require(self.factor >= 1, f"`factor` must be at least 1, got {self.factor}")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"`low_freq_factor={self.low_freq_factor}` must lie between 0 and "
            f"`high_freq_factor={self.high_freq_factor}`",
        )
        require_positive(self, "original_max_positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): NTK-by-parts frequencies, and cos/sin multiplied by a concentration factor.

    Attributes:
      factor: context extension.
      original_max_positions: context length of pre-training.
      beta_fast, beta_slow: rotations over the original context between which the ramp runs.
      attention_factor: the concentration; None derives it from `factor`, `mscale` and `mscale_all_dim`.
      truncate: round the ramp's ends to whole channels.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        normalise(self)
        require(self.factor >= 1, f"`factor` must be at least 1, got {self.factor}")
        require_positive(self, "original_max_positions", "beta_fast", "beta_slow")
        require_positive(self, "attention_factor", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the geometric frequencies.
      rotary_dim: the first so many channels of a head are rotated; None rotates all.
      pairing: "half" rotates (i, i + rotary_dim / 2) as Hugging Face does; "adjacent" rotates (2i, 2i + 1).
      scaling: context extension.
      mrope_sections: channels (of rotary_dim / 2) that follow the temporal, height and width position.
      mrope_interleaved: sections interleaved channel by channel (Qwen3.5) instead of in blocks.
    """

    theta: float = 10_000.0
    rotary_dim: int | None = None
    pairing: Literal["half", "adjacent"] = "half"
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    mrope_sections: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False

    def __post_init__(self):
        normalise(self)
        require_positive(self, "theta")
        if isinstance(self.scaling, YarnScaling):
            require(self.theta > 1, f"`theta` must exceed 1 with YarnScaling, got {self.theta}")
        if self.rotary_dim is not None:
            require(
                self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
                f"`rotary_dim` must be positive and even, got {self.rotary_dim}",
            )
        if self.mrope_sections is not None:
            require(
                min(self.mrope_sections) >= 0,
                f"`mrope_sections` must not be negative, got {self.mrope_sections}",
            )
            if self.rotary_dim is not None:
                require(
                    sum(self.mrope_sections) == self.rotary_dim // 2,
                    f"`mrope_sections={self.mrope_sections}` must sum to rotary_dim / 2 = {self.rotary_dim // 2}",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention over one fused projection.

    Attributes:
      model_dim: M, width of the residual stream.
      num_heads, num_kv_heads: N and K; N must be a multiple of K.
      head_dim: D; independent of M / N.
      qkv_bias, out_bias: bias on the fused input projection and on the output projection.
      output_gate: the fused projection also yields a gate per head and channel; `out * sigmoid(gate)`.
      output_gate_dtype: "model" multiplies in the model's dtype (Hugging Face), "float32" in float32 (Megatron).
      qk_norm: norm over D of queries and keys: none, RMS with weight w, RMS with weight 1 + w, or weightless RMS
        ("l2": divides by the root *mean* square, as Megatron and Llama 4 do).
      qk_norm_position: "before_rope" (Hugging Face, Megatron) or "after_rope" (torchtune).
      norm_eps: epsilon of the query/key norms.
      rope: None for no position embedding.
      sliding_window: exactly so many keys are visible, self included.
      scale: multiplies the logits; None means head_dim ** -0.5.
      logits_soft_cap: cap * tanh(logits / cap).
      sinks: "none", "zero" (an extra logit 0 per head, "off by one") or "learnable".
      is_causal: False for encoders.
      dropout_rate: dropout on the attention weights, only when not deterministic.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    output_gate: bool = False
    output_gate_dtype: Literal["model", "float32"] = "model"
    qk_norm: QKNorm = "none"
    qk_norm_position: Literal["before_rope", "after_rope"] = "before_rope"
    norm_eps: float = 1e-6
    rope: RopeConfig | None = RopeConfig()
    sliding_window: int | None = None
    scale: float | None = None
    logits_soft_cap: float | None = None
    sinks: Literal["none", "zero", "learnable"] = "none"
    is_causal: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self):
        normalise(self)
        require_positive(self, "model_dim", "num_heads", "num_kv_heads", "head_dim")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"`num_heads={self.num_heads}` must be a multiple of `num_kv_heads={self.num_kv_heads}`",
        )
        require_positive(self, "norm_eps")
        require_positive(self, "sliding_window")
        if self.sliding_window is not None:
            require(self.is_causal, "`sliding_window` needs `is_causal=True`")
        require_positive(self, "scale", "logits_soft_cap")
        require(
            0.0 <= self.dropout_rate < 1.0,
            f"`dropout_rate` must be in [0, 1), got {self.dropout_rate}",
        )
        if self.rope is not None:
            rotary_dim = self.rope.rotary_dim or self.head_dim
            require(
                rotary_dim <= self.head_dim and rotary_dim % 2 == 0,
                f"`rope.rotary_dim={rotary_dim}` must be even and at most `head_dim={self.head_dim}`",
            )
            sections = self.rope.mrope_sections
            require(
                sections is None or sum(sections) == rotary_dim // 2,
                f"`rope.mrope_sections={sections}` must sum to rotary_dim / 2 = {rotary_dim // 2}",
            )

    @property
    def q_per_kv(self) -> int:
        """R, query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet layer (arXiv 2412.06464; Qwen3-Next, Qwen3.5, Megatron and FLA variants).

    Attributes:
      model_dim: M.
      num_key_heads, num_value_heads: Hk and Hv; Hv must be a multiple of Hk.
      key_head_dim, value_head_dim: Dk and Dv.
      conv_width: W of the causal depthwise convolution over queries, keys and values.
      conv_bias: bias of the convolution.
      norm_eps: epsilon of the gated output norm.
      norm_zero_centred: the output norm multiplies by 1 + w (Megatron) instead of w.
      allow_negative_eigenvalues: beta = 2 * sigmoid(b) (FLA).
      decay_init: "ones" sets dt_bias to 1 (Qwen); "mamba" draws softplus(dt_bias) log-uniformly from [1e-3, 0.1].
      A_init_range: exp(A_log) is drawn uniformly from this range; never 0.
      chunk_size: of the chunked operator; None lets the operator choose.
    """

    model_dim: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int = 4
    conv_bias: bool = False
    norm_eps: float = 1e-6
    norm_zero_centred: bool = False
    allow_negative_eigenvalues: bool = False
    decay_init: Literal["ones", "mamba"] = "ones"
    A_init_range: tuple[float, float] = (0.01, 16.0)
    chunk_size: int | None = None

    def __post_init__(self):
        normalise(self)
        require_positive(
            self,
            "model_dim",
            "num_key_heads",
            "num_value_heads",
            "key_head_dim",
            "value_head_dim",
            "conv_width",
        )
        require(
            self.num_value_heads % self.num_key_heads == 0,
            f"`num_value_heads={self.num_value_heads}` must be a multiple of `num_key_heads={self.num_key_heads}`",
        )
        require_positive(self, "norm_eps")
        low, high = self.A_init_range
        require(
            0 < low <= high, f"`A_init_range` must satisfy 0 < low <= high, got {self.A_init_range}"
        )
        require_positive(self, "chunk_size")
        require(
            self.chunk_size in (None, *CHUNK_SIZES),
            f"`chunk_size` must be None or one of {CHUNK_SIZES}, got {self.chunk_size}",
        )

    @property
    def v_per_key(self) -> int:
        """n, value heads per key head."""
        return self.num_value_heads // self.num_key_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Top-k mixture of SwiGLU experts.

    Attributes:
      num_experts, num_experts_per_token: E and k.
      intermediate_size: width of one expert.
      shared_intermediate_size: width of the always-on, sigmoid-gated shared expert; None for none.
      normalize_top_k: divide the k router probabilities by their sum.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    normalize_top_k: bool = True

    def __post_init__(self):
        normalise(self)
        require_positive(self, "num_experts", "num_experts_per_token", "intermediate_size")
        require(
            self.num_experts_per_token <= self.num_experts,
            f"`num_experts_per_token={self.num_experts_per_token}` must be at most "
            f"`num_experts={self.num_experts}`",
        )
        require_positive(self, "shared_intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of full-attention, sliding-attention and linear-attention layers.

    Attributes:
      vocab_size, model_dim: V and M.
      layers: the kind of each layer.
      attention: config of attention layers; None if there are none.
      sliding_window: window of "sliding_attention" layers (exactly so many keys).
      gated_deltanet: config of linear-attention layers; None if there are none.
      intermediate_size: width of dense SwiGLU blocks; None if every layer is a mixture.
      moe: mixture config; None if every layer is dense.
      moe_layers: per layer, whether its block is a mixture; None means all layers if `moe` is given.
      norm_eps, norm_zero_centred: RMS norms of the residual stream; zero-centred multiplies by 1 + w.
      tie_embeddings: the output projection is the transposed embedding.
      family: Hugging Face `model_type` that the config was read from or is saved as; None for none.
      source: folder that `checkpoint.load_hf` read; `save_hf` takes the tokenizer and other such files from it. Not
        part of equality: one compiled program serves all folders of a model, and a decoder that a `jit` of your own
        returns names the folder of the first call.
      stop_tokens, pad_token: ids that end a text (end-of-sequence tokens) and fill what is behind; for `generate`.
      scan_layers: scan over the repeating pattern of layers (stacked parameters, one compile per pattern).
      remat: recompute each layer in the backward pass: all of it (True), or what a policy of `jax.checkpoint` does not
        keep, e.g. `recompute.policy(save=("core_attention",))`.
    """

    vocab_size: int
    model_dim: int
    layers: tuple[LayerKind, ...]
    attention: AttentionConfig | None = None
    sliding_window: int | None = None
    gated_deltanet: GatedDeltaNetConfig | None = None
    intermediate_size: int | None = None
    moe: MoEConfig | None = None
    moe_layers: tuple[bool, ...] | None = None
    norm_eps: float = 1e-6
    norm_zero_centred: bool = False
    tie_embeddings: bool = False
    family: str | None = None
    source: str | None = dataclasses.field(default=None, compare=False)
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    scan_layers: bool = False
    remat: bool | Callable[..., Any] = False

    def __post_init__(self):
        normalise(self)
        require_positive(self, "vocab_size", "model_dim", "norm_eps")
        if not isinstance(self.remat, bool) and not (
            callable(self.remat) and isinstance(self.remat, Hashable)
        ):
            raise TypeError(
                f"`remat` must be True, False or a policy of `jax.checkpoint` (hashable), got {self.remat!r}"
            )
        require(len(self.layers) > 0, "`layers` must name at least one layer")
        kinds = set(self.layers)
        linear = kinds & {"linear_attention"}
        for name, needing in (("attention", kinds - linear), ("gated_deltanet", linear)):
            config = getattr(self, name)
            require(config or not needing, f"`{name}` must be given for `layers` of {needing}")
            require(
                not config or config.model_dim == self.model_dim,
                f"`{name}.model_dim` must equal `model_dim={self.model_dim}`, got {config}",
            )
        if "sliding_attention" in kinds:
            require(
                self.sliding_window is not None and self.sliding_window > 0,
                f"`sliding_window` must be positive when `layers` has sliding_attention, got {self.sliding_window}",
            )
            require(
                self.attention is not None and self.attention.is_causal,
                "`attention.is_causal` must be True when `layers` has sliding_attention, got False",
            )
        if self.moe_layers is not None:
            require(
                len(self.moe_layers) == len(self.layers),
                f"`moe_layers` must have one entry per layer ({len(self.layers)}), got {len(self.moe_layers)}",
            )
            require(
                self.moe is not None or not any(self.moe_layers),
                "`moe` must be given when `moe_layers` has any",
            )
        require(
            self.intermediate_size or all(self.is_moe(i) for i in range(len(self.layers))),
            "`intermediate_size` must be given for dense layers",
        )
        require_positive(self, "intermediate_size")

    @classmethod
    def from_hf(cls, source: Any, *, ignore: Collection[str] = ()) -> "DecoderConfig":
        """The config of a Hugging Face `config.json`: its dict, its path or its folder's (`hf_config.from_hf`)."""
        from gqa_jax.hf import config as hf_config  # it imports this module

        return hf_config.from_hf(source, ignore=ignore)

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward block of `layer` is a mixture of experts."""
        if self.moe is None:
            return False
        return True if self.moe_layers is None else self.moe_layers[layer]

    def attention_at(self, layer: int) -> AttentionConfig:
        """The attention config of `layer`, its window included."""
        if self.attention is None or self.layers[layer] == "linear_attention":
            raise ValueError(f"layer {layer} is {self.layers[layer]}, it has no attention config")
        window = self.sliding_window if self.layers[layer] == "sliding_attention" else None
        if window is None:
            return self.attention
        return dataclasses.replace(self.attention, sliding_window=window)
