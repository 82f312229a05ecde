"""Trains a small model on a local Ray cluster under faults, and compares it with an undisturbed run.

    python -m tests.storm --faults 30 --seed 1 --out docs/results/storm_cpu.json
    python -m tests.storm --quick                  eight kinds of faults, each once, 2 ranks
    python -m tests.storm --quick --kinds killed_in_save out_of_memory_in_forward
    python -m tests.storm --gpus 2 --faults 16     over NCCL, a GPU for each of 2 ranks

The cluster has several raylets, each with its own loopback address. 4 ranks (CP=2 x DP=2; 2 in the quick form) train
under launch/ray_train.py. docs/storm.md describes the faults and the checks. Needs Linux and about 8 GiB of memory; 30
faults take about half an hour on two cores. Exit status 1: a check failed, and the state of the run is printed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.storm.errors import StormError
from tests.storm.report import table, write_json
from tests.storm.schedule import FAULT_KINDS, QUICK_KINDS
from tests.storm.storm import Storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, help="how many (default: 30, or each kind once with --quick)")
    parser.add_argument("--quick", action="store_true", help="each kind of fault once, and 2 ranks")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=FAULT_KINDS,
        metavar="NAME",
        help=f"kinds of faults (default: all, or the first {len(QUICK_KINDS)} with --quick): {', '.join(FAULT_KINDS)}",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        choices=(0, 2, 4),
        default=0,
        help="train on this many GPUs of this machine, one rank on each (default: on CPUs)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the faults and of their order (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.25, help="least time of a step (default: %(default)s)")
    parser.add_argument("--interval", type=int, help="steps between checkpoints (default: 6, or 3 with --quick)")
    parser.add_argument(
        "--fault-seconds", type=float, default=300, help="give up on a fault after this time (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-seconds", type=int, help="a rank without an answer for this time is lost (default: 1.5 x first step)"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    options = parser.parse_args()
    kinds = tuple(dict.fromkeys(options.kinds or (QUICK_KINDS if options.quick else FAULT_KINDS)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end the cluster, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="storm") as folder:  # short: Ray's sockets lie below it
        storm = Storm(
            Path(folder),
            faults=options.faults or (len(kinds) if options.quick else 30),
            seed=options.seed,
            workers=options.gpus or (2 if options.quick else 4),
            step_seconds=options.step_seconds,
            interval=options.interval or (3 if options.quick else 6),
            fault_seconds=options.fault_seconds,
            kinds=kinds,
            gpus=options.gpus,
            answer_seconds=options.answer_seconds,
            say=lambda text: print(text, flush=True),
        )
        try:
            result = storm.run()
        except StormError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(result))
    if options.out is not None:
        write_json(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
