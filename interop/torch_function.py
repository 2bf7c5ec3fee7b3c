"""JAX functions as PyTorch functions: autograd, `torch.func`, `torch.compile`, threads.

One pair of operators serves every function: `gqa_jax::call` runs a program (forward), `gqa_jax::vjp` its backward pass.
A string names the program, because a constant is all that every version of Dynamo lets through. Around them stands one
`torch.autograd.Function`. Eager calls skip torch's dispatcher, which would cost as much as the bridge itself.
"""

import contextlib
import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import torch
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten
from torch import Tensor

from interop import programs, structure
from interop.dlpack import (
    _NARROW,
    _PLAIN,
    _TO_JAX,
    Wide,
    _device_of,
    dtype_to_torch,
    exporter,
    import_plain,
)
from interop.programs import Owner, Program, Signature

_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag)
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
    owner = Owner(function, title, wide=wide, warn_after=warn_after)
    handle, static_names, save = owner.key, tuple(static_argnames), residuals == "save"
    _owners[handle] = owner

    def call(*args, **kwargs):
        static = tuple((key, kwargs.pop(key)) for key in static_names if key in kwargs)
        if torch.compiler.is_compiling():
            return _call_traced(handle, save, static, (args, kwargs))
        return _call_eager(owner, save, static, (args, kwargs))

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


# Calls -------------------------------------------------------------------------------------------------------------


def _call_eager(owner: Owner, save: bool, static: tuple, arguments: tuple) -> Any:
    leaves, treedef = tree_flatten(arguments)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            _raise_leaf(owner, arguments)
    if not leaves:
        raise ValueError(f"{owner.name} must be called with at least one tensor, got none")
    program = owner.program(treedef, static)
    functorch = torch._C._are_functorch_transforms_active()
    wanted = ""
    if functorch:
        wanted = "".join("1" if _is_inexact(x) else "0" for x in leaves)
    elif torch.is_grad_enabled():
        wanted = "".join("1" if x.requires_grad else "0" for x in leaves)
    if functorch:  # saved residuals would not be used: backward recomputes
        flat = JaxFunction.apply(program.key, wanted, False, *leaves)
    elif "1" in wanted:
        flat = _apply(program.key, wanted, save, *leaves)
    else:
        flat = _forward(program.key, leaves, "")[0]
    return tree_unflatten(program.out_tree, flat[: len(program.inexact_outs)])


def _raise_leaf(owner: Owner, arguments: tuple) -> None:
    for path, leaf in tree_flatten_with_path(arguments)[0]:
        if not isinstance(leaf, Tensor):
            where = f"args{keystr(path[1:])}" if path[0].idx == 0 else f"kwargs{keystr(path[1:])}"
            raise TypeError(
                f"{owner.name}: `{where}` must be a tensor (or be named in `static_argnames`), "
                f"got {type(leaf).__name__}"
            )


def _call_traced(handle: str, save: bool, static: tuple, arguments: tuple) -> Any:
    leaves, form = structure.flatten(arguments)
    key = _program_key(handle, form, static)
    wanted = ""
    if torch.is_grad_enabled():
        wanted = "".join(["1" if x.requires_grad else "0" for x in leaves])
    if "1" in wanted:
        flat = JaxFunction.apply(key, wanted, save, *_distinct(leaves))
    else:
        flat = torch.ops.gqa_jax.call(leaves, key, "")[0]
    count, out_form = _results(key)
    return structure.rebuild(out_form, flat[:count])


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Without repetitions: Dynamo drops the gradient of all but one input that are the same tensor (torch 2.11)."""
    unique: list[Tensor] = []
    for tensor in tensors:
        repeated = any(tensor is other for other in unique)
        unique.append(tensor.view_as(tensor) if repeated else tensor)
    return unique


@torch._dynamo.assume_constant_result
def _program_key(handle: str, form: structure.Structure, static: tuple) -> str:
    return _owners[handle].program(structure.to_treedef(form), static).key


@torch._dynamo.assume_constant_result
def _results(key: str) -> tuple[int, structure.Structure]:
    """Number and structure of a program's results; its fake has been asked before, so they are known."""
    program = programs.find(key)
    return len(program.inexact_outs), structure.from_treedef(program.out_tree)


