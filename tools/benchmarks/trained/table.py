"""Results on trained inputs as tables, one for each model."""

from __future__ import annotations

from typing import Any

from tools.benchmarks.common.markdown import number, provenance, table

_WAYS = ("tiles", "links")
_OF_WAY = ("fwd", "x cuDNN", "fwd+bwd", "x cuDNN", "attend", "dq", "dk, dv")
_HEADER = (
    "layer",
    "density",
    "chunks 50 % / 99 %",
    "tile efficiency",
    "route",
    *(f"{way}: {column}" for way in _WAYS for column in _OF_WAY),
    "difference",
)


def as_markdown(record: dict[str, Any]) -> str:
    """The environment, then one table for each model."""
    lines = [*provenance(record), "", "Milliseconds of one layer, by tiles of queries and by links."]
    for model in record["models"]:
        query_heads, kv_heads = model["heads"]
        title = f"({query_heads}, {kv_heads}) heads, T = {model['tokens']}, loss {model['loss']:.3f} after training"
        lines += ["", table(title, _HEADER, [_cells(index, row) for index, row in enumerate(model["layers"])])]
    return "\n".join(lines) + "\n"


def _cells(index: int, row: dict[str, Any]) -> list[str]:
    ways, cudnn = row.get("ways", {}), row.get("cudnn", {})
    cells = [
        str(index),
        number(row["density"], 4),
        f"{row['chunks']['0.5']:.0f} / {row['chunks']['0.99']:.0f}",
        number(row.get("tile_efficiency"), 2),
        number(ways.get("tiles", {}).get("stages", {}).get("route"), 2),
    ]
    for name in _WAYS:
        way: dict[str, Any] = ways.get(name, {})
        for part in ("forward", "forward_backward"):
            ours, dense = way.get(part), cudnn.get(part)
            cells += [number(ours, 2), number(dense / ours if ours and dense else None, 2)]
        cells += [number(way.get("stages", {}).get(part), 2) for part in ("attend", "query gradient", "key gradient")]
    difference = row.get("difference")
    return [*cells, "-" if difference is None else f"{difference:.0e}"]
