"""The JAX side of a wrapped function: what is compiled for it, and how its backward pass finds what it needs.

A `Program` is a function of arrays with everything static bound. Its forward pass for differentiation returns the
residuals of `jax.vjp` that are neither inputs nor outputs: those PyTorch keeps itself, so nothing is stored twice and
PyTorch's version counters see every in-place change.
"""

import itertools
import secrets
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten, tree_unflatten

from interop.dlpack import _TO_TORCH, Wide
from pallas_kernels import _dispatch

Signature = tuple[tuple[tuple[int, ...], Any], ...]
Unpack = Callable[[Sequence[jax.Array]], list[jax.Array]]
_SMALL_BYTES = 1 << 16

_serial = itertools.count()
# Keys end up in graphs that torch caches on disk: another process must never take one for its own.
_process = secrets.token_hex(4)
_programs: "weakref.WeakValueDictionary[str, Program]" = weakref.WeakValueDictionary()


def unique_key(name: str) -> str:
    """The name with a suffix that no other function and no other process has."""
    return f"{name}#{_process}-{next(_serial)}"


class RecompilationWarning(UserWarning):
    """A wrapped function was compiled for many shapes."""


class Source(NamedTuple):
    """Where the backward pass finds one leaf of a `jax.vjp` object: an input, an output or a residual, by index."""

    kind: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Recipe(NamedTuple):
    """How to rebuild a `jax.vjp` object: its tree, the source of each leaf, and the residuals as they were.

    `num_carriers` arrays hold the residuals; `unpack` takes them out again.
    """

    tree: Any
    sources: tuple[Source, ...]
    num_carriers: int
    unpack: "Unpack"

    def indices(self, kind: str) -> list[int]:
        """Indices of the inputs ("in") or results ("out") that are read, in the order they are taken."""
        return sorted({source.index for source in self.sources if source.kind == kind})


class Owner:
    """One wrapped function: its programs, and the shapes it was compiled for."""

    def __init__(self, function: Callable, name: str, *, wide: Wide, save: bool, warn_after: int):
        self.function, self.name, self.warn_after = function, name, warn_after
        self.save = save
        self.key = unique_key(name)
        self.wide: Wide = wide
        self.shapes: set[tuple[str, Signature]] = set()
        self._programs: dict[Any, Program] = {}
        self._lock = threading.Lock()

    def program(self, treedef: Any, static: tuple[tuple[str, Any], ...]) -> "Program":
        """The program for arguments of one structure `(args, kwargs)` and static values."""
        try:
            found = self._programs.get((treedef, static))
        except TypeError as error:
            raise TypeError(
                f"static arguments of {self.name} must be hashable, got {dict(static)}"
            ) from error
        if found is not None:
            return found
        function, fixed = self.function, dict(static)

        def of_leaves(*leaves):
            args, kwargs = tree_unflatten(treedef, leaves)
            return function(*args, **kwargs, **fixed)

        with self._lock:
            program = Program(of_leaves, self.name, wide=self.wide, owner=self)
            return self._programs.setdefault((treedef, static), program)

    def note(self, program: str, signature: Signature) -> None:
        """Counts shapes; says once when there are too many."""
        with self._lock:
            before = len(self.shapes)
            self.shapes.add((program, signature))
            crossed = before == self.warn_after < len(self.shapes)
        if crossed:
            warnings.warn(
                f"{self.name} was compiled for more than {self.warn_after} shapes, static values or structures: pad "
                "lengths to a few sizes (interop.bucket_length, interop.pad_to) or raise `warn_after`",
                RecompilationWarning,
                stacklevel=2,
            )


