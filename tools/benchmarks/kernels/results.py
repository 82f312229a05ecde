"""The rows of a run, their JSON file, and the tables printed from them. Runs without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.common.inputs import Case
from tools.benchmarks.common.markdown import number, table
from tools.benchmarks.kernels.measure import Cell

GIB = 2**30
# Columns, as they are called in the JSON file and in the tables.
FORWARD, STEP, FORWARD_PEER_SIGMA = "ours fwd", "ours fwd+bwd", "ours fwd sigma 1e6"
FORWARD_FIRST, STEP_FIRST = "first chunk too, fwd", "first chunk too, fwd+bwd"
CUDNN_FORWARD, CUDNN_STEP = "cuDNN fwd", "cuDNN fwd+bwd"
FLASH_FORWARD, FLASH_STEP = "FA2 fwd", "FA2 fwd+bwd"
PEER = "released fwd"
COLUMNS = (
    FORWARD,
    STEP,
    FORWARD_FIRST,
    STEP_FIRST,
    CUDNN_FORWARD,
    CUDNN_STEP,
    FLASH_FORWARD,
    FLASH_STEP,
    FORWARD_PEER_SIGMA,
    PEER,
)
SMALLEST_KERNEL = 0.01  # share of a call's time above which a kernel is printed


@dataclass
class Row:
    """One case and all that was measured on it.

    kernels: milliseconds by kernel of one forward + backward call (forward alone with --forward-only).
    selected: (token, KV head, chunk) triples. peer_density, peer_difference: see `peer.PeerResult`.
    errors: what failed outside the columns, by what it was.
    """

    case: Case
    routing_scale: float | None = None
    selected: int | None = None
    tile_efficiency: float | None = None
    columns: dict[str, Cell] = field(default_factory=dict)
    stages: dict[str, Cell] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    peer_density: float | None = None
    peer_difference: float | None = None
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        case = self.case
        return f"{case.seq_len} ({case.query_heads}, {case.kv_heads}) {case.inputs} {case.asked_density:g}"

    @property
    def density(self) -> float | None:
        return None if self.selected is None else self.selected / self.case.available

    def milliseconds(self, column: str) -> float | None:
        return self.columns.get(column, Cell()).median_ms

    def speed_up(self, ours: str, other: str) -> float | None:
        """Speed-up of our column over another."""
        own_time, other_time = self.milliseconds(ours), self.milliseconds(other)
        return None if own_time is None or other_time is None else other_time / own_time

    def of_ideal(self, ours: str, other: str) -> float | None:
        """Speed-up over a dense column, as a share of 1 / density."""
        speed_up = self.speed_up(ours, other)
        return None if speed_up is None or self.density is None else speed_up * self.density

    @property
    def teraflops(self) -> float | None:
        """TFLOP/s of the forward pass, all stages, on the FLOPs of `Case.selected_flops`."""
        milliseconds = self.milliseconds(FORWARD)
        if milliseconds is None or self.selected is None:
            return None
        return self.case.selected_flops(self.selected) / milliseconds / 1e9

    def failures(self) -> dict[str, str]:
        """Every error of the row by the name of what failed."""
        cells = self.columns | {f"stage {name}": cell for name, cell in self.stages.items()}
        return self.errors | {name: cell.error for name, cell in cells.items() if cell.error}


def write_json(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """One object: the environment's entries, and under "rows" one object a row; derived figures are written as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = environment | {"rows": [asdict(row) | {"derived": _derived(row)} for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(environment, rows) of a file that write_json wrote."""
    environment = json.loads(path.read_text())
    rows = []
    for entry in environment.pop("rows"):
        del entry["derived"]  # computed again where it is needed
        cells = {name: {key: Cell(**cell) for key, cell in entry.pop(name).items()} for name in ("columns", "stages")}
        rows.append(Row(case=Case(**entry.pop("case")), columns=cells["columns"], stages=cells["stages"], **entry))
    return environment, rows


