"""`python -m benchmarks.report`: the one place that turns results into tables and plots.

Every JSON under `benchmarks/results/<machine>/` whose suite has an entry in `REPORTS` becomes a markdown file, and
where the entry draws, a PNG, beside it. Another suite joins by one entry.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = pathlib.Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How the rows of a suite are shown.

    Attributes:
      title: heading of the page.
      columns: heading -> text of the cell of a row; a row for which a column raises KeyError is left out of the
        table and counted below it.
      plot: draws all rows on an axis, or None.
    """

    title: str
    columns: dict[str, Callable[[Row], str]]
    plot: Callable[[Any, list[Row]], None] | None = None


def table(columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """A markdown table; rows that lack what a column needs are counted below it."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    missing = 0
    for row in rows:
        try:
            lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
        except KeyError:
            missing += 1
    if missing:
        lines += ["", f"{missing} of {len(rows)} rows were not measured."]
    return "\n".join(lines)


def conditions(record: dict[str, Any]) -> str:
    """One line on what the numbers depend on."""
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    return (
        f"`python -m benchmarks.run {record['suite']}`, {record['date']}, {record['machine']}, "
        f"backend {record['backend']}, Python {record['python']}, {versions}, commit {record['commit'][:10]}."
    )


def milliseconds(variant: str) -> Callable[[Row], str]:
    """Cell: median (least) milliseconds of a variant of `timing.paired`."""

    def cell(row: Row) -> str:
        seconds = row["seconds"][variant]
        return f"{seconds['median'] * 1e3:.1f} ({seconds['min'] * 1e3:.1f})"

    return cell


def ratio(variant: str, ours: str = "ours") -> Callable[[Row], str]:
    """Cell: how many times faster `ours` is than `variant`, by medians (by least times)."""

    def cell(row: Row) -> str:
        one, other = row["seconds"][ours], row["seconds"][variant]
        return f"{other['median'] / one['median']:.2f} ({other['min'] / one['min']:.2f})"

    return cell


def field(name: str) -> Callable[[Row], str]:
    """Cell: a field of the row, unformatted."""
    return lambda row: str(row[name])


def per_call(variant: str) -> Callable[[Row], str]:
    """Cell: time of one call, in microseconds or milliseconds as the row has it."""

    def cell(row: Row) -> str:
        micro, milli = row.get("microseconds", {}), row.get("milliseconds", {})
        if variant in micro:
            return f"{micro[variant]:,.0f} us"
        return f"{milli[variant]:.1f} ms" if variant in milli else ""

    return cell


def megabytes(variant: str) -> Callable[[Row], str]:
    """Cell: bytes of a variant in MB."""
    return lambda row: f"{row['bytes'][variant] / 1e6:,.1f}"


def number(name: str, digits: int = 3) -> Callable[[Row], str]:
    """Cell: a number of the row to so many significant digits, thousands apart."""

    def cell(row: Row) -> str:
        value = row[name]
        return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"

    return cell


def published(row: Row) -> str:
    """Cell: milliseconds by library, where they were published."""
    return ", ".join(f"{name} {ms:g}" for name, ms in row["published_ms"].items())


def errors(what: str, plan: str) -> Callable[[Row], str]:
    """Cell: a relative error of one plan."""
    return lambda row: f"{row['relative_error'][what][plan]:.1e}"


def delta_rule_seconds(row: Row) -> str:
    """Cell: milliseconds of one call."""
    return f"{row['seconds'] * 1e3:.3f}"


def where_measured(cell: Callable[[Row], str]) -> Callable[[Row], str]:
    """The cell, empty for rows of another kind."""

    def blank_or_cell(row: Row) -> str:
        try:
            return cell(row)
        except KeyError:
            return ""

    return blank_or_cell


def worst_error(row: Row) -> str:
    """Cell: the largest relative error, and of what."""
    what, error = max(row["relative_error"].items(), key=lambda item: item[1])
    return f"{error:.1e} ({what})"


def plot_bytes(axis, rows: list[Row]) -> None:
    """Bytes over length, one line per variant, both axes logarithmic."""
    for variant in rows[0]["bytes"]:
        axis.plot(
            [row["length"] for row in rows],
            [row["bytes"][variant] for row in rows],
            marker="o",
            label=variant,
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="temporary bytes")
    axis.legend()


def plot_growth(axis, rows: list[Row]) -> None:
    """Milliseconds over length beside a line of slope one, both axes logarithmic."""
    grown = [row for row in rows if row["what"] == "growth"]
    lengths = [row["length"] for row in grown]
    for variant in grown[0]["seconds"]:
        times = [row["seconds"][variant]["median"] * 1e3 for row in grown]
        axis.plot(lengths, times, marker="o", label=variant)
        linear = [times[0] * length / lengths[0] for length in lengths]
        axis.plot(lengths, linear, color="black", linewidth=0.6)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds, one head")
    axis.legend(title="black: in proportion")


def plot_ratios(axis, rows: list[Row]) -> None:
    """Speed relative to each peer over length, one line per task, dtype and peer (median over groups)."""
    points: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        if "seconds" not in row or row["task"] == "decode":
            continue
        for peer in row["seconds"].keys() - {"ours"}:
            value = row["seconds"][peer]["median"] / row["seconds"]["ours"]["median"]
            line = points.setdefault((row["task"], row["dtype"], peer), {})
            line.setdefault(row["length"], []).append(value)
    for key, line in sorted(points.items()):
        middle = [sorted(values)[len(values) // 2] for values in line.values()]
        axis.plot(list(line), middle, marker="o", label=" ".join(key))
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times faster than the peer")
    axis.legend(fontsize=6)


def gibibytes(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.2f}"


def sent(row: Row, *, crosses_hosts: bool) -> float:
    """Bytes that one device of a plan sends in a step, within its host or beyond."""
    return sum(t["sent_bytes"] for t in row["traffic"] if t["crosses_hosts"] == crosses_hosts)


def plot_plans(axis, rows: list[Row]) -> None:
    """Memory and bytes sent per device over the number of GPUs, both axes logarithmic."""
    devices = [row["devices"] for row in rows]
    lines = {
        "arguments": [row["argument_bytes"] for row in rows],
        "temporary": [row["temporary_bytes"] for row in rows],
        "sent over NVLink": [sent(row, crosses_hosts=False) for row in rows],
        "sent between hosts": [sent(row, crosses_hosts=True) for row in rows],
    }
    for (label, values), style in zip(lines.items(), ("-", "-", "--", "--"), strict=True):
        gib = [value / 2**30 if value else float("nan") for value in values]
        axis.plot(devices, gib, style, marker="o", label=label)
    axis.axhline(rows[0]["memory_bytes"] / 2**30, color="black", linewidth=0.8, label="the device")
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GiB per device and step")
    axis.set_xticks(devices, [str(n) for n in devices])
    axis.minorticks_off()
    axis.legend(fontsize=7)


def plot_rates(axis, rows: list[Row]) -> None:
    """TFLOP/s over length on the problem measured at most lengths: one line per implementation and direction."""
    rated = [row for row in rows if "tflops" in row]
    lengths: dict[str, set[int]] = {}
    for row in rated:
        lengths.setdefault(row["problem"], set()).add(row["length"])
    if not lengths:
        return
    problem = max(lengths, key=lambda name: len(lengths[name]))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rated:
        if row["problem"] == problem:
            line = lines.setdefault((row["implementation"], row["direction"]), [])
            line.append((row["length"], row["tflops"]))
    for (name, direction), points in sorted(lines.items()):
        style = "-" if direction == "forward" else "--"
        axis.plot(
            *zip(*sorted(points), strict=True), style, marker="o", label=f"{name} {direction}"
        )
    axis.set(xscale="log", xlabel="tokens", ylabel="TFLOP/s", title=problem)
    axis.legend(fontsize=6)


REPORTS: dict[str, Report] = {
    "planner": Report(
        title="One training step of Qwen3-8B at 32768 tokens per row, as compiled for 1 to 512 H200s",
        columns={
            "GPUs": field("devices"),
            "mesh": lambda row: " ".join(f"{k}={v}" for k, v in row["mesh"].items()),
            "rows": field("batch"),
            "arguments GiB": lambda row: gibibytes(row["argument_bytes"]),
            "temporary GiB": lambda row: gibibytes(row["temporary_bytes"]),
            "fits": lambda row: "yes" if row["fits"] else "no",
            "NVLink GiB": lambda row: gibibytes(sent(row, crosses_hosts=False)),
            "between hosts GiB": lambda row: gibibytes(sent(row, crosses_hosts=True)),
            "not hidden ms": lambda row: f"{row['exposed_seconds'] * 1e3:.0f}",
            "bound ms": lambda row: f"{row['bound']['seconds'] * 1e3:.0f} ({row['bound']['by']})",
        },
        plot=plot_plans,
    ),
    "attention_gpu": Report(
        title="Attention on a GPU: TFLOP/s of the products of visible pairs",
        columns={
            "shape": field("shape"),
            "implementation": field("implementation"),
            "direction": field("direction"),
            "ms": lambda row: f"{row['seconds'] * 1e3:.3f}",
            "TFLOP/s": lambda row: f"{row['tflops']:.0f}",
            "of matmul": lambda row: f"{row['of_matmul']:.2f}",
            "relative error": lambda row: (
                "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            ),
        },
        plot=plot_rates,
    ),
    "attention_memory": Report(
        title="Attention, forward and backward: scratch memory as compiled",
        columns={
            "T": field("length"),
            "blockwise MB": megabytes("blockwise"),
            "reference MB": megabytes("reference"),
        },
        plot=plot_bytes,
    ),
    "attention_cpu": Report(
        title="Attention on a CPU: milliseconds, median (least), and how many times faster we are",
        columns={
            "task": field("task"),
            "T or S": field("length"),
            "R": field("group"),
            "dtype": field("dtype"),
            "ours": milliseconds("ours"),
            "jax.nn": milliseconds("jax.nn"),
            "torch": milliseconds("torch"),
            "vs jax.nn": ratio("jax.nn"),
            "vs torch": ratio("torch"),
        },
        plot=plot_ratios,
    ),
    "bridge_cpu": Report(
        title="Calling JAX from PyTorch on a CPU: one call",
        columns={
            "what": field("what"),
            "T": field("length"),
            "backward": field("backward"),
            "ours": lambda row: per_call("ours" if row["what"] == "tiny" else "bridge")(row),
            "jax alone": per_call("jax"),
            "naive bridge": per_call("naive"),
            "torch eager": per_call("torch"),
            "naive / ours": lambda row: (
                f"{row['naive_over_ours']:.1f}" if "naive_over_ours" in row else ""
            ),
            "the bridge adds": lambda row: (
                f"{row['bridge_adds']:.1%}" if "bridge_adds" in row else ""
            ),
        },
    ),
    "delta_rule_cpu": Report(
        title="Gated delta rule on a CPU: milliseconds, median (least); bytes kept for the backward pass",
        columns={
            "what": field("what"),
            "pass": where_measured(field("pass")),
            "T": field("length"),
            "heads": where_measured(field("heads")),
            "ours": where_measured(milliseconds("ours")),
            "Hugging Face": where_measured(milliseconds("hugging face")),
            "times faster": where_measured(ratio("hugging face")),
            "compile s": where_measured(lambda row: f"{row['compile_seconds']:.1f}"),
            "kept bytes per token and head": where_measured(field("kept_bytes_per_token_and_head")),
            "forward alone": where_measured(milliseconds("forward")),
            "with gradients": where_measured(milliseconds("gradient")),
        },
        plot=plot_growth,
    ),
    "delta_rule_floor": Report(
        title="Gated delta rule on an H200: what it costs at least, and what others published",
        columns={
            "direction": field("direction"),
            "sequences x T": lambda row: f"{row['sequences']} x {row['length']}",
            "heads": lambda row: f"16/{row['value_heads']}",
            "GFLOP": number("gflop"),
            "minimum MB": number("minimum_mb"),
            "design MB": number("design_mb"),
            "chain": field("chain"),
            "products ms": number("products_ms"),
            "memory ms": number("memory_ms"),
            "predicted ms (P)": lambda row: f"{row['predicted_ms']:.3g} ({row['segments']})",
            "published ms": published,
        },
    ),
    "delta_rule_rounding": Report(
        title="Gated delta rule: relative error of 16-bit plans, emulated",
        columns={
            "inputs": field("inputs"),
            **{
                f"{what}, {plan}": errors(what, plan)
                for what in ("out", "final_state")
                for plan in ("ours", "ours, float16", "FLA", "FlashQLA")
            },
        },
    ),
    "delta_rule_gpu": Report(
        title="Gated delta rule on a GPU: milliseconds, and relative errors against float64",
        columns={
            "shape": field("shape"),
            "direction": field("direction"),
            "implementation": field("implementation"),
            "ms": delta_rule_seconds,
            "worst error": worst_error,
            "of copy bandwidth": lambda row: f"{row['of_copy']:.0%}" if "of_copy" in row else "",
            "published ms": lambda row: (
                f"{row['published_seconds'] * 1e3:.3g}" if "published_seconds" in row else ""
            ),
            "launched": field("launched"),
        },
    ),
    "deltanet_gpu": Report(
        title="Around the gated delta rule on a GPU: milliseconds, and relative errors against float64",
        columns={
            "shape": field("shape"),
            "direction": field("direction"),
            "implementation": field("implementation"),
            "ms": delta_rule_seconds,
            "worst error": worst_error,
            "of copy bandwidth": lambda row: f"{row['of_copy']:.0%}",
        },
    ),
}


def write(path: pathlib.Path) -> None:
    """The page, and the plot, that belong to one result."""
    record = json.loads(path.read_text())
    report = REPORTS.get(record["suite"])
    if report is None:
        return
    page = [f"# {report.title}", "", conditions(record), "", table(report.columns, record["rows"])]
    if report.plot is not None:
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        report.plot(axis, record["rows"])
        figure.savefig(path.with_suffix(".png"), dpi=90, metadata={"Software": None})
        plt.close(figure)
        page += ["", f"![{report.title}]({path.with_suffix('.png').name})"]
    path.with_suffix(".md").write_text("\n".join(page) + "\n")
    print(f"wrote {path.with_suffix('.md').relative_to(RESULTS.parent.parent)}")


def main() -> None:
    """All results of all machines."""
    for path in sorted(RESULTS.glob("*/*.json")):
        write(path)


if __name__ == "__main__":
    main()
