"""Any Flax NNX module as a `torch.nn.Module` whose parameters PyTorch owns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from interop.dlpack import on_device, to_torch
from interop.dropout import draw_seed
from interop.torch_function import wrap
from interop.torch_modules.jax_cache import JaxBacked

_SIGNED = {jnp.dtype(f"uint{bits}"): jnp.dtype(f"int{bits}") for bits in (16, 32)}


class NNXModule(JaxBacked):
    """Calls an NNX module on tensors, under autograd and `torch.compile`.

    Every `nnx.Param` becomes a `torch.nn.Parameter` under its path (`layers.0.kernel`), in the layout NNX gives it;
    optimizers, `state_dict`, FSDP and safetensors see ordinary tensors. Every other Variable (batch statistics)
    becomes a buffer, written after each call. Of a part that torch cannot take, a dot becomes "_", and one of the names
    that `torch.nn.Module` uses itself gets a "_" at its end (`type_`). `train()` and `eval()` switch the NNX module's
    own `deterministic` and `use_running_average`.

    Random numbers follow PyTorch's generator: where the module has random-number streams, each call draws two numbers
    and folds them into the streams' keys, so `torch.manual_seed`, `fork_rng` and `torch.utils.checkpoint` repeat it.
    The streams themselves (buffers too) never change.
    """

    _call: Callable

    def __init__(
        self,
        factory: Callable[[nnx.Rngs], nnx.Module],
        *,
        rngs: int = 0,
        method: str = "__call__",
        static_argnames: Sequence[str] = (),
    ):
        """Builds the module once for its initial values; later it is only traced.

        Args:
          factory: makes the NNX module from random-number streams; a top-level function or class, if the module is
            to be pickled.
          rngs: seed; the values are made on PyTorch's default device.
          method: what `forward` calls.
          static_argnames: keyword arguments of the method that are Python values.

        Raises:
          TypeError: the factory does not return an NNX module.
          ValueError: two variables would have one name in torch.

        Example:
          >>> from flax import nnx
          >>> layer = NNXModule(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
          >>> sorted(layer.state_dict())
          ['bias', 'kernel']
        """
        super().__init__()
        with on_device(torch.get_default_device()):
            module = factory(nnx.Rngs(rngs))
        if not isinstance(module, nnx.Module):
            raise TypeError(f"`factory` must return an nnx.Module, got {type(module).__name__}")
        self.factory, self.method = factory, method
        self.static_argnames = tuple(static_argnames)
        key_impls, streams, paths = {}, [], {}
        for path, variable in _variables(nnx.state(module)):
            name = _name(path)
            if name in paths:
                raise ValueError(
                    f"`factory` must give variables names that differ, got {name!r} for {paths[name]} and {path}"
                )
            paths[name] = path
            value = variable[...]
            if _is_key(value):
                key_impls[name] = str(jax.random.key_impl(value))
            if isinstance(variable, nnx.RngState):
                streams.append(name)
            self._register(
                name, to_torch(_encode(value), copy=True), isinstance(variable, nnx.Param)
            )
        self.key_impls, self.streams = tuple(key_impls.items()), tuple(streams)
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        call = _call(self.factory, self.method, self.static_argnames, self.key_impls)
        return {"_call": call}

    def _register(self, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
        """Makes the submodules of a path if need be, and puts the tensor into the last."""
        *outer, leaf = name.split(".")
        holder: torch.nn.Module = self
        for part in outer:
            if part not in holder._modules:
                holder.add_module(part, torch.nn.Module())
            holder = holder.get_submodule(part)
        if is_parameter:
            holder.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            holder.register_buffer(leaf, tensor)

    def forward(self, *args, **kwargs) -> Any:
        """Calls the NNX module; arguments and results are pytrees of tensors."""
        parameters = dict(self.named_parameters())
        # Backward may read them after they were written: it gets copies.
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        seed = draw_seed(buffers[self.streams[0]], 1.0, None) if self.streams else None
        out, changed = self._call(
            parameters, buffers, args, seed=seed, training=self.training, **kwargs
        )
        if changed:
            with torch.no_grad():
                for name, value in changed.items():
                    self.get_buffer(name).copy_(value)
        return out


_Path = tuple[Any, ...]
# What a name must not be, at any depth: torch.nn.Module uses it.
_TAKEN = (
    frozenset(dir(torch.nn.Module()))
    | frozenset(dir(JaxBacked))
    | {
        "factory",
        "method",
        "static_argnames",
        "key_impls",
        "streams",
        "_call",
    }
)


def _variables(state: nnx.State) -> list[tuple[_Path, nnx.Variable]]:
    """Path and Variable, in the order of the state's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [(tuple(getattr(k, "key", k) for k in path), variable) for path, variable in leaves]


def _name(path: _Path) -> str:
    """A path's name in torch."""
    parts = [str(part).replace(".", "_") for part in path]
    return ".".join(part + "_" if part in _TAKEN or not part else part for part in parts)


def _reseed(key: jax.Array, seed: jax.Array) -> jax.Array:
    """Keys (of any shape) that also depend on two 32-bit numbers."""
    words = jax.lax.bitcast_convert_type(seed, jnp.uint32)
    fold = lambda k: jax.random.fold_in(jax.random.fold_in(k, words[0]), words[1])
    return jax.vmap(fold)(key.reshape(-1)).reshape(key.shape)


def _encode(value: jax.Array) -> jax.Array:
    """As torch holds it: keys by their data; unsigned integers, which torch cannot pickle, by their bits."""
    if _is_key(value):
        value = jax.random.key_data(value)
    if value.dtype in _SIGNED:
        value = jax.lax.bitcast_convert_type(value, _SIGNED[value.dtype])
    return value


def _decode(value: jax.Array, kind: Any, impl: str | None) -> jax.Array:
    dtype = jnp.dtype(jnp.uint32) if impl else kind.dtype
    if dtype in _SIGNED:
        value = jax.lax.bitcast_convert_type(value, dtype)
    return jax.random.wrap_key_data(value, impl=impl) if impl else value


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=64)
def _call(
    factory: Callable, method: str, static_argnames: tuple[str, ...], key_impls: tuple
) -> Callable:
    impls = dict(key_impls)

    def call(parameters, buffers, args, *, seed, training, **kwargs):
        module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
        module.train() if training else module.eval()
        graph, state = nnx.split(module)
        values = parameters | buffers
        leaves, streams = [], set()
        for path, variable in _variables(state):
            name = _name(path)
            value = _decode(values[name], variable.get_value(), impls.get(name))
            if isinstance(variable, nnx.RngState):
                streams.add(name)
                value = _reseed(value, seed) if name in impls else value
            leaves.append(value)
        module = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
        out = getattr(module, method)(*args, **kwargs)
        after = {_name(path): _encode(v[...]) for path, v in _variables(nnx.state(module))}
        return out, {name: after[name] for name in buffers if name not in streams}

    name = getattr(factory, "__name__", "NNXModule").replace("<lambda>", "NNXModule")
    return wrap(call, name=name, static_argnames=("training", *static_argnames), wide="cast")
