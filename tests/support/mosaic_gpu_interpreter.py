"""Test-only: lets Pallas' Mosaic GPU interpreter (JAX 0.11.2 and 0.12.0.1) run flash attention kernels.

Adds what those versions lack: wgmma with its left operand in registers, `accumulator[...] = value`, `pl.run_state` over
accumulators, `plgpu.atomic_add`, `copy_smem_to_gmem(reduction_op="add")` and predicates of copies. It also shows the
shared-memory operands of wgmma to the race detector, which upstream reads without a clock, and completes a wgmma only
where the kernel waits for it: until then nobody may overwrite its operands, and reading its accumulator is an error.

Not covered: additions into device memory do not race with each other, and here not with plain accesses either (the
kernels make none to the same array); a register operand changed while wgmma reads it (the compiler serialises wgmma
there and says so, which `test_attention_aot.py` refuses).
"""

import collections
import contextlib
import functools
import threading
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.state import discharge
from jax._src.state import types as state_types

from pallas_kernels import _mosaic_gpu

_LOCK = threading.Lock()
# Warpgroup -> products not yet waited for, oldest first: (key of the accumulator, clocks of the reads of operands).
_IN_FLIGHT: dict = collections.defaultdict(collections.deque)
_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_original = jaxpr_interpret.JaxprInterpreter.interpret


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs kernels on the CPU with race detection; a race in any of them is an error."""
    original, states = gpu_callbacks.GPURaceDetectionState, []

    def recorded(*arguments, **options):
        # The interpreter starts anew for every kernel, and forgets what it found in the last one.
        states.append(original(*arguments, **options))
        return states[-1]

    gpu_callbacks.GPURaceDetectionState = recorded
    jaxpr_interpret.JaxprInterpreter.interpret = _interpret
    gpu_callbacks.reset_gpu_interpret_mode_state()
    _IN_FLIGHT.clear()
    try:
        # With upstream's 5 clocks of asynchronous copies and products, a later one that shares a clock hides races.
        with _mosaic_gpu.interpreted(detect_races=True, num_tma_threads_per_device=64):
            yield
        jax.effects_barrier()
        assert not any(state.races_found for state in states), "the interpreter found a race"
    finally:
        gpu_callbacks.GPURaceDetectionState = original
        jaxpr_interpret.JaxprInterpreter.interpret = _original
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _is_ref(aval) -> bool:
    return isinstance(aval, state_types.AbstractRef)


def _shape_after(ref_aval, treedef) -> tuple[int, ...]:
    """Shape of a reference behind its transforms; their dynamic leaves do not matter for it."""
    transforms = jax.tree.unflatten(treedef, [0] * treedef.num_leaves)
    return state_types.TransformedRef(ref_aval, tuple(transforms)).shape


def _logging(location, thread, equation):
    return shared_memory.GPULoggingInfo(location, thread, equation.source_info)


def _allocate_registers(self, token, value, equation):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=equation.source_info,
    )


def _free(self, token, key, equation):
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        source_info=equation.source_info,
    )


def _transforms(transforms):
    return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))


def _asynchronous_get(self, token, key, transforms, shape, dtype, equation):
    """Reads a wgmma operand as the asynchronous proxy does: generic writes before it need `commit_smem`, and the next
    TMA write needs a wait for the product and a barrier after it."""

    @gpu_callbacks.fail_on_exception
    def read(token, key, transforms, thread, location):
        memory = gpu_callbacks._get_shared_memory()
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        access = memory.access(key, _transforms(transforms))
        log = _logging(location, thread, equation)
        value, _, _ = memory.get_buffer_content(
            key, access, thread, increment_clock=False, logging_info=log
        )
        if memory.detect_races:
            tma_thread = memory.get_next_tma_thread_id()
            with memory.lock:
                clock = memory.clocks[thread].copy()
                clock.inc(tma_thread)
                _IN_FLIGHT[thread][-1][1].append(clock)
            gpu_callbacks.get_races().check_read(
                thread, clock.async_smem_clock.copy(), key, access, source_info=equation.source_info
            )
        return token, value

    return callback.io_callback(
        read,
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(shape, dtype)),
        token,
        key,
        transforms,
        self.thread,
        self.mesh_location,
    )


def _host_key(accumulator):
    return gpu_callbacks.HostAllocationKey.from_array(accumulator)


def _start_product(self, token, accumulator):
    @gpu_callbacks.fail_on_exception
    def start(token, accumulator, thread):
        _IN_FLIGHT[thread].append((_host_key(accumulator), []))
        return token

    return callback.io_callback(
        start, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, accumulator, self.thread
    )


def _wait_for_products(self, token, most, accumulator=None):
    """Ends products until at most `most` are in flight (None: ends none); then none of them may own `accumulator`."""

    @gpu_callbacks.fail_on_exception
    def wait(token, thread, *accumulator):
        memory = gpu_callbacks._get_shared_memory()
        products = _IN_FLIGHT[thread]
        while most is not None and len(products) > most:
            _, clocks = products.popleft()
            with memory.lock:
                for clock in clocks:
                    memory.clocks[thread].update(clock)
        for key in map(_host_key, accumulator):
            assert all(key != owner for owner, _ in products), "an accumulator still in flight"
        return token

    keys = () if accumulator is None else (accumulator,)
    return callback.io_callback(wait, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, self.thread, *keys)


def _load_accumulator(self, token, key, aval, equation):
    return callback.io_callback(
        functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=equation.source_info),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_allocation_key_as_array=key,
        wait_n=0,
    )


def _store_accumulator(self, token, key, value, equation):
    @gpu_callbacks.fail_on_exception
    def store(token, key, value, thread, location):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        memory = gpu_callbacks._get_shared_memory()
        log = _logging(location, thread, equation)
        memory.store_buffer_content(
            key, memory.access(key, ()), np.asarray(value), thread, logging_info=log
        )
        return token

    return callback.io_callback(
        store, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, key, value, self.thread, self.mesh_location
    )


def _modify(self, token, key, transforms, value, operation, equation):
    """Atomic read-modify-write on the host, outside the race detector's view: atomics never race."""

    @gpu_callbacks.fail_on_exception
    def modify(token, key, transforms, value, thread, location):
        with _LOCK:
            memory = gpu_callbacks._get_shared_memory()
            key = gpu_callbacks.HostAllocationKey.from_array(key)
            access = memory.access(key, _transforms(transforms))
            log = _logging(location, thread, equation)
            value = np.asarray(value)
            old, _, _ = memory.get_buffer_content(key, access, thread, logging_info=log)
            memory.store_buffer_content(
                key, access, operation(old, value), thread, logging_info=log
            )
        return token

    return callback.io_callback(
        modify,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token,
        key,
        transforms,
        value,
        self.thread,
        self.mesh_location,
    )


