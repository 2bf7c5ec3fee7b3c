"""Which Hugging Face tensors make which of our parameters.

One rule per parameter, or per pair that is converted together: it is pure data about names and shapes and two exact
functions, `fuse` (their tensors to our arrays) and `split` (back). Paths are those of the module tree:
`("layers", 3, "mixer", "qkv", "kernel")`.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gqa_jax import layout
from gqa_jax.config import AttentionConfig, DecoderConfig, GatedDeltaNetConfig, MoEConfig
from gqa_jax.models.decoder import pattern_length

Path = tuple[Hashable, ...]
Arrays = Sequence[np.ndarray]


class Dialect(NamedTuple):
    """How a folder spells the names.

    Attributes:
      prefix: before the decoder's names; vision-language checkpoints add `language_model.`.
      fused_experts: experts as two stacked tensors, as modules hold them, instead of one tensor per expert.
    """

    prefix: str = "model."
    fused_experts: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Tensors and the parameters that they make.

    Attributes:
      paths, shapes: our parameters.
      names, hf_shapes: their tensors.
      fuse: tensors, in the order of `names`, to arrays in the order of `paths`.
      split: the inverse.
      float32: our parameters are float32 whatever the checkpoint holds.
    """

    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    fuse: Callable[[Arrays], Arrays]
    split: Callable[[Arrays], Arrays]
    float32: bool = False


def rules(config: DecoderConfig, dialect: Dialect | None = None) -> list[Rule]:
    """All rules of a decoder, in the order of its layers.

    Args:
      config: a config whose `family` is a Hugging Face `model_type`.
      dialect: None for what transformers' causal language models save.
    """
    dialect = dialect or Dialect()
    m, v = config.model_dim, config.vocab_size
    found = [_renamed("embed.embedding", (v, m), dialect.prefix + "embed_tokens.weight")]
    by_layer = [list(_layer(config, i, dialect)) for i in range(len(config.layers))]
    pattern = pattern_length(config) if config.scan_layers else len(by_layer)
    for position in range(pattern):
        repeats = range(position, len(by_layer), pattern)
        for alike in zip(*(by_layer[i] for i in repeats), strict=True):
            named = [
                _placed(rule, ("layers", position), f"{dialect.prefix}layers.{i}.")
                for rule, i in zip(alike, repeats, strict=True)
            ]
            found.append(_stacked(named) if config.scan_layers else named[0])
    found.append(_renamed("norm.scale", (m,), dialect.prefix + "norm.weight"))
    if not config.tie_embeddings:
        found.append(_transposed("lm_head.kernel", (m, v), "lm_head.weight"))
    return found


def _layer(config: DecoderConfig, index: int, dialect: Dialect) -> Iterator[Rule]:
    m = config.model_dim
    yield _renamed("mixer_norm.scale", (m,), "input_layernorm.weight")
    if config.layers[index] == "linear_attention":
        assert config.gated_deltanet is not None
        yield from _gated_deltanet(config.gated_deltanet, fused=config.family == "qwen3_next")
    else:
        yield from _attention(config.attention_at(index))
    yield _renamed("mlp_norm.scale", (m,), "post_attention_layernorm.weight")
    if config.is_moe(index):
        assert config.moe is not None
        yield from _moe(config.moe, m, dialect)
    else:
        assert config.intermediate_size is not None
        yield from _mlp("mlp.", "mlp.", m, config.intermediate_size)


def _attention(config: AttentionConfig) -> Iterator[Rule]:
    m, k, r, d = config.model_dim, config.num_kv_heads, config.q_per_kv, config.head_dim
    slots = (2 * r if config.output_gate else r) + 2
    widths = (k * r * d * (2 if config.output_gate else 1), k * d, k * d)
    sizes = {"q_per_kv": r, "head_dim": d}

    def fuse(tensors: Arrays) -> Arrays:
        parts = [tensor.T for tensor in tensors]
        if config.output_gate:
            return (layout.to_group_axes(layout.HFGatedQ(*parts), layout="hf_gated_q", **sizes),)
        fused = layout.fuse_qkv(*parts, layout="grouped", **sizes)
        return (layout.to_group_axes(fused, layout="grouped", **sizes),)

    def split(arrays: Arrays) -> Arrays:
        name = "hf_gated_q" if config.output_gate else "grouped"
        fused = layout.from_group_axes(arrays[0], layout=name, q_per_kv=r)
        parts = fused if config.output_gate else layout.split_qkv(fused, layout=name, **sizes)[:3]
        return [part.T for part in parts]

    def qkv(leaf: str, kind: str, inputs: tuple[int, ...]) -> Rule:
        return Rule(
            paths=(("mixer", "qkv", leaf),),
            shapes=((*inputs, k, slots, d),),
            names=tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv"),
            hf_shapes=tuple((width, *inputs) for width in widths),
            fuse=fuse,
            split=split,
        )

    yield qkv("kernel", "weight", (m,))
    if config.qkv_bias:
        yield qkv("bias", "bias", ())
    yield _transposed("mixer.out.kernel", (k, r, d, m), "self_attn.o_proj.weight", num_in=3)
    if config.out_bias:
        yield _renamed("mixer.out.bias", (m,), "self_attn.o_proj.bias")
    if config.qk_norm in ("rms", "rms_zero_centred"):
        for part in "qk":
            yield _renamed(f"mixer.{part}_norm.scale", (d,), f"self_attn.{part}_norm.weight")


