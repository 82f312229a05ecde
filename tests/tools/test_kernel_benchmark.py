"""The kernel benchmark's parts that need no GPU: inputs, the search of routing_scale, results, tables and plot."""

import json
import math
from pathlib import Path

import pytest
import torch

from dash_kernels import dash_attention
from tools.benchmarks.common.environment import commit_of
from tools.benchmarks.common.inputs import Case, fingerprint, linear_recurrence, make_inputs
from tools.benchmarks.kernels.__main__ import cases, main, parse
from tools.benchmarks.kernels.density import TOLERANCE, find_routing_scale
from tools.benchmarks.kernels.measure import Cell
from tools.benchmarks.kernels.results import CUDNN_FORWARD, FORWARD, STEP, Row, read_json, tables, write_json

CPU = torch.device("cpu")


def case(
    seq_len: int, *, inputs: str = "smooth", density: float = 0.25, chunk_size: int = 16, head_dim: int = 16
) -> Case:
    return Case(
        seq_len=seq_len,
        query_heads=4,
        kv_heads=2,
        head_dim=head_dim,
        chunk_size=chunk_size,
        dtype="fp32",
        inputs=inputs,
        asked_density=density,
        prior_sigma=None,
    )


@pytest.mark.parametrize("seq_len", [1, 255, 256, 257, 1000])
def test_the_recurrence_in_tiles_is_the_recurrence(seq_len: int) -> None:
    x = torch.randn(seq_len, 3)
    expected = [x[0]]
    for row in x[1:]:
        expected.append(0.98 * expected[-1] + row)
    torch.testing.assert_close(linear_recurrence(x, 0.98), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("inputs", "neighbours"), [("smooth", 0.98), ("iid", 0.0)])
def test_correlations_of_the_inputs(inputs: str, neighbours: float) -> None:
    drawn = make_inputs(case(20_000, inputs=inputs, head_dim=32), CPU)
    q, k = drawn.q[0], drawn.k[0]
    for tensor in vars(drawn).values():
        assert tensor.square().mean().item() == pytest.approx(1, abs=0.3 if tensor.dim() == 2 else 0.06)
    assert (q[1:] * q[:-1]).mean().item() == pytest.approx(neighbours, abs=0.05)
    assert (q[:, 0] * q[:, 1]).mean().item() == pytest.approx(0.8, abs=0.05)  # heads of one KV head
    assert (q[:, 1] * q[:, 2]).mean().item() == pytest.approx(0, abs=0.08)
    assert (k[0:-1:16] * k[1::16]).mean().item() == pytest.approx(0.7, abs=0.05)  # in a chunk
    assert (k[15:-1:16] * k[16::16]).mean().item() == pytest.approx(0, abs=0.05)  # across its end


def test_inputs_are_the_same_when_drawn_again() -> None:
    first, second = (make_inputs(case(100), CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(vars(first).values(), vars(second).values(), strict=True))
    assert fingerprint(first) == fingerprint(second) != fingerprint(make_inputs(case(100, inputs="iid"), CPU))


@pytest.mark.parametrize("asked", [1.0, 0.4])
def test_the_search_reaches_the_density(asked: float) -> None:
    wanted = case(300, density=asked)
    inputs = make_inputs(wanted, CPU)

    def density_at(scale: float) -> float:
        statistics = dash_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.summary_query,
            chunk_size=16,
            routing_scale=scale,
            backend="eager",
            return_routing=True,
        )[1]
        assert wanted.available == 2 * statistics.available_per_token.sum().item()
        return statistics.density.item()

    assert density_at(find_routing_scale(density_at, wanted)) == pytest.approx(asked, rel=TOLERANCE)


@pytest.mark.parametrize("factor", [0.02, 1.0, 30.0])
def test_the_search_recovers_from_a_bad_first_guess(factor: float) -> None:
    wanted = case(65536, density=0.05)
    scale = find_routing_scale(lambda scale: 1 / (1 + (scale * factor) ** 0.7), wanted)
    assert 1 / (1 + (scale * factor) ** 0.7) == pytest.approx(0.05, rel=TOLERANCE)


def test_an_unreachable_density_is_named() -> None:
    with pytest.raises(ValueError, match=r"density 0\.25 is not reachable at 64 tokens"):
        find_routing_scale(lambda scale: 0.8, case(64))


@pytest.mark.parametrize("seq_len", [7, 64, 70])
def test_flops_of_a_selection_of_everything_are_those_of_causal_attention(seq_len: int) -> None:
    dense = case(seq_len, density=1.0)
    pairs = seq_len * (seq_len + 1) // 2
    assert dense.available == 2 * sum(token // 16 + 1 for token in range(seq_len))
    assert dense.selected_flops(dense.available) == 4 * 16 * 4 * pairs


def test_results_survive_their_file_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Row(
        case(1024),
        routing_scale=3.0,
        selected=round(0.25 * case(1024).available),
        tile_efficiency=0.7,
        columns={FORWARD: Cell(2.0, 1.9, 2.1, 20, 2**30), CUDNN_FORWARD: Cell(5.0, 5.0, 5.0, 3, 0)},
        stages={"route": Cell(0.5, 0.4, 0.6, 20, 0)},
        kernels={"attend_fwd_kernel": 1.5, "route_fwd_kernel": 0.5, "fill": 0.001},
    )
    failed = Row(case(2048), columns={STEP: Cell(error="OutOfMemoryError: too much")}, errors={"stages": "no"})
    environment = {"gpu": "none", "torch": "2", "triton": "3", "commit": "unknown"}
    path = tmp_path / "results.json"
    write_json(path, environment, [measured, failed])
    assert read_json(path) == (environment, [measured, failed])
    derived = json.loads(path.read_text())["rows"][0]["derived"]
    assert derived["forward_speed_up_over_cudnn"] == 2.5
    assert math.isclose(measured.of_ideal(FORWARD, CUDNN_FORWARD) or 0, 2.5 * 0.25, rel_tol=1e-3)

    main(["--plot-only", str(path)])
    printed = capsys.readouterr().out
    assert "attend_fwd_kernel" in printed
    assert "fill" not in printed  # less than 1 % of the time
    assert "OutOfMemoryError: too much" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert tables([measured, failed]) in printed


def test_rows_are_all_combinations_and_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = "--heads 32,2 32,8 --density 0.25 1 --inputs smooth iid --seq-len 64 128"
    options = parse(several.split())
    assert len(set(cases(options))) == 16
    for wrong, message in (
        (["--heads", "3,2"], "multiple of the KV heads"),
        (["--density", "1.5"], r"give a number in (0, 1]"),
        (["--peer", str(tmp_path)], "no package dash_attn"),
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert message in capsys.readouterr().err
    assert commit_of(tmp_path) == "unknown"
