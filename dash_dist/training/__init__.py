"""One run: the training loop, its faults, its checkpoints and its telemetry. `run.train` is the entry point.

Knows the parts of a run; does not know how its processes were started.
"""