def _gated_deltanet(config: GatedDeltaNetConfig, *, fused: bool) -> Iterator[Rule]:
    m, w, h, n = config.model_dim, config.conv_width, config.num_key_heads, config.v_per_key
    dk, dv = config.key_head_dim, config.value_head_dim
    sizes = {"v_per_key": n, "key_head_dim": dk, "value_head_dim": dv}
    inputs = layout.Qwen3NextInputs if fused else layout.Qwen3_5Inputs
    source = "qwen3_next" if fused else "qwen3_5"
    z = h * n * dv
    widths = (2 * h * dk + 2 * z, 2 * h * n) if fused else (2 * h * dk + z, z, h * n, h * n)

    def fuse(tensors: Arrays) -> Arrays:
        parts = inputs(*(tensor.T for tensor in tensors))
        return layout.convert_gdn(parts, source=source, target="key_heads", **sizes)

    def split(arrays: Arrays) -> Arrays:
        parts = layout.convert_gdn(arrays, source="key_heads", target=source, **sizes)
        return [part.T for part in parts]

    yield Rule(
        paths=(("mixer", "in_proj", "kernel"), ("mixer", "ba", "kernel")),
        shapes=((m, h, 2 * dk + 2 * n * dv), (m, h, 2 * n)),
        names=tuple(f"linear_attn.{field}.weight" for field in inputs._fields),
        hf_shapes=tuple((width, m) for width in widths),
        fuse=fuse,
        split=split,
    )
    yield Rule(
        paths=(("mixer", "conv", "kernel"),),
        shapes=((w, h, 2 * dk + n * dv),),
        names=("linear_attn.conv1d.weight",),
        hf_shapes=((2 * h * dk + z, 1, w),),
        fuse=lambda tensors: (layout.conv_to_key_heads(tensors[0], **sizes),),
        split=lambda arrays: (layout.conv_from_key_heads(arrays[0], **sizes),),
    )
    for name in ("A_log", "dt_bias"):
        rule = _reshaped(f"mixer.{name}", (h, n), f"linear_attn.{name}", (h * n,))
        yield dataclasses.replace(rule, float32=True)
    yield _renamed("mixer.norm.scale", (dv,), "linear_attn.norm.weight")
    yield _transposed("mixer.out.kernel", (h, n, dv, m), "linear_attn.out_proj.weight", num_in=3)


