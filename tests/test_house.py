"""The law of the house (docs/DESIGN.md), read from the source text, each file once: imports nothing, needs no GPU."""

import ast
import functools
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]


PACKAGES = {  # package -> what its files may import, besides the standard library
    "pallas_kernels": "jax numpy jaxtyping pallas_kernels",
    "gqa_jax": "jax numpy jaxtyping flax optax orbax safetensors tqdm matplotlib pallas_kernels gqa_jax",
    "interop": "jax numpy jaxtyping flax torch transformers pallas_kernels gqa_jax interop",
}
EXCEPTIONS = {  # (file, import) -> why
    ("gqa_jax/demo/run.py", "interop"): "the demo shows the bridge where torch is installed",
}
ROOT_FILES = {  # what a package keeps outside its rooms
    "pallas_kernels": "__init__ _explain _checks _dispatch _inert _mosaic_gpu _precision _sharding",
    "gqa_jax": "__init__ __main__ config config_checks",
}
RANKS = (  # inside an operator a file or room imports only what stands on a line before its own
    "algebra",
    "order tuning hopper.tuning step.tuning",
    "reference blockwise chunked channelwise cudnn hopper mosaic_gpu triton",
    "step vjp",
    "api",
    "aot_cases",
    "autotune_cases",
)
COMPOSED = {  # operator -> operators that it may import; no other does
    # A decode step of the whole layer: its kernels are the delta rule's walk over the state, fed by a convolution.
    "deltanet": {"causal_conv", "delta_rule"},
}
TOOLS = {"aot", "autotune"}
KERNELS = {"hopper", "mosaic_gpu", "triton", "_mosaic_gpu"}  # files and rooms that name Pallas
# The mesh stands above layers and models; these hand a call over to it.
DISPATCH = {"gqa_jax/models/decoder.py", "gqa_jax/models/generation.py"}
# How often each stands in the packages. These only fall.
RATCHETS = {"# fmt: skip": 6, r"\bAny\b": 850}


@functools.cache
def sources() -> dict[str, str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


@functools.cache
def imports() -> dict[str, set[str]]:  # file -> dotted names
    def names(source: str) -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return {name: set(names(source)) for name, source in sources().items()}


def rooms(name: str) -> list[str]:
    return list(pathlib.PurePath(name).with_suffix("").parts)


def may_import(name: str, top: str) -> bool:
    known = top in sys.stdlib_module_names or top in PACKAGES[rooms(name)[0]].split()
    return known or (name, top) in EXCEPTIONS


IMPORTS = {  # rule -> whether a file breaks it by an import
    "packages import downwards": lambda name, to: not may_import(name, to.split(".")[0]),
    "only kernel files name Pallas": lambda name, to: (
        "experimental.pallas" in to and not KERNELS & set(rooms(name))
    ),
    "other packages use public names of the operators": lambda name, to: (
        re.match(r"pallas_kernels\.\w+\.", to) and not name.startswith("pallas_kernels/")
    ),
    "layers and models do not know the mesh": lambda name, to: (
        to.startswith("gqa_jax.parallel")
        and name.startswith(("gqa_jax/layers/", "gqa_jax/models/"))
        and name not in DISPATCH
    ),
}


@pytest.mark.parametrize("rule", IMPORTS)
def test_imports(rule):
    pairs = ((name, to) for name, imported in imports().items() for to in sorted(imported))
    assert not [pair for pair in pairs if IMPORTS[rule](*pair)]


WORDS = {  # what only some files may write -> which; an artefact's loader travels without this source
    r"\bdefault_backend\(|\bjax_default_device\b": "pallas_kernels/_dispatch.py|interop/artefact_loader.py",
    r"\bPartitionSpec\b": "gqa_jax/parallel/|interop/|pallas_kernels/",
}


@pytest.mark.parametrize("pattern", WORDS)
def test_words_stand_in_their_room(pattern):
    found = [name for name, source in sources().items() if re.search(pattern, source)]
    assert not [name for name in found if not re.match(WORDS[pattern], name)]


def test_an_operator_imports_what_ranks_below():
    def rank(part: str) -> int:
        part = re.sub(r"_\w+_cases", "_cases", part)  # aot_fwd_cases
        return next(i for i, parts in enumerate(RANKS) if part in parts.split())

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


def test_a_file_stands_in_a_room_and_says_what_it_is():
    for name in sources():
        package, *inner = rooms(name)
        in_root = inner[0] in ROOT_FILES.get(package, inner[0]).split()
        assert inner[1:] or in_root, f"{name} is in no room"
        assert inner[-1] not in {"utils", "common", "base", "helpers", "misc"}, name
        assert not re.search(r"_(v\d+|new|wip|fast|utils)$", inner[-1]), name


def test_no_module_is_hidden_by_a_name_that_its_package_exports():
    for package in PACKAGES:
        exported = set(re.findall(r" as (\w+)", sources()[f"{package}/__init__.py"]))
        assert not exported & {path.stem for path in (ROOT / package).iterdir()}


@pytest.mark.parametrize("pattern", RATCHETS)
def test_what_should_be_rare_becomes_rarer(pattern):
    found = sum(len(re.findall(pattern, source)) for source in sources().values())
    assert found <= RATCHETS[pattern]
