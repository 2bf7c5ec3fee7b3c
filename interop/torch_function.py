"""JAX functions as PyTorch functions: autograd, `torch.func`, `torch.compile`, threads.

Here the arguments become a list of tensors and a program; `program_calls` runs it.
"""

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from interop import program_calls, programs, structure
from interop.dlpack import Wide
from interop.programs import Owner

_owners: "weakref.WeakValueDictionary[str, Owner]" = weakref.WeakValueDictionary()


def wrap(
    function: Callable,
    *,
    name: str | None = None,
    static_argnames: Sequence[str] = (),
    residuals: Literal["save", "recompute"] = "save",
    wide: Wide = "error",
    warn_after: int = 32,
) -> Callable:
    """Makes a jittable JAX function of arrays a PyTorch function of tensors.

    Arguments and results are pytrees of tensors (under `torch.compile`: tuples, lists, dicts, NamedTuples, dataclasses,
    None). The function is compiled once per combination of shapes, dtypes, static values and gradients asked for. It
    works under autograd (first order by saved residuals, higher orders by recomputation), `torch.func.grad` / `vmap` /
    `jacrev`, checkpointing, threads and `torch.compile(fullgraph=True)`, where every shape is compiled for itself.
    Inputs and what the backward pass reads are saved by PyTorch, so an in-place change before `backward` raises.
    Autocast does not change dtypes: cast the inputs. float64 and complex128 inputs turn on 64-bit JAX for this call.
    Forward-mode differentiation (`torch.func.jvp`) and CUDA graph capture are refused.

    Args:
      function: pure; called with arrays where the caller gives tensors.
      name: for messages and profiles; the function's own by default.
      static_argnames: keyword arguments that are hashable Python values and select another compilation.
      residuals: "save" keeps what the backward pass needs; "recompute" runs the forward pass again.
      wide: int64 and uint64 inputs without 64-bit JAX: "error", or "cast" (checked).
      warn_after: warn (`RecompilationWarning`) when compiled for more shapes than this.

    Returns:
      A function that takes tensors. It counts what it compiled for: see `compiled_shapes`.

    Raises:
      TypeError: when called: a leaf that is no tensor, a static value that is not hashable.
      ValueError: `residuals` unknown, or a static name that the function does not have; when called: no tensor, or
        tensors on several devices.

    Example:
      >>> import jax.numpy as jnp, torch, interop
      >>> norm = interop.wrap(lambda x, *, order: jnp.sum(jnp.abs(x) ** order), static_argnames=("order",))
      >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
      >>> norm(x, order=3).backward()
      >>> x.grad
      tensor([ 3., 12.])
    """
    if residuals not in ("save", "recompute"):
        raise ValueError(f"`residuals` must be 'save' or 'recompute', got {residuals!r}")
    title = name or getattr(function, "__name__", type(function).__name__).replace("<lambda>", "fn")
    _check_static_names(function, static_argnames)
    save = residuals == "save"
    owner = Owner(function, title, wide=wide, save=save, warn_after=warn_after)
    handle, static_names = owner.key, tuple(static_argnames)
    _owners[handle] = owner

    def call(*args, **kwargs):
        static = tuple((key, kwargs.pop(key)) for key in static_names if key in kwargs)
        if torch.compiler.is_compiling():
            return _call_traced(handle, _constants(static), (args, kwargs))
        return _call_eager(owner, static, (args, kwargs))

    # A code object of its own: Dynamo counts recompilations per code object.
    own = call.__code__.replace(co_name=title, co_qualname=title)
    call = types.FunctionType(own, call.__globals__, title, None, call.__closure__)
    call.__doc__ = function.__doc__
    call.compiled_shapes = lambda: len(owner.shapes)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def compiled_shapes(wrapped: Callable) -> int:
    """For how many combinations of shapes, static values and structures a wrapped function was compiled."""
    return wrapped.compiled_shapes()  # pyright: ignore[reportFunctionMemberAccess]


def _check_static_names(function: Callable, names: Sequence[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature to check against
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    unknown = set(names) - {p.name for p in parameters}
    if unknown:
        raise ValueError(
            f"`static_argnames` must name arguments of {function}, got {sorted(unknown)}"
        )


def _call_eager(owner: Owner, static: tuple, arguments: tuple) -> Any:
    leaves, treedef = tree_flatten(arguments)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            _raise_leaf(owner, arguments)
    if not leaves:
        raise ValueError(f"{owner.name} must be called with at least one tensor, got none")
    program = owner.program(treedef, static)
    flat = program_calls.forward(leaves, program.key)
    return tree_unflatten(program.out_tree, flat)


def _raise_leaf(owner: Owner, arguments: tuple) -> None:
    for path, leaf in tree_flatten_with_path(arguments)[0]:
        if not isinstance(leaf, Tensor):
            where = f"args{keystr(path[1:])}" if path[0].idx == 0 else f"kwargs{keystr(path[1:])}"
            raise TypeError(
                f"{owner.name}: `{where}` must be a tensor (or be named in `static_argnames`), "
                f"got {type(leaf).__name__}"
            )


def _call_traced(handle: str, static: tuple, arguments: tuple) -> Any:
    leaves, form = structure.flatten(arguments)
    key = _program_key(handle, form, static)
    flat = torch.ops.gqa_jax.call(leaves, key, "")[0]
    return structure.rebuild(_results(key), flat)


def _constants(values: tuple) -> tuple:
    """Numbers as they are now: one that changes between calls comes as a symbol, and another value traces again."""
    return tuple(
        guard_scalar(value)
        if isinstance(value, int | float)
        else _constants(value)
        if type(value) is tuple
        else value
        for value in values
    )


@torch._dynamo.assume_constant_result
def _program_key(handle: str, form: structure.Structure, static: tuple) -> str:
    return _owners[handle].program(structure.to_treedef(form), static).key


@torch._dynamo.assume_constant_result
def _results(key: str) -> structure.Structure:
    """Structure of a program's results; its fake has been asked before, so it is known."""
    return structure.from_treedef(programs.find(key).out_tree)
