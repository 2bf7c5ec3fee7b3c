"""Checkpoints of every family, tensor by tensor, against the folders that transformers writes and reads."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import checkpoint
from gqa_jax.config import DecoderConfig
from gqa_jax.hf.checkpoint.safetensors_file import TensorFile
from tests.hf.hf_models import FAMILIES, build, hf_config, shared_model
from tests.support.compare import assert_bitwise_equal

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What transformers saves of every family."""
    root = tmp_path_factory.mktemp("hf")
    for family in FAMILIES:
        shared_model(family).save_pretrained(root / family)
    return root


def numpy_state(model) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.state_dict().items()}


def reload(path, **kwargs):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, **kwargs
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model


def assert_same_state(actual, expected):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        other = actual.state_dict()[name]
        assert other.dtype == tensor.dtype, name
        view = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(other.view(view), tensor.view(view)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_exhaustive(family, folders):
    config = DecoderConfig.from_hf(folders / family)
    files = checkpoint.HFFolder(folders / family)
    assert checkpoint.hf_names(config).keys() == set(files)
    tree = checkpoint.read_hf(folders / family)
    assert {path for paths in checkpoint.hf_names(config).values() for path in paths} == set(tree)
    decoder = checkpoint.load_hf(folders / family)
    assert tree.keys() == checkpoint.parameters(decoder).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folders_load_in_transformers_bit_for_bit(family, folders, tmp_path):
    config = DecoderConfig.from_hf(folders / family)
    tree = checkpoint.read_hf(folders / family)
    checkpoint.write_hf(config, tree, tmp_path, extra_config={"eos_token_id": 5})
    theirs, ours = checkpoint.HFFolder(folders / family), checkpoint.HFFolder(tmp_path)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert_bitwise_equal(ours[name], tensor, what=name)
    model = reload(tmp_path)
    assert model.config.eos_token_id == 5
    assert model.dtype == torch.float32
    assert_same_state(model, shared_model(family))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "qwen3_next", "qwen3_5_text"])
def test_bfloat16_keeps_its_bits(family, tmp_path):
    model = build(family, seed=11, dtype="bfloat16")
    model.save_pretrained(tmp_path / "theirs")
    decoder = checkpoint.load_hf(tmp_path / "theirs")
    for path, array in checkpoint.parameters(decoder).items():
        decay = path[-1] in ("A_log", "dt_bias")
        assert array.dtype == (jnp.float32 if decay else jnp.bfloat16), path
    checkpoint.save_hf(decoder, tmp_path / "ours")
    assert_same_state(reload(tmp_path / "ours", dtype=torch.bfloat16), model)


def test_independent_positions_of_single_weights(folders):
    """Spot checks by explicit index, so that a mistake made in both directions shows."""
    state = numpy_state(shared_model("qwen3_next"))
    tree = checkpoint.read_hf(folders / "qwen3_next")
    k, r, d = 3, 2, 16
    q_proj = state["model.layers.3.self_attn.q_proj.weight"]
    kernel = np.asarray(tree["layers", 3, "mixer", "qkv", "kernel"])
    for head in range(k * r):
        g, j = divmod(head, r)
        for c in range(d):
            assert_bitwise_equal(kernel[:, g, j, c], q_proj[head * 2 * d + c])
            assert_bitwise_equal(kernel[:, g, r + j, c], q_proj[head * 2 * d + d + c])
    v_proj = state["model.layers.3.self_attn.v_proj.weight"]
    assert_bitwise_equal(kernel[:, 2, 2 * r + 1, 5], v_proj[2 * d + 5])
    o_proj = state["model.layers.3.self_attn.o_proj.weight"]
    out = np.asarray(tree["layers", 3, "mixer", "out", "kernel"])
    assert_bitwise_equal(out[1, 0, 3], o_proj[:, (1 * r + 0) * d + 3])
    conv = state["model.layers.0.linear_attn.conv1d.weight"]
    taps = np.asarray(tree["layers", 0, "mixer", "conv", "kernel"])
    assert_bitwise_equal(taps[:, 1, 16 + 3], conv[2 * 3 * 8 + 1 * 2 * 4 + 3, 0])
    expert = state["model.layers.0.mlp.experts.gate_up_proj"][4]
    gate_up = np.asarray(tree["layers", 0, "mlp", "experts", "gate_up"])
    assert_bitwise_equal(gate_up[4, :, 7, 1], expert[12 + 7])
    assert_bitwise_equal(gate_up[4, :, 7, 0], expert[7])


