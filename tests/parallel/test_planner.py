"""The planner: HLO read right, sums that can be checked by hand, meshes refused in the layers' own words."""

import json

import jax
import jax.numpy as jnp
import pytest

from gqa_jax import DecoderConfig
from gqa_jax.__main__ import main
from gqa_jax.hf.config import PRESETS
from gqa_jax.planner import costs, plan, programs
from gqa_jax.planner.mesh import parse_mesh, plan_mesh
from gqa_jax.planner.model_flops import model_flops
from gqa_jax.train.step import TrainOutput
from pallas_kernels.aot import Rates, hlo, rates
from tests.support.aot import require

RATES = Rates(bf16_flops=1e9, hbm_bytes=1e6, nvlink_bytes=1e5, network_bytes=1e4, memory_bytes=1e9)
TINY = DecoderConfig.from_hf(PRESETS["tiny_hybrid"])

HLO = """HloModule step, is_scheduled=true

%fused (a: f32[8,4], b: f32[4,6]) -> f32[8,6] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,6]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[8,4], f32[10,4,6])) -> (s32[], f32[8,4], f32[10,4,6]) {
  %s = (s32[], f32[8,4]{1,0}, f32[10,4,6]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %w = f32[10,4,6]{2,1,0} get-tuple-element(%s), index=2
  %taken = f32[1,4,6]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,4,6}
  %flat = f32[4,6]{1,0} bitcast(%taken)
  %start = (f32[8,4], f32[8,4]) collective-permute-start(%x), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %product = f32[8,6]{1,0} fusion(%x, %flat), kind=kCustom, calls=%fused
  %done = f32[8,4]{1,0} collective-permute-done(%start)
  ROOT %next = (s32[], f32[8,4]{1,0}, f32[10,4,6]{2,1,0}) tuple(%i, %done, %w)
}

%condition (s: (s32[], f32[8,4], f32[10,4,6])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}, f32[10,4,6]{2,1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8,4], f32[10,4,6])) -> f32[16,4] {
  %p = (s32[], /*index=1*/f32[8,4], f32[10,4,6]) parameter(0)
  %while.1 = (s32[], f32[8,4], f32[10,4,6]) while(%p), condition=%condition, body=%body, backend_config=KNOWN
  %x = f32[8,4]{1,0} get-tuple-element(%while.1), index=1
  ROOT %gathered = f32[16,4]{1,0} all-gather(%x), replica_groups=mesh['cp'=2,'tp'=2] {'tp'}, dimensions={0}
}
""".replace("KNOWN", '{"known_trip_count":{"n":"10"}}')


def test_loops_overlap_and_slices_are_summed_by_hand():
    found = costs(HLO, {"cp": 2, "tp": 2}, RATES)
    product, taken = 2 * 8 * 4 * 6, 2 * 4 * 6 * 4
    operands = (8 * 4 + 4 * 6 + 8 * 6) * 4
    assert found.flops == 10 * product
    assert found.traffic_bytes == 10 * (operands + taken)
    assert found.kernel_seconds == pytest.approx(found.traffic_bytes / 1e6)
    assert found.unknown_loops == 0
    hop, gathered = found.collectives
    assert (hop.kind, hop.axes, hop.times) == ("collective-permute", ("cp",), 10)
    assert (hop.result_bytes, hop.sent_bytes, hop.crosses_hosts) == (128, 128, False)
    assert hop.asynchronous
    assert hop.overlapped_kernels == 1
    assert hop.seconds == pytest.approx(128 / 1e5)
    assert hop.hidden_seconds == pytest.approx(operands / 1e6)
    assert (gathered.kind, gathered.axes, gathered.times) == ("all-gather", ("tp",), 1)
    assert (gathered.result_bytes, gathered.sent_bytes) == (256, 128)
    assert not gathered.asynchronous
    assert gathered.hidden_seconds == 0.0


def test_loops_of_unknown_length_count_once_and_are_named():
    text = HLO.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")
    found = costs(text, {"cp": 2, "tp": 2}, RATES)
    assert found.unknown_loops == 1
    assert found.collectives[0].times == 1


@pytest.mark.parametrize(
    "attributes, want",
    [
        ("replica_groups={{0,1},{2,3}}, channel_id=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,4},{4,0}}, x={1}", [[0, 4], [4, 0]]),
        ("replica_groups={}", [list(range(8))]),
    ],
)  # fmt: skip
def test_every_way_to_write_groups(attributes, want):
    assert hlo.groups(attributes, 8).tolist() == want


@pytest.mark.parametrize("text", ["dp=8,pp=2", "dp=8,dp=2", "dp", "tp=0", "", "tp=x"])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="`mesh` must be like 'dp=8,cp=8,tp=8' with each of"):
        parse_mesh(text)


def test_tp_is_factored_where_key_value_heads_do_not_fill_it():
    config = DecoderConfig.from_hf(PRESETS["qwen3_next"])
    shape, axes, note = plan_mesh(parse_mesh("fsdp=8,cp=2,tp=8"), config)
    assert shape == {"fsdp": 8, "cp": 2, "tp_kv": 2, "tp_q": 4}
    assert axes.heads == ("tp_kv", "tp_q")
    assert axes.embed == "fsdp"
    assert "2 key/value heads on tp=8" in note
    shape, axes, note = plan_mesh({"dp": 4, "tp": 2}, config, sequence_parallel=True)
    assert (shape, axes.heads, axes.seq_residual, note) == (
        {"dp": 4, "tp": 2},
        ("tp",),
        ("tp",),
        "",
    )


