"""The demo: a small hybrid model learns Python from the standard library's own source, then shows what it can do.

Trains, compares its bits per byte with zlib's, generates through its caches, proves that cached and uncached logits
agree, makes a Hugging Face round trip, and answers a call from PyTorch where that is installed.
"""

import argparse
import importlib.util
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gqa_jax.config import AttentionConfig, DecoderConfig, GatedDeltaNetConfig, RopeConfig
from gqa_jax.demo.byte_text import (
    VOCAB_SIZE,
    ByteText,
    as_text,
    model_bits_per_byte,
    random_windows,
    standard_library,
    zlib_bits_per_byte,
)
from gqa_jax.hf import checkpoint
from gqa_jax.models.decoder import Decoder
from gqa_jax.models.generation import generate, stream
from gqa_jax.train.step import TrainState, train_step

BATCH_SIZE = 8
LENGTH = 128
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
PROMPTS = ("def __init__(self, ", "import ", "    for key, value in ", '    """Return ')


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
      decoder: the model.
      losses: bits per byte of each step's batch.
      seconds: spent in steps after the first, which compiles.
    """

    decoder: Decoder
    losses: list[float]
    seconds: float


def demo_config() -> DecoderConfig:
    """Three Gated DeltaNet layers, then full attention with an output gate: Qwen3.5's plan, 1/5000 of its size."""
    width = 128
    return DecoderConfig(
        vocab_size=VOCAB_SIZE,
        model_dim=width,
        layers=("linear_attention",) * 3 + ("full_attention",),
        attention=AttentionConfig(
            model_dim=width,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            output_gate=True,
            qk_norm="rms_zero_centred",
            rope=RopeConfig(theta=10_000.0, rotary_dim=8),
        ),
        gated_deltanet=GatedDeltaNetConfig(
            model_dim=width, num_key_heads=2, num_value_heads=4, key_head_dim=32, value_head_dim=32
        ),
        intermediate_size=384,
        norm_zero_centred=True,
        tie_embeddings=True,
        family="qwen3_5_text",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--seconds",
        type=float,
        default=110.0,
        help="training time, compilation excluded (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="stop after so many steps, whatever the time (no limit)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--held-out-bytes",
        type=int,
        default=131_072,
        help="how much held-out source to score (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("demo_output"),
        help="folder for the plot, the checkpoint and summary.json (%(default)s)",
    )


def check_arguments(options: argparse.Namespace) -> str | None:
    """What is wrong with the options or missing for the demo, or None."""
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the demo needs {' and '.join(missing)}: pip install 'gqa-jax[demo]'"
    if not options.seconds > 0:
        return f"--seconds must be positive, got {options.seconds}"
    if options.steps is not None and options.steps < 1:
        return f"--steps must be positive, got {options.steps}"
    if options.held_out_bytes < 2:
        return f"--held-out-bytes must be at least 2, got {options.held_out_bytes}"
    return None


def run(options: argparse.Namespace) -> int:
    """Runs the demo; the exit status."""
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    text = standard_library()
    held_out = text.held_out[: options.held_out_bytes]
    print(
        f"Python's standard library: {len(text.train):,} bytes of {text.num_train_files} files to train on, "
        f"{len(held_out):,} of {text.num_held_out_files} other files held out"
    )
    trained = train(text, seconds=options.seconds, steps=options.steps, seed=options.seed)
    decoder, losses = trained.decoder, trained.losses
    plot_losses(losses, zlib_bits_per_byte(held_out), options.out / "loss.png")

    summary = {
        "steps": len(losses),
        "training_seconds": round(trained.seconds, 1),
        "bytes_per_second": round((len(losses) - 1) * BATCH_SIZE * LENGTH / trained.seconds)
        if trained.seconds > 0
        else None,
        "held_out_bits_per_byte": model_bits_per_byte(decoder, held_out, length=LENGTH),
        "zlib_bits_per_byte": zlib_bits_per_byte(held_out),
    }
    print(
        f"held-out source: {summary['held_out_bits_per_byte']:.3f} bits per byte "
        f"(zlib -9 of the same bytes: {summary['zlib_bits_per_byte']:.3f}; uniform: 8)"
    )
    print_samples(decoder, seed=options.seed)
    summary["cached_difference"] = cached_difference(decoder, held_out)
    print(f"max |cached - uncached| logits: {summary['cached_difference']:.1e}")
    folder = options.out / "checkpoint"
    summary["reloaded_difference"] = round_trip(decoder, held_out, folder)
    print(
        f"saved as {decoder.config.family} in {folder} and loaded again: max |difference| of logits "
        f"{summary['reloaded_difference']:.1e}"
    )
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: the call from torch is left out")
    else:
        summary["torch_difference"], summary["torch_gradient_difference"] = call_from_torch(
            decoder, seed=options.seed
        )
        print(
            "the trained attention layer called from torch (DLPack): max |difference| "
            f"{summary['torch_difference']:.1e}, of its gradient {summary['torch_gradient_difference']:.1e}"
        )
    summary["total_seconds"] = round(time.perf_counter() - started, 1)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['total_seconds']:.0f} seconds; plot, checkpoint and summary in {options.out}")
    return 0