@pytest.mark.parametrize("limit", [1, 4096, 20_000])
def test_shards_and_their_index(limit, folders, tmp_path):
    family = "qwen3_moe"
    config = DecoderConfig.from_hf(folders / family)
    tree = checkpoint.read_hf(folders / family)
    checkpoint.write_hf(config, tree, tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {p.name for p in tmp_path.glob("*.safetensors")}
    assert len(files) > 1
    for file in files:
        tensors = TensorFile(tmp_path / file).tensors.values()
        assert len(tensors) == 1 or sum(t.stop - t.start for t in tensors) <= limit
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tree.values())
    assert_same_state(reload(tmp_path), shared_model(family))
    for path, array in checkpoint.read_hf(tmp_path).items():
        assert_bitwise_equal(array, tree[path])
    with pytest.raises(
        ValueError, match="`path` must not hold other safetensors files, got model-"
    ):
        checkpoint.write_hf(config, tree, tmp_path)


def test_shards_that_transformers_writes(folders, tmp_path):
    model = shared_model("qwen3_5_moe_text")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    expected = checkpoint.read_hf(folders / "qwen3_5_moe_text")
    for path, array in checkpoint.read_hf(tmp_path).items():
        assert_bitwise_equal(array, expected[path])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next", "qwen3_5_moe_text"])
