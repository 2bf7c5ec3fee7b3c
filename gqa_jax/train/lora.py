"""Low-rank adapters (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) on our projections, fused ones included.

  >>> lora.apply(model, lora.LoRAConfig(rank=8, alpha=16.0), rngs=nnx.Rngs(0))
  >>> loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
  >>> adapters = lora.merge(model)       # plain projections again; lora.unmerge(model, adapters) takes it back

One adapter on the fused projection has one A for queries, keys and values together. Files for other libraries, with an
adapter per projection, are in `lora_peft`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from gqa_jax.layers.projection import Projection, compute_dtype

Path = tuple[Any, ...]
TARGETS = ("qkv", "q", "kv", "out", "gate_up", "down", "in_proj", "ba")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What adapters to add.

    Attributes:
      rank: r.
      alpha: the adapter is multiplied by alpha / r.
      targets: names of projections, wherever they are in the model.
      use_dora: learn the norm of each output's weights beside their direction.
      use_rslora: multiply by alpha / sqrt(r) instead (arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("qkv", "out")
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` must be a positive int, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"`alpha` must be positive, got {self.alpha}")
        if math.isinf(self.alpha):
            raise ValueError(f"`alpha` must be finite, got {self.alpha}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"`targets` must be names out of {TARGETS}, got {self.targets}")

    @property
    def scaling(self) -> float:
        """What multiplies `A @ B`."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The change of one kernel: `kernel + scaling * a @ b`, with DoRA rescaled to `magnitude`.

    Attributes:
      a: `[*in, r]`.
      b: `[r, *out]`.
      magnitude: `[*out]`, norm of each output's weights (DoRA), or None.
      base_norm: `[*out]`, norm of `kernel + scaling * a @ b` when it was merged (DoRA), or None.
      scaling: alpha / r.
    """

    a: Array
    b: Array
    magnitude: Array | None
    base_norm: Array | None
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]


def adapted_norm(
    kernel: Array, a: Array, b: Array, scaling: float, *, split_over: tuple[str, ...] = ()
) -> Array:
    """`[*out]` float32, the norm over the inputs of `kernel + scaling * a @ b`.

    Args:
      kernel, a, b, scaling: as in `Adapter`.
      split_over: the axes of a `shard_map` whose devices each hold a part of the inputs.
    """
    wide = kernel.astype(jnp.float32) + scaling * delta_kernel(a, b)
    squares = (wide * wide).sum(axis=tuple(range(a.ndim - 1)))
    return jnp.sqrt(jax.lax.psum(squares, split_over) if split_over else squares)


def delta_kernel(a: Array, b: Array) -> Array:
    """`a @ b` as `[*in, *out]` float32."""
    product = lambda x, y: jnp.tensordot(x, y, axes=1, precision="highest")
    return product(a.astype(jnp.float32), b.astype(jnp.float32))


class LoRAProjection(nnx.Module):
    """A `Projection` and its adapter; train the `nnx.LoRAParam`s.

    Attributes:
      base: the projection, its kernel and bias as they were.
      lora_a: `[*in, r]`, uniform at first.
      lora_b: `[r, *out]`, zeros at first.
      magnitude: `[*out]` (DoRA), at first the norm of each output's weights; or None.
      split_over: the axes of a `shard_map` whose devices each hold a part of the inputs.
    """

    def __init__(self, base: Projection, adapter: Adapter):
        self.base = base
        self.split_over: tuple[str, ...] = ()
        self.scaling = adapter.scaling
        self.lora_a, self.lora_b = nnx.LoRAParam(adapter.a), nnx.LoRAParam(adapter.b)
        given = adapter.magnitude
        self.magnitude = None if given is None else nnx.LoRAParam(given)

    @property
    def kernel(self) -> nnx.Param:
        """The base's."""
        return self.base.kernel

    @property
    def bias(self) -> nnx.Param | None:
        """The base's."""
        return self.base.bias

    @property
    def dtype(self) -> Any:
        """The base's."""
        return self.base.dtype

    def adapter(self) -> Adapter:
        """The adapter's present values."""
        magnitude = None if self.magnitude is None else self.magnitude[...]
        return Adapter(self.lora_a[...], self.lora_b[...], magnitude, None, self.scaling)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As the base, with the adapted kernel; the norm in DoRA's denominator passes no gradient (section 4.3)."""
        kernel, a, b = self.kernel[...], self.lora_a[...], self.lora_b[...]
        dtype = compute_dtype(x, kernel, self.dtype)
        low = jnp.tensordot(x.astype(dtype), a.astype(dtype), axes=self.base.num_in)
        delta = jnp.tensordot(low, b.astype(dtype), axes=1) * jnp.asarray(self.scaling, dtype)
        out = self.base(x)
        if self.magnitude is None:
            return out + delta
        along = lambda v: v.astype(dtype).reshape((1,) * (out.ndim - v.ndim) + v.shape)
        norm = adapted_norm(
            *jax.lax.stop_gradient((kernel, a, b)), self.scaling, split_over=self.split_over
        )
        ratio = along(_ratio(self.magnitude[...], norm))
        if self.bias is None:
            return ratio * (out + delta)
        bias = along(self.bias[...])
        return ratio * (out - bias + delta) + bias


def projections(model: nnx.Module, kind: type = Projection) -> Iterator[tuple[Path, Any, str]]:
    """`(path, parent, name)` of every projection of `kind` under a name of `TARGETS`, except inside another one."""
    for path, parent in list(nnx.iter_modules(model)):
        if isinstance(parent, LoRAProjection):
            continue
        for name in TARGETS:
            if isinstance(getattr(parent, name, None), kind):
                yield (*path, name), parent, name


