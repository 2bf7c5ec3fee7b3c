"""`interop` without torch, and the settings that must precede JAX's first use."""

import pytest

import interop
from tests.support.fresh_process import run_python


def test_import_needs_no_torch_and_names_what_is_missing():
    run_python("""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "torch":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Missing())
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "torch" else real(name, package)
        import interop
        assert "torch" not in sys.modules
        assert "to_jax" in dir(interop)
        try:
            interop.to_jax
        except ImportError as error:
            assert "interop.to_jax needs PyTorch" in str(error), error
        else:
            raise AssertionError("no error")
    """)


def test_unknown_attributes_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'to_tensorflow'"):
        interop.to_tensorflow  # noqa: B018


def test_configure_sets_the_environment_and_starts_nothing():
    run_python("""
        import os, interop
        interop.configure(preallocate=False, memory_fraction=0.4, allocator="cuda_async")
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.4"
        assert os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] == "cuda_async"
        report = interop.check_environment()
        assert not report.backend_initialised and "jax" in str(report)
        import jax
        jax.devices()
        assert interop.check_environment().backend_initialised
        try:
            interop.configure()
        except RuntimeError as error:
            assert "before JAX is first used" in str(error)
        else:
            raise AssertionError("no error")
    """)


def test_configure_checks_its_values():
    with pytest.raises(ValueError, match=r"`memory_fraction` must lie in \(0, 1\], got 1.5"):
        interop.configure(memory_fraction=1.5)
    with pytest.raises(ValueError, match="`allocator` must be None or one of"):
        interop.configure(allocator="jemalloc")