class Program:
    """A function of arrays, compiled per shape: forward, forward that saves, backward.

    Attributes:
      key: names the program in PyTorch's graphs.
      out_tree: structure of the results; known after the first trace, the same for every shape.
      inexact_outs: which results are floating point or complex, hence differentiable.
    """

    def __init__(self, function: Callable, name: str, *, wide: Wide, owner: Owner | None = None):
        self.key, self.name = unique_key(name), name
        self.wide: Wide = wide
        self.save = owner is None or owner.save
        self.out_tree: Any = None
        self.inexact_outs: tuple[bool, ...] = ()
        self._function = function
        self._owner = None if owner is None else weakref.ref(owner)
        self._lock = threading.Lock()
        self._saved_outs: dict[str, tuple[int, ...]] = {}
        # Another machine runs other kernels, which leave other residuals.
        self._recipes: dict[tuple[str, Signature, _dispatch.Target], Recipe] = {}
        self._backward: dict[tuple[str, Signature, _dispatch.Target], Callable] = {}
        self._saving: dict[str, Callable] = {}
        self._derived: dict[tuple[str, str], Program] = {}
        self.plain = jax.jit(self._outputs)
        _programs[self.key] = self

    def saved_outs(self, wanted: str) -> tuple[int, ...]:
        """Indices of the results that the backward pass reads."""
        return self._saved_outs.get(wanted, ())

    def saving(self, wanted: str) -> Callable:
        """Compiled forward pass `(*arrays) -> (outs, residuals)` for gradients of the inputs marked "1"."""
        if wanted not in self._saving:
            self._saving[wanted] = jax.jit(lambda *xs: self._forward(wanted, xs))
        return self._saving[wanted]

    def backward(self, wanted: str, signature: Signature) -> tuple[Recipe, Callable]:
        """The recipe, and the compiled `(*inputs, *outs, *residuals, *cotangents) -> gradients` that follows it."""
        key = (wanted, signature, _dispatch.target())
        if key not in self._recipes:
            self.abstract(wanted, signature)
        recipe = self._recipes[key]
        if key not in self._backward:
            self._backward[key] = jax.jit(lambda *flat: self._pull_back(recipe, flat))
        return recipe, self._backward[key]

    def abstract(self, wanted: str, signature: Signature) -> tuple[list, list]:
        """Shapes and dtypes of `(outs, residuals)`, by tracing alone."""
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in signature]
        if wanted:
            return jax.eval_shape(self.saving(wanted), *arrays)
        return jax.eval_shape(self.plain, *arrays), []

    def vjp(self, wanted: str) -> "Program":
        """The program `(*inputs, *cotangents) -> gradients`, which recomputes the forward pass."""
        count = len(wanted)
        return self._derive("vjp", wanted, lambda *a: self._recompute(wanted, a[:count], a[count:]))

    def vmap(self, in_axes: tuple[int | None, ...]) -> "Program":
        """The program over one more axis."""
        mapped = lambda *xs: jax.vmap(self._outputs, in_axes=in_axes)(*xs)
        return self._derive("vmap", repr(in_axes), mapped)

    def _derive(self, kind: str, detail: str, function: Callable) -> "Program":
        with self._lock:
            if (kind, detail) not in self._derived:
                program = Program(function, f"{self.name}/{kind}", wide=self.wide)
                self._derived[kind, detail] = program
            return self._derived[kind, detail]

    def _outputs(self, *xs: jax.Array) -> list[jax.Array]:
        owner = self._owner and self._owner()
        if owner is not None:
            owner.note(self.key, signature_of(xs))
        leaves, tree = tree_flatten(self._function(*xs))
        for leaf in leaves:
            if not isinstance(leaf, jax.typing.ArrayLike):
                raise TypeError(f"{self.name} must return arrays, got {type(leaf).__name__}")
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        if self.out_tree is not None and tree != self.out_tree:
            raise TypeError(
                f"{self.name} must return one structure for all shapes, got {tree} after {self.out_tree}"
            )
        self.inexact_outs = tuple(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)
        self.out_tree = tree
        return leaves

    def _vjp(self, wanted: str, xs: Sequence[jax.Array]) -> tuple[list[jax.Array], Callable]:
        """All results, and the pull-back of cotangents of the inexact ones to the inputs marked "1"."""
        chosen = [i for i, mark in enumerate(wanted) if mark == "1"]

        def of_chosen(*values):
            full = list(xs)
            for i, value in zip(chosen, values, strict=True):
                full[i] = value
            outs = self._outputs(*full)
            differentiable = [
                o for o, inexact in zip(outs, self.inexact_outs, strict=True) if inexact
            ]
            return differentiable, [
                o for o, inexact in zip(outs, self.inexact_outs, strict=True) if not inexact
            ]

        differentiable, vjp, rest = jax.vjp(of_chosen, *(xs[i] for i in chosen), has_aux=True)
        sources = {True: iter(differentiable), False: iter(rest)}
        return [next(sources[inexact]) for inexact in self.inexact_outs], vjp

    def _forward(self, wanted: str, xs: Sequence[jax.Array]) -> tuple[list, list]:
        outs, vjp = self._vjp(wanted, xs)
        leaves, tree = tree_flatten(vjp)
        known = {id(out): Source("out", i) for i, out in enumerate(outs)}
        known |= {id(x): Source("in", i) for i, x in enumerate(xs)}
        found = (known.get(id(leaf)) for leaf in leaves)
        used = tuple(sorted({s.index for s in found if s is not None and s.kind == "out"}))
        with self._lock:  # one answer for all shapes: torch's graphs hold it as a constant
            used = self._saved_outs.setdefault(wanted, used)
        residuals, decoders, sources = [], [], []
        for leaf in leaves:
            source = known.get(id(leaf))
            if source is None or (source.kind == "out" and source.index not in used):
                source = known[id(leaf)] = Source("residual", len(residuals))
                encoded, decode = _encode(leaf)
                residuals.append(encoded)
                decoders.append(decode)
            sources.append(source)
        carriers, split = _pack(residuals)
        unpack = lambda arrays: [d(a) for d, a in zip(decoders, split(arrays), strict=True)]
        recipe = Recipe(tree, tuple(sources), len(carriers), unpack)
        self._recipes[wanted, signature_of(xs), _dispatch.target()] = recipe
        return outs, carriers

    def _pull_back(self, recipe: Recipe, flat: Sequence[jax.Array]) -> list[jax.Array]:
        values = iter(flat)
        known = {Source("in", i): next(values) for i in recipe.indices("in")}
        known |= {Source("out", i): next(values) for i in recipe.indices("out")}
        residuals = recipe.unpack([next(values) for _ in range(recipe.num_carriers)])
        known |= {Source("residual", i): residual for i, residual in enumerate(residuals)}
        vjp = tree_unflatten(recipe.tree, [known[source] for source in recipe.sources])
        return _gradients(vjp, list(values))

    def _recompute(self, wanted: str, xs, cotangents) -> list[jax.Array]:
        _, vjp = self._vjp(wanted, xs)
        return _gradients(vjp, list(cotangents))


