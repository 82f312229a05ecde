"""A rank whose device goes on for a quarter of a second after every step, as a GPU does that updates the weights.

Arguments: configuration and overrides. Prints the number of waits for the device.
"""

import sys
import time
from unittest import mock

from dash_dist.config.file import load_config
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.training import loop
from dash_dist.training.run import train

SECONDS = 0.25


def main(config: str, *overrides: str) -> None:
    real, done_at, waits = MegatronEngine.train_step, [0.0], []

    def train_step(engine, micro_batches):
        result = real(engine, micro_batches)
        done_at[0] = time.monotonic() + SECONDS
        return result

    def wait_for_device(device):
        waits.append(device)
        time.sleep(max(0.0, done_at[0] - time.monotonic()))

    with (
        mock.patch.object(MegatronEngine, "train_step", train_step),
        mock.patch.object(loop, "wait_for_device", wait_for_device),
    ):
        train(load_config(config, overrides))
    print("waits:", len(waits))


if __name__ == "__main__":
    main(*sys.argv[1:])
