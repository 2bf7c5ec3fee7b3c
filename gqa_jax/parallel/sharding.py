"""Which mesh axis splits which dimension: the one page of sharding policy.

Names are stored, never a mesh: the mesh is the one of `jax.set_mesh` when a layer is called. Explicit and Auto axes
both work. Parameters keep their key/value group (or key head) axis, so a shard is whole groups and a checkpoint does
not depend on the mesh it was trained on.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None


def names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes that one logical axis stands for."""
    if axis is None:
        return ()
    return (axis,) if isinstance(axis, str) else tuple(axis)


def _entry(*axes: Axis) -> Axis:
    flat = tuple(name for axis in axes for name in names(axis))
    return flat[0] if len(flat) == 1 else flat or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """Names of mesh axes by what they split; None does not split, a tuple is a product of axes (major first).

    Attributes:
      batch: rows of the batch, e.g. "dp" or ("dp", "fsdp").
      seq: tokens (context parallelism), e.g. "cp".
      heads: heads, hidden channels and vocabulary (tensor parallelism), e.g. "tp". Key/value groups are split by the
        longest prefix that divides them, query heads by all: with 2 groups on 8 devices give ("tk", "tr") of
        sizes 2 and 4.
      embed: the model width of parameters (ZeRO, fsdp); gathered where a layer is called. Must be among `batch`.
      seq_residual: `heads` again splits the tokens of the residual stream too (Megatron's sequence parallelism).

    Raises:
      ValueError: an axis with two uses, `embed` outside `batch`, `seq_residual` other than `heads`.
    """

    batch: Axis = None
    seq: Axis = None
    heads: Axis = None
    embed: Axis = None
    seq_residual: Axis = None

    def __post_init__(self):
        used = names(self.batch) + names(self.seq) + names(self.heads)
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ValueError(f"`batch`, `seq` and `heads` must not share axes, got {twice} twice")
        if not set(names(self.embed)) <= set(names(self.batch)):
            raise ValueError(
                f"`embed` must be among the axes of `batch`, got embed={self.embed!r}, batch={self.batch!r}"
            )
        if self.seq_residual is not None and names(self.seq_residual) != names(self.heads):
            raise ValueError(
                f"`seq_residual` must be None or equal `heads={self.heads!r}`, got {self.seq_residual!r}"
            )

    @property
    def used(self) -> tuple[str, ...]:
        """Every mesh axis named."""
        return names(self.batch) + names(self.seq) + names(self.heads)

    @property
    def without_seq(self) -> "MeshAxes":
        """The same with tokens on every device: for steps, which have few."""
        return dataclasses.replace(self, seq=None, seq_residual=None)

    @property
    def tokens(self) -> PartitionSpec:
        """Of `[B, T]`: token ids, positions, segment ids."""
        return PartitionSpec(_entry(self.batch), _entry(self.seq))

    @property
    def residual(self) -> PartitionSpec:
        """Of `[B, T, M]`."""
        return PartitionSpec(_entry(self.batch), _entry(self.seq, self.seq_residual), None)

    @property
    def logits(self) -> PartitionSpec:
        """Of `[B, T, V]`: each device holds its part of the vocabulary."""
        return PartitionSpec(_entry(self.batch), _entry(self.seq), _entry(self.heads))


