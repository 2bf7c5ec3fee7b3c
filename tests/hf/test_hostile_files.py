"""Folders from strangers: a valid tiny one, changed in one place, loads equal or an error says what is wrong."""

import json
import random
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from gqa_jax import DecoderConfig, checkpoint
from gqa_jax.hf.checkpoint.rules import rules

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIELDS = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 11,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEXT = {
    "model_type": "qwen3_5_text",
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"mrope_section": [1, 0, 0], "partial_rotary_factor": 0.5},
}
MIXTURE_ONLY = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob")
WINDOWS = ("max_window_layers", "sliding_window", "use_sliding_window")
HYBRID = {
    k: v
    for k, v in FIELDS.items()
    if "expert" not in k and "moe" not in k and k not in (*MIXTURE_ONLY, *WINDOWS)
} | NEXT
SHARDS = pytest.mark.parametrize("valid", ["shards"], indirect=True)


@pytest.fixture(scope="module", params=["one file", "shards"])
def valid(request, tmp_path_factory):
    """A folder that loads, and its parameters."""
    folder = tmp_path_factory.mktemp("valid")
    config = DecoderConfig.from_hf(FIELDS)
    rng = np.random.default_rng(0)
    tree = {
        path: rng.standard_normal(shape, np.float32)
        for rule in rules(config)
        for path, shape in zip(rule.paths, rule.shapes, strict=True)
    }
    limit = 10**9 if request.param == "one file" else 2000
    checkpoint.write_hf(config, tree, folder, max_shard_bytes=limit)
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return folder, tree


@pytest.fixture
def copy(valid, tmp_path):
    """A copy of the valid folder to damage."""
    return shutil.copytree(valid[0], tmp_path / "copy")


def outcome(folder):
    """What loading gives: the parameters, or the error, which must come quickly and say where."""
    begin = time.process_time()
    try:
        config = DecoderConfig.from_hf(folder)
        found = {
            path: np.asarray(array) for path, array in checkpoint.read_hf(folder, config).items()
        }
    except (ValueError, OSError) as error:
        found = error
        said = str(error)
        assert str(folder) in said or "`config" in said or "model." in said or "lm_head" in said
        assert len(said) < 2500, said
    assert time.process_time() - begin < 1.0
    return found


def refused(folder, *words):
    error = outcome(folder)
    assert isinstance(error, ValueError), error
    for word in words:
        assert word in str(error), error


def equal(found, tree):
    return found.keys() == tree.keys() and all(
        found[path].dtype == tree[path].dtype and np.array_equal(found[path], tree[path])
        for path in tree
    )


def edit_header(folder, change):
    """Changes the header of the first file."""
    file = sorted(folder.glob("*.safetensors"))[0]
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + length]))
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    return file


def first(header):
    return next(name for name in header if name != "__metadata__")


