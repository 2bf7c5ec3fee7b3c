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
SIBLINGS = {  # inside one operator: file -> siblings it may import
    "api": {
        "reference",
        "blockwise",
        "chunked",
        "cudnn",
        "vjp",
        "step",
        "step_tuning",
        "tuning",
        "mosaic_gpu_tuning",
        "algebra",
        "order",
    },
    "step": {"mosaic_gpu_step", "triton_step", "reference", "step_tuning", "algebra"},
    "vjp": {
        "mosaic_gpu_lanes",
        "mosaic_gpu_lanes_bwd",
        "mosaic_gpu_fwd",
        "mosaic_gpu_bwd",
        "blockwise",
        "chunked",
        "channelwise",
        "reference",
        "tuning",
        "mosaic_gpu_tuning",
        "algebra",
        "order",
    },
    "mosaic_gpu_lanes": {
        "algebra",
        "order",
        "mosaic_gpu_prologue",
        "mosaic_gpu_fwd",
        "mosaic_gpu_tuning",
    },
    "mosaic_gpu_lanes_bwd": {
        "order",
        "mosaic_gpu_lanes",
        "mosaic_gpu_bwd",
        "mosaic_gpu_chunk",
        "mosaic_gpu_tuning",
    },
    "mosaic_gpu_chunk": {"order", "mosaic_gpu_tuning"},
    "mosaic_gpu_prologue": {"algebra", "order", "mosaic_gpu_chunk", "mosaic_gpu_tuning"},
    "mosaic_gpu_fwd": {
        "tuning",
        "algebra",
        "order",
        "mosaic_gpu_mask",
        "mosaic_gpu_chunk",
        "mosaic_gpu_tile",
        "mosaic_gpu_tuning",
    },
    "mosaic_gpu_bwd": {
        "tuning",
        "algebra",
        "order",
        "mosaic_gpu_mask",
        "mosaic_gpu_chains",
        "mosaic_gpu_chunk",
        "mosaic_gpu_gradients",
        "mosaic_gpu_tile",
        "mosaic_gpu_tuning",
    },
    "mosaic_gpu_tile": {"tuning"},
    "mosaic_gpu_chains": {"order", "mosaic_gpu_chunk", "mosaic_gpu_tuning"},
    "mosaic_gpu_factors": {"mosaic_gpu_chains", "mosaic_gpu_chunk"},
    "mosaic_gpu_owner": {"mosaic_gpu_chains", "mosaic_gpu_chunk"},
    "mosaic_gpu_gradients": {
        "order",
        "mosaic_gpu_chains",
        "mosaic_gpu_chunk",
        "mosaic_gpu_factors",
        "mosaic_gpu_owner",
    },
    "mosaic_gpu_mask": set(),
    "mosaic_gpu_tuning": set(),
    "mosaic_gpu_step": {"step_tuning", "algebra"},
    "triton_step": {"step_tuning", "algebra"},
    "step_tuning": set(),
    "reference": {"algebra"},
    "blockwise": {"algebra", "tuning"},
    "chunked": {"algebra", "order", "tuning"},
    "channelwise": {"algebra", "order"},
    "cudnn": {"algebra"},
    "tuning": set(),
    "algebra": set(),
    "order": {"algebra"},
}
LINES = {"mosaic_gpu_fwd": 600}
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

    if not any(re.search("mosaic_gpu|triton", part) for part in inner):
        pallas = {n for n in names if "experimental.pallas" in n}
        assert not pallas, f"only mosaic_gpu and triton files may import {sorted(pallas)}"

    if room in ("gqa_jax", "interop"):
        deep = {n for n in names if n.startswith("pallas_kernels.") and n.count(".") > 1}
        assert not deep, f"{room} uses public kernel names, not {sorted(deep)}"

    if room == "pallas_kernels" and len(inner) >= 2:
        own = f"pallas_kernels.{inner[0]}"
        mine = {
            n.removeprefix(own).lstrip(".").split(".")[0]
            for n in names
            if n.startswith(f"{own}.") or n == own
        }
        role = inner[1]
        wrong = mine - SIBLINGS.get(role, set()) - {role}
        assert stem == "__init__" or not wrong, f"{role}.py may not import {sorted(wrong)}"
        other = {n for n in names if n.startswith("pallas_kernels.") and not n.startswith(own)}
        other = {n for n in other if not n.split(".")[1].startswith("_")}
        other = {n for n in other if n.split(".")[1] not in COMPOSED.get(inner[0], set())}
        assert not other, f"an operator may not import another one: {sorted(other)}"


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
        assert roles - {"__init__"} <= set(SIBLINGS), (
            f"{room.name}: {sorted(roles - set(SIBLINGS))}"
        )


@pytest.mark.parametrize("package", ["pallas_kernels", "gqa_jax"])
def test_no_module_is_hidden_by_a_name_that_its_package_exports(package):
    exported = set(re.findall(r" as (\w+)", (ROOT / package / "__init__.py").read_text()))
    modules = {path.stem for path in (ROOT / package).iterdir()}
    assert exported & modules <= {"explain"}, "a module that no one can import by its name"
