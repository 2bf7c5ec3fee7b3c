"""Operators, their implementations, and the machine that a program is for.

An operator declares its implementations once, in order of preference: how each runs, and why it cannot run a call.
The call, its choice and its `explain` all read that declaration. Nothing here catches an implementation's exceptions: a
choice is made before it is traced.

Which machine a program is for is one value, the `Target`: who compiles for another machine or interprets kernels sets
it, everybody else asks it instead of JAX. The target and the tuned configurations are part of what JAX keys compiled
programs by, a user's `jax.jit` included: where either changes, programs are traced anew.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

SYMBOLIC = "its blocks need sizes that are numbers, not symbols of jax.export"
HOPPER = "compute capability 9.0 (H100, H200)"
SHARED_MEMORY_BYTES = 232448  # 227 KiB: what one block may opt in to on sm_90 and sm_100


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation an operator would run, and what keeps each other one from running.

    Attributes:
      operator: public name of the operator.
      chosen: the implementation that runs, or None if none can (or the requested one cannot).
      reasons: implementation -> why it was not chosen ("" for the chosen one).
    """

    operator: str
    chosen: str | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'no implementation can run this call'}"]
        lines += [f"  not {name}: {why}" for name, why in self.reasons.items() if why]
        return "\n".join(lines)


class Implementation(NamedTuple):
    """One way to run an operator.

    Attributes:
      run: what the operator calls once this is chosen; kernels are imported there, not before.
      unsupported_reason: takes the operator's own description of a call; why this cannot run it, or None.
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[[Any], str | None] = lambda call: None


class Explained(Exception):
    """Ends a call that is to be explained instead of run: `choose` raises it, `pallas_kernels.explain` catches it."""

    def __init__(self, explanation: Explanation):
        super().__init__(str(explanation))
        self.explanation = explanation


EXPLAINING: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)
OPERATORS: dict[str, Callable[..., Any]] = {}  # every public operator by name


def operator[F: Callable[..., Any]](function: F) -> F:
    """Registers a public operator, so that `explain` knows it. Its body calls `choose` under its own name."""
    OPERATORS[function.__name__] = function
    return function


def choose(
    operator: str,
    implementation: str | None,
    implementations: Mapping[str, Implementation],
    *,
    call: Any = None,
) -> Callable[..., Any]:
    """`run` of the implementation for a call.

    Args:
      operator: public name, for messages.
      implementation: what the caller requested; None takes the first that can run the call.
      implementations: by name, in order of preference.
      call: what each `unsupported_reason` is asked about.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the requested implementation (or every one) cannot run this call.
    """
    if implementation is not None and implementation not in tuple(implementations):
        known = ", ".join(map(repr, implementations))
        raise ValueError(f"`implementation` must be None or one of {known}, got {implementation!r}")
    if EXPLAINING.get():
        reasons = {name: each.unsupported_reason(call) for name, each in implementations.items()}
        raise Explained(_explanation(operator, implementation, reasons))
    if implementation is not None:
        reason = implementations[implementation].unsupported_reason(call)
        if reason is None:
            return implementations[implementation].run
        raise NotImplementedError(
            f"`implementation={implementation!r}` of {operator} cannot run this call: {reason}"
        )
    reasons = {}
    for name, each in implementations.items():
        reasons[name] = each.unsupported_reason(call)
        if reasons[name] is None:
            return each.run
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation of {operator} can run this call ({listed})")


def _explanation(
    operator: str, implementation: str | None, reasons: Mapping[str, str | None]
) -> Explanation:
    able = [name for name, reason in reasons.items() if reason is None]
    wanted = able[:1] if implementation is None else [implementation]
    chosen = next((name for name in wanted if name in able), None)
    why = "preferred here" if implementation is None else "requested"
    return Explanation(
        operator,
        chosen,
        {
            name: "" if name == chosen else reason or f"{wanted[0]} is {why}"
            for name, reason in reasons.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine that programs traced now are for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: of the GPU that kernels are chosen for, e.g. "9.0"; None without one.
      interpret: what Pallas takes as `interpret`, for kernels of a GPU that is not there; None where they are compiled.
    """

    platform: str
    compute_capability: str | None = None
    interpret: Any = None

    def not_hopper(self) -> str | None:
        """Why kernels written for H100 and H200 cannot run there, or None."""
        if self.compute_capability is None:
            return f"it needs an NVIDIA GPU of {HOPPER}"
        if self.compute_capability != "9.0":
            return f"it is written for {HOPPER}, this is {self.compute_capability}"
        return None


_TARGET = jax.make_user_context(default_value=None)
# (operator, key, configuration) of every tuned entry.
_TUNED = jax.make_user_context(default_value=())


def target() -> Target:
    """The target that was set, else the device that JAX would take: `jax.default_device`, or the first of its platform.

    While a function is traced nobody knows where its arguments lie: on a machine with a GPU, work on arrays committed
    to the CPU belongs under `jax.default_device(cpu)`.
    """
    if _TARGET.value is not None:
        return _TARGET.value
    device = jax.config.jax_default_device
    if device is None:
        platform = jax.default_backend()
        device = jax.local_devices()[0]
    else:
        device = jax.local_devices(backend=device)[0] if isinstance(device, str) else device
        platform = device.platform
    capability = str(getattr(device, "compute_capability", ""))
    is_nvidia = platform == "gpu" and capability.replace(".", "").isdigit()
    return Target(platform, capability if is_nvidia else None)


def computing_on(device: Any) -> contextlib.AbstractContextManager[object]:
    """Inside, in this thread, programs are for `device`, and constants lie there; None changes nothing."""
    if device is None or device == (jax.config.jax_default_device or jax.local_devices()[0]):
        return contextlib.nullcontext()
    return jax.default_device(device)


def target_of(platform: str) -> Target:
    """The target for "cpu", "cuda", "rocm" or "tpu": this machine's if it is of that platform, else any such one."""
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    here = target()
    return here if here.platform == platform else Target(platform)


def targeting(value: Target) -> contextlib.AbstractContextManager[None]:
    """Programs traced inside, in this thread, are for another machine."""
    return _TARGET(value)


def use_tuned(operator: str, table: Mapping[str, Any]) -> None:
    """Replaces the tuned configurations (hashable) of one operator, in every thread."""
    kept = [entry for entry in _TUNED.get_global() if entry[0] != operator]
    _TUNED.set_global((*kept, *((operator, *item) for item in table.items())))


def tuned(operator: str, key: str) -> Any:
    """The configuration that was tuned for `key`, or None."""
    return next((found for *place, found in _TUNED.value if place == [operator, key]), None)


def is_symbolic(*arrays: Any) -> bool:
    """Whether a size of the arrays is a symbol of `jax.export`."""
    return not all(isinstance(size, int) for array in arrays for size in array.shape)
