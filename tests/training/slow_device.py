"""A rank whose device goes on for a while after every step, as a GPU does that updates the weights.

Time is simulated: the host takes none, and only a wait for the device lets it pass. So step times are exact on a busy
machine. Arguments: configuration and overrides. Prints the number of waits for the device.
"""

import sys
from types import SimpleNamespace
from unittest import mock

from dash_dist.config.file import load_config
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.training import loop, pace
from dash_dist.training.run import train

SECONDS = 0.25
"""That the device works on a step."""


def main(config: str, *overrides: str) -> None:
    real = MegatronEngine.train_step
    clock = SimpleNamespace(now=0.0, device_done=0.0, waits=0)

    def train_step(engine, micro_batches):
        result = real(engine, micro_batches)
        clock.device_done = max(clock.device_done, clock.now) + SECONDS
        return result

    def wait_for_device(device):
        clock.waits += 1
        clock.now = max(clock.now, clock.device_done)

    with (
        mock.patch.object(MegatronEngine, "train_step", train_step),
        mock.patch.object(loop, "wait_for_device", wait_for_device),
        mock.patch.object(pace, "time", SimpleNamespace(perf_counter=lambda: clock.now)),
    ):
        train(load_config(config, overrides))
    print("waits:", clock.waits)


if __name__ == "__main__":
    main(*sys.argv[1:])
