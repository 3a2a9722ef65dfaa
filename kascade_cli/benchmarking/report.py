"""What a benchmark leaves behind: rows, the machine they were measured on, tables, CSV and pictures."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kascade_cli import provenance
from kascade_cli.benchmarking.shapes import Shape, describe_sizes
from kascade_cli.errors import require_extra

Row = dict[str, Any]

SCHEMA = "kascade-bench/v1"
_PACKAGES = ("kascade-cli", "torch", "transformers", "tilelang", "flash-attn-4", "flash-attn-3", "flashinfer-python")
_COLUMNS = {
    "size": "size",
    "name": "name",
    "ms_p20": "p20",
    "ms_p50": "p50 ms",
    "ms_p80": "p80",
    "rate": "rate",
    "tokens_s": "tokens/s",
    "speedup": "speedup",
    "baseline": "over",
}


def base_row(shape: Shape, phase: str, batch: int, context: int, setting: Any) -> Row:
    """The part that all rows of one measurement share."""
    return {
        "phase": phase,
        "batch": batch,
        "context": context,
        "size": describe_sizes(batch, context),
        "shape": shape.name,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "dtype": setting.dtype_name,
        "ratio": setting.budget.ratio_at(context),
        "backend": setting.backend.name,
    }


def strategy_fields(setting: Any) -> Row:
    """Under which strategy a row was measured."""
    refresh = {} if setting.refresh is None else {"refresh": setting.refresh}
    return {"strategy": setting.strategy} | refresh


def machine(device: torch.device) -> dict[str, Any]:
    """Name, capability and versions of what measures, the date (UTC) and the commit."""
    versions = provenance.versions(_PACKAGES) | {"cuda": torch.version.cuda or "none"}
    about: dict[str, Any] = {"device": "cpu", "gpu": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about = {
            "device": properties.name,
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    else:
        about["threads"] = torch.get_num_threads()
    return about | {"versions": versions, "date": provenance.now(), "commit": provenance.commit()}


def document(device: torch.device, rows: Sequence[Row], ceilings: dict[str, float], **more: Any) -> dict[str, Any]:
    """The result file: what was measured and on what. `rows` is what `select-anchors --cost` reads."""
    rounded = {name: float(f"{value:.4g}") for name, value in ceilings.items()}
    return {"schema": SCHEMA, **machine(device), "ceilings": rounded, **more, "rows": list(rows)}


def caption(result: dict[str, Any]) -> str:
    """Two facts a reader needs: the machine, and what it can do at best."""
    best = result["ceilings"]
    limits = f"copies {best['copy_gb_s']:.0f} GB/s, multiplies {best['matmul_tflop_s']:.3g} TFLOP/s"
    if result["gpu"] is None:
        return f"CPU figures (no GPU here): they say nothing about the kernels' speed. This CPU {limits}."
    return f"{result['gpu']}, measured here: {limits}."


def _format(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if name == "speedup":
            return f"{value:.2f}x"
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3f}"
    return str(value)


def render(result: dict[str, Any], console: Any) -> None:
    """The rich table of a result."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = [_display(row) for row in result["rows"]]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        here = [row for row in rows if row["phase"] == phase]
        shown = [row for row in here if "skipped" not in row and "error" not in row]
        names = [name for name in _COLUMNS if any(row.get(name) is not None for row in shown)]
        over = {row.get("baseline") for row in shown} - {None}
        title = _title(here, phase)
        if len(over) == 1:  # one word in the title instead of a column of it
            title = f"{title}, speedup over {over.pop()}"
            names = [name for name in names if name != "baseline"]
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in names:
            left = name in ("size", "name", "baseline")
            table.add_column(_COLUMNS[name], justify="left" if left else "right", no_wrap=True)
        for before, row in zip([None, *shown], shown, strict=False):
            if before and before["size"] != row["size"]:
                table.add_section()
            table.add_row(*(_format(name, row.get(name)) for name in names))
        console.print(table)
        reasons: dict[str, list[str]] = {}
        for row in here:
            if reason := row.get("skipped") or row.get("error"):
                where = row["name"] if "skipped" in row else f"{row['name']} {row['size']}"
                reasons.setdefault(reason, []).append(where)
        for reason, names in reasons.items():
            console.print(f"not measured: {', '.join(dict.fromkeys(names))}: {reason}", markup=False)
    console.print(caption(result), markup=False)


def _title(rows: Iterable[Row], phase: str) -> str:
    """The phase, and the strategy where it is not kascade."""
    return ", ".join([phase, *sorted({row.get("strategy", "kascade") for row in rows} - {"kascade"})])


def _display(row: Row) -> Row:
    """One rate for both kinds, and of a model row its mean per layer where others have their median."""
    units = {"gb_s": "GB/s", "tflop_s": "TFLOP/s"}
    rates = [f"{_format(name, row[name])} {unit}" for name, unit in units.items() if row.get(name)]
    shown = {**row, "rate": rates[0] if rates else None}
    return shown | ({"ms_p50": row["mean_ms"], "name": "mean"} if row["kind"] == "model" else {})


def to_csv(rows: Iterable[Row]) -> str:
    """One line per row, all fields that any row has."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(result: dict[str, Any], path: Path) -> None:
    """A PNG of medians per size: bars for every row that has one. Needs matplotlib (extra `plot`)."""
    require_extra("matplotlib", "plot").use("Agg")
    pyplot = require_extra("matplotlib.pyplot", "plot")
    rows = [row for row in map(_display, result["rows"]) if row.get("ms_p50")]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    figure, axes = pyplot.subplots(1, max(1, len(phases)), figsize=(6.4 * max(1, len(phases)), 4.2), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=False):
        here = [row for row in rows if row["phase"] == phase and not row["name"].startswith("pass")]
        sizes = list(dict.fromkeys(row["size"] for row in here))
        names = list(dict.fromkeys(row["name"] for row in here))
        width = 0.8 / len(names)
        for n, name in enumerate(names):
            points = [(sizes.index(row["size"]), row["ms_p50"]) for row in here if row["name"] == name]
            axis.bar([x + n * width for x, _ in points], [y for _, y in points], width, label=name)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(sizes))], sizes)
        axis.set(yscale="log", ylabel="milliseconds, median", xlabel="batch x context", title=_title(here, phase))
        axis.legend(fontsize=7, ncols=2)
    figure.suptitle(caption(result), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
