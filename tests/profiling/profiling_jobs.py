"""Profiles in processes of their own. Each job runs at every rank."""

import io

import torch.distributed as dist
from rich.console import Console

from dash_dist.errors import RunError
from dash_dist.profiling.command import Options, profile


def profiled(path, commands):
    """Run each (overrides, options); returns its profile and output, or None and the message of its error.

    The option `out` may be a list, one folder for each rank.
    """
    results = []
    for overrides, options in commands:
        output = io.StringIO()
        options = {name: value[_rank()] if isinstance(value, list) else value for name, value in options.items()}
        try:
            found = profile(path, overrides, Options(**options), Console(file=output, width=60))
            results.append((found, output.getvalue()))
        except RunError as error:
            results.append((None, f"{type(error).__name__}: {error}"))
        if dist.is_initialized():
            dist.barrier()
    return results


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0