@torch._dynamo.assume_constant_result
def _saved(key: str, wanted: str) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Which results are differentiable, and the indices of those that backward reads."""
    program = programs.find(key)
    return program.inexact_outs, program.saved_outs(wanted)


@torch._dynamo.assume_constant_result
def _vjp_key(key: str, wanted: str) -> str:
    return programs.find(key).vjp(wanted).key


# Autograd ----------------------------------------------------------------------------------------------------------


class JaxFunction(torch.autograd.Function):
    """A program under autograd: `(key, wanted, save, *tensors) -> (*outs, *residuals)`.

    `wanted` marks with "1" the inputs whose gradient is asked for.
    """

    @staticmethod
    def forward(key, wanted, save, *tensors):
        outs, residuals = _forward(key, tensors, wanted if save else "")
        return (*outs, *residuals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        key, wanted, save = inputs[:3]
        tensors = inputs[3:]
        inexact, saved = _saved(key, wanted if save else "")
        count = len(inexact)
        ctx.key, ctx.wanted, ctx.save = key, wanted, save
        ctx.num_inputs, ctx.inexact, ctx.num_saved = len(tensors), inexact, len(saved)
        fixed = [output[i] for i in range(count) if not inexact[i]] + list(output[count:])
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(*tensors, *[output[i] for i in saved], *output[count:])
        if not torch.compiler.is_compiling():
            ctx.program = programs.find(
                key
            )  # alive until backward, whatever becomes of the wrapper

    @staticmethod
    def backward(ctx, *gradients):
        key, wanted, inexact = ctx.key, ctx.wanted, ctx.inexact
        saved = ctx.saved_tensors
        tensors = saved[: ctx.num_inputs]
        cotangents = [gradients[i] for i in range(len(inexact)) if inexact[i]]
        if _differentiate_again():
            given = _differentiable_vjp(key, wanted, tensors, cotangents)
        elif ctx.save:
            outs = saved[ctx.num_inputs : ctx.num_inputs + ctx.num_saved]
            residuals = saved[ctx.num_inputs + ctx.num_saved :]
            given = _backward(key, tensors, outs, residuals, cotangents, wanted)
        else:
            given = _forward(_vjp_key(key, wanted), [*tensors, *cotangents], "")[0]
        wanted_at = [i for i in range(len(wanted)) if wanted[i] == "1"]
        full: list[Tensor | None] = [None] * len(wanted)
        for position, index in enumerate(wanted_at):
            full[index] = given[position]
        return None, None, None, *full

    @staticmethod
    def vmap(info, in_dims, key, wanted, save, *tensors):
        program = programs.find(key).vmap(tuple(in_dims[3:]))
        flat = JaxFunction.apply(program.key, wanted, False, *tensors)
        return flat, (0,) * len(flat)


# `Function.apply` binds a signature on every call, for the sake of torch.func; plain eager calls go to what it wraps.
_apply: Callable = super(torch.autograd.Function, JaxFunction).apply  # pyright: ignore


def _differentiate_again() -> bool:
    """Whether the backward pass must itself be differentiable or batched."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _differentiable_vjp(key: str, wanted: str, tensors, cotangents) -> Sequence[Tensor]:
    inputs = [*tensors, *cotangents]
    program = programs.find(key).vjp(wanted)
    if torch._C._are_functorch_transforms_active():
        marks = "".join("1" if _is_inexact(x) else "0" for x in inputs)
    else:
        marks = "".join("1" if x.requires_grad else "0" for x in inputs)
    if "1" not in marks:
        return _forward(program.key, inputs, "")[0]
    return JaxFunction.apply(program.key, marks, True, *inputs)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


# Operators ---------------------------------------------------------------------------------------------------------


def _forward(key: str, tensors: Sequence[Tensor], wanted: str) -> tuple[Sequence, Sequence]:
    if torch.compiler.is_compiling() or not _are_plain(tensors):
        return torch.ops.gqa_jax.call(list(tensors), key, wanted)
    return _run_forward(tensors, key, wanted)


