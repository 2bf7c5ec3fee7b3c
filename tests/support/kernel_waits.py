"""Finds the waits of a Mosaic GPU kernel in its source, and traces the kernel without one of them.

Because they are found, a new wait is tested from its first day. A kernel in which nothing is found wrong without one
means that other waits imply it, or that the interpreter does not see what it is for; its test says which.
"""

import ast
import contextlib
import dataclasses
import inspect
import pathlib
import sys
from types import ModuleType

import pytest
from jax._src import source_info_util
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.support.mosaic_gpu_interpreter import interpreted

WAITS = ("barrier_wait", "wgmma_wait", "wait_smem_to_gmem", "commit_smem")
COMPLAINT = r"found a race|RACE DETECTED|accumulator still in flight|operations completed before"


@dataclasses.dataclass(frozen=True)
class Site:
    """A wait in a file; `function` is the outermost one around it, `call` its text."""

    file: str
    line: int
    name: str
    function: str
    call: str = ""

    def __str__(self) -> str:
        return f"{pathlib.Path(self.file).stem}.{self.function}-{self.name}-{self.line}"

    @property
    def kind(self) -> tuple[str, str, str]:
        """Names a wait whatever its line."""
        return pathlib.Path(self.file).stem, self.function, self.name


def waits(module: ModuleType) -> list[Site]:
    """All waits of a kernel file, but for those that only the interpreter makes."""
    path = inspect.getsourcefile(module)
    assert path is not None
    tree = ast.parse(pathlib.Path(path).read_text())
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        skipped = set()
        for node in ast.walk(function):
            if isinstance(node, ast.If) and "interpreting" in ast.unparse(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or id(node) in skipped:
                continue
            name = ast.unparse(node.func).removeprefix("plgpu.")
            if name in WAITS:
                found.append(Site(path, node.lineno, name, function.name, ast.unparse(node)))
    return sorted(found, key=lambda site: site.line)


@contextlib.contextmanager
def without(site: Site):
    """Kernels traced inside lack the wait (in every loop that the line is traced into), and are interpreted.

    A wait for a barrier takes place, else the interpreter would miss it whether or not it were needed; but nothing that
    happened before the arrivals counts as having happened before what follows.
    """
    original = getattr(plgpu, site.name)

    def skipped(*arguments, **options):
        caller = sys._getframe(1)
        if (caller.f_code.co_filename, caller.f_lineno) != (site.file, site.line):
            original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        if site.name == "barrier_wait":
            patch.setattr(gpu_callbacks, "_barrier_wait", _learning_nothing(site))
        else:
            patch.setattr(plgpu, site.name, skipped)
        with interpreted():
            yield


def _learning_nothing(site: Site):
    """The interpreter's wait for a barrier, after which a thread that waited at `site` knows no more than before."""
    original = gpu_callbacks._barrier_wait

    @gpu_callbacks.fail_on_exception
    def wait(token, location, thread, barrier, source_info):
        frame = source_info_util.user_frame(source_info.traceback)
        assert frame is not None
        if (frame.file_name, frame.start_line) != (site.file, site.line):
            return original(token, location, thread, barrier, source_info=source_info)
        memory = gpu_callbacks._get_shared_memory()
        with memory.lock:
            known = memory.clocks[thread].copy()
        token = original(token, location, thread, barrier, source_info=source_info)
        with memory.lock:
            memory.clocks[thread] = known
        memory.incr_clock(thread)
        return token

    return wait