HEADERS = {
    "offsets that are strings": lambda h: h[first(h)].update(data_offsets=["0", "8"]),
    "three offsets": lambda h: h[first(h)].update(data_offsets=[0, 4, 8]),
    "negative offsets": lambda h: h[first(h)].update(data_offsets=[-8, 0]),
    "offsets beyond the file": lambda h: h[first(h)].update(data_offsets=[0, 2**40]),
    "no offsets": lambda h: h[first(h)].pop("data_offsets"),
    "no dtype": lambda h: h[first(h)].pop("dtype"),
    "an unknown dtype": lambda h: h[first(h)].update(dtype="X32"),
    "a shape that is a number": lambda h: h[first(h)].update(shape=8),
    "a shape of 2 ** 80": lambda h: h[first(h)].update(shape=[2**40, 2**40]),
    "a negative size": lambda h: h[first(h)].update(shape=[-1, 8]),
    "an entry that is a list": lambda h: h.update({first(h): []}),
    "metadata that are numbers": lambda h: h.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers_are_checked(change, copy):
    def changed(header):
        change(header)
        return header

    file = edit_header(copy, changed)
    refused(copy, str(file))


@pytest.mark.parametrize(
    "encoded",
    [b"[]", b"null", b"", b'{"a":\xff}', b"[" * 50_000, b'{"a":' * 50_000, b"{"],
    ids=["list", "null", "empty", "not UTF-8", "deep lists", "deep objects", "cut"],
)
def test_headers_that_are_no_objects(encoded, copy):
    refused(copy, str(edit_header(copy, lambda header: encoded)))


def test_overlapping_tensors(copy):
    def overlap(header):
        names = [name for name in header if name != "__metadata__"]
        same = [n for n in names if header[n]["shape"] == header[names[-1]]["shape"]]
        header[same[-1]]["data_offsets"] = header[same[0]]["data_offsets"]
        assert len(same) > 1
        return header

    refused(copy, str(edit_header(copy, overlap)), "offset")


def test_lengths_that_lie(copy):
    file = sorted(copy.glob("*.safetensors"))[0]
    data = file.read_bytes()
    for length in (0, 1, len(data), 2**31, 2**63, 2**64 - 1):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        refused(copy, str(file))
    for size in (0, 7, 8, 100, len(data) - 1):
        file.write_bytes(data[:size])
        refused(copy, str(file))
    file.write_bytes(data + b"\0")
    refused(copy, str(file))


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


@SHARDS
@pytest.mark.parametrize(
    "name",
    [
        "../secret/m.safetensors",
        "/etc/m.safetensors",
        "..\\m.safetensors",
        "m\0.safetensors",
        "C:m.safetensors",
        "config.json",
        "..",
        "",
        None,
        3,
        ["m.safetensors"],
    ],
)
def test_shards_lie_in_the_folder(name, copy):
    index = index_of(copy)
    (copy.parent / "secret").mkdir()
    some = next(iter(index["weight_map"]))
    shutil.copy(copy / index["weight_map"][some], copy.parent / "secret/m.safetensors")
    index["weight_map"][some] = name
    (copy / INDEX).write_text(json.dumps(index))
    refused(copy, INDEX, "must name files of its folder")


@SHARDS
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\xff", "[" * 99_999]
)
def test_an_index_is_checked(text, copy):
    (copy / INDEX).write_bytes(text.encode("latin-1"))
    refused(copy, INDEX)


@SHARDS
def test_of_a_tensor_in_two_shards_the_index_chooses(copy, valid):
    where = index_of(copy)["weight_map"]
    other = sorted(set(where.values()))[-1]
    name = next(name for name in where if where[name] != other)
    held = checkpoint.HFFolder(copy)
    tensors = {n: np.array(held[n]) for n in where if where[n] == other}
    tensors[name] = np.full_like(held[name], 7.0)
    save_file(tensors, copy / other)
    assert equal(outcome(copy), valid[1])
    save_file(tensors | {"model.stranger": tensors[name]}, copy / other)
    refused(copy, "disagree about model.stranger")


@SHARDS
def test_a_config_of_ten_thousand_layers_is_refused_at_once(copy):
    for count in (3, 10_000, 10_001, 2**31 - 1, 10**30):
        fields = FIELDS | {"num_hidden_layers": count}
        (copy / "config.json").write_text(json.dumps(fields))
        begin = time.process_time()
        with pytest.raises(ValueError, match="layers"):
            checkpoint.load_hf(copy)
        assert time.process_time() - begin < 1.0
    (copy / "config.json").write_text(json.dumps(FIELDS | {"num_experts": 2**31 - 1}))
    refused(copy, "2147483647 experts per layer")


@SHARDS
def test_pickles_are_named(copy):
    for file in copy.glob("model*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    refused(copy, "must be a folder that holds model.safetensors", "torch's pickles are not read")


@SHARDS
def test_missing_tensors_are_named_briefly(copy, valid):
    file = sorted(copy.glob("*.safetensors"))[0]
    fields = FIELDS | {"mlp_only_layers": [], "num_experts": 20, "num_experts_per_tok": 2}
    (copy / "config.json").write_text(json.dumps(fields))
    assert file.is_file()
    error = outcome(copy)
    assert "misses" in str(error) or "experts per layer" in str(error)
    assert len(str(error)) < 600


def nasty(value):
    """Values that a field must not have, or may."""
    yield from (None, True, False, -1, 0, 1, 2, 7, 2**31, 10**30, -(10**400), 0.5, -1.5, 1e308)
    yield from (
        float("nan"),
        float("inf"),
        "",
        "32",
        "silu",
        "x" * 10_000,
        [],
        [1],
        [[]],
        {},
        {"a": 1},
    )
    yield [value]
    yield {"value": value}


def check_reading(fields):
    try:
        config = DecoderConfig.from_hf(fields)
    except ValueError as error:
        said = str(error)
    else:
        hash(config)
        assert all(type(i) is int for i in config.stop_tokens)
        assert isinstance(config.norm_eps, float)
        return
    assert "`" in said, (fields, said)
    assert len(said) < 1500, said


@pytest.mark.parametrize("fields", [FIELDS, HYBRID], ids=["mixture", "hybrid"])
def test_every_field_with_every_kind_of_value(fields):
    """A config that is legal, or a ValueError that names the field or the rule it breaks."""
    DecoderConfig.from_hf(fields)
    tracemalloc.start()
    begin = time.process_time()
    count = 0
    try:
        for at in (None, "rope_parameters"):
            inside = fields if at is None else fields[at]
            for name, value in inside.items():
                for other in nasty(value):
                    changed = inside | {name: other}
                    changed = changed if at is None else fields | {at: changed}
                    count += 1
                    check_reading(changed)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count > 500
    assert peak < 100e6
    assert time.process_time() - begin < 0.05 * count


@SHARDS
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_files_that_are_none(file, copy):
    for text in (
        b"",
        b"[]",
        b"3",
        b"{",
        b"\xff\xfe",
        b"[" * 99_999,
        b'{"a": ' * 99_999,
        b"1" * 9999,
    ):
        (copy / file).write_bytes(text)
        refused(copy, file)
    (copy / file).unlink()


@SHARDS
def test_token_ids_are_ids(copy):
    for value in ("</s>", True, 1.5, [1, "2"], {"a": 1}, 10**30):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        refused(copy, "eos_token_id", "must be a token id or a list of them")


def test_random_bytes(valid, tmp_path):
    """Flips, cuts and insertions: refused, or the same parameters, or only values of the flipped tensor differ."""
    folder, tree = valid
    copy = shutil.copytree(folder, tmp_path / "copy")
    names = sorted(p.name for p in copy.iterdir())
    random_ = random.Random(17)
    seen = {"equal": 0, "refused": 0, "other values": 0}
    for _ in range(400):
        name = random_.choice(names)
        data = bytearray((folder / name).read_bytes())
        header = 8 + struct.unpack("<Q", data[:8])[0] if name.endswith("safetensors") else len(data)
        at = random_.randrange(header if random_.random() < 0.9 else len(data))
        kind = random_.choice(["flip", "flip", "set", "cut", "insert", "remove"])
        if kind == "flip":
            data[at] ^= 1 << random_.randrange(8)
        elif kind == "set":
            data[at] = random_.choice(b'0198"{}[],:-.eN\x00\xff')
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes([random_.choice(b'019"{}[],:-\x00\xff')])
        else:
            del data[at]
        (copy / name).write_bytes(bytes(data))
        found = outcome(copy)
        if isinstance(found, Exception):
            seen["refused"] += 1
        elif equal(found, tree):
            seen["equal"] += 1
        else:
            assert name.endswith("safetensors"), (name, kind, at)
            assert at >= header, (name, kind, at)
            assert {p: a.shape for p, a in found.items()} == {p: a.shape for p, a in tree.items()}
            seen["other values"] += 1
        (copy / name).write_bytes((folder / name).read_bytes())
    assert seen["refused"] > 100, seen
