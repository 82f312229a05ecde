"""One rank that trains, and stops itself: python training_rank.py CONFIG STOP_AFTER_STEP [key=value ...] ["--" ...].

Several runs, one after the other in one process group, are separated by "--".
"""

import itertools
import sys

import torch.distributed as dist

from dash_dist.config.file import load_config
from dash_dist.run.requests import Command, Request
from dash_dist.training.run import train


def main(arguments: list[str]) -> None:
    for is_separator, run in itertools.groupby(arguments, lambda argument: argument == "--"):
        if is_separator:
            continue
        config, stop_after, *overrides = run
        asked = itertools.count()  # asked once before each step

        def requests(asked=asked, stop_after=int(stop_after)) -> Command:
            return Command(Request.STOP if next(asked) >= stop_after else Request.GO_ON)

        train(load_config(config, overrides), requests=requests)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1:])
    dist.destroy_process_group()