def _backward(key, tensors, outs, residuals, cotangents, wanted) -> Sequence[Tensor]:
    if torch.compiler.is_compiling() or not _are_plain(cotangents):
        lists = (list(tensors), list(outs), list(residuals), list(cotangents))
        return torch.ops.gqa_jax.vjp(*lists, key, wanted)
    return _run_backward(tensors, outs, residuals, cotangents, key, wanted)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing (fake tensors, tracers, profilers of operators) wants to see the call."""
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(type(x) in _PLAIN for x in tensors)


def _run_forward(xs: Sequence[Tensor], key: str, wanted: str) -> tuple[list[Tensor], list[Tensor]]:
    program = programs.find(key)
    with _place(xs), _x64(xs):
        arrays = [import_plain(x, program.wide) for x in xs]
        outs, residuals = (
            program.saving(wanted)(*arrays) if wanted else (program.plain(*arrays), ())
        )
        export = exporter(xs[0])
        return [export(o) for o in outs], [export(r) for r in residuals]


def _run_backward(xs, outs, residuals, cotangents, key: str, wanted: str) -> list[Tensor]:
    program = programs.find(key)
    with _place(xs), _x64(xs):
        recipe, pull_back = program.backward(wanted, _signature(xs, program))
        used = [*(xs[i] for i in recipe.indices("in")), *outs, *residuals, *cotangents]
        export = exporter(xs[0])
        return [export(g) for g in pull_back(*[import_plain(x, program.wide) for x in used])]


def _place(xs: Sequence[Tensor]) -> contextlib.AbstractContextManager:
    """The device of all tensors, made current."""
    device = xs[0].device
    for x in xs:
        if x.device != device:
            raise ValueError(f"tensors must be on one device, got {device} and {x.device}")
    return _device_of(xs[0])


def _x64(xs: Sequence[Tensor]) -> contextlib.AbstractContextManager:
    """64-bit JAX where an input asks for it, 32-bit elsewhere, whatever others have done to the process-wide flag."""
    dtypes = {x.dtype for x in xs}
    wide = not dtypes.isdisjoint((torch.float64, torch.complex128))
    if not wide and not dtypes.isdisjoint(_NARROW):
        wide = jax.config.jax_enable_x64
    return jax.enable_x64(wide)


def _signature(xs: Sequence[Tensor], program: Program) -> Signature:
    """Shapes and dtypes that the tensors have as arrays. Dynamic sizes become what they are now."""
    signature = []
    for x in xs:
        dtype = x.dtype
        if dtype in _NARROW and not jax.config.jax_enable_x64:
            if program.wide == "error":
                raise TypeError(
                    f"{program.name} must not be given {dtype} while jax_enable_x64 is off: cast it to {_NARROW[dtype]}"
                )
            dtype = _NARROW[dtype]
        signature.append((tuple(map(int, x.shape)), _TO_JAX[dtype]))
    return tuple(signature)


def _fake_forward(xs, key: str, wanted: str) -> tuple[list[Tensor], list[Tensor]]:
    program = programs.find(key)
    with _x64(xs):
        outs, residuals = program.abstract(wanted, _signature(xs, program))
    empty = lambda a: xs[0].new_empty(a.shape, dtype=dtype_to_torch(a.dtype))
    return [empty(o) for o in outs], [empty(r) for r in residuals]


def _fake_backward(xs, outs, residuals, cotangents, key: str, wanted: str) -> list[Tensor]:
    chosen = [x for x, mark in zip(xs, wanted, strict=True) if mark == "1"]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in chosen]


_library = torch.library.Library("gqa_jax", "DEF")
_library.define(
    "call(Tensor[] xs, str key, str wanted) -> (Tensor[] outs, Tensor[] residuals)", tags=_TAGS
)
_library.define(
    "vjp(Tensor[] xs, Tensor[] outs, Tensor[] residuals, Tensor[] cotangents, str key, str wanted) -> Tensor[]",
    tags=_TAGS,
)
_library.impl("call", _run_forward, "CompositeExplicitAutograd")
_library.impl("vjp", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gqa_jax::call", _fake_forward, lib=_library)
torch.library.register_fake("gqa_jax::vjp", _fake_backward, lib=_library)
