"""Importing is cheap and needs neither torch nor a GPU; what is public is what the packages export."""

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import gqa_jax

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}} is blocked')
sys.meta_path.insert(0, Block())
"""


def in_fresh_process(code: str, blocked: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=set(blocked)) + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "package, blocked",
    [
        (
            "pallas_kernels",
            ("torch", "flax", "transformers", "triton", "jax_triton", "gqa_jax", "interop"),
        ),
        ("gqa_jax", ("torch", "transformers", "triton", "jax_triton", "interop")),
        ("interop", ("torch", "transformers")),
    ],
)
def test_import_with_the_rest_blocked(package, blocked):
    in_fresh_process(f"import {package}", blocked)


def test_import_starts_no_backend():
    code = """
import gqa_jax, pallas_kernels, interop
from jax._src import xla_bridge
print(sorted(xla_bridge._backends))
"""
    assert in_fresh_process(code, ()).strip() == "[]"


def test_operators_run_with_flax_and_torch_blocked():
    code = """
import jax.numpy as jnp, pallas_kernels as pk
x = jnp.ones((1, 3, 2, 4))
assert pk.gqa_attention(x, x, x).shape == x.shape
assert pk.gated_delta_rule(x, x, x, x[..., 0] * 0, x[..., 0]).out.shape == x.shape
print(pk.explain('gqa_attention', x, x, x).operator)
"""
    assert in_fresh_process(code, ("torch", "flax")).strip() == "gqa_attention"


@pytest.mark.parametrize("package", ["pallas_kernels", "gqa_jax"])
def test_every_public_name_has_a_docstring(package):
    module = __import__(package)
    names = [n for n in vars(module) if not n.startswith("_")]
    public = [n for n in names if not inspect.ismodule(vars(module)[n])]
    assert public
    bare = [n for n in public if not (vars(module)[n].__doc__ or "").strip()]
    assert not bare, f"without docstring: {bare}"


def test_rooms_load_when_first_used():
    code = """
import sys, gqa_jax
assert "gqa_jax.train.checkpoint" not in sys.modules
from gqa_jax import training
print(*(getattr(gqa_jax, name).__name__ for name in gqa_jax._ROOMS), training.train_step.__name__)
"""
    out = in_fresh_process(code, ("torch", "transformers"))
    assert out.split() == [*gqa_jax._ROOMS.values(), "train_step"]
    with pytest.raises(AttributeError, match="no attribute 'chekpoint'"):
        gqa_jax.chekpoint  # noqa: B018


def test_modules_of_the_bridge_load_when_first_used():
    code = """
import sys, interop
assert not {"torch", "interop.export", "interop.huggingface"} & sys.modules.keys()
assert {"export", "huggingface"} <= set(dir(interop))
print(interop.huggingface.__name__, interop.export.export_operator.__name__)
assert interop.huggingface is sys.modules["interop.huggingface"]
"""
    pytest.importorskip("torch")
    assert in_fresh_process(code, ("transformers",)).split() == [
        "interop.huggingface",
        "export_operator",
    ]


@pytest.mark.parametrize("name", ["export", "huggingface", "attention"])
def test_what_needs_torch_says_so(name):
    code = f"""
import interop, importlib.util
importlib.util.find_spec = lambda name: None
try:
    interop.{name}
except ImportError as error:
    print(error)
"""
    assert f"interop.{name} needs PyTorch" in in_fresh_process(code, ("torch",))


def test_every_public_name_of_the_bridge_is_declared_and_documented():
    pytest.importorskip("torch")
    import interop

    declared = inspect.getsource(interop)
    for name in interop._HOME:
        value = getattr(interop, name)
        assert (value.__doc__ or "").strip(), name
        assert isinstance(value, ModuleType) or f"{name} as {name}" in declared, name
