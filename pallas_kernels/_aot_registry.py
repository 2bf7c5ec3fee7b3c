"""Every program that `pallas_kernels.aot` knows by name."""

from pallas_kernels import (
    _aot_cases,
    _aot_conv_cases,
    _aot_delta_bwd_cases,
    _aot_delta_cases,
    _aot_delta_step_cases,
)
from pallas_kernels._aot_cases import Case

_ROOMS = (
    _aot_cases,
    _aot_conv_cases,
    _aot_delta_cases,
    _aot_delta_bwd_cases,
    _aot_delta_step_cases,
)


def cases() -> list[Case]:
    """Every registered case, in the order of the table."""
    return [case for room in _ROOMS for case in room.cases()]