def current_mesh(axes: MeshAxes):
    """The mesh of `jax.set_mesh`.

    Raises:
      ValueError: there is none, or it lacks an axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(f"`axes={axes}` must be used under `jax.set_mesh(mesh)`, got no mesh")
    check_axes(axes, mesh)
    return mesh


def check_axes(axes: MeshAxes, mesh) -> None:
    """Raises `ValueError` for an axis that the mesh does not have."""
    for field in dataclasses.fields(axes):
        for name in names(getattr(axes, field.name)):
            if name not in mesh.shape:
                raise ValueError(
                    f"`{field.name}` must name axes of the mesh {dict(mesh.shape)}, got {name!r}"
                )


def size(axis: Axis, mesh) -> int:
    """Number of devices along an axis."""
    return math.prod(mesh.shape[name] for name in names(axis))


def is_manual(axes: MeshAxes) -> bool:
    """Whether the caller is already inside a `shard_map` over these axes.

    Raises:
      ValueError: some of the axes are manual and others not.
    """
    mesh = current_mesh(axes)
    inside = set(axes.used) & set(mesh.manual_axes)
    if inside and inside != set(axes.used):
        raise ValueError(
            f"`axes` must be manual all or none inside a shard_map, got {sorted(inside)} of {sorted(axes.used)}"
        )
    return bool(inside)


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` laid out as `spec` on the current mesh: a reshard where its axes are Explicit, a constraint where Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    lay_out = lax.with_sharding_constraint
    if mesh.are_all_axes_explicit:
        lay_out = jax.sharding.reshard
    if not isinstance(x, Tracer):  # an array that is not on the mesh yet is no error
        return jax.jit(lay_out, static_argnums=1)(x, spec)
    return lay_out(x, spec)


def laid_out(tree: Any, specs: Any) -> Any:
    """Every array of the tree laid out as its spec; one spec may stand for a subtree."""
    spread = jax.tree.broadcast(specs, tree, is_leaf=lambda s: isinstance(s, jax.P))
    return jax.tree.map(constrain, tree, spread)


def cast_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` typed as varying wherever `like` does, which `shard_map` asks of scan carries and custom derivatives."""
    missing = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def split_groups(axes: MeshAxes, groups: int, mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`heads` as (axes that split `groups` key/value groups, axes that split the queries within a group)."""
    prefix: tuple[str, ...] = ()
    for name in names(axes.heads):
        if groups % size((*prefix, name), mesh):
            break
        prefix = (*prefix, name)
    return prefix, names(axes.heads)[len(prefix) :]


# Last part of a parameter's path -> what each of its dimensions is:
#   heads   split by all of `heads`
#   groups  split by the part of `heads` that divides it, `within` by the rest
#   embed   split by `embed`;  embed+ also by what `groups` leaves over, so that nothing is stored twice
_RULES: dict[str, tuple[str | None, ...]] = {
    "qkv.kernel": ("embed+", "groups", None, None),
    "qkv.bias": ("groups", None, None),
    "q.kernel": ("embed+", "groups", None, None),
    "q.bias": ("groups", None, None),
    "kv.kernel": ("embed+", "groups", None, None),
    "kv.bias": ("groups", None, None),
    "out.kernel": ("groups", "within", None, "embed"),
    "out.bias": (None,),
    "sinks": ("groups", "within"),
    "in_proj.kernel": ("embed", "heads", None),
    "ba.kernel": ("embed", "heads", None),
    "conv.kernel": (None, "heads", None),
    "conv.bias": ("heads", None),
    "A_log": ("heads", None),
    "dt_bias": ("heads", None),
    "gate_up.kernel": ("embed", "heads", None),
    "down.kernel": ("heads", "embed"),
    "router.kernel": ("embed", None),
    "experts.gate_up": (None, "embed", "heads", None),
    "experts.down": (None, "heads", "embed"),
    "shared_gate.kernel": ("embed", None),
    "embedding": ("heads", "embed"),
    "lm_head.kernel": ("embed", "heads"),
    "scale": (None,),
}
# Projections that may carry an adapter -> how many dimensions of the kernel are inputs: A has those, B the others.
_NUM_IN = {"qkv": 1, "q": 1, "kv": 1, "out": 3, "in_proj": 1, "ba": 1, "gate_up": 1, "down": 1}
for _name, _num_in in _NUM_IN.items():
    _kernel = _RULES[f"{_name}.kernel"]
    # A has no groups from which to tell what they leave over.
    _inputs = tuple("embed" if dim == "embed+" else dim for dim in _kernel[:_num_in])
    _RULES |= {
        f"{_name}.base.kernel": _kernel,
        f"{_name}.base.bias": _RULES.get(f"{_name}.bias", ()),
        f"{_name}.lora_a": (*_inputs, None),
        f"{_name}.lora_b": (None, *_kernel[_num_in:]),
        f"{_name}.magnitude": _kernel[_num_in:],
    }


def path_name(path) -> str:
    """A key path as "layers.0.mixer.qkv.kernel"."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def parameter_spec(
    path: str,
    shape: tuple[int, ...],
    axes: MeshAxes,
    mesh,
    *,
    overrides: Mapping[str, PartitionSpec] | None = None,
) -> PartitionSpec:
    """How one parameter, or one moment of it in an optimizer's state, lies on the mesh.

    Args:
      path: e.g. "layers.0.mixer.qkv.kernel"; its end decides.
      shape: may have one leading axis more than a layer's (stacked layers), which is not split.
      axes: names of mesh axes.
      mesh: with a `shape`, concrete or abstract.
      overrides: end of a path -> spec, before the rules.

    Raises:
      ValueError: no rule for the path (no parameter is replicated in silence), or a size that its axes do not divide.
    """
    for suffix, given in (overrides or {}).items():
        if path == suffix or path.endswith("." + suffix):
            return given
    if not shape:
        return PartitionSpec()
    rule = _rule(path)
    dims = _RULES[rule]
    stacked = len(shape) - len(dims)
    if stacked not in (0, 1):
        raise ValueError(
            f"`{path}` must have {len(dims)} dimensions, or one more when stacked, got shape {shape}"
        )
    groups, within = names(axes.heads), ()
    if "groups" in dims:
        groups, within = split_groups(axes, shape[stacked + dims.index("groups")], mesh)
    meaning: dict[str | None, tuple[str, ...]] = {
        None: (),
        "heads": names(axes.heads),
        "groups": groups,
        "within": within,
        "embed": names(axes.embed),
        "embed+": names(axes.embed) + within,
    }
    spec: list[Axis] = [None] * stacked
    for i, dim in enumerate(dims):
        axis = meaning[dim]
        if shape[stacked + i] % size(axis, mesh):
            hint = ""
            if dim == "within":
                hint = "; factor `heads` into axes of which a prefix divides the groups"
            raise ValueError(
                f"dimension {stacked + i} of `{path}` must be a multiple of {size(axis, mesh)} "
                f"(mesh axes {axis}), got shape {shape}{hint}"
            )
        spec.append(_entry(axis))
    return PartitionSpec(*spec)


