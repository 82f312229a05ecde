"""One rank of a run in which rank 1 stands still after step 6: python hanging_rank.py CONFIG [key=value ...]."""

import os
import sys
import time

from dash_dist.megatron import Engine
from dash_dist.training import load_config, train


def stand_still() -> None:
    time.sleep(3600)


def main(config: str, *overrides: str) -> None:
    real = Engine.train_step

    def train_step(engine, micro_batches):
        if engine.step == 6 and os.environ["RANK"] == "1":
            stand_still()
        return real(engine, micro_batches)

    Engine.train_step = train_step
    train(load_config(config, overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
