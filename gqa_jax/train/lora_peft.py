"""LoRA adapters in the files of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT knows q_proj, k_proj, v_proj, gate_proj and up_proj; we have them fused. Both ways are exact: splitting a fused
adapter repeats its A, which the parts share; fusing stacks the As of the parts, where they differ, to one adapter of
the sum of their ranks, and scaling factors that differ become a part of B.
"""

import json
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save_file

from gqa_jax import layout
from gqa_jax.layers.attention import SelfAttention
from gqa_jax.layers.gated_deltanet import GatedDeltaNet
from gqa_jax.train import peft_config
from gqa_jax.train.lora import (
    Adapter,
    LoRAProjection,
    Path,
    adapted_norm,
    check_unstacked,
    projections,
)

CONFIG, WEIGHTS = peft_config.FILE, "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)


class Part(NamedTuple):
    """The adapter of one torch linear layer, as PEFT stores it.

    Attributes:
      lora_A: `[r, in]`.
      lora_B: `[out, r]`.
      magnitude: `[out]` (DoRA), or None.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None


def split(adapter: Adapter, *, name: str, layer: Any) -> dict[str, Part]:
    """One of our adapters as PEFT's, by the name of the torch layer.

    Args:
      adapter: of the projection `name` of `layer`.
      name: "qkv", "out", "gate_up" or "down".
      layer: the `SelfAttention`, `GatedDeltaNet` or `MLP`.

    Raises:
      ValueError: a projection that has no counterpart of one layout.
    """
    rank, names = adapter.rank, torch_names(name, layer)
    # Contiguous: safetensors writes a strided array's buffer as if it were.
    shared = np.ascontiguousarray(_float32(adapter.a).reshape(-1, rank).T)
    outputs = _split_outputs(_float32(adapter.b).reshape(rank, -1), name, layer)
    magnitudes: list = [None] * len(names)
    if adapter.magnitude is not None:
        separate = _split_outputs(_float32(adapter.magnitude).reshape(-1), name, layer)
        magnitudes = [np.ascontiguousarray(magnitude) for magnitude in separate]
    return {
        torch_name: Part(shared, np.ascontiguousarray(b.T), magnitude)
        for torch_name, b, magnitude in zip(names, outputs, magnitudes, strict=True)
    }


def fuse(
    parts: Mapping[str, Part], *, name: str, layer: Any, scaling: float | Mapping[str, float]
) -> Adapter:
    """The inverse of `split`.

    Args:
      parts: by the name of the torch layer; one that is missing is left unadapted. Where their As are equal they share
        one, otherwise these are stacked to the sum of their ranks.
      name, layer: as for `split`.
      scaling: alpha / r; or by part, which becomes a factor of its B unless all are equal.

    Raises:
      ValueError: names or shapes do not fit, or some parts have a magnitude and some have not.
    """
    names, base = torch_names(name, layer), _base(layer, name)
    unknown = sorted(set(parts) - set(names))
    if unknown or not parts:
        raise ValueError(f"`parts` must hold some of {names}, got {sorted(parts)}")
    in_shape, out_shape = base.kernel.shape[: base.num_in], base.kernel.shape[base.num_in :]
    widths = [
        array.shape[-1]
        for array in _split_outputs(np.zeros((1, int(np.prod(out_shape)))), name, layer)
    ]
    for torch_name, part in parts.items():
        _check_part(torch_name, part, int(np.prod(in_shape)), widths[names.index(torch_name)])
    present = [torch_name for torch_name in names if torch_name in parts]
    factors = dict.fromkeys(present, 1.0)
    if isinstance(scaling, Mapping):
        different = {scaling[n] for n in present}
        if len(different) > 1:
            factors, scaling = {n: scaling[n] for n in present}, 1.0
        else:
            scaling = different.pop()
    first = parts[present[0]].lora_A
    equal = all(np.array_equal(parts[n].lora_A, first) for n in present)
    ranks = [first.shape[0]] if equal else [parts[n].lora_A.shape[0] for n in present]
    a = first if equal else np.concatenate([parts[n].lora_A for n in present])
    outputs = []
    for torch_name, width in zip(names, widths, strict=True):
        b = np.zeros((sum(ranks), width), np.float32)
        if torch_name in parts:
            start = 0 if equal else sum(ranks[: present.index(torch_name)])
            own = parts[torch_name].lora_B.T * np.float32(factors[torch_name])
            b[start : start + own.shape[0]] = own
        outputs.append(b)
    fused = _fuse_outputs(outputs, name, layer).reshape(sum(ranks), *out_shape)
    a, b = jnp.asarray(a.T.reshape(*in_shape, -1)), jnp.asarray(fused)
    magnitude = _fuse_magnitudes(parts, name, layer)
    return Adapter(a, b, magnitude, None, scaling)


def _check_part(name: str, part: Part, size_in: int, size_out: int) -> None:
    rank = part.lora_A.shape[0] if part.lora_A.ndim else 0
    if rank < 1 or part.lora_A.shape != (rank, size_in) or part.lora_B.shape != (size_out, rank):
        raise ValueError(
            f"`{name}` must have lora_A [r, {size_in}] and lora_B [{size_out}, r], got "
            f"{part.lora_A.shape} and {part.lora_B.shape}"
        )
    if part.magnitude is not None and part.magnitude.size != size_out:
        raise ValueError(
            f"`{name}` must have a magnitude of {size_out} numbers, got shape {part.magnitude.shape}"
        )


def save(model: nnx.Module, path: str | pathlib.Path, *, base_model: str | None = None) -> None:
    """Writes the adapters that a model carries as a PEFT directory.

    Args:
      model: a `Decoder` or one layer, with adapters (`lora.apply`).
      path: a directory, made if need be.
      base_model: written as `base_model_name_or_path`.

    Raises:
      ValueError: no adapters, or one on a projection that PEFT has no name for.
    """
    found = list(projections(model, LoRAProjection))
    if not found:
        raise ValueError("`model` must carry adapters, got none")
    tensors, settings, targets = {}, {}, set()
    for at, parent, name in found:
        adapter = getattr(parent, name).adapter()
        for torch_name, part in split(adapter, name=name, layer=parent).items():
            module = _module_name(at, parent, torch_name)
            targets.add(torch_name)
            settings[module] = (adapter.rank, adapter.scaling * adapter.rank)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = part.lora_A
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = part.lora_B
            if part.magnitude is not None:
                tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = part.magnitude
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    number = lambda x: int(x) if float(x).is_integer() else x
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "use_dora": any(key.endswith("magnitude_vector") for key in tensors),
        "use_rslora": False,  # its factor is part of lora_alpha here
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {m: r for m, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {m: number(x) for m, (_, x) in settings.items() if x != alpha},
    }
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(
    model: nnx.Module, path: str | pathlib.Path, *, ignore: Collection[str] = ()
) -> tuple[Path, ...]:
    """Puts the adapters of a PEFT directory beside the projections of a model, in place; exact, whatever was adapted.

    Args:
      model: a `Decoder` or one layer, without adapters.
      path: the directory.
      ignore: settings of its `adapter_config.json` that may have any value; see `peft_config`.

    Returns:
      the paths of the projections that carry an adapter now.

    Raises:
      ValueError: files that are missing or broken, settings that have no counterpart here, tensors that contradict the
        settings or fit nothing in the model.
    """
    directory = pathlib.Path(path)
    config = peft_config.read(directory, ignore=ignore)
    torch_parts = _read_parts(directory, config)
    fused = []
    for at, parent, name in projections(model):
        try:
            modules = {n: _module_name(at, parent, n) for n in torch_names(name, parent)}
        except ValueError:
            continue  # no counterpart; if the files held one, it is left over below
        parts = {n: torch_parts.pop(m) for n, m in modules.items() if m in torch_parts}
        if not parts:
            continue
        check_unstacked(at, getattr(parent, name))
        scaling = {n: config.scaling(modules[n]) for n in parts}
        try:
            adapter = fuse(parts, name=name, layer=parent, scaling=scaling)
        except ValueError as error:
            where = ", ".join(modules[n] for n in parts)
            raise ValueError(f"{WEIGHTS} does not fit the model at {where}: {error}") from None
        fused.append((at, parent, name, adapter))
    if torch_parts:
        raise ValueError(
            f"`model` must have a projection for each adapter, got {sorted(torch_parts)}"
        )
    for _, parent, name, adapter in fused:
        setattr(parent, name, LoRAProjection(getattr(parent, name), adapter))
    return tuple(at for at, _, _, _ in fused)


def _read_parts(directory: pathlib.Path, config: peft_config.PeftConfig) -> dict[str, Part]:
    """The adapters by the name of the torch module, checked against the settings."""
    if not (directory / WEIGHTS).is_file():
        raise ValueError(
            f"`path` must hold {WEIGHTS}, got {directory} with {sorted(f.name for f in directory.iterdir())}; write a "
            ".bin file anew with PEFT's save_pretrained"
        )
    try:
        stored = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"`{directory / WEIGHTS}` must be a safetensors file: {error}") from None
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"`{WEIGHTS}` must hold LoRA tensors of linear layers, got {key!r} ({tensor.dtype})"
            )
        modules[match["module"]][match["part"]] = _float32(tensor)
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    parts = {}
    for module, tensors in modules.items():
        if set(tensors) != wanted:
            listed = ", ".join(sorted(wanted)[:-1]) + f" and {max(wanted)}"
            raise ValueError(
                f"`{module}` must have {listed} in {WEIGHTS} as use_dora={config.use_dora}, got {sorted(tensors)}"
            )
        part = Part(tensors["lora_A"], tensors["lora_B"], tensors.get("lora_magnitude_vector"))
        if part.lora_A.shape[:1] != (config.rank(module),):
            raise ValueError(
                f"`r` of {CONFIG} must be that of `{module}.lora_A` in {WEIGHTS}, of shape {part.lora_A.shape}, "
                f"got {config.rank(module)}"
            )
        parts[module] = part
    return parts


def torch_names(name: str, layer: Any) -> list[str]:
    """Names of the torch layers that our projection `name` of `layer` stands for."""
    names = {"gate_up": ["gate_proj", "up_proj"], "down": ["down_proj"]}
    if isinstance(layer, SelfAttention):
        names = {"qkv": ["q_proj", "k_proj", "v_proj"], "out": ["o_proj"]}
    elif isinstance(layer, GatedDeltaNet):
        names = {"out": ["out_proj"]}
    if name not in names:
        raise ValueError(
            f"`name` must be a projection with a counterpart in PEFT, one of {sorted(names)} in "
            f"{type(layer).__name__}, got {name!r}"
        )
    return names[name]


def _module_name(path: Path, layer: Any, torch_name: str) -> str:
    """Hugging Face's name of the torch layer for our path to the projection."""
    mixer = "linear_attn" if isinstance(layer, GatedDeltaNet) else "self_attn"
    renamed = {"mixer": mixer, "shared": "shared_expert"}
    parts = [renamed.get(str(part), str(part)) for part in path[:-1]]
    root = ["model"] if parts[:1] == ["layers"] else []
    return ".".join([*root, *parts, torch_name])