def gathered_dimensions(
    path: str, axes: MeshAxes, within: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """For each dimension of a layer's parameter, the axes over which a device gathers it before use.

    Args:
      path: inside the layer.
      axes: names of mesh axes.
      within: the axes that split queries within a group (see `split_groups`).
    """
    dims = _RULES[_rule(path)]
    spread = {"embed": names(axes.embed), "embed+": names(axes.embed) + within}
    return [spread.get(dim or "", ()) for dim in dims]


def _rule(path: str) -> str:
    """The rule of a path.

    Raises:
      ValueError: there is none.
    """
    for key in _RULES:
        if path == key or path.endswith("." + key):
            return key
    raise ValueError(
        f"`overrides` must give a PartitionSpec for {path!r}: it has no rule, and no parameter is replicated in silence"
    )


def parameter_specs(
    tree: Any, axes: MeshAxes, mesh, *, overrides: Mapping[str, PartitionSpec] | None = None
) -> list[PartitionSpec]:
    """The spec of every leaf of a module, its state or its optimizer, in the order of `jax.tree.leaves`.

    Parameters lie as `parameter_spec` says. In an optimizer's state (below a NamedTuple, as Optax makes them, or a name
    `opt_state`) an array of its parameter's shape lies as that parameter, one that lacks some of its dimensions
    (Adafactor's rows and columns, SM3's covers) as the dimensions that it has, and what belongs to no parameter
    (counts, coefficients) is replicated. Which dimensions it lacks is only known if the tree holds the parameters too,
    as a `TrainState` does; otherwise it is replicated.
    """
    check_axes(axes, mesh)
    leaves = list(_named_leaves(tree))
    spec_of = functools.partial(parameter_spec, axes=axes, mesh=mesh, overrides=overrides)
    shapes = {name: leaf.shape for name, leaf, in_state in leaves if not in_state}
    # An optimizer's state names parameters as the tree did that it was made for.
    shapes |= {name.removeprefix("params."): shape for name, shape in shapes.items()}
    state_spec = functools.partial(_state_spec, shapes=shapes, spec_of=spec_of)
    return [
        (state_spec if in_state else spec_of)(name, leaf.shape) for name, leaf, in_state in leaves
    ]


def _named_leaves(tree: Any) -> Iterator[tuple[str, Any, bool]]:
    """(path, leaf, whether it is in an optimizer's state)."""
    is_state = lambda node: isinstance(node, tuple) and hasattr(node, "_fields")
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state):
        for rest, leaf in jax.tree_util.tree_leaves_with_path(node):
            name = path_name((*path, *rest))
            yield name, leaf, is_state(node) or "opt_state" in name.split(".")