def train(text: ByteText, *, seconds: float, steps: int | None, seed: int) -> Trained:
    """AdamW, linear warm-up, then a cosine over the time (or the steps) that there is."""
    from tqdm import tqdm

    decoder = Decoder(demo_config(), rngs=nnx.Rngs(seed))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(decoder))
    print(f"{num_params:,} parameters, layers: {', '.join(decoder.config.layers)}")
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(PEAK_LEARNING_RATE, b2=0.95, weight_decay=0.1),
    )
    state = TrainState.create(decoder, optimizer)
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    begin = time.perf_counter()
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while True:
            elapsed = time.perf_counter() - begin if losses else 0.0
            done = max(elapsed / seconds, len(losses) / steps if steps else 0.0)
            bar.update(min(100, int(100 * done)) - bar.n)
            if done >= 1.0:
                break
            scale = min(1.0, (len(losses) + 1) / WARMUP_STEPS)
            scale *= 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done))
            batch = random_windows(text.train, rng, batch_size=BATCH_SIZE, length=LENGTH + 1)
            state, loss, _ = train_step(
                state, jnp.asarray(batch), optimizer=optimizer, update_scale=jnp.float32(scale)
            )
            losses.append(float(loss) / math.log(2.0))
            if len(losses) == 1:
                begin = time.perf_counter()  # the first step compiled
            bar.set_postfix_str(f"step {len(losses)}, {np.mean(losses[-50:]):.3f} bits per byte")
    return Trained(state.decoder, losses, time.perf_counter() - begin)


def plot_losses(losses: list[float], zlib_reference: float, path: pathlib.Path) -> None:
    """Training loss, smoothed, against zlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    window = min(len(losses), 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(losses, alpha=0.25, label="each batch")
    axes.plot(np.arange(window - 1, len(losses)), smooth, label=f"mean of {window}")
    axes.axhline(zlib_reference, linestyle=":", color="black", label="zlib -9, held-out source")
    axes.set(xlabel="step", ylabel="bits per byte", title="Python source, byte by byte")
    axes.legend()
    figure.savefig(path)


def print_samples(decoder: Decoder, *, seed: int) -> None:
    """One ragged batch of samples, and one that streams."""
    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    options: dict[str, Any] = dict(
        max_new_tokens=160,
        temperature=0.7,
        top_p=0.95,
        stop_tokens=(0,),
        prefill_chunk=32,
        max_length=256,
    )
    print("\nSamples, through the caches, one ragged batch:")
    result = generate(decoder, prompts, key=jax.random.key(seed), **options)
    for prompt, sample in zip(PROMPTS, result.to_lists(), strict=True):
        print("-" * 80)
        print(prompt + bytes(sample).decode(errors="replace"))
    print("-" * 80 + "\nand one that streams:")
    print(PROMPTS[0], end="", flush=True)
    steps = stream(decoder, prompts[:1], key=jax.random.key(seed + 1), **options)
    for piece in as_text(int(step.tokens[0]) for step in steps):
        print(piece, end="", flush=True)
    print("\n" + "-" * 80)


def cached_difference(decoder: Decoder, data: np.ndarray, *, length: int = 96) -> float:
    """Largest difference between logits of one uncached call and of prefill plus decoding byte by byte."""
    tokens = jnp.asarray(data[None, :length], jnp.int32)
    length = tokens.shape[1]
    graphdef, params = nnx.split(decoder)
    step = jax.jit(
        lambda params, tokens, cache: nnx.merge(graphdef, params).step(tokens, cache),
        donate_argnums=2,
    )
    expected = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens))(params)
    cache = decoder.init_cache(1, length)
    prefilled = length // 2
    logits, cache = step(params, tokens[:, :prefilled], cache)
    pieces = [logits]
    for i in range(prefilled, length):
        logits, cache = step(params, tokens[:, i : i + 1], cache)
        pieces.append(logits)
    return float(jnp.abs(jnp.concatenate(pieces, axis=1) - expected).max())


def round_trip(decoder: Decoder, data: np.ndarray, folder: pathlib.Path) -> float:
    """Saves in Hugging Face's format, loads, and returns the largest difference of logits."""
    checkpoint.save_hf(decoder, folder)
    loaded = checkpoint.load_hf(folder)
    tokens = jnp.asarray(data[None, :64], jnp.int32)
    call = jax.jit(lambda decoder, tokens: decoder(tokens))
    return float(jnp.abs(call(loaded, tokens) - call(decoder, tokens)).max())


def call_from_torch(decoder: Decoder, *, seed: int) -> tuple[float, float]:
    """Calls the trained full-attention layer on a torch tensor; differences of output and gradient to JAX's own."""
    import interop

    layer = decoder.layer(decoder.config.layers.index("full_attention")).mixer
    x = jax.random.normal(jax.random.key(seed), (2, 32, decoder.config.model_dim))
    expected = layer(x)
    expected_gradient = jax.grad(lambda x: layer(x).sum())(x)
    tensor = interop.to_torch(x, copy=True).requires_grad_()
    out = interop.wrap(lambda x: layer(x), name="trained attention")(tensor)
    out.sum().backward()
    assert tensor.grad is not None
    difference = jnp.abs(interop.to_jax(out.detach()) - expected).max()
    gradient_difference = jnp.abs(interop.to_jax(tensor.grad) - expected_gradient).max()
    return float(difference), float(gradient_difference)
