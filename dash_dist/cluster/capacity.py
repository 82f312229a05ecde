"""Number of workers for a run: the largest that it can use and the cluster can hold.

Knows the run's layout and counts of workers; does not know Ray.
"""

from dash_dist.cluster.limits import Limits
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError


def usable_workers(config: RunConfig, room: int) -> int:
    """The most workers, of the `room` there is, that `config` can run on with its global batch; 0 if there is none."""
    ranks = config.model_ranks
    for workers in range(room - room % ranks, 0, -ranks):
        try:
            config.check_world_size(workers)
        except ValueError:
            continue
        return workers
    return 0


def default_num_workers(config: RunConfig, gpus: int) -> int:
    """Workers for a cluster of `gpus` GPUs: the most that the run can use, or one replica of the model on CPUs.

    Raises ConfigError if there are GPUs, but too few for one replica of the model.
    """
    ranks = config.model_ranks
    if gpus == 0:
        return ranks
    if workers := usable_workers(config, gpus):
        return workers
    raise ConfigError(
        f"the cluster has {gpus} GPUs, and parallel.tensor x parallel.context x parallel.pipeline = {ranks}: "
        f"lower one of the three, for example parallel.context=1"
    )


def check_limits(config: RunConfig, limits: Limits) -> None:
    """Refuse, with ConfigError, numbers of workers that `config` cannot run on."""
    for option, workers in (("--num-workers", limits.num_workers), ("--min-workers", limits.min_workers)):
        if workers is not None:
            try:
                config.check_world_size(workers)
            except ValueError as error:
                raise ConfigError(f"{option} {workers}: {error}") from None
    if limits.num_workers is not None and limits.min_workers is not None and limits.min_workers > limits.num_workers:
        raise ConfigError(
            f"--min-workers {limits.min_workers} is above --num-workers {limits.num_workers}: lower the first"
        )


def check_local_gpus(num_workers: int, gpus: int) -> None:
    """Refuse, with ConfigError, more workers than this machine has GPUs: no node will come to bring more."""
    if num_workers > gpus > 0:
        raise ConfigError(
            f"--num-workers {num_workers}: each worker takes a GPU and this machine has {gpus}: start at most {gpus}, "
            f"or set RAY_ADDRESS to a cluster that has more"
        )