def _state_spec(
    name: str, shape: tuple[int, ...], *, shapes: Mapping[str, tuple[int, ...]], spec_of: Callable
) -> PartitionSpec:
    """Of an array in an optimizer's state, whose path holds that of its parameter, if it has one in `shapes`."""
    parts = name.split(".")
    starts = range(len(parts))
    inside = (".".join(parts[i:end]) for i in starts for end in range(len(parts), i, -1))
    parameter = next((path for path in inside if path in shapes), None)
    if parameter is None:
        try:
            return spec_of(name, shape)
        except ValueError:  # no moment of a parameter
            return PartitionSpec()
    whole, full = spec_of(parameter, shapes[parameter]), shapes[parameter]
    entries, at = [], 0
    for length in shape:
        if length not in full[at:]:
            return PartitionSpec()
        at = full.index(length, at) + 1
        entries.append(whole[at - 1] if at <= len(whole) else None)
    return PartitionSpec(*entries)


def parameter_shardings(
    tree: Any, mesh, axes: MeshAxes, *, overrides: Mapping[str, PartitionSpec] | None = None
) -> Any:
    """The tree with a `NamedSharding` in place of every leaf: for `jax.device_put`, `jit(out_shardings=...)`, Orbax.

    Args:
      tree: a module, `nnx.state(module)`, a pure dict or an optimizer; abstract leaves will do.
      mesh: concrete.
      axes: names of its axes.
      overrides: end of a path -> PartitionSpec, before the rules.

    Raises:
      ValueError: as `parameter_spec`.

    An optimizer's state lies as `parameter_specs` says.
    """
    specs = parameter_specs(tree, axes, mesh, overrides=overrides)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def sharding_of_path(
    mesh, axes: MeshAxes, *, overrides: Mapping[str, PartitionSpec] | None = None
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """`(path, shape) -> NamedSharding`, for a loader that puts each parameter where it belongs as it reads it."""
    check_axes(axes, mesh)

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path, shape, axes, mesh, overrides=overrides))

    return sharding


def shard_parameters(
    tree: Any, mesh, axes: MeshAxes, *, overrides: Mapping[str, PartitionSpec] | None = None
) -> Any:
    """A copy of a module (or state, or optimizer) whose arrays lie on the mesh as the rules say.

    Raises:
      ValueError: as `parameter_spec`.
    """
    specs = parameter_specs(tree, axes, mesh, overrides=overrides)
    leaves, treedef = jax.tree.flatten(tree)
    placed = [
        jax.device_put(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(treedef, placed)


def assert_colwise_parallel(name: str, array: jax.Array, *, group_axis: int) -> None:
    """Raises unless a fused, group-interleaved parameter is split by whole groups only.

    Splits of the first dimension of a rank-3 or rank-4 kernel (the model width: ZeRO) do not cut groups and pass.

    Args:
      name: for the message.
      array: e.g. `qkv.kernel [M, K, R + 2, D]`.
      group_axis: the dimension of the groups, 1 there.

    Raises:
      ValueError: a dimension behind `group_axis` is split.
    """
    shard = array.sharding.shard_shape(array.shape)
    cut = [i for i in range(group_axis + 1, array.ndim) if shard[i] != array.shape[i]]
    if cut:
        raise ValueError(
            f"`{name}` is interleaved by groups and must be split along dimension {group_axis} only, got shape "
            f"{array.shape} in shards of {shard}"
        )
