"""`python -m gqa_jax`: the demo, generation from a checkpoint, plans for GPUs, and what this machine would run."""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import sys

import jax
import jax.numpy as jnp

from gqa_jax.demo import run as demo
from gqa_jax.demo.byte_text import VOCAB_SIZE, as_text
from gqa_jax.hf import checkpoint
from gqa_jax.models.generation import stream
from gqa_jax.models.sampling import as_int
from gqa_jax.planner import command as plan_command
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
        "generate",
        help="continue a prompt with a Hugging Face checkpoint",
        description="Continues a prompt; text streams for byte-level models, token ids for others.",
    )
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder of safetensors")
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="for models whose tokens are bytes")
    prompt.add_argument("--tokens", metavar="1,2,3", help="token ids, for any model")
    command.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="(%(default)s)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most likely token (%(default)s)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely")
    command.add_argument("--top-p", type=float, metavar="P", help="draw among the top share P")
    command.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    command.add_argument(
        "--stop",
        metavar="1,2",
        help="token ids that end the text, or none (those of the checkpoint's own configuration)",
    )
    command.add_argument(
        "--ignore", metavar="a,b", help="fields of config.json to read as if they were absent"
    )
    command.set_defaults(run=run_generate)

    command = commands.add_parser(
        "plan",
        help="what a step costs on 1 to 512 GPUs; none is needed",
        description=plan_command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan_command.add_arguments(command)

    command = commands.add_parser(
        "info", help="versions, devices, and which implementation each operator would run and why"
    )
    command.set_defaults(run=run_info)
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """`demo`; a ValueError for options that make no sense."""
    if wrong := demo.check_arguments(options):
        raise ValueError(wrong)
    return demo.run(options)


def run_generate(options: argparse.Namespace) -> int:
    """`generate`; a ValueError or OSError for options that make no sense and checkpoints that cannot be read."""
    tokens = [] if options.tokens is None else _token_ids("--tokens", options.tokens)
    stop_tokens = None
    if options.stop is not None:
        stop_tokens = [] if options.stop == "none" else _token_ids("--stop", options.stop)
    ignore = options.ignore.split(",") if options.ignore else ()
    decoder = checkpoint.load_hf(options.checkpoint, ignore=ignore)
    if options.prompt is not None:
        if decoder.config.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"--prompt needs a model whose tokens are bytes (vocab_size {VOCAB_SIZE}), this one has "
                f"{decoder.config.vocab_size}: give token ids with --tokens"
            )
        tokens = list(options.prompt.encode())
    steps = stream(
        decoder,
        [tokens],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=stop_tokens,
        key=jax.random.key(as_int("--seed", options.seed, "an integer of 32 bits")),
    )
    ids = (int(step.tokens[0]) for step in steps)
    if options.prompt is not None:
        print(options.prompt, end="")
        pieces = as_text(ids)
    else:
        pieces = (f"{token} " for token in ids)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _token_ids(option: str, text: str) -> list[int]:
    try:
        return [as_int(option, int(part), "") for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be token ids joined by commas, got {text!r}") from None


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
    mixed, per_head = array(8, 1, 16, 768), array(16, 2, dtype=jnp.float32)
    layer = {"conv_kernel": array(4, 16, 512), "A_log": per_head, "dt_bias": per_head}
    return [
        ("gqa_attention", (query, key, key), {"is_causal": True}),
        ("decode_attention", (array(8, 1, 16, 128), cache, cache, lengths), {}),
        ("gated_delta_rule", (q, q, v, gate, gate), {"use_qk_l2norm": True}),
        ("gated_delta_rule_step", (q1, q1, v1, gate1, gate1, state), {"use_qk_l2norm": True}),
        ("gated_deltanet_step", (mixed, array(8, 1, 16, 4), state, array(8, 4, 16, 512)), layer),
        ("causal_conv1d", (array(1, 4096, 8192), array(4, 8192)), {"activation": "silu"}),
        (
            "causal_conv1d_qkv",
            (array(1, 4096, 16, 768), array(4, 16, 512)),
            {"key_dim": 128, "value_dim": 128, "use_qk_l2norm": True},
        ),
    ]


def accept_no_driver() -> None:
    """Where no NVIDIA driver is, JAX's CUDA plugin (the `aot` extra installs it) leaves the work to the CPU.

    It does so in any case, but after a traceback from its check of library versions.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; its exit status, which is 2, after one line that says why, for bad input."""
    options = build_parser().parse_args(arguments)
    accept_no_driver()
    try:
        return options.run(options)
    except (ValueError, OSError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 1000 else reason[:997] + "..."
        print(f"python -m gqa_jax {options.command}: error: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
