"""Every program that `pallas_kernels.aot` knows by name."""

from pallas_kernels.aot.case import Case
from pallas_kernels.attention import aot_cases as attention
from pallas_kernels.causal_conv import aot_cases as causal_conv
from pallas_kernels.decode import aot_cases as decode
from pallas_kernels.delta_rule import aot_cases as delta_rule
from pallas_kernels.delta_rule.hopper import aot_bwd_cases as delta_rule_bwd
from pallas_kernels.delta_rule.hopper import aot_fwd_cases as delta_rule_fwd
from pallas_kernels.delta_rule.step import aot_cases as delta_rule_step

_ROOMS = (
    attention,
    decode,
    causal_conv,
    delta_rule,
    delta_rule_fwd,
    delta_rule_bwd,
    delta_rule_step,
)


def cases() -> list[Case]:
    """Every registered case, in the order of the table."""
    return [case for room in _ROOMS for case in room.cases()]