def _gradients(vjp: Callable, cotangents: list[jax.Array]) -> list[jax.Array]:
    """In PyTorch's convention, which conjugates where JAX's does not."""
    return [jnp.conj(gradient) for gradient in vjp([jnp.conj(c) for c in cotangents])]


def _encode(leaf: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A residual as an array that torch can hold, and the way back."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        implementation = jax.random.key_impl(leaf)
        wrap = lambda data: jax.random.wrap_key_data(data, impl=implementation)
        return jax.random.key_data(leaf), wrap
    if dtype in _TO_TORCH:
        return leaf, lambda array: array
    carrier = jnp.float32
    if jnp.issubdtype(dtype, jnp.integer):
        carrier = jnp.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.uint8
    return leaf.astype(carrier), lambda array: array.astype(dtype)


def _pack(arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], Unpack]:
    """Small arrays of one dtype end to end in one, and the way back: each handover costs more than their copy."""
    groups: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        small = array.size * array.dtype.itemsize <= _SMALL_BYTES
        groups.setdefault(array.dtype if small else i, []).append(i)
    members, shapes = list(groups.values()), [array.shape for array in arrays]
    ends = [np.cumsum([arrays[i].size for i in group])[:-1].tolist() for group in members]

    def split(carriers: Sequence[jax.Array]) -> list[jax.Array]:
        found: dict[int, jax.Array] = {}
        for carrier, group, end in zip(carriers, members, ends, strict=True):
            parts = jnp.split(carrier, end) if end else [carrier]
            found |= {i: part.reshape(shapes[i]) for i, part in zip(group, parts, strict=True)}
        return [found[i] for i in range(len(shapes))]

    join = lambda group: jnp.concatenate([arrays[i].reshape(-1) for i in group])
    return [arrays[group[0]] if len(group) == 1 else join(group) for group in members], split


def signature_of(arrays: Sequence[Any]) -> Signature:
    """Shapes and dtypes of arrays."""
    return tuple((tuple(a.shape), jnp.dtype(a.dtype)) for a in arrays)


def find(key: str) -> Program:
    """The program of a key.

    Raises:
      RuntimeError: its wrapped function no longer exists.
    """
    program = _programs.get(key)
    if program is None:
        raise RuntimeError(
            f"the function behind {key!r} is gone: keep what interop.wrap returned alive as long as graphs use it"
        )
    return program
