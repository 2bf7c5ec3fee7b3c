"""Artefacts: written, loaded here and in a process without our source, and refused when damaged."""

import functools
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flatbuffers")

import interop  # noqa: E402
import pallas_kernels  # noqa: E402
from interop import artefact_loader, export  # noqa: E402
from pallas_kernels import _dispatch  # noqa: E402
from tests.support.compare import assert_close  # noqa: E402
from tests.support.fresh_process import run_python  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    attention = functools.partial(pallas_kernels.gqa_attention, is_causal=True)
    specs = [torch.empty(1, 4, 4, 8), torch.empty(1, 4, 2, 8), torch.empty(1, 4, 2, 8)]
    folder = tmp_path_factory.mktemp("exported") / "attention"
    return export.export_operator(
        lambda q, k, v: attention(q, k, v),
        specs,
        folder,
        name="attention",
        platforms=("cpu", "cuda"),
    )


def tensors():
    make = lambda heads: torch.randn(1, 4, heads, 8, requires_grad=True)
    return [make(4), make(2), make(2)]


@pytest.mark.parametrize("load", [export.load, artefact_loader.load])
def test_round_trip_with_gradients(artefact, load):
    inputs = tensors()
    ours, expected = load(artefact)(*inputs), interop.attention(*inputs, is_causal=True)
    assert_close(ours, expected, atol=1e-6)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, expected)]
    for mine, its in zip(*gradients, strict=True):
        assert_close(mine, its, atol=1e-6)


def test_the_manifest_says_what_it_is(artefact):
    manifest = json.loads((artefact / "manifest.json").read_text())
    assert manifest["jax"] == jax.__version__
    assert manifest["inputs"][0] == {"shape": [1, 4, 4, 8], "dtype": "float32"}
    assert manifest["outputs"] == [{"shape": [1, 4, 4, 8], "dtype": "float32"}]
    assert set(manifest["files"]) == {"cpu", "cuda"}
    assert manifest["custom_calls"] is False


def test_it_runs_where_our_source_is_not(artefact):
    run_python(
        """
        import sys, importlib.util
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("interop", "gqa_jax", "pallas_kernels", "flax"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Hidden())
        sys.path.insert(0, sys.argv[1])
        import torch
        from loader import load
        attention = load(sys.argv[1])
        q, kv = torch.randn(1, 4, 4, 8, requires_grad=True), torch.randn(1, 4, 2, 8)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), kv.transpose(1, 2), kv.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        out = attention(q, kv, kv)
        assert (out - expected).abs().max() < 1e-5
        (mine,), (its,) = (torch.autograd.grad(y.sin().sum(), q) for y in (out, expected))
        assert (mine - its).abs().max() < 1e-5
        """,
        str(artefact),
    )


def test_symbolic_sizes_and_a_whole_module(tmp_path):
    batch, length = jax.export.symbolic_shape("b, t")
    spec = jax.ShapeDtypeStruct((batch, length, 4), jnp.float32)
    export.export_operator(lambda x: {"y": jnp.cumsum(x, 1)}, [spec], tmp_path / "sum", name="sum")
    loaded = export.load(tmp_path / "sum")
    for shape in ((1, 3, 4), (2, 7, 4)):
        x = torch.randn(shape)
        assert_close(loaded(x)["y"], x.cumsum(1), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"sum: input 0 must have shape \['b', 't', 4\], got \[1, 3, 5\]"
    ):
        loaded(torch.ones(1, 3, 5))


def test_wrong_inputs_are_named(artefact):
    attention = export.load(artefact)
    good = [x.detach() for x in tensors()]
    with pytest.raises(ValueError, match="attention takes 3 tensors, got 2"):
        attention(*good[:2])
    with pytest.raises(TypeError, match=r"input 0 must be float32, got torch\.float64"):
        attention(good[0].double(), *good[1:])
    with pytest.raises(
        ValueError, match=r"input 1 must have shape \[1, 4, 2, 8\], got \[1, 5, 2, 8\]"
    ):
        attention(good[0], torch.ones(1, 5, 2, 8), good[2])
    with pytest.raises(TypeError, match="input 2 must be a tensor, got float"):
        attention(*good[:2], 1.0)