def test_scanned_layers_are_the_same_checkpoint(family, tmp_path):
    layers = 4 if family == "qwen3" else 8
    dense = {"mlp_only_layers": []} if family == "qwen3_next" else {}
    model = build(family, seed=3, num_hidden_layers=layers, **dense)
    model.save_pretrained(tmp_path / "theirs")
    config = DecoderConfig.from_hf(tmp_path / "theirs")
    scanned = dataclasses.replace(config, scan_layers=True)
    decoder = checkpoint.load_hf(tmp_path / "theirs", config=scanned)
    plain = checkpoint.load_hf(tmp_path / "theirs")
    stacks = checkpoint.parameters(decoder)
    pattern = 1 if family == "qwen3" else 4
    for path, array in checkpoint.parameters(plain).items():
        if path[0] == "layers":
            repeat, position = divmod(path[1], pattern)
            assert_bitwise_equal(stacks["layers", position, *path[2:]][repeat], array)
    checkpoint.save_hf(decoder, tmp_path / "ours")
    assert_same_state(reload(tmp_path / "ours"), model)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_vision_language_folders_yield_the_text_model(family, tmp_path):
    names = {
        "qwen3_5_text": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration"),
        "qwen3_5_moe_text": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    }[family]
    outer, model_class = (getattr(transformers, name) for name in names)
    text = hf_config(family)
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    vision |= {"out_hidden_size": 24, "patch_size": 2, "num_position_embeddings": 4}
    torch.manual_seed(1)
    model = model_class(
        outer(
            text_config=text.to_dict(),
            vision_config=vision,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )
    model.save_pretrained(tmp_path / "whole")
    stored = checkpoint.HFFolder(tmp_path / "whole")
    assert any(name.startswith("model.visual.") for name in stored)
    assert any(name.startswith("model.language_model.layers.") for name in stored)
    decoder = checkpoint.load_hf(tmp_path / "whole")
    checkpoint.save_hf(decoder, tmp_path / "text")
    causal = reload(tmp_path / "text").state_dict()
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        if not name.startswith("model.visual."):
            assert torch.equal(causal.pop(name), tensor), name
    assert not causal


def test_each_device_gets_its_slice(folders):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.NamedSharding(mesh, jax.P("y"))
    first = {("embed", "embedding"): jax.NamedSharding(mesh, jax.P(None, ("x", "y")))}
    folder = folders / "qwen3"
    plain = checkpoint.read_hf(folder)
    decoder = checkpoint.load_hf(
        folder,
        mesh=mesh,
        shardings=lambda path: (
            rows if path[-1] == "kernel" and path[-2] == "qkv" else first.get(path)
        ),
    )
    loaded = checkpoint.parameters(decoder)
    qkv, embedding = loaded["layers", 0, "mixer", "qkv", "kernel"], loaded["embed", "embedding"]
    assert {s.data.shape for s in qkv.addressable_shards} == {(6, 3, 4, 8)}
    assert {s.data.shape for s in embedding.addressable_shards} == {(61, 3)}
    for path, array in loaded.items():
        assert array.sharding.device_set == set(mesh.devices.flat), path
        assert_bitwise_equal(array, plain[path])


def test_the_host_holds_one_parameter_at_a_time(tmp_path):
    config = DecoderConfig.from_hf(
        hf_config("qwen3", num_hidden_layers=24, hidden_size=128, intermediate_size=512).to_dict()
    )
    rng = np.random.default_rng(0)
    shapes = checkpoint.huggingface.rules(config)
    tree = {
        path: rng.standard_normal(shape, np.float32)
        for rule in shapes
        for path, shape in zip(rule.paths, rule.shapes, strict=True)
    }
    total = sum(array.nbytes for array in tree.values())
    largest = max(array.nbytes for array in tree.values())
    assert total > 20 * largest
    tracemalloc.start()
    try:
        checkpoint.write_hf(config, tree, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 4 * largest + 300_000
        tracemalloc.reset_peak()
        for path, array in checkpoint.import_hf(config, checkpoint.HFFolder(tmp_path)):
            assert_bitwise_equal(array, tree[path])
        assert tracemalloc.get_traced_memory()[1] < 4 * largest + 300_000
    finally:
        tracemalloc.stop()


def test_arrays_outlive_their_file(folders, tmp_path):
    config = DecoderConfig.from_hf(folders / "llama")
    original = checkpoint.read_hf(folders / "llama")
    checkpoint.write_hf(config, original, tmp_path)
    decoder = checkpoint.load_hf(tmp_path)
    checkpoint.write_hf(
        config, {p: a + jnp.ones((), a.dtype) for p, a in original.items()}, tmp_path
    )
    for path, array in checkpoint.parameters(decoder).items():
        assert_bitwise_equal(array, original[path])


def test_dtype_casts_as_torch_does(folders):
    decoder = checkpoint.load_hf(folders / "qwen3_next", dtype=jnp.bfloat16)
    expected = build("qwen3_next", seed=7, dtype="bfloat16").state_dict()
    loaded = checkpoint.parameters(decoder)
    assert loaded["layers", 0, "mixer", "A_log"].dtype == jnp.float32
    config = DecoderConfig.from_hf(folders / "qwen3_next")
    for name, tensor in checkpoint.export_hf(config, loaded):
        if name in expected and tensor.dtype != np.float32:
            assert_bitwise_equal(tensor.view(np.int16), expected[name].view(torch.int16).numpy())


@pytest.fixture
def state(folders):
    return {
        k: torch.from_numpy(np.array(v)) for k, v in checkpoint.HFFolder(folders / "qwen2").items()
    }


def save_state(state, folders, tmp_path):
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders / "qwen2/config.json").read_text())


def test_missing_and_unexpected_names_are_listed(state, folders, tmp_path):
    dropped = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    save_state({k: v for k, v in state.items() if k not in dropped}, folders, tmp_path)
    with pytest.raises(ValueError, match=f"misses 2 tensors: {', '.join(dropped)}$"):
        checkpoint.load_hf(tmp_path)
    save_state(state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, folders, tmp_path)
    with pytest.raises(
        ValueError, match=r"1 unexpected tensors: model.layers.0.self_attn.q_norm.weight$"
    ):
        checkpoint.load_hf(tmp_path)


