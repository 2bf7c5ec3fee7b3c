"""Memory and traffic of a training step as the mesh grows from 1 to 512 H200s, as compiled: nothing is executed."""

from gqa_jax import DecoderConfig
from gqa_jax.hf.config import PRESETS
from gqa_jax.planner import plan

TESTS = ["tests/parallel/test_planner.py"]
MODEL, LENGTH = "qwen3_8b", 32768
# First tensor parallelism fills a host, then context parallelism, then parameters spread over what is left.
MESHES: tuple[dict[str, int], ...] = (
    {"tp": 1},
    {"tp": 2},
    {"tp": 8},
    {"cp": 2, "tp": 8},
    {"cp": 8, "tp": 8},
    {"fsdp": 2, "cp": 8, "tp": 8},
    {"fsdp": 8, "cp": 8, "tp": 8},
)


def measure(quick: bool) -> list[dict]:
    """One row per mesh: the plan of one update on a row of the batch per fsdp device."""
    config = DecoderConfig.from_hf(PRESETS["tiny_hybrid" if quick else MODEL])
    rows = []
    for mesh in ({"tp": 2},) if quick else MESHES:
        made = plan(
            config,
            mesh=mesh,
            length=512 if quick else LENGTH,
            decode=quick,
            # The machine code does not matter to the plan; not optimising it halves the time.
            compiler_options={"xla_backend_optimization_level": 0},
        )
        rows.append({"model": MODEL, **made.as_json()})
    return rows
