"""Which implementation runs, and why each other one would not.

An operator lists its implementations in order of preference, each with `None` (it can) or the reason why it
cannot. Nothing here catches exceptions: a choice is made before the implementation is traced.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

import jax

_ASSUMED: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed", default=None)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation an operator would run, and what keeps each other one from running.

    Attributes:
      operator: public name of the operator.
      chosen: the implementation that runs with `implementation=None`, or None if none can.
      reasons: implementation -> why it was not chosen ("" for the chosen one).
    """

    operator: str
    chosen: str | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'no implementation can run this call'}"]
        lines += [f"  not {name}: {why}" for name, why in self.reasons.items() if why]
        return "\n".join(lines)


def resolve(operator: str, implementation: str | None, reasons: Mapping[str, str | None]) -> str:
    """The implementation to run.

    Args:
      operator: public name, for messages.
      implementation: what the caller asked for; None takes the first that can.
      reasons: implementation -> None if it can run this call, else why not; in order of preference.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the implementation asked for (or every one) cannot run this call.
    """
    if implementation is None:
        for name, reason in reasons.items():
            if reason is None:
                return name
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"no implementation of {operator} can run this call ({listed})")
    if implementation not in reasons:
        known = ", ".join(map(repr, reasons))
        raise ValueError(f"`implementation` must be None or one of {known}, got {implementation!r}")
    if reasons[implementation] is not None:
        raise NotImplementedError(
            f"`implementation={implementation!r}` of {operator} cannot run this call: {reasons[implementation]}"
        )
    return implementation


def explain(operator: str, reasons: Mapping[str, str | None]) -> Explanation:
    """The `Explanation` that belongs to `resolve(operator, None, reasons)`."""
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    why = {
        name: "" if name == chosen else (reason or f"{chosen} is preferred here")
        for name, reason in reasons.items()
    }
    return Explanation(operator, chosen, why)


def platform() -> str:
    """The platform that computations run on by default: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


@contextlib.contextmanager
def assume_compute_capability(value: str) -> Iterator[None]:
    """Kernels are chosen for a GPU that is not there: one compiled for, or interpreted."""
    before = _ASSUMED.set(value)
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def compute_capability() -> str | None:
    """Compute capability of the GPU that kernels are chosen for, e.g. "9.0"; None without one."""
    if _ASSUMED.get() is not None:
        return _ASSUMED.get()
    if platform() != "gpu":
        return None
    return getattr(jax.local_devices()[0], "compute_capability", None)