def _derived(row: Row) -> dict[str, float | None]:
    return {
        "density": row.density,
        "forward_teraflops": row.teraflops,
        "forward_speed_up_over_cudnn": row.speed_up(FORWARD, CUDNN_FORWARD),
        "step_speed_up_over_cudnn": row.speed_up(STEP, CUDNN_STEP),
        "forward_speed_up_over_released": row.speed_up(FORWARD_PEER_SIGMA, PEER),
        "step_peak_over_qkv": _peak(row, STEP, row.case.qkv_bytes),
    }


def _peak(row: Row, column: str, unit: int) -> float | None:
    peak = row.columns.get(column, Cell()).peak_bytes
    return None if peak is None else peak / unit


def tables(rows: list[Row]) -> str:
    """Markdown: routing, times, speed-ups, peak memory, stages; then kernels and errors as lists."""
    columns = [name for name in COLUMNS if any(name in row.columns for row in rows)]
    stages = list(dict.fromkeys(name for row in rows for name in row.stages))
    sections = [
        _table(
            "Routing",
            rows,
            {
                "density": lambda row: number(row.density, 4),
                "routing_scale": lambda row: number(row.routing_scale, 5),
                "tile efficiency": lambda row: number(row.tile_efficiency, 3),
                "TFLOP/s on selected chunks": lambda row: number(row.teraflops, 1),
                "released: density": lambda row: number(row.peer_density, 4),
                "released: output differs by": lambda row: number(row.peer_difference, 4),
            },
        ),
        _table("Milliseconds, median", rows, {name: _time_of(name) for name in columns}),
        _table(
            "Times faster, and that as a share of 1 / density",
            rows,
            {
                "ideal": lambda row: number(None if row.density is None else 1 / row.density, 2),
                "fwd / cuDNN": lambda row: number(row.speed_up(FORWARD, CUDNN_FORWARD), 2),
                "share": lambda row: number(row.of_ideal(FORWARD, CUDNN_FORWARD), 2),
                "fwd+bwd / cuDNN": lambda row: number(row.speed_up(STEP, CUDNN_STEP), 2),
                "share ": lambda row: number(row.of_ideal(STEP, CUDNN_STEP), 2),
                "fwd / FA2": lambda row: number(row.speed_up(FORWARD, FLASH_FORWARD), 2),
                "fwd+bwd / FA2": lambda row: number(row.speed_up(STEP, FLASH_STEP), 2),
                "fwd sigma 1e6 / released": lambda row: number(row.speed_up(FORWARD_PEER_SIGMA, PEER), 2),
            },
        ),
        _table(
            "Peak memory beyond inputs, output and their gradients, GiB (multiple of q + k + v)",
            rows,
            {name: _memory_of(name) for name in columns},
        ),
        _table("Stages, ms", rows, {name: _stage_of(name) for name in stages}),
        *(_kernels(row) for row in rows if row.kernels),
        *(_failures(row) for row in rows if row.failures()),
    ]
    return "\n\n".join(sections)


def _table(title: str, rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    cells = [[row.label, *(show(row) for show in columns.values())] for row in rows]
    return table(title, ["T, heads, inputs, density asked", *columns], cells)


def _time_of(column: str) -> Callable[[Row], str]:
    return lambda row: _cell(row.columns.get(column))


def _stage_of(stage: str) -> Callable[[Row], str]:
    return lambda row: _cell(row.stages.get(stage))


def _memory_of(column: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        gibibytes, multiple = _peak(row, column, GIB), _peak(row, column, row.case.qkv_bytes)
        return f"{number(gibibytes, 2)} ({number(multiple, 2)})" if gibibytes is not None else "-"

    return show


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return "error" if cell.error else number(cell.median_ms, 3)


def _kernels(row: Row) -> str:
    total = sum(row.kernels.values())
    lines = [
        f"- {milliseconds:.3f} ms, {milliseconds / total:.1%}: {name}"
        for name, milliseconds in row.kernels.items()
        if milliseconds >= SMALLEST_KERNEL * total
    ]
    return "\n".join([f"Kernels of one call, {row.label}, {total:.3f} ms together:", *lines])


def _failures(row: Row) -> str:
    return "\n".join([f"Errors, {row.label}:", *(f"- {name}: {text}" for name, text in row.failures().items())])
