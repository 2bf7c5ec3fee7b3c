"""Any Flax NNX module as a `torch.nn.Module` whose parameters PyTorch owns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from interop.dlpack import to_torch
from interop.torch_function import wrap
from interop.torch_modules.jax_cache import JaxBacked

_SIGNED = {jnp.dtype(f"uint{bits}"): jnp.dtype(f"int{bits}") for bits in (16, 32)}


class NNXModule(JaxBacked):
    """Calls an NNX module on tensors, under autograd and `torch.compile`.

    Every `nnx.Param` becomes a `torch.nn.Parameter` under its path (`layers.0.kernel`), in the layout NNX gives it;
    optimizers, `state_dict`, FSDP and safetensors see ordinary tensors. Every other Variable (batch statistics,
    random-number state) becomes a buffer, written after each call. `train()` and `eval()` switch the NNX module's
    own `deterministic` and `use_running_average`.
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
          rngs: seed.
          method: what `forward` calls.
          static_argnames: keyword arguments of the method that are Python values.

        Raises:
          TypeError: the factory does not return an NNX module.

        Example:
          >>> from flax import nnx
          >>> layer = NNXModule(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
          >>> sorted(layer.state_dict())
          ['bias', 'kernel']
        """
        super().__init__()
        module = factory(nnx.Rngs(rngs))
        if not isinstance(module, nnx.Module):
            raise TypeError(f"`factory` must return an nnx.Module, got {type(module).__name__}")
        self.factory, self.method = factory, method
        self.static_argnames = tuple(static_argnames)
        key_impls = {}
        for name, variable in _variables(nnx.state(module)):
            holder, leaf = self._holder(name)
            if _is_key(variable[...]):
                key_impls[name] = str(jax.random.key_impl(variable[...]))
            tensor = to_torch(_encode(variable[...]), copy=True)
            if isinstance(variable, nnx.Param):
                holder.register_parameter(leaf, torch.nn.Parameter(tensor))
            else:
                holder.register_buffer(leaf, tensor)
        self.key_impls = tuple(key_impls.items())
        self.bind()

    def _bind(self) -> dict[str, Callable]:
        call = _call(self.factory, self.method, self.static_argnames, self.key_impls)
        return {"_call": call}

    def _holder(self, name: str) -> tuple[torch.nn.Module, str]:
        """The submodule that holds a path's last name, made if need be."""
        *outer, leaf = name.split(".")
        holder: torch.nn.Module = self
        for part in outer:
            if part not in holder._modules:
                holder.add_module(part, torch.nn.Module())
            holder = holder.get_submodule(part)
        return holder, leaf

    def forward(self, *args, **kwargs) -> Any:
        """Calls the NNX module; arguments and results are pytrees of tensors."""
        parameters = dict(self.named_parameters())
        # Backward may read them after they were written: it gets copies.
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        out, changed = self._call(parameters, buffers, args, training=self.training, **kwargs)
        if buffers:
            with torch.no_grad():
                for name, buffer in self.named_buffers():
                    buffer.copy_(changed[name])
        return out


def _variables(state: nnx.State) -> list[tuple[str, nnx.Variable]]:
    """Dotted path and Variable, in the order of the state's leaves."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [
        (".".join(str(getattr(k, "key", k)) for k in path), variable) for path, variable in found
    ]


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

    def call(parameters, buffers, args, *, training, **kwargs):
        module = nnx.eval_shape(lambda: factory(nnx.Rngs(0)))
        module.train() if training else module.eval()
        graph, state = nnx.split(module)
        values = parameters | buffers
        leaves = [
            _decode(values[name], variable.get_value(), impls.get(name))
            for name, variable in _variables(state)
        ]
        module = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
        out = getattr(module, method)(*args, **kwargs)
        after = {name: _encode(v[...]) for name, v in _variables(nnx.state(module))}
        return out, {name: after[name] for name in buffers}

    name = getattr(factory, "__name__", "NNXModule").replace("<lambda>", "NNXModule")
    return wrap(call, name=name, static_argnames=("training", *static_argnames), wide="cast")