def apply(
    model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32
) -> tuple[Path, ...]:
    """Adds adapters that change nothing yet, in place.

    Args:
      model: any module with our projections under the names that `config.targets` lists.
      config: rank, scaling, targets.
      rngs: the `params` stream draws A.
      param_dtype: of the adapters; DoRA's magnitudes are float32 at least.

    Returns:
      the paths of the projections that carry an adapter now.

    Raises:
      ValueError: nothing to adapt; a projection that has an adapter; or layers stacked for a scan, whose kernels have
        an axis more (adapt the unstacked decoder).
    """
    carried = [
        path for path, _, name in projections(model, LoRAProjection) if name in config.targets
    ]
    if carried:
        raise ValueError(f"`model` must carry no adapters on its targets, got one at {carried[0]}")
    found = [item for item in projections(model) if item[2] in config.targets]
    if not found:
        raise ValueError(f"`targets` must name projections of the model, got {config.targets}")
    for path, parent, name in found:
        base = getattr(parent, name)
        check_unstacked(path, base)
        kernel = base.kernel[...]
        in_shape, out_shape = kernel.shape[: base.num_in], kernel.shape[base.num_in :]
        limit = float(np.prod(in_shape)) ** -0.5
        a = jax.random.uniform(
            rngs.params(), (*in_shape, config.rank), jnp.float32, -limit, limit
        ).astype(param_dtype)
        b = jnp.zeros((config.rank, *out_shape), param_dtype)
        magnitude = None
        if config.use_dora:
            # At least float32: rounded, it would rescale the weights before anything is learnt.
            wide = np.promote_types(param_dtype, jnp.float32)
            magnitude = adapted_norm(kernel, a, b, config.scaling).astype(wide)
        setattr(parent, name, LoRAProjection(base, Adapter(a, b, magnitude, None, config.scaling)))
    return tuple(path for path, _, _ in found)


def check_unstacked(path: Path, base: Projection) -> None:
    """Raises `ValueError` for a projection stacked over layers."""
    if base.kernel.ndim != base.num_in + base.num_out:
        raise ValueError(
            f"`model` must not stack its layers for a scan, got a kernel of shape {base.kernel.shape} at {path}"
        )


def merge(model: nnx.Module) -> dict[Path, Adapter]:
    """Adds every adapter into its kernel, in place, and leaves plain projections.

    Returns:
      the adapters by path, for `unmerge`.

    Raises:
      ValueError: the model carries none.
    """
    found = list(projections(model, LoRAProjection))
    if not found:
        raise ValueError("`model` must carry adapters, got none")
    merged = {}
    for path, parent, name in found:
        adapted = getattr(parent, name)
        adapter, kernel = adapted.adapter(), adapted.kernel[...]
        new = kernel.astype(jnp.float32) + adapter.scaling * delta_kernel(adapter.a, adapter.b)
        if adapter.magnitude is not None:
            norm = adapted_norm(kernel, adapter.a, adapter.b, adapter.scaling)
            new = new * _along(_ratio(adapter.magnitude, norm), new)
            adapter = dataclasses.replace(adapter, base_norm=norm)
        adapted.base.kernel[...] = new.astype(kernel.dtype)
        setattr(parent, name, adapted.base)
        merged[path] = adapter
    return merged


def unmerge(model: nnx.Module, adapters: dict[Path, Adapter]) -> None:
    """Takes merged adapters out of their kernels again, up to the rounding of the kernel's dtype, and puts them beside.

    Raises:
      ValueError: a path without a plain projection, or a magnitude of 0, whose weights merging made 0.
    """
    plain = {path: (parent, name) for path, parent, name in projections(model)}
    missing = sorted(map(str, set(adapters) - set(plain)))
    if missing:
        raise ValueError(f"`adapters` must belong to plain projections of the model, got {missing}")
    lost = [path for path, adapter in adapters.items() if _lost(adapter)]
    if lost:
        raise ValueError(
            f"`adapters` must have magnitudes other than 0 to be taken out, got one at {lost}: merging "
            "made its weights 0"
        )
    for path, adapter in adapters.items():
        parent, name = plain[path]
        base = getattr(parent, name)
        kernel = base.kernel[...]
        old = kernel.astype(jnp.float32)
        if adapter.magnitude is not None:
            assert adapter.base_norm is not None
            old = old / _along(_ratio(adapter.magnitude, adapter.base_norm), old)
        old = old - adapter.scaling * delta_kernel(adapter.a, adapter.b)
        base.kernel[...] = old.astype(kernel.dtype)
        setattr(parent, name, LoRAProjection(base, dataclasses.replace(adapter, base_norm=None)))


def _ratio(magnitude: Array, norm: Array) -> Array:
    """What DoRA multiplies an output's weights by; 1 where these are all 0 and have no direction to rescale."""
    nonzero = norm > 0
    return jnp.where(nonzero, magnitude.astype(jnp.float32) / jnp.where(nonzero, norm, 1.0), 1.0)


def _lost(adapter: Adapter) -> bool:
    """Whether merging has multiplied weights by 0, as far as values can be read."""
    if adapter.magnitude is None or isinstance(adapter.magnitude, Tracer):
        return False
    assert adapter.base_norm is not None
    return not bool(_ratio(adapter.magnitude, adapter.base_norm).all())


def _along(per_output: Array, kernel: Array) -> Array:
    return per_output.reshape((1,) * (kernel.ndim - per_output.ndim) + per_output.shape)
