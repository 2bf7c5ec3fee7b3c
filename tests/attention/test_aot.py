"""The attention kernels as machine code for Hopper, compiled without a GPU."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import aot
from pallas_kernels.aot import command, registry, sass
from pallas_kernels.attention import aot_cases
from pallas_kernels.attention.hopper import tuning
from tests.support.aot import assert_fast, require

LIMITS = {  # operators without a kernel of ours -> temporary memory over bytes moved, and bytes updated in place
    # The cache is read where it lies: a copy of it would be half of what must be moved.
    "decode_attention/step/b32-s8192": (0.1, 0),
    # A chunk's products and, backward, the states at the starts of chunks.
    "gated_delta_rule/forward/t4096": (6.0, 0),
    "gated_delta_rule/backward/t4096": (12.0, 0),
    "gated_delta_rule/step/b32": (0.1, 4 * 32 * 32 * 128 * 128),
    "causal_conv1d/forward/t4096": (1.0, 2 * 4 * 8192),
}
CASES = {case.name: case for case in aot_cases.cases()}
XLA_CASES = {case.name: case for case in registry.cases() if case.name in LIMITS}
# What the registered cases leave out: masks and features together, and lengths that are no multiple of a tile.
HARD = [
    aot_cases.AttentionShape("everything", segments=True, sliding_window=512, soft_cap=20.0, sinks=True),
    aot_cases.AttentionShape(
        "everything-d256", heads=16, kv_heads=2, head_dim=256, segments=True, sliding_window=512,
        soft_cap=20.0, sinks=True, dtype=jnp.float16,
    ),
    aot_cases.AttentionShape("ragged", batch=3, length=1037, heads=6, kv_heads=2, head_dim=96),
]  # fmt: skip


# The atomic backward is the walk of the other one: CI compiles two of its cases every time, the rest in turns.
OFTEN = ("causal", "fused")


def taking_turns(name: str):
    slow = "backward_atomic" in name and name.rpartition("/")[2] not in OFTEN
    return pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("name", map(taking_turns, CASES))
def test_registered_cases_use_the_tensor_cores_and_spill_nothing(name):
    require()
    report = aot.compile_case(CASES[name])
    assert_fast(report)
    assert not report.collectives
    # The operator copies neither keys nor queries: beside its outputs it needs statistics only, and where dq is added
    # up by atomics a float32 array of its size (the largest of six arrays of 16 bits that the case moves).
    extra = report.hbm_bytes / 2 if "backward_atomic" in name else 0
    assert report.temporary_bytes <= extra + 0.05 * report.hbm_bytes + 2**20


@pytest.mark.parametrize(
    "direction, shape",
    [
        pytest.param(direction, shape, id=f"{direction}-{shape.label}")
        for direction in aot_cases.DIRECTIONS
        for shape in HARD
        if direction != "backward_atomic" or shape.head_dim in tuning.ATOMIC_HEAD_DIMS
    ],
)
def test_features_together_spill_nothing(direction, shape):
    require()
    # The compiler may prove a loop empty, so the count on paper is not asked for.
    case = dataclasses.replace(aot_cases.DIRECTIONS[direction](shape), tensor_instructions=())
    assert_fast(aot.compile_case(case))


@pytest.mark.parametrize(
    "label, dim, block", [("causal", 128, 128), ("d64", 64, 128), ("d256", 256, 64)]
)
def test_softmax_runs_behind_the_tensor_cores(label, dim, block):
    """In every loop body the weighted sum of the last tile is issued before the softmax of this one and waited for
    after it."""
    require()
    (kernel,) = aot.compile_case(CASES[f"gqa_attention/forward/{label}"]).kernels
    runs = [(op, len(list(group))) for op, group in itertools.groupby(kernel.sequence)]
    both = (dim + block) // 16
    bodies = [i for i, run in enumerate(runs) if run == ("HGMMA", both)]
    assert len(bodies) == 2, runs
    for start in bodies:
        names = [op for op, _ in runs[start : start + 4]]
        assert names == ["HGMMA", "WAIT<=1", "EX2", "WAIT<=0"], runs
        assert runs[start + 2][1] >= block // 2, runs


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name.startswith("gated_delta_rule/b") else []
        )
        for name in XLA_CASES
    ],
)
def test_operators_without_a_kernel(name):
    """What XLA keeps beside arguments and results, and what it updates in place."""
    require()
    report = aot.compile_case(XLA_CASES[name])
    assert not report.kernels
    assert not report.collectives
    most, aliased = LIMITS[name]
    assert report.temporary_bytes <= most * report.hbm_bytes
    assert report.aliased_bytes == aliased


@pytest.mark.parametrize("devices", [8, 64])
def test_a_batch_spread_over_hosts_needs_no_collective(devices):
    require()
    report = aot.compile_case(XLA_CASES["gated_delta_rule/step/b32"], devices=devices)
    assert report.devices == devices
    assert not report.collectives
    assert report.aliased_bytes == 4 * 32 * 32 * 128 * 128  # per device


def test_eight_gpus_without_a_collective():
    require()
    report = aot.compile_case(CASES["gqa_attention/forward/short16"], target="h100", devices=8)
    assert report.devices == 8
    assert report.target == "NVIDIA H100 80GB HBM3"
    assert not report.collectives
    assert_fast(report)


def test_collectives_and_memory_of_a_sharded_program():
    require()
    mesh = aot.topology("h200", devices=8)
    rows = NamedSharding(mesh, PartitionSpec("device"))
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=rows)
    report = aot.compile_program(lambda x: x.sum(0), x, mesh=mesh, name="sum")
    assert report.collectives["all-reduce"] == (1, 4096)
    assert report.argument_bytes == 8 * 4096
    assert report.output_bytes == 4096


def test_aliasing_of_a_donated_argument():
    require()
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    report = aot.compile_program(lambda x: x + 1.0, x, target="b200", donate_argnums=0)
    assert report.aliased_bytes == 4 * 256 * 256
    assert "B200" in report.target


def test_command_line(capsys, tmp_path):
    require()
    path = tmp_path / "facts.json"
    shape = "--length 256 --heads 4 --kv-heads 2 --head-dim 64 --causal --direction forward"
    command.main(["--operator", "gqa_attention", *shape.split(), "--json", str(path)])
    printed = capsys.readouterr().out
    assert "| gqa_attention/forward/b1-t256-n4-k2-d64 | attention_forward |" in printed
    (report,) = json.loads(path.read_text())["reports"]
    assert report["kernels"][0]["spill_store_bytes"] == 0


def test_list_needs_no_compiler(capsys):
    command.main(["--list"])
    listed = capsys.readouterr().out.split()
    assert len(set(listed)) == len(listed)
    assert {*CASES, *XLA_CASES} <= set(listed)


def test_errors():
    with pytest.raises(
        ValueError, match=r"`target` must be one of a100, b200, h100, h200, got 'v100'"
    ):
        aot.topology("v100")
    with pytest.raises(ValueError, match=r"`devices` must be 1..8 or a multiple of 8, got 12"):
        aot.topology("h200", devices=12)
    with pytest.raises(SystemExit):
        command.main(["--case", "nothing"])


PRINTED = """\
Resources(smem_scratch_bytes=2048, barrier_counts=Counter({Barrier(arrival_count=1, num_barriers=2, orders_tensor_core=False): 3, Barrier(arrival_count=2, num_barriers=1, orders_tensor_core=False): 1}), scoped_gmem_semaphores={})
ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'one_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for one_mosaic_gpu_kernel
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
//--------------------- .text.one_mosaic_gpu_kernel --------------------------
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 STL [R1], R2 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], RZ, !UPT ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/              @!UP1 MUFU.EX2 R0, R1 ;
"""  # noqa: E501


def test_parsing_what_the_compiler_prints():
    (kernel,) = sass.parse(PRINTED)
    assert kernel.name == "one_mosaic_gpu_kernel"
    assert (kernel.registers, kernel.stack_bytes) == (168, 8)
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (12, 16)
    assert (kernel.shared_bytes, kernel.barriers) == (2048, 7)
    assert kernel.sequence == ("HGMMA", "WAIT<=1", "EX2")
    assert kernel.instructions == {"LDC": 1, "STL": 1, "HGMMA": 1, "WARPGROUP": 1, "MUFU": 1}
    assert set(kernel.slow_paths) == {"STL", "C7513"}
    assert kernel.loops == ()


def test_loops_end_where_the_code_goes_back():
    line = lambda text: f"        /*0050*/                   {text} ;\n"
    loop = ".L_x_1:\n" + 70 * line("FADD R0, R0, R1") + line("@P0 BRA `(.L_x_1)")
    # Out of line: waits for a barrier, then goes back.
    wait = ".L_x_2:\n" + line("@!P1 BRA `(.L_x_2)") + line("BRA `(.L_x_1)")
    (kernel,) = sass.parse(PRINTED + loop + line("EXIT") + wait)
    assert kernel.loops == (71,)
