"""Times context-parallel DashAttention on the GPUs of this machine against dense ring attention; one process per GPU.

    python -m tools.benchmarks.context_parallel --out docs/results/cp_2xh200.json --plot docs/results/cp_2xh200.png
    python -m tools.benchmarks.context_parallel --only exchanges --seq-len 131072 --exchange selective
    python -m tools.benchmarks.context_parallel --plot-only docs/results/cp_2xh200.json   (tables, plot)
    python -m tools.benchmarks.context_parallel --predict docs/results/cp_2xh200.json     (8 to 512 GPUs)

Parts, for every sequence length, pair of head counts and density:
exchanges: forward + backward over each exchange and over PyTorch's dense ring attention, on the same tensors.
overlap:   the detailed exchange as it is, its flights alone and its computation alone, in turns.
weak:      all GPUs at T against one GPU at T / GPUs that selects as many (token, chunk) pairs per GPU: once of one
           sequence, at a higher density, and once of as many sequences as there are GPUs, at the same density.
layouts:   the detailed exchange in every layout of the same sequence: times, bytes, balance.
Batch size 1 but for the last of weak. A time is the slowest rank's, and a median over a few seconds of calls; a call
longer than that is made once, after warming up at the sparsest routing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from dash_dist.context_parallel.exchange import EXCHANGES
from dash_dist.context_parallel.layout import LAYOUTS
from tools.benchmarks.common.inputs import NEIGHBOUR_CORRELATION, Case
from tools.benchmarks.common.options import add_shape_options, density, heads
from tools.benchmarks.context_parallel.dense_ring import KERNELS
from tools.benchmarks.context_parallel.inputs import PIECES
from tools.benchmarks.context_parallel.predict import DEFAULT_RANKS, DEFAULT_SEQ_LENS, predictions
from tools.benchmarks.context_parallel.ranks import RanksFailedError, run_ranks
from tools.benchmarks.context_parallel.results import Results
from tools.benchmarks.context_parallel.run import PARTS, Request, run
from tools.benchmarks.context_parallel.tables import tables

DETAILED = "selective"  # of the parts that measure one exchange, if it is among those asked for


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.predict:
        print(predictions(Results.read(options.predict), options.predict_ranks, options.predict_seq_len))
        return
    if options.plot_only:
        results = Results.read(*options.plot_only)
        print(tables(results))
        draw(options.plot or options.plot_only[0].with_suffix(".png"), results)
        return
    request = Request(
        cases=cases(options),
        parts=options.only,
        exchanges=options.exchange,
        detailed=options.detailed_exchange,
        layout=options.layout,
        dense=options.dense,
        seconds=options.seconds,
        dense_max_seq_len=options.dense_max_seq_len,
        overlap_rounds=options.overlap_rounds,
        arguments=arguments,
        commit=options.commit,
        out=options.out,
    )
    try:
        run_ranks(run, options.ranks, options.device, options.time_limit, request)
    except RanksFailedError as error:
        raise SystemExit(f"benchmark: {error}") from error
    if options.plot:
        draw(options.plot, Results.read(options.out))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; exits with a message where it asks for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[131072], metavar="T", help="of the whole sequence")
    parser.add_argument("--heads", type=heads, nargs="+", default=[(32, 8)], metavar="QUERY,KV")
    parser.add_argument(
        "--density",
        type=density,
        nargs="+",
        default=[0.25, 0.05],
        help="selected / available chunks, hit to within 10 %% by a search of routing_scale",
    )
    parser.add_argument(
        "--inputs",
        choices=tuple(NEIGHBOUR_CORRELATION),
        default="smooth",
        help="as in tools.benchmarks.kernels; drawn in 4 x ranks pieces that are independent of each other",
    )
    add_shape_options(parser)
    parser.add_argument(
        "--exchange", nargs="+", default=list(EXCHANGES), choices=list(EXCHANGES), help="columns of this project"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of all parts but layouts")
    parser.add_argument(
        "--detailed-exchange",
        choices=list(EXCHANGES),
        help=f"of overlap, weak and layouts; default {DETAILED}, or else the first of --exchange",
    )
    parser.add_argument(
        "--dense",
        choices=list(KERNELS),
        nargs="*",
        default=list(KERNELS),
        help="columns of PyTorch's context parallelism",
    )
    parser.add_argument("--dense-max-seq-len", type=int, default=1048576, help="longest sequence with dense columns")
    parser.add_argument("--seconds", type=float, default=4.0, help="of repeated calls for one median")
    parser.add_argument("--overlap-rounds", type=int, default=15, help="at most; fewer where calls are long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tries the program out")
    parser.add_argument("--ranks", type=int, help="processes; default: every GPU, or 2 on the CPU")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds, after which all ranks are ended")
    parser.add_argument("--commit", help="what the results call this tree; default: git's HEAD")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="results, written after every measurement")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs --out")
    parser.add_argument(
        "--plot-only", type=Path, nargs="+", metavar="FILE.json", help="print and draw earlier runs together, no GPU"
    )
    parser.add_argument("--predict", type=Path, metavar="FILE.json", help="print predictions from an earlier run")
    parser.add_argument("--predict-ranks", type=int, nargs="+", default=list(DEFAULT_RANKS), metavar="CP")
    parser.add_argument("--predict-seq-len", type=int, nargs="+", default=list(DEFAULT_SEQ_LENS), metavar="T")
    options = parser.parse_args(arguments)
    if options.detailed_exchange is None:
        options.detailed_exchange = DETAILED if DETAILED in options.exchange else options.exchange[0]
    if options.predict or options.plot_only:
        return options
    available = torch.cuda.device_count() if options.device == "cuda" else 2
    options.ranks = options.ranks or available
    if options.ranks < 2 or (options.device == "cuda" and options.ranks > available):
        parser.error(f"{options.ranks} ranks on {torch.cuda.device_count()} GPUs: give 2 or more, one per GPU")
    unit = PIECES * options.ranks * options.chunk_size
    for seq_len in options.seq_len:
        if seq_len < unit or seq_len % unit:
            parser.error(f"--seq-len {seq_len}: give a multiple of {PIECES} x ranks x chunk_size = {unit}")
    if options.plot and not options.out:
        parser.error("--plot is drawn from the results file: give --out as well")
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination of the options that take several values."""
    combinations = itertools.product(options.seq_len, options.heads, options.density)
    return [
        Case(
            seq_len=seq_len,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=options.head_dim,
            chunk_size=options.chunk_size,
            dtype=options.dtype,
            inputs=options.inputs,
            asked_density=asked,
            prior_sigma=None,
        )
        for seq_len, (query_heads, kv_heads), asked in combinations
    ]


def draw(path: Path, results: Results) -> None:
    """The plot, as a PNG."""
    from tools.benchmarks.context_parallel.plot import plot  # matplotlib comes with the development tools only

    plot(path, results)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