def test_damaged_files_are_refused(artefact, tmp_path):
    def damaged(change):
        folder = tmp_path / change.__name__
        shutil.copytree(artefact, folder)
        change(folder)
        return folder

    def edit(folder, **fields):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def truncated(folder):
        path = folder / "cpu.jaxexport"
        path.write_bytes(path.read_bytes()[:-1])

    def flipped(folder):
        path = folder / "cpu.jaxexport"
        blob = bytearray(path.read_bytes())
        blob[100] ^= 1
        path.write_bytes(blob)

    def half_a_manifest(folder):
        path = folder / "manifest.json"
        path.write_text(path.read_text()[:40])

    def other_format(folder):
        edit(folder, format=99)

    def without_name(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["name"]
        path.write_text(json.dumps(manifest))

    def escaping(folder):
        edit(folder, files={"cpu": {"file": "../cpu.jaxexport", "bytes": 1, "sha256": ""}})

    def of_another_shape(folder):
        edit(folder, files=["cpu.jaxexport"])

    def undescribed(folder):
        edit(folder, files={"cpu": {"file": "cpu.jaxexport"}})

    def no_function(
        folder,
    ):  # the manifest agrees with the bytes, which are a pickle that would leave a trace
        trace = f"open({str(tmp_path / 'executed')!r}, 'w')"
        blob = b"cbuiltins\neval\n(V" + trace.encode() + b"\ntR."
        (folder / "cpu.jaxexport").write_bytes(blob)
        entry = {
            "file": "cpu.jaxexport",
            "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        edit(folder, files={"cpu": entry})

    def other_platform(folder):
        edit(folder, files={})

    def other_version(folder):
        edit(folder, custom_calls=True, jax="0.1.0")

    for change, message in (
        (truncated, "is damaged: .* bytes, the manifest says"),
        (flipped, "its SHA-256 is not the manifest's"),
        (half_a_manifest, r"manifest\.json is damaged"),
        (other_format, "must have format 1"),
        (without_name, r"it lacks \['name'\]"),
        (escaping, "is no file name"),
        (of_another_shape, "`files` must be an object"),
        (undescribed, "describes no file"),
        (no_function, "holds no exported function"),
        (other_platform, "was exported for .*, not for 'cpu'"),
        (other_version, r"holds kernels of jax 0\.1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            export.load(damaged(change))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path / "nowhere")


def test_each_platform_is_traced_for_itself(tmp_path):
    """Tiles and implementations are chosen for the platform of the file, not for the machine that writes it."""
    traced = []

    def function(x):
        traced.append(_dispatch.target())
        return x + 1

    spec = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    export.export_operator(function, [spec], tmp_path, platforms=("cpu", "cuda"))
    assert {target.platform for target in traced} == {"cpu", "gpu"}


def test_export_checks_its_arguments(tmp_path):
    spec = jax.ShapeDtypeStruct((2,), jnp.float32)
    double = lambda x: x * 2
    for options, message in (
        ({"platforms": ()}, "`platforms` must be some of"),
        ({"platforms": ("metal",)}, "`platforms` must be some of"),
        ({"vjp_order": 2}, "`vjp_order` must be 0 or 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            export.export_operator(double, [spec], tmp_path / "new", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="`folder` must be empty"):
        export.export_operator(double, [spec], tmp_path / "full")
    with pytest.raises(TypeError, match=r"`specs\[0\]` must have a shape and a dtype, got int"):
        export.export_operator(double, [3], tmp_path / "new")
    forward_only = export.export_operator(double, [spec], tmp_path / "new", vjp_order=0)
    x = torch.ones(2, requires_grad=True)
    out = artefact_loader.load(forward_only)(x)
    with pytest.raises(RuntimeError, match="exported without gradients"):
        out.sum().backward()
