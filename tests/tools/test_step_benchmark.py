"""The step benchmark: every case is a configuration that runs, and the table says what was measured."""

import re
from pathlib import Path

import pytest

from dash_dist.config.file import load_config
from tools.benchmarks.common.shapes import SHAPES
from tools.benchmarks.step.cases import CASES, MATRIX_FLOPS, VOCABULARY, Case, floor_seconds, write
from tools.benchmarks.step.table import as_markdown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_a_configuration(case: Case, tmp_path: Path) -> None:
    config = load_config(write(case, 131_072, tmp_path))
    assert config.training.sequence_length == (case.tokens or 131_072)
    assert config.model.resolved_head_dim == SHAPES[case.shape].head_dim
    assert config.parallel.context == case.gpus
    for section, values in case.changes.items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("name", "again", "output"),
    [
        ("fused", "qkv o gate up", 3),  # the last matrix of a layer is not multiplied again
        ("fused, only the MLP again", "gate up", 3),
        ("fused, all again", "qkv o gate up", 3),
        ("pytorch, all again", "qkv o gate up", 4),
    ],
)
def test_the_floor_counts_each_product_that_is_multiplied(name: str, again: str, output: int, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    weights = {"qkv": 2048 * 48 * 64, "o": 32 * 64 * 2048} | dict.fromkeys(("gate", "up", "down"), 2048 * 8192)
    products = 16 * (3 * sum(weights.values()) + sum(weights[linear] for linear in again.split()))
    products += output * VOCABULARY * 2048
    found = floor_seconds(load_config(write(case, 131_072, tmp_path)), case.gpus)
    assert found == pytest.approx(2 * 131_072 * products / MATRIX_FLOPS)


def test_the_table_compares_with_the_peer_of_the_same_shape() -> None:
    def row(name: str, seconds: float, **others: object) -> dict[str, object]:
        common = {"name": name, "shape": "1b", "gpus": 1, "tokens": 1000, "density": None, "allocated_gib": 2.0}
        of_time = {"step_seconds": seconds, "tokens_per_second": 1000 / seconds, "floor_seconds": 0.5}
        return {**common, **of_time, "is_peer": False, **others}

    parts = {"attention: routing": 0.2, "matrix products": 0.5, "output layer: products": 0.1, "norms": 0.2}
    profiled = {"density": 0.0123, "parts": parts, "profiled_seconds": 1.0}
    rows = [row("fused", 1.0, **profiled), row("peer", 4.0, is_peer=True), row("far", 2.0, tokens=4000)]
    record = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c", "command": "run", "rows": rows}
    text = as_markdown({**record, "failed": {"8b": "out of memory"}})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 1b")]
    assert cells[0] == ["1b: fused", "1", "1000", "0.012", "1.000", "1000", "4.00", "2.0", "70 %", "20 %"]
    assert cells[1][6] == "1.00"
    assert cells[2][6] == "-"
    assert re.search(r"^\| attention: routing +\| 200\.0 +\|$", text, re.MULTILINE)
    assert "its memory is not comparable" in text
    assert "Failed: 8b: out of memory" in text
