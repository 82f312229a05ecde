"""Starts a run on Ray, on this machine or on the Ray cluster that RAY_ADDRESS names.

    python launch/ray_train.py CONFIG [key=value ...] [--num-workers N] [--min-workers M] [--max-failures K]

Without RAY_ADDRESS a Ray of its own is started here, on this machine's loopback only, and ended with the run; inside a
Ray job the cluster is the job's. When a worker or a node is lost, all ranks are started again, on as many workers as
there is room for, and go on from the run's newest checkpoint. Ctrl-C and SIGTERM let the run finish its step and
save. `--help` shows every option; docs/operations.md says what they are for.

The same as `python -m dash_dist.cluster`.
"""

from dash_dist.cluster.__main__ import main

if __name__ == "__main__":
    main()
