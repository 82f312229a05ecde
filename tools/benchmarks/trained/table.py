"""Results on trained inputs as tables, one for each model."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = ("layer", "density", "chunks 50 % / 99 %", "tile efficiency", "fwd", "x cuDNN", "fwd+bwd", "x cuDNN", "host")
_STAGES = ("route", "attend", "query gradient", "key gradient")


def as_markdown(record: dict[str, Any]) -> str:
    """The environment, then one table for each model."""
    lines = [
        *provenance(record),
        "",
        "Milliseconds of one layer. host: until a call of forward and backward returns to Python.",
    ]
    for model in record["models"]:
        query_heads, kv_heads = model["heads"]
        title = f"({query_heads}, {kv_heads}) heads, T = {model['tokens']}, loss {model['loss']:.3f} after training"
        lines += [
            "",
            table(
                title,
                (*_HEADER, *_STAGES, "largest error"),
                [_cells(index, row) for index, row in enumerate(model["layers"])],
            ),
        ]
    return "\n".join(lines) + "\n"


def _cells(index: int, row: dict[str, Any]) -> list[str]:
    cudnn: dict[str, Any] = row.get("cudnn", {})
    cells = [
        str(index),
        number(row["density"], 4),
        f"{row['chunks']['0.5']:.0f} / {row['chunks']['0.99']:.0f}",
        number(row.get("tile_efficiency"), 2),
    ]
    for part in ("forward", "forward_backward"):
        ours, dense = row.get(part), cudnn.get(part)
        cells += [number(ours, 2), number(dense / ours if ours and dense else None, 2)]
    stages: dict[str, Any] = row.get("stages", {})
    cells += [number(row.get("host"), 2), *(number(stages.get(stage), 2) for stage in _STAGES)]
    worst = max(row["errors"], key=row["errors"].__getitem__)
    return [*cells, f"{row['errors'][worst]:.0e} ({worst})"]
