"""A rank of a run in which one rank fails alone at step 3: failing_rank.py RANK PHASE KIND CONFIG [key=value ...].

PHASE is a key of `PLACES`. KIND is memory, defect, or stuck: a defect after which the failed rank does not end.
"""

import os
import sys
import time

import torch

from dash_dist.command_line import run_app
from dash_dist.config.file import load_config
from dash_dist.distributed.first_failure import FirstFailure
from dash_dist.megatron.core_attention import DashCoreAttention
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.optimizer import Optimizer
from dash_dist.training.run import train

STEP = 3
PATIENCE = 4.0  # seconds; a run's own is longer than a test should wait
PLACES = {
    "forward": (DashCoreAttention, "forward"),
    "backward": (DashCoreAttention, "forward"),
    "optimizer": (Optimizer, "update"),
    "save": (MegatronEngine, "start_save"),
}


def main(rank: str, phase: str, kind: str, config: str, *overrides: str) -> None:
    begun: list[int] = []
    owner, name = PLACES[phase]
    real, real_step = getattr(owner, name), MegatronEngine.train_step
    initialise, real_exit = FirstFailure.__init__, FirstFailure.__exit__

    def fail(*_: object) -> None:
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of ...")
        raise KeyError("a defect")

    def call(*args, **kwargs):
        due = os.environ["RANK"] == rank and begun[-1:] == [STEP]
        if due and phase != "backward":
            fail()
        result = real(*args, **kwargs)
        if due:
            result.register_hook(fail)
        return result

    def train_step(engine, micro_batches):
        begun.append(engine.step + 1)
        return real_step(engine, micro_batches)

    def enter(context, **options):
        initialise(context, **{**options, "patience": PATIENCE})

    def leave(context, *error):
        real_exit(context, *error)
        if kind == "stuck" and os.environ["RANK"] == rank:
            time.sleep(120)  # as a process that waits in NCCL

    setattr(owner, name, call)
    MegatronEngine.train_step = train_step
    FirstFailure.__init__, FirstFailure.__exit__ = enter, leave
    run_app(lambda: train(load_config(config, overrides)))


if __name__ == "__main__":
    main(*sys.argv[1:])
