"""`python -m gqa_jax`: the demo, and what this machine would run."""

import argparse
import importlib.metadata
import platform
import sys

import jax
import jax.numpy as jnp

from gqa_jax import demo
from pallas_kernels import explain

PACKAGES = (
    "gqa-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "torch",
    "transformers",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gqa_jax",
        description="Grouped-query attention and gated delta linear attention for JAX.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="train a small hybrid model on Python's own source, generate, save, reload",
        description=demo.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_arguments(command)
    command.set_defaults(run=run_demo)

    command = commands.add_parser(
        "info", help="versions, devices, and which implementation each operator would run and why"
    )
    command.set_defaults(run=run_info)
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """`demo`; 2 for options that make no sense."""
    wrong = demo.check_arguments(options)
    if wrong:
        print(f"python -m gqa_jax demo: error: {wrong}", file=sys.stderr)
        return 2
    return demo.run(options)


def run_info(options: argparse.Namespace) -> int:
    """`info`."""
    del options
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {package:17} {version}")
    print("devices:")
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        print(f"  {device.id}: {device.device_kind}" + (f", sm {capability}" if capability else ""))
    print(
        "what each operator would run here (bfloat16, typical shapes), and why not something else:"
    )
    for name, arguments, options_ in typical_calls():
        for line in str(explain(name, *arguments, **options_)).splitlines():
            print(f"  {line}")
    return 0


def typical_calls() -> list[tuple[str, tuple, dict]]:
    """Operator, arguments (shapes only) and options of a call that a model of this family makes."""

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    query, key = array(1, 4096, 16, 128), array(1, 4096, 4, 128)
    cache, lengths = array(8, 4, 8192, 128), array(8, dtype=jnp.int32)
    q, v = array(1, 4096, 16, 128), array(1, 4096, 32, 128)
    gate = array(1, 4096, 32, dtype=jnp.float32)
    q1, v1 = array(8, 1, 16, 128), array(8, 1, 32, 128)
    gate1 = array(8, 1, 32, dtype=jnp.float32)
    state = array(8, 32, 128, 128, dtype=jnp.float32)
    return [
        ("gqa_attention", (query, key, key), {"is_causal": True}),
        ("decode_attention", (array(8, 1, 16, 128), cache, cache, lengths), {}),
        ("gated_delta_rule", (q, q, v, gate, gate), {"use_qk_l2norm": True}),
        ("gated_delta_rule_step", (q1, q1, v1, gate1, gate1, state), {"use_qk_l2norm": True}),
        ("causal_conv1d", (array(1, 4096, 8192), array(4, 8192)), {"activation": "silu"}),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; its exit status."""
    options = build_parser().parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
