"""The law of the house (docs/DESIGN.md), read from the source text: imports nothing, needs no GPU.

Each test lists every breach of one rule. Files are read and parsed once.
"""

import ast
import functools
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def words(text: str) -> set[str]:
    return set(text.split())


PACKAGES = {  # package -> what its files may import, besides the standard library
    "pallas_kernels": words("jax numpy jaxtyping pallas_kernels"),
    "gqa_jax": words(
        "jax numpy jaxtyping flax optax orbax safetensors tqdm matplotlib pallas_kernels gqa_jax"
    ),
    "interop": words("jax numpy jaxtyping flax torch transformers pallas_kernels gqa_jax interop"),
}
EXCEPTIONS = {  # (file, import) -> why
    ("gqa_jax/demo/run.py", "interop"): "the demo shows the bridge where torch is installed",
}
ROOT_FILES = {  # what a package keeps outside its rooms
    "pallas_kernels": words(
        "__init__ _explain _checks _dispatch _inert _mosaic_gpu _precision _sharding"
    ),
    "gqa_jax": words("__init__ __main__ config config_checks"),
}
# Inside an operator a file or room imports only what stands on a line before its own.
RANKS = [
    words("algebra"),
    words("order tuning hopper.tuning step.tuning"),
    words("reference blockwise chunked channelwise cudnn hopper mosaic_gpu triton"),
    words("step vjp"),
    words("api"),
    words("aot_cases"),
    words("autotune_cases"),
]
COMPOSED = {  # operator -> operators that it may import; no other does
    # A decode step of the whole layer: its kernels are the delta rule's walk over the state, fed by a convolution.
    "deltanet": {"causal_conv", "delta_rule"},
}
TOOLS = {"aot", "autotune"}
KERNELS = {"hopper", "mosaic_gpu", "triton", "_mosaic_gpu"}  # files and rooms that name Pallas
# Who asks JAX which machine this is; the loader travels with an artefact, without this source.
MACHINE = {"pallas_kernels/_dispatch.py", "interop/artefact_loader.py"}
# The mesh stands above layers and models; these hand a call over to it.
DISPATCH = {"gqa_jax/models/decoder.py", "gqa_jax/models/generation.py"}
# How often each stands in the packages. These only fall.
RATCHETS = {"# fmt: skip": 25, r"\bAny\b": 850}


@functools.cache
def sources() -> dict[str, str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


@functools.cache
def imports() -> dict[str, set[str]]:
    """File -> the dotted names that it imports."""

    def names(source: str) -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return {name: set(names(source)) for name, source in sources().items()}


def rooms(name: str) -> list[str]:
    """`gqa_jax/layers/mlp.py` -> `["gqa_jax", "layers", "mlp"]`."""
    return list(pathlib.PurePath(name).with_suffix("").parts)


def test_packages_import_downwards():
    for name, imported in imports().items():
        allowed = set(sys.stdlib_module_names) | PACKAGES[rooms(name)[0]]
        allowed |= {to for file, to in EXCEPTIONS if file == name}
        unexpected = {to.split(".")[0] for to in imported} - allowed
        assert not unexpected, f"{name} may not import {sorted(unexpected)}"


def test_only_kernel_files_name_pallas():
    for name, imported in imports().items():
        pallas = {to for to in imported if "experimental.pallas" in to}
        assert not pallas or KERNELS & set(rooms(name)), f"{name} may not import {sorted(pallas)}"


def test_other_packages_use_public_names_of_the_operators():
    for name, imported in imports().items():
        deep = {to for to in imported if to.startswith("pallas_kernels.") and to.count(".") > 1}
        assert not deep or name.startswith("pallas_kernels"), f"{name} imports {sorted(deep)}"


def test_an_operator_imports_what_ranks_below():
    def rank(part: str) -> int:
        part = re.sub(r"_\w+_cases", "_cases", part)  # aot_fwd_cases
        return next(i for i, parts in enumerate(RANKS) if part in parts)

    for name, imported in imports().items():
        package, operator, *inner = rooms(name)
        if package != "pallas_kernels" or operator in TOOLS or inner in ([], ["__init__"]):
            continue
        role = "hopper" if KERNELS & set(inner) else inner[0]
        own = rank(inner[-1] if inner[-1].endswith("_cases") else role)
        for to in imported:
            top, *path = to.split(".")
            if top == package and path and path[0] not in TOOLS and path[0][0] != "_":
                other, *parts = path
                allowed = {operator} | COMPOSED.get(operator, set())
                assert other in allowed, f"{name}: an operator may not import another one, {to}"
                if other == operator and parts and parts[0] != inner[0]:
                    part = ".".join(parts[:2]) if parts[1:2] == ["tuning"] else parts[0]
                    assert rank(part) < own, f"{name} may not import {to}"


def test_one_place_asks_which_machine_a_program_is_for():
    for name, source in sources().items():
        asks = re.search(r"\bdefault_backend\(|\bjax_default_device\b", source)
        assert not asks or name in MACHINE, f"{name} must ask pallas_kernels._dispatch.target()"


def test_mesh_axes_are_named_in_one_room():
    for name, source in sources().items():
        if rooms(name)[0] == "gqa_jax" and rooms(name)[1] != "parallel":
            assert not re.search(r"\bPartitionSpec\b", source), f"{name} names a PartitionSpec"


def test_layers_and_models_do_not_know_the_mesh():
    for name, imported in imports().items():
        below = name.startswith(("gqa_jax/layers/", "gqa_jax/models/")) and name not in DISPATCH
        mesh = {to for to in imported if to.startswith("gqa_jax.parallel")}
        assert not (below and mesh), f"{name} may not import {sorted(mesh)}"


def test_a_file_stands_in_a_room_and_says_what_it_is():
    for name in sources():
        package, *inner = rooms(name)
        assert inner[1:] or inner[0] in ROOT_FILES.get(package, inner), f"{name} is in no room"
        assert inner[-1] not in {"utils", "common", "base", "helpers", "misc"}, name
        assert not re.search(r"_(v\d+|new|wip|fast|utils)$", inner[-1]), name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_hidden_by_a_name_that_its_package_exports(package):
    exported = set(re.findall(r" as (\w+)", sources()[f"{package}/__init__.py"]))
    modules = {path.stem for path in (ROOT / package).iterdir()}
    assert not exported & modules


@pytest.mark.parametrize("pattern", RATCHETS)
def test_what_should_be_rare_becomes_rarer(pattern):
    found = sum(len(re.findall(pattern, source)) for source in sources().values())
    assert found <= RATCHETS[pattern]