def test_operations_of_a_model_by_hand():
    config = DecoderConfig.from_hf(PRESETS["llama3_8b"])
    projections = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336
    parameters = 32 * projections + 4096 * 128256
    pairs = 32 * 32 * 128 * 4 * (2048 * 2049 // 2)
    want = 3 * (2 * parameters * 2048 + pairs)
    assert model_flops(config, batch=1, length=2048, decode=False) == pytest.approx(want)
    want = 2 * parameters + 32 * 32 * 128 * 4 * 2048
    assert model_flops(config, batch=1, length=2048, decode=True) == pytest.approx(want)


def test_rates_are_those_of_the_target_file():
    assert rates("h200") == Rates(989.4e12, 4.8e12, 450e9, 50e9, 150e9)
    with pytest.raises(
        ValueError, match="`target` must be one of a100, b200, h100, h200, got 'v100'"
    ):
        rates("v100")


def test_what_a_mesh_cannot_do_is_refused_in_the_words_of_the_layers():
    require()
    cases = [
        (dict(mesh={"tp": 8}), r"A_log` must be a multiple of 8 \(mesh axes \('tp_kv', 'tp_q'\)\), got shape"),
        (dict(mesh={"cp": 8}, length=40), r"`tokens` must have a length that is a multiple of 16"),
        (dict(mesh={"fsdp": 8}, batch=3), r"`batch` must be a multiple of 8 \(mesh \{'fsdp': 8\}\)"),
        (dict(mesh={"dp": 9}), "`devices` must be 1..8 or a multiple of 8, got 9"),
        (dict(mesh={"cp": 8}, mode="a2a"), "mode 'a2a' must have a multiple of 8 key/value heads"),
        (dict(mesh={"cp": 8}, length=0), "`length` and `batch` must be positive, got 0 and None"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            plan(TINY, **{"length": 64, **options})


@pytest.mark.parametrize("explicit", [False, True])
def test_a_decode_step_on_eight_gpus(explicit):
    require()
    made = plan(
        TINY,
        mesh={"fsdp": 2, "cp": 2, "tp": 2},
        length=4096,
        batch=4,
        decode=True,
        explicit=explicit,
    )
    assert (made.devices, made.step, made.axis_type) == (
        8, "decoding", "explicit" if explicit else "auto"
    )  # fmt: skip
    # 2 attention layers: keys and values of 4 / 2 rows, 2 / 2 heads, 4096 / 2 slots; the rest are states.
    keys = 2 * 2 * 2 * 1 * 2048 * 64 * 2
    states = 2 * (2 * 4 * 64 * 64 * 4 + 2 * 4 * 2 * 256 * 2)
    assert made.parts["cache"] == keys + states + 4 * 2 * 4
    assert made.argument_bytes >= sum(made.parts.values())
    assert made.aliased_bytes == made.parts["cache"]  # updated in place
    assert made.temporary_bytes < made.parts["cache"] / 2 + 2 * made.parts["parameters"] + 2**22
    # One token: all that is sent besides gathered parameters is small, and no activation is gathered.
    for row in made.traffic:
        if "fsdp" not in row.axes:
            assert row.kind == "all-reduce"
            assert row.result_bytes <= 0.1 * 2**20 * made.num_layers
    assert made.fits
    assert made.bound[1] == max(made.floors.values()) > 0
    assert json.loads(json.dumps(made.as_json()))["peak_bytes"] == made.peak_bytes


@pytest.mark.usefixtures("loose_promotion")  # optax relies on JAX's default promotion
def test_a_planned_update_is_a_training_step():
    planned = plan_mesh({"dp": 2}, TINY)
    sizes, names = tuple(planned.shape.values()), tuple(planned.shape)
    mesh = jax.sharding.AbstractMesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,))
    dtypes = dict(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        program = programs.training(TINY, mesh, planned.axes, None, batch=2, length=16, **dtypes)
        output = jax.eval_shape(program.function, *program.arguments)
    assert isinstance(output, TrainOutput)


def test_one_gpu_sends_nothing():
    require()
    made = plan(TINY, mesh={"tp": 1}, length=256, batch=1, decode=True)
    assert made.devices == 1
    assert not made.traffic


def test_the_command_prints_a_plan_or_says_why_not(capsys, tmp_path):
    require()
    arguments = ["plan", "--config", "qwen3_8b", "--layers", "1", "--seq", "128", "--decode"]
    file = tmp_path / "plan.json"
    assert main([*arguments, "--mesh", "tp=8", "--nvlink-bytes", "1e9", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "qwen3_8b, one step of decoding on 8 x h200: mesh tp=8 (auto axes)" in text
    assert "all-reduce" in text
    assert "<- bound" in text
    record = json.loads(file.read_text())
    sent = sum(row["sent_bytes"] for row in record["traffic"])
    assert record["floors"]["NVLink"] == pytest.approx(sent / 1e9)
    assert main([*arguments, "--mesh", "tp=3"]) == 2
    assert "must be a multiple of 3" in capsys.readouterr().err
    assert main(["plan", "--config", "nowhere", "--mesh", "tp=8", "--seq", "8"]) == 2
    assert "`path` must be a config.json or a folder that holds one" in capsys.readouterr().err


def test_every_preset_is_a_decoder():
    for name, fields in PRESETS.items():
        config = DecoderConfig.from_hf(fields)
        assert config.family == fields["model_type"], name
        assert len(config.layers) == fields["num_hidden_layers"]