def _wgmma(self, equation, token, values):
    accumulator, left, right, *leaves = values
    empty = jax.tree.structure([])
    trees = [
        equation.params[name] or empty
        for name in ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
    ]
    sliced, left_transforms, right_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(tuple(trees)), leaves
    )
    assert not sliced, "slices of accumulators are not modelled"
    accumulator_aval, left_aval, right_aval = (v.aval for v in equation.invars[:3])
    rows, columns = accumulator_aval.shape
    right, right_transforms = jaxpr_interpret.resolve_ref(right_aval, right, right_transforms)
    inner = left_aval.shape[1]
    token = _start_product(self, token, accumulator)
    if _is_ref(left_aval):
        left, left_transforms = jaxpr_interpret.resolve_ref(left_aval, left, left_transforms)
        inner = _shape_after(left_aval, trees[1])[1]
        token, left = _asynchronous_get(
            self, token, left, left_transforms, (rows, inner), left_aval.dtype, equation
        )
    token, right = _asynchronous_get(
        self, token, right, right_transforms, (inner, columns), right_aval.dtype, equation
    )
    token, value = _load_accumulator(self, token, accumulator, accumulator_aval, equation)
    product = jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32), precision="highest")
    value = value + product.astype(value.dtype)
    return _store_accumulator(self, token, accumulator, value, equation), []


def _wait(self, equation, token, values):
    return _wait_for_products(self, token, equation.params["n"]), []


def _get_accumulator(self, equation, token, values):
    (accumulator,) = values
    token = _wait_for_products(self, token, equation.params["wait_n"], accumulator)
    token, value = _load_accumulator(self, token, accumulator, equation.outvars[0].aval, equation)
    return token, [value]


def _set_accumulator(self, equation, token, values):
    accumulator, value = values
    token = _wait_for_products(self, token, None, accumulator)
    return _store_accumulator(self, token, accumulator, value, equation), [value]


def _run_state(self, equation, token, values):
    jaxpr = equation.params["jaxpr"]
    keys, owned = [], []
    for inner, outer, value in zip(jaxpr.invars, equation.invars, values, strict=True):
        own = _is_ref(inner.aval) and not _is_ref(outer.aval)
        if own:
            token, value = _allocate_registers(self, token, value, equation)
        keys.append(value)
        owned.append(own)
    token, _ = self.interpret(jaxpr, token, *getattr(jaxpr, "consts", ()), *keys)
    token = _wait_for_products(self, token, 0)
    results = []
    for inner, key, own in zip(jaxpr.invars, keys, owned, strict=True):
        if own:
            token, value = _load_accumulator(self, token, key, inner.aval, equation)
            token = _free(self, token, key, equation)
            results.append(value)
        else:
            results.append(key)
    return token, results


def _atomic(self, equation, token, values):
    ref, transforms, value = equation.params["args_tree"].unflatten(values)
    ref, transforms = jaxpr_interpret.resolve_ref(
        equation.invars[0].aval, ref, tuple(transforms or ())
    )
    operation = _REDUCTIONS[equation.params["atomic_type"].value]
    return _modify(self, token, ref, transforms, value, operation, equation), []


