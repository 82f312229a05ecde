"""The checks, one module per family; each knows its own subject only."""

from dash_dist.doctor.checks import configuration, gpu, host, links, network, packages, parity, ray_cluster, storage
from dash_dist.doctor.findings import Check

CHECKS: dict[str, tuple[Check, ...]] = {
    "configuration": configuration.CHECKS,
    "packages": packages.CHECKS,
    "host": host.CHECKS,
    "network": network.CHECKS,
    "GPU": gpu.CHECKS,
    "ranks": links.CHECKS,
    "context parallelism": parity.CHECKS,
    "storage": storage.CHECKS,
    "Ray": ray_cluster.CHECKS,
}
"""By family, in the order they run."""
