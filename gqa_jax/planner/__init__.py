"""What a step costs on a mesh that this machine does not have: memory, collectives, operations, a bound on the time."""

from gqa_jax.planner.costs import Collective as Collective
from gqa_jax.planner.costs import Costs as Costs
from gqa_jax.planner.costs import costs as costs
from gqa_jax.planner.plan import Plan as Plan
from gqa_jax.planner.plan import Traffic as Traffic
from gqa_jax.planner.plan import plan as plan
