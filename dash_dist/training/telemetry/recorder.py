"""Measurements of a run other than its loss: seconds of a step by part, and heat maps of its routing.

Knows which steps to measure and how to combine ranks; does not know files or how an engine measures.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from dash_dist.config.run import RunConfig
from dash_dist.config.selection import ROUTED_KINDS
from dash_dist.config.upkeep import LoggingSection
from dash_dist.engine.telemetry import StepTelemetry
from dash_dist.extras import require_extra
from dash_dist.training.telemetry.curves import Curves


class Telemetry:
    """Telemetry of one run at one rank.

    Args:
        curves: the run's curves at rank 0; None at the other ranks.
    """

    def __init__(self, config: RunConfig, engine: StepTelemetry, curves: Curves | None) -> None:
        self._config = config
        self._engine = engine
        self._curves = curves
        self._layers = heat_map_layers(config.logging.heat_map_layers, config.attention.kinds(config.model.num_layers))
        self._host_seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = 0  # since these seconds were last asked for

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count host time spent in this block as `part` of the step."""
        start = time.perf_counter()
        yield
        self._host_seconds[part] += time.perf_counter() - start

    def is_due(self, interval: int, step: int) -> bool:
        """Return whether what has this interval is recorded in a step: every so many, and the first and the last."""
        return step in (1, self._config.training.steps) or step % interval == 0

    def before_step(self, step: int, *, logged: bool) -> None:
        """Switch on the measurements of the engine that are due at this step."""
        with_map = self.is_due(self._config.logging.heat_map_interval, step)
        self._engine.record_seconds = logged
        self._engine.record_selections = self._layers if with_map else ()
        self._steps += 1

    def own_seconds(self) -> dict[str, float]:
        """Return part -> seconds of this rank, for the logged step that just ended.

        "data" and "save" are means over the steps since the last logged one. Local; waits for the device.
        """
        of_engine = self._engine.seconds_by_part()
        of_host = {part: seconds / self._steps for part, seconds in self._host_seconds.items()}
        self._host_seconds.clear()
        self._steps = 0
        return {"data": 0.0, "save": 0.0, **of_host, **of_engine}

    def log_heat_maps(self, step: int) -> None:
        """Write the heat maps that this step recorded. A collective in steps that record any."""
        if not self._engine.record_selections:
            return
        maps = self._engine.selection_maps()
        self._engine.record_selections = ()
        if self._curves is not None:
            length = self._config.training.sequence_length
            self._curves.write(step, lambda writer: writer.heat_maps(step, maps, sequence_length=length))


def require_heat_maps(logging: LoggingSection) -> None:
    """Refuse, with ConfigError, heat maps that this process could not draw. Call it where the curves are written."""
    if logging.heat_map_layers != ():
        require_extra(
            "report",
            "drawing heat maps of the routing",
            instead="set logging.heat_map_layers=[] to draw none",
        )


def heat_map_layers(chosen: Sequence[int] | None, kinds: Sequence[str]) -> list[int]:
    """Return the layers to draw: the chosen ones, or the first, the middle and the last of those that select chunks.

    Args:
        kinds: of the attention of every layer.
    """
    if chosen is not None:
        return list(chosen)
    routed = [layer for layer, kind in enumerate(kinds) if kind in ROUTED_KINDS]
    return sorted({routed[0], routed[len(routed) // 2], routed[-1]}) if routed else []


def over_ranks(
    seconds: Sequence[Mapping[str, float]], step_seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return (mean, maximum) over the ranks as part -> seconds, with "rest" for the unmeasured time.

    Args:
        seconds: part -> seconds of each rank.
        step_seconds: step time of rank 0, which starts a step last because it writes the log of the previous one.
    """
    parts = list(dict.fromkeys(part for of_rank in seconds for part in of_rank))
    by_part = {part: [of_rank.get(part, 0.0) for of_rank in seconds] for part in parts}
    in_step = (sum(of_rank.values()) - of_rank["save"] for of_rank in seconds)
    by_part["rest"] = [max(0.0, step_seconds - known) for known in in_step]
    return (
        {part: sum(values) / len(values) for part, values in by_part.items()},
        {part: max(values) for part, values in by_part.items()},
    )