def _mlp(path: str, prefix: str, m: int, f: int) -> Iterator[Rule]:
    yield Rule(
        paths=((*path.split(".")[:-1], "gate_up", "kernel"),),
        shapes=((m, f, 2),),
        names=(f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"),
        hf_shapes=((f, m), (f, m)),
        fuse=lambda tensors: (layout.fuse_gate_up(*(t.T for t in tensors)).reshape(m, f, 2),),
        split=lambda arrays: [arrays[0][..., i].T for i in range(2)],
    )
    yield _transposed(f"{path}down.kernel", (f, m), f"{prefix}down_proj.weight")


def _moe(config: MoEConfig, m: int, dialect: Dialect) -> Iterator[Rule]:
    e, f, shared = config.num_experts, config.intermediate_size, config.shared_intermediate_size
    yield _transposed("mlp.router.kernel", (m, e), "mlp.gate.weight")
    yield from (_fused_experts if dialect.fused_experts else _experts)(e, m, f)
    if shared is not None:
        yield from _mlp("mlp.shared.", "mlp.shared_expert.", m, shared)
        yield _transposed("mlp.shared_gate.kernel", (m, 1), "mlp.shared_expert_gate.weight")


def _experts(e: int, m: int, f: int) -> Iterator[Rule]:
    def fuse_gate_up(tensors: Arrays) -> Arrays:
        out = np.empty((e, m, f, 2), tensors[0].dtype)
        for i, tensor in enumerate(tensors):
            out[i // 2, :, :, i % 2] = tensor.T
        return (out,)

    yield Rule(
        paths=(("mlp", "experts", "gate_up"),),
        shapes=((e, m, f, 2),),
        names=tuple(
            f"mlp.experts.{i}.{part}_proj.weight" for i in range(e) for part in ("gate", "up")
        ),
        hf_shapes=((f, m),) * (2 * e),
        fuse=fuse_gate_up,
        split=lambda arrays: [arrays[0][i, :, :, j].T for i in range(e) for j in range(2)],
    )
    yield Rule(
        paths=(("mlp", "experts", "down"),),
        shapes=((e, f, m),),
        names=tuple(f"mlp.experts.{i}.down_proj.weight" for i in range(e)),
        hf_shapes=((m, f),) * e,
        fuse=lambda tensors: (_filled((tensor.T for tensor in tensors), e),),
        split=lambda arrays: [arrays[0][i].T for i in range(e)],
    )


def _fused_experts(e: int, m: int, f: int) -> Iterator[Rule]:
    yield Rule(
        paths=(("mlp", "experts", "gate_up"),),
        shapes=((e, m, f, 2),),
        names=("mlp.experts.gate_up_proj",),
        hf_shapes=((e, 2 * f, m),),
        fuse=lambda tensors: (tensors[0].reshape(e, 2, f, m).transpose(0, 3, 2, 1),),
        split=lambda arrays: (arrays[0].transpose(0, 3, 2, 1).reshape(e, 2 * f, m),),
    )
    yield Rule(
        paths=(("mlp", "experts", "down"),),
        shapes=((e, f, m),),
        names=("mlp.experts.down_proj",),
        hf_shapes=((e, m, f),),
        fuse=lambda tensors: (tensors[0].swapaxes(1, 2),),
        split=lambda arrays: (arrays[0].swapaxes(1, 2),),
    )


def _reshaped(path: str, shape: tuple[int, ...], name: str, hf_shape: tuple[int, ...]) -> Rule:
    return Rule(
        paths=(tuple(path.split(".")),),
        shapes=(shape,),
        names=(name,),
        hf_shapes=(hf_shape,),
        fuse=lambda tensors: (tensors[0].reshape(shape),),
        split=lambda arrays: (arrays[0].reshape(hf_shape),),
    )


def _renamed(path: str, shape: tuple[int, ...], name: str) -> Rule:
    return _reshaped(path, shape, name, shape)


def _transposed(path: str, shape: tuple[int, ...], name: str, *, num_in: int = 1) -> Rule:
    """A torch `[out, in]` weight as our `[*in, *out]`."""
    rows, columns = math.prod(shape[num_in:]), math.prod(shape[:num_in])
    return Rule(
        paths=(tuple(path.split(".")),),
        shapes=(shape,),
        names=(name,),
        hf_shapes=((rows, columns),),
        fuse=lambda tensors: (tensors[0].T.reshape(shape),),
        split=lambda arrays: (arrays[0].reshape(columns, rows).T,),
    )


def _placed(rule: Rule, path: Path, prefix: str) -> Rule:
    return dataclasses.replace(
        rule,
        paths=tuple((*path, *inner) for inner in rule.paths),
        names=tuple(prefix + name for name in rule.names),
    )


def _stacked(repeats: Sequence[Rule]) -> Rule:
    """One rule for parameters that are stacked over the repeats of the layer pattern."""
    first, count, width = repeats[0], len(repeats), len(repeats[0].names)

    def fuse(tensors: Arrays) -> Arrays:
        rows = (rule.fuse(tensors[i * width : (i + 1) * width]) for i, rule in enumerate(repeats))
        return _filled_each(rows, count)

    def split(arrays: Arrays) -> Arrays:
        return [
            tensor
            for i, rule in enumerate(repeats)
            for tensor in rule.split([array[i] for array in arrays])
        ]

    return dataclasses.replace(
        first,
        shapes=tuple((count, *shape) for shape in first.shapes),
        names=tuple(name for rule in repeats for name in rule.names),
        hf_shapes=tuple(shape for rule in repeats for shape in rule.hf_shapes),
        fuse=fuse,
        split=split,
    )


def _filled(rows: Iterator[np.ndarray], count: int) -> np.ndarray:
    return _filled_each(((row,) for row in rows), count)[0]


def _filled_each(rows: Iterator[Any], count: int) -> Arrays:
    """`np.stack` of each column of `rows`, holding one row at a time besides the result."""
    stacks: list[np.ndarray] = []
    for i, row in enumerate(rows):
        stacks = stacks or [np.empty((count, *part.shape), part.dtype) for part in row]
        for stack, part in zip(stacks, row, strict=True):
            stack[i] = part
    return stacks
