"""One rank of a run in which rank 1 stands still after step 6: python hanging_rank.py CONFIG [key=value ...]."""

import os
import sys
import time

from dash_dist.config.file import load_config
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.training.faults.watchdog import Watchdog
from dash_dist.training.run import train


def stand_still() -> None:
    time.sleep(3600)


def main(config: str, *overrides: str) -> None:
    dogs: list[Watchdog] = []
    initialise, real = Watchdog.__init__, MegatronEngine.train_step

    def note(dog, timeout):
        initialise(dog, timeout)
        dogs.append(dog)

    def train_step(engine, micro_batches):
        if engine.step == 6:
            # From here on, so that a machine that is slow to begin is not taken for one that hangs.
            dogs[0]._timeout = 10.0
            dogs[0].beat()
            if os.environ["RANK"] == "1":
                stand_still()
        return real(engine, micro_batches)

    Watchdog.__init__ = note
    MegatronEngine.train_step = train_step
    train(load_config(config, overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
