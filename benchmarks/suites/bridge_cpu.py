"""What calling JAX from PyTorch costs: a tiny operator (overhead alone) and attention at T = 2048 (overhead in use).

`naive` is what public bridges do: DLPack, one autograd.Function class per call, `jax.vjp` un-jitted in every call.
"""

import jax
import jax.numpy as jnp
import torch

import interop
import pallas_kernels
from benchmarks import timing

TESTS = ["tests/interop/test_dlpack.py", "tests/interop/test_torch_function.py"]


def measure(quick: bool) -> list[dict]:
    """Rows of `what`: "tiny" (microseconds per call) and "attention" (milliseconds, and what the bridge adds).

    XLA runs matrices of 4 x 4 in the calling thread: their time is the bridge's. It hands 8 x 8 to a thread of its own
    and is waited for, which costs whoever calls it, JAX too, tens of microseconds where threads wake slowly.
    """
    torch.set_num_threads(1)
    calls = 5 if quick else 200
    rows = [
        tiny(size, backward=backward, calls=calls) for size in (4, 8) for backward in (False, True)
    ]
    length, rounds = (64, 1) if quick else (2048, 25)
    return [*rows, *(in_use(length, backward=b, rounds=rounds) for b in (False, True))]


def mix(query, key, value):
    """The tiny operator."""
    return jax.nn.softmax(query @ key.T) @ value


def torch_mix(query, key, value):
    """The same by PyTorch."""
    return torch.softmax(query @ key.T, -1) @ value


def naive(function):
    """The bridge of the public packages, in the fewest lines."""

    def call(*tensors):
        class Bridge(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                arrays = [jax.dlpack.from_dlpack(t.detach().contiguous()) for t in tensors]
                out, ctx.vjp = jax.vjp(function, *arrays)
                return torch.from_dlpack(out)

            @staticmethod
            def backward(ctx, cotangent):
                return tuple(
                    map(torch.from_dlpack, ctx.vjp(jax.dlpack.from_dlpack(cotangent.contiguous())))
                )

        return Bridge.apply(*tensors)

    return call


def tiny(size: int, *, backward: bool, calls: int) -> dict:
    """Overhead of one call on three square matrices; `jax` is the compiled function called from JAX and waited for."""
    tensors = [torch.randn(size, size, requires_grad=backward) for _ in range(3)]
    ones = torch.ones(size, size)
    arrays, cotangent = [interop.to_jax(x) for x in tensors], interop.to_jax(ones)
    forward = jax.jit((lambda *xs: jax.vjp(mix, *xs)) if backward else mix)
    pull = jax.jit(lambda vjp, ct: vjp(ct))

    def jax_alone():
        out = forward(*arrays)
        jax.block_until_ready(pull(out[1], cotangent) if backward else out)

    def repeat(function, count):
        def run():
            for _ in range(count):
                out = function(*tensors)
                if backward:
                    out.backward(ones)

        return run

    def repeat_jax():
        for _ in range(calls):
            jax_alone()

    few = max(calls // 20, 1)  # naive is slow: fewer calls, same figure per call
    times = timing.paired(
        {
            "ours": repeat(interop.wrap(mix), calls),
            "naive": repeat(naive(mix), few),
            "torch": repeat(torch_mix, calls),
            "jax": repeat_jax,
        }
    )
    per_call = {"ours": calls, "naive": few, "torch": calls, "jax": calls}
    micro = {name: 1e6 * t["median"] / per_call[name] for name, t in times.items()}
    return {
        "what": "tiny",
        "length": size,
        "backward": backward,
        "microseconds": micro,
        "naive_over_ours": micro["naive"] / micro["ours"],
    }


def in_use(length: int, *, backward: bool, rounds: int) -> dict:
    """Causal attention, N = 8, K = 2, D = 64: through the bridge, and the same compiled function called from JAX."""
    shapes = ((1, length, 8, 64), (1, length, 2, 64), (1, length, 2, 64))
    tensors = [torch.randn(shape, requires_grad=backward) for shape in shapes]
    arrays = [jnp.array(interop.to_jax(t)) for t in tensors]
    attend = lambda q, k, v: pallas_kernels.gqa_attention(q, k, v, is_causal=True)
    weight = torch.ones(shapes[0])
    ones = jnp.ones(shapes[0])

    @jax.jit
    def forward(*xs):
        return jax.vjp(attend, *xs) if backward else attend(*xs)

    pull = jax.jit(lambda vjp, ct: vjp(ct))

    def from_jax():
        if not backward:
            return forward(*arrays)
        return pull(forward(*arrays)[1], ones)

    def from_torch():
        out = interop.attention(*tensors, is_causal=True)
        if backward:
            return torch.autograd.grad(out, tensors, weight)
        return out

    times = timing.paired({"bridge": from_torch, "jax": from_jax}, rounds=rounds)
    milli = {name: 1e3 * t["min"] for name, t in times.items()}
    return {
        "what": "attention",
        "length": length,
        "backward": backward,
        "milliseconds": milli,
        "bridge_adds": milli["bridge"] / milli["jax"] - 1,
    }
