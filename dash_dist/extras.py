"""Optional packages, with an error for a missing one that names the extra that installs it.

Knows the extras of pyproject.toml; does not know the code that uses them.
"""

import importlib.util

from dash_dist.errors import ConfigError

MODULES = {
    "ray": ("ray", "aiohttp", "requests"),
    "deepspeed": ("deepspeed",),
    "hub": ("tokenizers", "transformers"),
    "report": ("matplotlib",),
}


def require_extra(extra: str, purpose: str, *, instead: str = "") -> None:
    """Refuse, with ConfigError, to continue without the packages of `extra`, without importing them.

    Args:
        extra: key of MODULES.
        purpose: subject of the error's sentence, such as "engine=deepspeed".
        instead: remedy other than the installation, such as "set engine=megatron".
    """
    missing = [module for module in MODULES[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not installed here: pip install 'dash-dist[{extra}]', or in the "
            f"repository pip install -c requirements.lock -e kernels -e '.[{extra}]'"
            + (f"; or {instead}" if instead else "")
        )
