"""The dependency law of the house (docs/DESIGN.md), read from the source text: imports nothing, needs no GPU."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAY_NAME = {  # room -> roots its files may import, besides the standard library
    "pallas_kernels": {"jax", "numpy", "jaxtyping", "pallas_kernels"},
    "gqa_jax": {
        "jax",
        "numpy",
        "jaxtyping",
        "flax",
        "pallas_kernels",
        "gqa_jax",
        "optax",
        "orbax",
        "safetensors",
        "tqdm",
        "matplotlib",
    },
    "interop": {
        "jax",
        "numpy",
        "jaxtyping",
        "flax",
        "torch",
        "transformers",
        "pallas_kernels",
        "gqa_jax",
        "interop",
    },
}
# Files that may name a root that their room may not, with the reason.
EXCEPTIONS = {
    "gqa_jax/demo/run.py": {"interop"},  # the demo shows the bridge when torch is installed
}
# Operators that are made of others, with the reason; no other operator imports another one.
COMPOSED = {
    # A decode step of the whole layer: its reference is the composition of both, and its kernels are the delta rule's
    # walk over the state, which exists once, fed by a convolution.
    "deltanet": {"causal_conv", "delta_rule"},
}
SIBLINGS = {  # inside one operator: file or room -> what it may import of the others
    "api": {
        "reference",
        "blockwise",
        "chunked",
        "cudnn",
        "vjp",
        "step",
        "step.tuning",
        "tuning",
        "hopper.tuning",
        "algebra",
        "order",
    },
    "vjp": {
        "hopper",
        "hopper.tuning",
        "blockwise",
        "chunked",
        "channelwise",
        "reference",
        "tuning",
        "algebra",
        "order",
    },
    "step": {"mosaic_gpu", "triton", "reference", "tuning", "algebra"},
    "hopper": {"hopper.tuning", "tuning", "algebra", "order"},
    "mosaic_gpu": {"algebra"},
    "triton": {"algebra"},
    "reference": {"algebra"},
    "blockwise": {"algebra", "tuning"},
    "chunked": {"algebra", "order", "tuning"},
    "channelwise": {"algebra", "order"},
    "cudnn": {"algebra"},
    "tuning": set(),
    "algebra": set(),
    "order": {"algebra"},
}
TOOL_CASES = re.compile(
    r"^(aot|autotune)_(\w+_)?cases$"
)  # what the tools compile and time: may name all of its operator
TOOLS = {"aot", "autotune"}
PALLAS = {"hopper", "mosaic_gpu", "triton", "_mosaic_gpu"}  # files and rooms that may name Pallas
ROOT_FILES = {  # of pallas_kernels; everything else is an operator's or a tool's
    "__init__",
    "explain",
    "_checks",
    "_dispatch",
    "_inert",
    "_l2norm",
    "_mosaic_gpu",
    "_sharding",
}
LINES = {"fwd": 600}
# path -> budget; each has its reason in docs/DESIGN.md, "Budgets exceeded".
OVER_BUDGET: dict[str, int] = {
    "pallas_kernels/attention/api.py": 480,
    "gqa_jax/parallel/sharding.py": 440,
}
AXIS_POLICY = "gqa_jax/parallel/"

FILES = sorted(path for room in MAY_NAME for path in (ROOT / room).rglob("*.py"))
# Who may ask JAX which machine this is; the loader travels with an artefact, without this source.
MACHINE = ("pallas_kernels/_dispatch.py", "interop/artefact_loader.py")
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported_names(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", NAMES)
def test_imports_stay_inside_the_law(name):
    path = ROOT / name
    room, *inner = path.relative_to(ROOT).with_suffix("").parts
    names = set(imported_names(path.read_text()))
    stem = inner[-1]

    allowed = set(sys.stdlib_module_names) | MAY_NAME[room] | EXCEPTIONS.get(name, set())
    strangers = {n.split(".")[0] for n in names} - allowed
    assert not strangers, f"{room} may not import {sorted(strangers)}"

    if not PALLAS & set(inner):
        pallas = {n for n in names if "experimental.pallas" in n}
        assert not pallas, f"only {sorted(PALLAS)} may import {sorted(pallas)}"

    if room in ("gqa_jax", "interop"):
        deep = {n for n in names if n.startswith("pallas_kernels.") and n.count(".") > 1}
        assert not deep, f"{room} uses public kernel names, not {sorted(deep)}"

    tool = bool(TOOL_CASES.match(stem))
    if room == "pallas_kernels" and len(inner) >= 2 and inner[0] not in TOOLS:
        own = f"pallas_kernels.{inner[0]}."
        role = inner[1]
        parts = [n.removeprefix(own).split(".") for n in names if n.startswith(own)]
        siblings = {".".join(p[:2]) if p[1:2] == ["tuning"] else p[0] for p in parts}
        siblings -= {role, f"{role}.tuning"}
        assert stem == "__init__" or tool or siblings <= SIBLINGS.get(role, set()), (
            f"{role} may not import {sorted(siblings - SIBLINGS.get(role, set()))}"
        )
        other = {n.split(".")[1] for n in names if n.startswith("pallas_kernels.")}
        other -= {inner[0], *COMPOSED.get(inner[0], set()), *(TOOLS if tool else ())}
        other = {n for n in other if not n.startswith("_")}
        assert not other, f"an operator may not import another one: {sorted(other)}"


def test_the_root_of_pallas_kernels_holds_what_operators_share():
    assert {p.stem for p in (ROOT / "pallas_kernels").glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("name", NAMES)
def test_length_budget(name):
    path = ROOT / name
    budget = OVER_BUDGET.get(name, LINES.get(path.stem, 400))
    lines = len(path.read_text().splitlines())
    assert lines <= budget, f"{lines} lines, over its budget of {budget}"


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.startswith("gqa_jax/") and not n.startswith(AXIS_POLICY)]
)
def test_mesh_axes_are_named_in_one_room(name):
    source = (ROOT / name).read_text()
    assert not re.search(r"\bPartitionSpec\b", source), "PartitionSpecs belong in gqa_jax/parallel/"


@pytest.mark.parametrize("name", NAMES)
def test_one_place_asks_which_machine_a_program_is_for(name):
    asked = re.search(r"\bdefault_backend\(|\bjax_default_device\b", (ROOT / name).read_text())
    assert not asked or name in MACHINE, "ask pallas_kernels._dispatch.target()"


@pytest.mark.parametrize("name", NAMES)
def test_no_drawer_names(name):
    stem = pathlib.Path(name).stem
    assert stem not in {"utils", "common", "base", "helpers", "misc"}
    assert not re.search(r"_(v\d+|new|wip|fast|utils)$", stem)


def test_every_operator_file_has_a_known_role():
    rooms = [
        p for p in (ROOT / "pallas_kernels").iterdir() if p.is_dir() and (p / "api.py").exists()
    ]
    assert rooms
    for room in rooms:
        roles = {
            p.stem
            for p in room.iterdir()
            if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")
        }
        unknown = {r for r in roles - {"__init__"} - set(SIBLINGS) if not TOOL_CASES.match(r)}
        assert not unknown, f"{room.name}: {sorted(unknown)}"


@pytest.mark.parametrize("package", ["pallas_kernels", "gqa_jax"])
def test_no_module_is_hidden_by_a_name_that_its_package_exports(package):
    exported = set(re.findall(r" as (\w+)", (ROOT / package / "__init__.py").read_text()))
    modules = {path.stem for path in (ROOT / package).iterdir()}
    assert exported & modules <= {"explain"}, "a module that no one can import by its name"