class _Reduction(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A copy by TMA that combines with what is there: reads shared memory as any copy does, writes atomically."""

    operation = np.add

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        value, _, _ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=self.logging_info
        )
        shape = tuple(memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        inside = gpu_callbacks._clip_store_to_shape(self.dst_access, np.asarray(value), shape)
        if inside is not None:
            access, value = inside
            place = {"logging_info": self.logging_info}
            with _LOCK:
                old, _, _ = memory.get_buffer_content(
                    self.dst_allocation_key, access, self.thread, **place
                )
                memory.store_buffer_content(
                    self.dst_allocation_key,
                    access,
                    self.operation(old, value),
                    self.thread,
                    **place,
                )
        if memory.detect_races:
            assert self.clock is not None
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        self.post_write(tma_thread_id, memory)


def _reduce(operation, equation, token, source, target, thread, location):
    memory = gpu_callbacks._get_shared_memory()
    accesses = []
    for key, transforms in (source, target):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        accesses += [key, memory.access(key, _transforms(transforms))]
    clock = memory.incr_clock(thread) if memory.detect_races else None
    task = _Reduction(location, thread, *accesses, equation.source_info, clock)
    task.operation = operation
    memory.execute_async_task(task)
    return token


def _smem_to_gmem(self, equation, token, values):
    params = dict(equation.params)
    source, target, *flat = values
    predicate = flat.pop() if params["has_user_predicate"] else None

    def copy(token):
        if params["reduction_op"] is None:
            plain = params | {"has_user_predicate": False}
            return jaxpr_interpret.JaxprInterpreter._interpret_copy_smem_to_gmem_p(
                self, equation, token, source, target, *flat, **plain
            )[0]
        trees = (params["src_transforms_treedef"], params["dst_transforms_treedef"])
        from_transforms, to_transforms = jax.tree.unflatten(
            jax.tree_util.treedef_tuple(trees), flat
        )
        source_aval, target_aval = (v.aval for v in equation.invars[:2])
        from_key, from_transforms = jaxpr_interpret.resolve_ref(
            source_aval, source, from_transforms
        )
        to_key, to_transforms = jaxpr_interpret.resolve_ref(target_aval, target, to_transforms)
        reduce = functools.partial(_reduce, _REDUCTIONS[params["reduction_op"]], equation)
        return callback.io_callback(
            gpu_callbacks.fail_on_exception(reduce),
            gpu_callbacks.TOKEN_SHAPE_DTYPE,
            token,
            (from_key, from_transforms),
            (to_key, to_transforms),
            self.thread,
            self.mesh_location,
        )

    if predicate is None:
        return copy(token), []
    return lax.cond(predicate, copy, lambda token: token, token), []


def _gmem_to_smem(self, equation, token, values):
    *values, predicate = values

    def copy(token):
        return jaxpr_interpret.JaxprInterpreter._interpret_copy_gmem_to_smem_p(
            self, equation, token, lambda: values
        )[0]

    return lax.cond(predicate, copy, lambda token: token, token), []


def _handler(equation):
    primitive, params = equation.primitive, equation.params
    if primitive is primitives.copy_smem_to_gmem_p:
        special = params["has_user_predicate"] or params["reduction_op"] is not None
        return _smem_to_gmem if special else None
    if primitive is primitives.copy_gmem_to_smem_p:
        return _gmem_to_smem if params.get("has_user_predicate") else None
    return {
        primitives.wgmma_ref_p: _wgmma,
        primitives.wgmma_wait_p: _wait,
        primitives.wgmma_accumulator_deref_p: _get_accumulator,
        primitives.wgmma_accumulator_store_p: _set_accumulator,
        discharge.run_state_p: _run_state,
        primitives.atomic_store_p: _atomic,
    }.get(primitive)


def _interpret(self, jaxpr, token, *arguments):
    """Upstream's loop over equations, with the primitives above handled here, one equation at a time."""
    if not any(_handler(equation) for equation in jaxpr.eqns):
        return _original(self, jaxpr, token, *arguments)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, jax_core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        handler = _handler(equation)
        if handler is not None:
            info = equation.source_info
            with source_info_util.user_context(info.traceback, name_stack=info.name_stack):
                token, results = handler(self, equation, token, [read(v) for v in equation.invars])
        else:
            inputs = [v for v in equation.invars if not isinstance(v, jax_core.Literal)]
            inputs = list(dict.fromkeys(inputs))
            outputs = [v for v in equation.outvars if not isinstance(v, jax_core.DropVar)]
            single = types.SimpleNamespace(
                constvars=[], invars=inputs, outvars=outputs, eqns=[equation]
            )
            token, found = _original(self, single, token, *[known[v] for v in inputs])
            found = dict(zip(outputs, found, strict=True))
            results = [found.get(v) for v in equation.outvars]
        for variable, result in zip(equation.outvars, results, strict=True):
            if not isinstance(variable, jax_core.DropVar):
                known[variable] = result
    return token, [read(v) for v in jaxpr.outvars]