def test_what_transformers_ignores_is_ignored(state, folders, tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "mtp.fc.weight": torch.ones(2),
    }
    save_state(state | extra, folders, tmp_path)
    checkpoint.load_hf(tmp_path)


def test_tied_heads_may_be_stored_if_they_agree(state, folders, tmp_path):
    embedding = state["model.embed_tokens.weight"]
    save_state(state | {"lm_head.weight": embedding.clone()}, folders, tmp_path)
    assert checkpoint.load_hf(tmp_path).lm_head is None
    save_state(state | {"lm_head.weight": embedding + 1}, folders, tmp_path)
    with pytest.raises(
        ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight because"
    ):
        checkpoint.load_hf(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_named(dtype, state, folders, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    save_state(state | {name: state[name].to(dtype)}, folders, tmp_path)
    with pytest.raises(
        ValueError, match=rf"{name} in .* got F8_E\dM\d: dequantize the checkpoint first"
    ):
        checkpoint.load_hf(tmp_path)


def test_wrong_shapes_and_dtypes_are_named(state, folders, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    save_state(state | {name: torch.zeros(8, 24)}, folders, tmp_path)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(12, 24\), got \(8, 24\)"):
        checkpoint.load_hf(tmp_path)
    save_state(state | {name: state[name].half()}, folders, tmp_path)
    with pytest.raises(
        ValueError, match=r"must share one dtype, or `dtype` must be given, got float16, float32"
    ):
        checkpoint.load_hf(tmp_path)
    assert checkpoint.load_hf(tmp_path, dtype=jnp.float32).norm.scale[...].dtype == jnp.float32
    save_state({k: v.double() for k, v in state.items()}, folders, tmp_path)
    with pytest.raises(
        ValueError, match="`dtype` must be given: .* is float64 and 64-bit types are disabled"
    ):
        checkpoint.load_hf(tmp_path)
    assert checkpoint.load_hf(tmp_path, dtype=jnp.float32).embed.embedding[...].dtype == jnp.float32


def test_folders_that_are_not_checkpoints(folders, tmp_path):
    config = DecoderConfig.from_hf(folders / "qwen2")
    with pytest.raises(
        ValueError, match=r"`path` must be a folder that holds model.safetensors or"
    ):
        checkpoint.read_hf(tmp_path, config)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match="names model-00001-of-00001.safetensors, which does not exist"
    ):
        checkpoint.read_hf(tmp_path, config)
    save_file({"model.other": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"disagree about model.norm.weight, model.other"):
        checkpoint.read_hf(tmp_path, config)


def test_parameters_that_do_not_fit_are_named(folders, tmp_path):
    config = DecoderConfig.from_hf(folders / "llama")
    tree = checkpoint.read_hf(folders / "llama")
    with pytest.raises(ValueError, match=r"misses 1 paths: norm.scale"):
        checkpoint.write_hf(
            config, {p: a for p, a in tree.items() if p != ("norm", "scale")}, tmp_path
        )
    with pytest.raises(ValueError, match=r"1 unexpected paths: lora.0"):
        checkpoint.write_hf(config, tree | {("lora", 0): tree["norm", "scale"]}, tmp_path)
    with pytest.raises(ValueError, match=r"norm.scale must have shape \(24,\), got \(24, 61\)"):
        checkpoint.write_hf(config, tree | {("norm", "scale"): tree["lm_head", "kernel"]}, tmp_path)
    with pytest.raises(ValueError, match="`max_shard_bytes` must be positive, got 0"):
        checkpoint.write_hf(config, tree, tmp_path, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"`config.family` must be one of .*, got None"):
        checkpoint.write_hf(dataclasses.replace(config, family=None), tree, tmp_path)
    assert not list(tmp_path.iterdir())
