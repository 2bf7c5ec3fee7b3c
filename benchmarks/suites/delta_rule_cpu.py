"""The gated delta rule and its convolution on a CPU: time beside PyTorch's, compile time, kept bytes, growth."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from pallas_kernels import causal_conv1d, gated_delta_rule

TESTS = ["tests/delta_rule", "tests/causal_conv"]
DIM = 128
NAMES = ("query", "key", "value", "g", "beta")


def measure(quick: bool) -> list[dict]:
    """Rows of `what`: "paired", "memory", "growth" and "convolution"."""
    if quick:
        return [
            paired(128, 2, backward=True, rounds=1),
            memory(128, 2),
            growth(256, 2),
            convolution(64, 32),
        ]
    rows = [
        paired(length, heads, backward=backward, rounds=2 if backward else 3)
        for length, heads, backward in (
            (2048, 8, False),
            (2048, 32, False),
            (8192, 8, False),
            (8192, 32, False),
            (2048, 8, True),
            (2048, 32, True),
            (8192, 8, True),
        )
    ]
    rows += [memory(length, 8) for length in (2048, 8192)]
    rows += [growth(length, 1) for length in (1024, 4096, 16384, 65536)]
    return [*rows, convolution(4096, 1024)]


def operands(length: int, heads: int) -> dict[str, np.ndarray]:
    """Random float32 operands of one sequence, D = 128."""
    rng = np.random.default_rng(0)
    wide, gate = (1, length, heads, DIM), (1, length, heads)
    arrays = [rng.standard_normal(wide) for _ in range(3)]
    arrays += [-0.1 * rng.exponential(size=gate), rng.uniform(0.05, 0.95, gate)]
    return dict(zip(NAMES, (a.astype(np.float32) for a in arrays), strict=True))


def run(query, key, value, g, beta):
    """What both sides compute: normalised queries and keys, output and final state."""
    return gated_delta_rule(
        query, key, value, g, beta, use_qk_l2norm=True, implementation="chunked"
    )


def loss(tokens):
    """A scalar that reaches every output."""
    out, final = run(*tokens)
    return jnp.sum(out) + jnp.sum(final)


def compiled(function, *arguments):
    """`(executable, seconds to compile)`."""
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def paired(length: int, heads: int, *, backward: bool, rounds: int) -> dict:
    """Ours and Hugging Face's in turn, after checking that they agree."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    theirs = functools.partial(
        modeling_qwen3_next.torch_chunk_gated_delta_rule,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    arrays = operands(length, heads)
    ours = tuple(jnp.asarray(a) for a in arrays.values())
    tensors = [torch.tensor(a, requires_grad=backward) for a in arrays.values()]
    forward, compile_seconds = compiled(run, *ours)
    expected = theirs(*tensors)[0].detach().numpy()
    np.testing.assert_allclose(forward(*ours).out, expected, atol=2e-5)
    ours_call, theirs_call = lambda: forward(*ours), lambda: theirs(*tensors)
    if backward:
        gradient, compile_seconds = compiled(jax.grad(loss), ours)
        ours_call = lambda: gradient(ours)

        def theirs_call():
            out, final = theirs(*tensors)
            return torch.autograd.grad(out.sum() + final.sum(), tensors)

    seconds = timing.paired(
        {"ours": ours_call, "hugging face": theirs_call}, rounds=rounds, warmup=1
    )
    medians = {name: s["median"] for name, s in seconds.items()}
    return {
        "what": "paired",
        "batch": 1,
        "length": length,
        "heads": heads,
        "dim": DIM,
        "dtype": "float32",
        "pass": "forward and backward" if backward else "forward",
        "seconds": seconds,
        "speedup": medians["hugging face"] / medians["ours"],
        "compile_seconds": compile_seconds,
    }


def memory(length: int, heads: int) -> dict:
    """Bytes per token and value head that the forward keeps for the backward beside its inputs, and of the state."""
    tokens = tuple(jnp.asarray(a) for a in operands(length, heads).values())
    out, pull = jax.vjp(run, *tokens)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull)) - sum(x.nbytes for x in tokens)
    return {
        "what": "memory",
        "length": length,
        "heads": heads,
        "dim": DIM,
        "kept_bytes_per_token_and_head": kept / (length * heads),
        "input_bytes_per_token_and_head": sum(x.nbytes for x in tokens) / (length * heads),
        "state_bytes_per_head": out.final_state.nbytes / heads,
    }


def growth(length: int, heads: int) -> dict:
    """Forward and gradient seconds, to see that cost is linear in the length."""
    tokens = tuple(jnp.asarray(a) for a in operands(length, heads).values())
    forward, gradient = compiled(run, *tokens)[0], compiled(jax.grad(loss), tokens)[0]
    seconds = timing.paired(
        {"forward": lambda: forward(*tokens), "gradient": lambda: gradient(tokens)},
        rounds=3,
        warmup=1,
    )
    return {"what": "growth", "length": length, "heads": heads, "dim": DIM, "seconds": seconds}


def convolution(length: int, features: int, width: int = 4) -> dict:
    """Shifted sums against the grouped convolution of XLA: forward, and gradient of x and weight."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, length, features)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((width, features)), jnp.float32)

    def grouped(x, weight):
        return jax.lax.conv_general_dilated(
            x,
            weight[:, None],
            (1,),
            [(width - 1, 0)],
            feature_group_count=features,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    def shifted(x, weight):
        return causal_conv1d(x, weight).out

    np.testing.assert_allclose(shifted(x, weight), grouped(x, weight), atol=1e-5)
    calls = {}
    for name, function in (("shifted", shifted), ("grouped", grouped)):
        forward = jax.jit(function)
        gradient = jax.jit(jax.grad(lambda x, w, f=function: jnp.sum(jnp.sin(f(x, w))), (0, 1)))
        calls[f"{name}, forward"] = functools.partial(forward, x, weight)
        calls[f"{name}, gradient"] = functools.partial(gradient, x, weight)
    seconds = timing.paired(calls, rounds=3, warmup=1)
    return {
        "what": "convolution",
        "length": length,
        "features": features,
        "width": width,
        "seconds": seconds,
    }