def _base(layer: Any, name: str) -> Any:
    projection = getattr(layer, name)
    return projection.base if isinstance(projection, LoRAProjection) else projection


def _layout_options(layer: SelfAttention) -> dict[str, Any]:
    return dict(q_per_kv=layer.config.q_per_kv, head_dim=layer.config.head_dim)


def _split_outputs(array: np.ndarray, name: str, layer: Any) -> list[np.ndarray]:
    """Features on the last axis, ours to torch's."""
    if name == "gate_up":
        return list(layout.split_gate_up(array))
    if name != "qkv":
        return [array]
    options = _layout_options(layer)
    if not layer.config.output_gate:
        return list(layout.split_qkv(array, layout="grouped", **options)[:3])
    separate = layout.split_qkv(array, layout="grouped_gated", **options)
    return list(layout.fuse_qkv(*separate[:3], gate=separate.gate, layout="hf_gated_q", **options))


def _fuse_outputs(arrays: list[np.ndarray], name: str, layer: Any) -> np.ndarray:
    """The inverse of `_split_outputs`."""
    if name == "gate_up":
        return layout.fuse_gate_up(*arrays)
    if name != "qkv":
        return arrays[0]
    options = _layout_options(layer)
    if not layer.config.output_gate:
        return layout.fuse_qkv(*arrays, layout="grouped", **options)
    separate = layout.split_qkv(layout.HFGatedQ(*arrays), layout="hf_gated_q", **options)
    return layout.fuse_qkv(*separate[:3], gate=separate.gate, layout="grouped_gated", **options)


def _fuse_magnitudes(parts: Mapping[str, Part], name: str, layer: Any):
    given = {part.magnitude is not None for part in parts.values()}
    if given == {False}:
        return None
    if len(given) > 1:
        raise ValueError("`magnitude` must be given for all parts or for none (DoRA)")
    base = _base(layer, name)
    kernel = base.kernel[...]
    out_shape = kernel.shape[base.num_in :]
    nothing = jnp.zeros((1, *out_shape))  # parts without an adapter keep the norm that they have
    own = adapted_norm(kernel, jnp.zeros((*kernel.shape[: base.num_in], 1)), nothing, 0.0)
    kept = _split_outputs(_float32(own).reshape(-1), name, layer)
    arrays = []
    for torch_name, norm in zip(torch_names(name, layer), kept, strict=True):
        part = parts.get(torch_name)
        arrays.append(norm if part is None else np.asarray(part.magnitude).reshape(norm.shape))
    return jnp.asarray(_fuse_outputs(arrays, name, layer).reshape(out_shape))


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32)
