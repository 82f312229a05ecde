"""Times DashAttention's kernels on one GPU against dense attention, and against the released DashAttention.

    python -m tools.benchmarks.kernels --out docs/results/h100.json --plot docs/results/h100.png
    python -m tools.benchmarks.kernels --seq-len 1048576 --heads 16,2 --density 0.05
    python -m tools.benchmarks.kernels --peer ../dash-attention --heads 32,2
    python -m tools.benchmarks.kernels --plot-only docs/results/h100.json        (no GPU needed)

A row is one sequence length, pair of head counts, kind of inputs and density. All columns of a row run on the same
tensors, in this process; the released kernels run in a second process, which draws those tensors again. Batch size 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.common.environment import commit_of, describe_environment
from tools.benchmarks.common.inputs import NEIGHBOUR_CORRELATION, Case
from tools.benchmarks.common.options import add_shape_options, density, heads
from tools.benchmarks.kernels.results import Row, read_json, tables, write_json


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.plot_only:
        environment, rows = read_json(options.plot_only)
        print(tables(rows))
        draw(options.plot or options.plot_only.with_suffix(".png"), environment, rows)
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run this on a machine with a GPU, or --plot-only with a results file")
    from tools.benchmarks.kernels.run import (  # imports Triton, which drawing a file's plot does not need
        Extent,
        run_row,
    )

    dense_limit = 0 if options.no_dense else options.dense_max_seq_len
    extent = Extent(dense_limit, options.forward_only, options.attend_first_chunk, options.peer)
    environment = describe_environment("tools.benchmarks.kernels", arguments, commit=options.commit, device="cuda")
    environment["peer_commit"] = commit_of(options.peer) if options.peer else None
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    rows = []
    for case in cases(options):
        rows.append(run_row(case, extent))
        print(f"\n{tables(rows[-1:])}\n", flush=True)
        if options.out:  # after every row: a run that is stopped keeps what it has
            write_json(options.out, environment, rows)
    print(tables(rows))
    if options.plot:
        draw(options.plot, environment, rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; exits with a message where it asks for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[65536], metavar="T")
    parser.add_argument("--heads", type=heads, nargs="+", default=[(32, 2), (32, 8)], metavar="QUERY,KV")
    parser.add_argument(
        "--density",
        type=density,
        nargs="+",
        default=[0.25, 0.05],
        help="selected / available chunks, hit to within 10 %% by a search of routing_scale; 1: all earlier chunks",
    )
    parser.add_argument(
        "--inputs",
        choices=tuple(NEIGHBOUR_CORRELATION),
        nargs="+",
        default=["smooth"],
        help="all components have unit variance; heads of a KV head share 0.8 of their queries' variance, tokens of a "
        "chunk 0.7 of their keys'; values, summary queries and output gradients are independent normal numbers. "
        "smooth: every query component is an AR(1) process over tokens, rho 0.98. iid: rho 0, no correlation between "
        "neighbouring queries",
    )
    add_shape_options(parser)
    parser.add_argument("--prior-sigma", type=float, help="of our columns; default None, the bias log P")
    parser.add_argument(
        "--attend-first-chunk",
        action="store_true",
        help="our columns once more, with that setting and the same routing_scale",
    )
    parser.add_argument("--forward-only", action="store_true", help="no backward passes")
    parser.add_argument("--no-dense", action="store_true", help="no cuDNN and FlashAttention-2 columns")
    parser.add_argument("--dense-max-seq-len", type=int, default=131072, help="longest sequence with dense columns")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of github.com/fasa-org/dash-attention")
    parser.add_argument("--commit", help="what the results call this tree; default: git's HEAD")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="results, written after every row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--plot-only", type=Path, metavar="FILE.json", help="print and draw an earlier run, no GPU")
    options = parser.parse_args(arguments)
    if options.peer and not (options.peer / "dash_attn" / "__init__.py").is_file():
        parser.error(f"--peer {options.peer}: no package dash_attn in it; give the root of the checkout")
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination of the options that take several values."""
    combinations = itertools.product(options.seq_len, options.heads, options.inputs, options.density)
    return [
        Case(
            seq_len=seq_len,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=options.head_dim,
            chunk_size=options.chunk_size,
            dtype=options.dtype,
            inputs=inputs,
            asked_density=density,
            prior_sigma=options.prior_sigma,
        )
        for seq_len, (query_heads, kv_heads), inputs, density in combinations
    ]


def draw(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """The plot, as a PNG."""
    from tools.benchmarks.kernels.plot import plot  # matplotlib comes with the development tools only

    plot(path, environment, rows)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
