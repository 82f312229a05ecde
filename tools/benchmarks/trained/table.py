"""Results on trained inputs as tables, one for each model."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_HEADER = (
    "layer",
    "density",
    "chunks 50 % / 99 %",
    "tiles",
    "fwd ms",
    "x cuDNN",
    "fwd+bwd ms",
    "x cuDNN",
    "route",
    "key gradient",
)


def as_markdown(record: dict[str, Any]) -> str:
    """The environment, then one table for each model."""
    lines = provenance(record)
    for model in record["models"]:
        query_heads, kv_heads = model["heads"]
        title = f"({query_heads}, {kv_heads}) heads, T = {model['tokens']}, loss {model['loss']:.3f} after training"
        lines += ["", table(title, _HEADER, [_cells(index, row) for index, row in enumerate(model["layers"])])]
    return "\n".join(lines) + "\n"


def _cells(index: int, row: dict[str, Any]) -> list[str]:
    ms, stages = row.get("ms", {}), row.get("stages", {})

    def ratio(name: str) -> float | None:
        ours, cudnn = ms.get(name), ms.get(f"cudnn_{name}")
        return cudnn / ours if ours and cudnn else None

    return [
        str(index),
        number(row["density"], 4),
        f"{row['chunks']['0.5']:.0f} / {row['chunks']['0.99']:.0f}",
        number(row.get("tile_efficiency"), 2),
        number(ms.get("forward"), 2),
        number(ratio("forward"), 2),
        number(ms.get("forward_backward"), 2),
        number(ratio("forward_backward"), 2),
        number(stages.get("route"), 2),
        number(stages.get("key gradient"), 2),
    ]
