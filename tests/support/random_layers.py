"""Layers whose every parameter is random, and inputs for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def draw(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomise(module, seed: int = 0, *, kind: type[nnx.Variable] = nnx.Param, scale: float = 0.3):
    """Adds noise to every variable of a kind, in place: nothing keeps its initial value, biases and norms too."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(module):
        if isinstance(leaf, kind):
            noise = jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
            leaf[...] = (leaf[...] + noise).astype(leaf.dtype)
    return module


def random_layer(cls, config, seed: int = 0, **kwargs):
    """A layer of the class, randomised."""
    return randomise(cls(config, rngs=nnx.Rngs(seed), **kwargs), seed)
