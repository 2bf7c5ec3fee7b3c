"""Peers' own test files, run with our implementation in place of theirs.

    make peers PEERS=folder     folder/jax, folder/torchtune, ... (the names in `PEERS`): checkouts of their sources
    python -m tests.peers folder fla -- -k varlen

None of their files is in this project (PEFT has no tests to put ours into: `peft_peer.py` compares with it). A peer
whose folder or package is missing is skipped with the reason. Every failure that is left has its reason in `PEERS`;
any other makes the command exit with 1.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent


class Peer(NamedTuple):
    """A peer's tests.

    Attributes:
      needs: packages that its tests import.
      tests: pytest arguments, relative to the checkout.
      left: pattern of a test's name -> why it fails here.
      checkout: whether the tests come with the peer's sources; else they are ours.
    """

    needs: tuple[str, ...]
    tests: tuple[str, ...]
    left: dict[str, str]
    checkout: bool = True


KERNEL = "tests one of their kernels by its own name, not the operator"
PEERS = {
    "jax": Peer(("scipy", "absl"), ("tests/nn_test.py", "-k", "DotProductAttention"), {}),
    "torchtune": Peer(
        ("torchao", "torchdata", "torchvision", "pytest_integration"),
        (
            "tests/torchtune/modules/test_attention.py",
            "tests/torchtune/modules/test_kv_cache.py",
            "--without-integration",
            "--without-slow-integration",
        ),
        {},
    ),
    "tokamax": Peer(
        ("chex", "qwix"),
        ("tokamax/_src/ops/attention/xla_chunked_test.py",),
        {
            "test_dropout": "takes the mask of what is dropped; ours draws it from a key",
            "test_normalize_output": "asks for outputs that are not divided by the softmax sum",
            "test_tanh_clipping0": "adds the bias before the soft cap; ours adds it after",
        },
    ),
    "fla": Peer(
        ("einops", "triton"),
        ("tests/ops/test_gdn.py", "tests/ops/test_kda.py"),
        {
            "test_gate": KERNEL,
            "prepare_wy_repr": KERNEL,
            "vllm_decode": KERNEL,
            "flash_(qla|kda)": "tests the choice between their kernels",
            "return_intermediate_states": "the states of all chunks are no result of `gated_delta_rule`",
            "invalid_chunk_size": "tests their error message",
        },
    ),
    "transformers": Peer(
        ("parameterized", "accelerate"),
        (
            *(
                f"tests/models/{model}/test_modeling_{model}.py"
                for model in ("llama", "gemma2", "gpt_oss", "qwen3_next", "qwen3_5")
            ),
            "-k",
            "not fsdp",  # it starts processes of its own, with transformers as it is
        ),
        {
            "retain_grad": "our output is not computed from the attention weights: they get no gradient",
            "continued_forward": "padding among tokens that continue a cache is refused in linear attention",
            "rope_scaling_frequencies": "fails with their own attention too (Qwen3.5)",
            "custom_4d": "positions that start again beside a cache are refused in linear attention",
        },
    ),
    "peft": Peer(("peft", "transformers"), ("peft_peer.py",), {}, checkout=False),
    "automodel": Peer(
        ("transformers",),
        (
            "tests/unit_tests/models/common/test_combined_projection_state_dict_adapter.py",
            "tests/unit_tests/models/llama",
            "tests/unit_tests/models/qwen2",
            "-k",
            "combined_projection_state or from_hf",
        ),
        {},
    ),
    "megatron": Peer(
        ("packaging",),
        ("tests/unit_tests/transformer/test_attention.py", "-k", "ClipQK", "--noconftest"),
        {},
    ),
}


def run(name: str, folder: pathlib.Path, extra: list[str]) -> bool:
    """Runs one peer's tests and prints what came of them; whether nothing unexpected failed."""
    peer = PEERS[name]
    folder = folder if peer.checkout else HERE
    missing = [package for package in peer.needs if importlib.util.find_spec(package) is None]
    if not folder.is_dir() or missing:
        print(f"{name}: skipped, {f'needs {missing}' if missing else f'no folder {folder}'}")
        return True
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        options = f"-q --tb=line -p {name}_peer -p no:cacheprovider -c {os.devnull}".split()
        options += [f"--rootdir={folder}", f"--confcutdir={folder}", f"--junitxml={report.name}"]
        command = [sys.executable, "-m", "pytest", *options, *peer.tests, *extra]
        # Theirs before ours: a peer's package of tests may be called `tests` too.
        folders = (HERE, folder, HERE.parents[1], os.environ.get("PYTHONPATH", ""))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "JAX_PLATFORMS": "cpu",
        }
        ran = subprocess.run(command, cwd=folder, env=environment, check=False, stdout=sys.stderr)
        if ran.returncode > 1:  # neither all passed nor some failed
            print(f"{name}: pytest ended with {ran.returncode}")
            return False
        cases = ElementTree.parse(report.name).getroot().iter("testcase")
        return summarise(name, list(cases), peer.left)


def summarise(name: str, cases: list[ElementTree.Element], left: dict[str, str]) -> bool:
    """Prints counts, and each failure with its reason; whether every failure has one."""
    ran = [case for case in cases if case.find("skipped") is None]
    failed = [c for c in ran if c.find("failure") is not None or c.find("error") is not None]
    skipped = len(cases) - len(ran)
    print(f"{name}: {len(ran) - len(failed)} of {len(ran)} passed, {skipped} skipped by themselves")
    unexpected = False
    for case in failed:
        test = case.get("name", "")
        reason = next((why for pattern, why in left.items() if re.search(pattern, test)), None)
        unexpected |= reason is None
        print(f"  {test}: {reason or 'UNEXPECTED'}")
    return bool(ran) and not unexpected


def main(arguments: list[str]) -> int:
    """The exit status."""
    if not arguments:
        print(__doc__)
        return 2
    folder, *names = arguments
    cut = names.index("--") if "--" in names else len(names)
    names, extra = names[:cut], names[cut + 1 :]
    results = [run(name, pathlib.Path(folder).resolve() / name, extra) for name in names or PEERS]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
