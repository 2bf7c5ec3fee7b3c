"""How PyTorch runs a program: two operators, which it differentiates, batches and traces like its own.

`gqa_jax::call` is the forward pass, `gqa_jax::vjp` the backward pass. A string names the program, because a constant is
all that every version of Dynamo lets through. The operators bring their derivative and their batching rule along, so
autograd, every level of `torch.func`, exported graphs and torch.compile find them wherever a call stands, also where no
Python of ours can look ahead. Plain eager calls skip the dispatcher, which would cost as much as the bridge itself.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from interop import programs
from interop.dlpack import (
    _NARROW,
    _PLAIN,
    _TO_JAX,
    _device_of,
    dtype_to_torch,
    exporter,
    import_plain,
    on_device,
)
from interop.programs import Program, Signature

_batch: Callable = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]
_unbatch: Callable = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag)


class JaxFunction(_SingleLevelFunction):
    """A program under autograd: `(key, wanted, *tensors) -> (*outs, *residuals)`.

    `wanted` marks with "1" the inputs whose gradient is asked for.
    """

    @staticmethod
    def forward(key, wanted, *tensors):
        if torch._C._are_functorch_transforms_active():
            # To the next transform, with gradients on: it may be one that differentiates too.
            with (
                torch.enable_grad(),
                _set_fwd_grad_enabled(True),
                torch._C._AutoDispatchBelowAutograd(),
            ):
                return tuple(torch.ops.gqa_jax.call(list(tensors), key, "")[0])
        saving = wanted if programs.find(key).save else ""
        outs, residuals = (
            _run_forward(tensors, key, saving)
            if _are_plain(tensors)
            else torch.ops.gqa_jax.call(list(tensors), key, saving)
        )
        return (*outs, *residuals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        key, wanted, *tensors = inputs
        program = programs.find(key)
        ctx.key, ctx.program = key, program  # alive until backward, whatever becomes of the wrapper
        ctx.wanted, ctx.num_inputs = wanted, len(tensors)
        ctx.save = program.save and not torch._C._are_functorch_transforms_active()
        inexact = program.inexact_outs
        saved = program.saved_outs(wanted) if ctx.save else ()
        ctx.num_saved = len(saved)
        residuals = output[len(inexact) :]
        fixed = [output[i] for i in range(len(inexact)) if not inexact[i]] + list(residuals)
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        ctx.save_for_backward(*tensors, *[output[i] for i in saved], *residuals)

    @staticmethod
    @torch._dynamo.disable  # it would compile what runs between its graphs
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, count = ctx.saved_tensors, ctx.num_inputs
        inexact = ctx.program.inexact_outs
        cotangents = [gradients[i] for i in range(len(inexact)) if inexact[i]]
        tensors, rest = saved[:count], saved[count:]
        if ctx.save:
            outs, residuals = rest[: ctx.num_saved], rest[ctx.num_saved :]
            results = _backward(tensors, outs, residuals, cotangents, ctx.key, ctx.wanted)
        else:
            results = forward([*tensors, *cotangents], ctx.program.vjp(ctx.wanted).key)
        remaining = iter(results)
        return None, None, *(next(remaining) if mark == "1" else None for mark in ctx.wanted)

    @staticmethod
    def _compiled_autograd_key(ctx):
        """What compiled autograd compiles for, besides shapes."""
        return (ctx._autograd_function_id, *(hash(x) for x in (ctx.key, ctx.wanted)))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"{ctx.program.name} has no forward-mode derivative (jvp, jacfwd, hessian): use grad, vjp or jacrev"
        )


_apply: Callable = JaxFunction.apply  # pyright: ignore[reportAttributeAccessIssue]


def forward(tensors: Sequence[Tensor], key: str) -> Sequence[Tensor]:
    """All results; differentiable, batched, traced as whatever surrounds the call wants it."""
    if forward_ad._current_level >= 0 or not _are_plain(tensors):
        return torch.ops.gqa_jax.call(list(tensors), key, "")[0]
    wanted = _wanted(tensors)
    return _differentiable(tensors, key, wanted) if wanted else _run_forward(tensors, key, "")[0]


def _backward(tensors, outs, residuals, cotangents, key: str, wanted: str) -> Sequence[Tensor]:
    if torch.is_grad_enabled() or not _are_plain([*tensors, *cotangents]):
        lists = (list(tensors), list(outs), list(residuals), list(cotangents))
        return torch.ops.gqa_jax.vjp(*lists, key, wanted)
    return _run_backward(tensors, outs, residuals, cotangents, key, wanted)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing (transforms, fake tensors, tracers, profilers of operators) wants to see the call."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        if type(x) not in _PLAIN or is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x):
            return False
    return True


def _wanted(tensors: Sequence[Tensor]) -> str:
    """Marks with "1" the tensors whose gradient is asked for; empty if none is."""
    if not torch.is_grad_enabled():
        return ""
    wanted = "".join("1" if x.requires_grad else "0" for x in tensors)
    return wanted if "1" in wanted else ""


def _differentiable(tensors: Sequence[Tensor], key: str, wanted: str) -> Sequence[Tensor]:
    flat = _apply(key, wanted, *tensors)
    return flat[: len(programs.find(key).inexact_outs)]


def _autograd_call(keys, xs, key: str, wanted: str):
    """The derivative of `call`: here autograd, every level of `torch.func` and the tracers of torch.compile find it."""
    marks = "" if wanted else _wanted(xs)
    if marks or (not wanted and forward_ad._current_level >= 0):
        with enable_single_level_autograd_function():
            return list(_differentiable(xs, key, marks or "0" * len(xs))), []
    with torch._C._AutoDispatchBelowAutograd():
        return _CALL.redispatch(keys & torch._C._after_autograd_keyset, xs, key, wanted)


def _autograd_vjp(keys, xs, outs, residuals, cotangents, key: str, wanted: str):
    if _wanted([*xs, *cotangents]):
        return _vjp_anew(xs, cotangents, key, wanted)
    with torch._C._AutoDispatchBelowAutograd():
        return _VJP.redispatch(
            keys & torch._C._after_autograd_keyset, xs, outs, residuals, cotangents, key, wanted
        )


def _vjp_anew(xs, cotangents, key: str, wanted: str) -> Sequence[Tensor]:
    """The backward pass as a program that recomputes the forward pass, which can be differentiated and batched."""
    return torch.ops.gqa_jax.call([*xs, *cotangents], programs.find(key).vjp(wanted).key, "")[0]


def _batched_call(xs, dims: Sequence[int | None], key: str, wanted: str) -> Sequence[Tensor]:
    """Results with the new axis in front."""
    if wanted:
        raise NotImplementedError(
            "torch.vmap around a compiled graph that already holds a backward pass is not supported: compile the "
            "function that calls torch.vmap"
        )
    return torch.ops.gqa_jax.call(list(xs), programs.find(key).vmap(tuple(dims)).key, "")[0]


def _vmap_call(info, in_dims, xs, key: str, wanted: str):
    outs = _batched_call(xs, in_dims[0], key, wanted)
    return (outs, []), ([0] * len(outs), [])


def _vmap_vjp(info, in_dims, xs, outs, residuals, cotangents, key: str, wanted: str):
    dims = [*in_dims[0], *in_dims[3]]
    results = _batched_call([*xs, *cotangents], dims, programs.find(key).vjp(wanted).key, "")
    return results, [0] * len(results)


def _legacy_vmap_call(xs, key: str, wanted: str):
    """For `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = [0 if is_legacy_batchedtensor(x) else None for x in xs]
    arguments = zip(xs, dims, strict=True)
    plain = [x if d is None else _unbatch(x, level, 1, 0) for x, d in arguments]
    return [_batch(o, 0, level) for o in _batched_call(plain, dims, key, wanted)], []


def _legacy_vmap_vjp(xs, outs, residuals, cotangents, key: str, wanted: str):
    return _vjp_anew(xs, cotangents, key, wanted)


def _run_forward(xs: Sequence[Tensor], key: str, wanted: str) -> tuple[list[Tensor], list[Tensor]]:
    program = programs.find(key)
    with on_device(_device(xs)), _device_of(xs[0]), _x64(xs):
        arrays = [import_plain(x, program.wide) for x in xs]
        outs, residuals = (
            program.saving(wanted)(*arrays) if wanted else (program.plain(*arrays), ())
        )
        export = exporter(xs[0])
        return [export(o) for o in outs], [export(r) for r in residuals]


def _run_backward(xs, outs, residuals, cotangents, key: str, wanted: str) -> list[Tensor]:
    program = programs.find(key)
    with on_device(_device(xs)), _device_of(xs[0]), _x64(xs):
        recipe, pull_back = program.backward(wanted, _signature(xs, program))
        used = [*(xs[i] for i in recipe.indices("in")), *outs, *residuals, *cotangents]
        export = exporter(xs[0])
        return [export(g) for g in pull_back(*[import_plain(x, program.wide) for x in used])]


def _device(xs: Sequence[Tensor]) -> torch.device:
    """The device of all tensors.

    Raises:
      ValueError: they are on several.
    """
    device = xs[0].device
    for x in xs:
        if x.device != device:
            raise ValueError(f"tensors must be on one device, got {device} and {x.device}")
    return device


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
    with on_device(xs[0].device), _x64(xs):
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
_CALL, _VJP = torch.ops.gqa_jax.call.default, torch.ops.gqa_jax.vjp.default
torch.library.register_fake("gqa_jax::call", _fake_forward, lib=_library)
torch.library.register_fake("gqa_jax::vjp", _fake_backward, lib=_library)
torch.library.register_vmap("gqa_jax::call", _vmap_call, lib=_library)
torch.library.register_vmap("gqa_jax::vjp", _vmap_vjp, lib=_library)
for _name, _run, _derive, _map in (
    ("call", _run_forward, _autograd_call, _legacy_vmap_call),
    ("vjp", _run_backward, _autograd_vjp, _legacy_vmap_vjp),
):
    _library.impl(_name, torch._dynamo.disable(_run), "CompositeExplicitAutograd")
    _library.impl(_name, torch._dynamo.disable(_derive), "Autograd", with_keyset=True)
    _library.impl(_name, torch._dynamo.disable(_map), "Batched")
