"""The file of tuned configurations: written by the command, used only when loaded."""

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import jax

from pallas_kernels.autotune.measure import OPERATORS, Result

FORMAT = 1
TIMED, COMPILED = "time", "machine code"


def save(path: pathlib.Path, found: dict[str, list[Result]], *, device: str, basis: str) -> None:
    """Writes the best of each cell, and the others behind it."""
    entries = {}
    for key, results in found.items():
        rows = [
            {"config": dataclasses.asdict(x.config), "seconds": x.seconds, "facts": list(x.facts)}
            for x in results
        ]
        entries[key] = {"best": rows[0]["config"], "candidates": rows}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    record = {"format": FORMAT, "basis": basis, "device": device, "jax": _jax_series()}
    path.write_text(json.dumps(record | {"date": date, "entries": entries}, indent=1) + "\n")


def _jax_series() -> str:
    """The part of JAX's version that decides how kernels are compiled."""
    return ".".join(jax.__version__.split(".")[:2])


def load(path: str | pathlib.Path, *, device: str | None = None) -> int:
    """Uses a file of this command for calls traced from now on in this process; returns how many entries it holds.

    Functions compiled before keep what they were compiled with. What was loaded before for the operators of which the
    file has entries is replaced, other operators keep theirs.

    Args:
      path: the file.
      device: kind of the GPU that it must be of; that of `jax.devices()[0]` by default.

    Raises:
      ValueError: the file is not one of these, was made on other hardware or another JAX, was not timed, or holds a
        configuration that does not exist or does not fit.
    """
    device = device or jax.devices()[0].device_kind
    try:
        record = json.loads(pathlib.Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`path` must hold JSON, {path} does not: {error}") from error
    record = record if isinstance(record, dict) else {}
    rules = {"format": FORMAT, "basis": TIMED, "device": device, "jax": _jax_series()}
    for name, rule in rules.items():
        if record.get(name) != rule:
            raise ValueError(f"`{name}` in {path} must be {rule!r}, got {record.get(name)!r}")
    entries = record.get("entries")
    if not isinstance(entries, dict):
        raise ValueError(f"`entries` in {path} must be an object, got {type(entries).__name__}")
    kinds = {name: operator.kinds() for name, operator in OPERATORS.items()}
    tables: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        name = next((name for name in OPERATORS if key in kinds[name]), None)
        if name is None:
            raise ValueError(f"`entries` in {path} has the unknown key {key!r}")
        config = _config(path, key, entry, kinds[name][key])
        if error := OPERATORS[name].refusal(key, config):
            raise ValueError(f"{key!r} in {path}: {error}")
        tables.setdefault(name, {})[key] = config
    for name, table in tables.items():
        OPERATORS[name].use_tuned(table)
    return len(entries)


def _config(path, key: str, entry: Any, kind: type) -> Any:
    """The configuration of an entry, every field of its type."""
    values = entry.get("best") if isinstance(entry, dict) else None
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict) or set(values) != set(fields):
        raise ValueError(f"{key!r} in {path} must have a `best` with exactly {', '.join(fields)}")
    for name, value in values.items():
        if type(value) is not fields[name]:
            raise ValueError(
                f"`{name}` of {key!r} in {path} must be {fields[name].__name__}, got {value!r}"
            )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{key!r} in {path}: {error}") from error
