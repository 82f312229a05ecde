"""Measurements of a training step that an engine makes on request: routing, heat maps, seconds, traffic.

Knows the layers of a pipeline stage and when a step begins. Does not know loggers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from dash_dist.config.attention import AttentionConfig
from dash_dist.engine.exchange_statistics import ExchangeStatistics, gather_traffic
from dash_dist.engine.ranks import Dims, RoutedModel, routed_attentions
from dash_dist.engine.routing import LayerRouting, gather_routing, set_recording
from dash_dist.engine.selection_map import SelectionMap, SelectionRecorder, gather_selections
from dash_dist.engine.step_timer import StepTimer


class StepTelemetry:
    """Measurements of the last step. Set the attributes `record_*` to the same values at every rank, before the step.

    Args:
        on_timing: called with the timer when seconds are to be recorded, with None when not.
    """

    def __init__(
        self,
        model: RoutedModel,
        dims: Dims,
        attention: AttentionConfig,
        *,
        sequence_length: int,
        on_timing: Callable[[StepTimer | None], None],
    ) -> None:
        self.timer = StepTimer(dims.device)
        self._model = model
        self._dims = dims
        self._layout = attention.layout
        self._num_chunks = math.ceil(sequence_length / attention.chunk_size)
        self._on_timing = on_timing
        self._record_routing = False
        self._record_seconds = False
        self._selections = SelectionRecorder(dict(routed_attentions(model)), self.timer)

    def begin_step(self) -> None:
        """Start the timer, and drop unread counters and the state that a failed step kept for recomputation."""
        for _, attention in self._model.attentions():
            attention.traffic.clear()
            if attention.memory is not None:
                attention.memory.clear()
        self.timer.begin(record=self._record_seconds)

    @contextlib.contextmanager
    def paused(self, *, keep_routing: bool = False) -> Iterator[None]:
        """Measure nothing in this block, and forget the last step.

        Args:
            keep_routing: record the routing as before.
        """
        routing, seconds, selections = self.record_routing, self.record_seconds, self.record_selections
        self.record_routing, self.record_seconds, self.record_selections = routing and keep_routing, False, ()
        self.begin_step()
        try:
            yield
        finally:
            self.begin_step()
            self.record_routing, self.record_seconds, self.record_selections = routing, seconds, selections

    @property
    def record_routing(self) -> bool:
        """Keep each layer's routing of the last micro-batch, for `routing_statistics`."""
        return self._record_routing

    @record_routing.setter
    def record_routing(self, record: bool) -> None:
        self._record_routing = record
        set_recording(self._model, record)

    @property
    def record_seconds(self) -> bool:
        """Measure the parts of later steps, for `seconds_by_part`."""
        return self._record_seconds

    @record_seconds.setter
    def record_seconds(self, record: bool) -> None:
        self._record_seconds = record
        self._on_timing(self.timer if record else None)

    @property
    def record_selections(self) -> Sequence[int]:
        """Layers that select chunks, from 0, that count their selected chunks; costs a second routing of each."""
        return self._selections.layers

    @record_selections.setter
    def record_selections(self, layers: Sequence[int]) -> None:
        self._selections.layers = tuple(layers)

    def routing_statistics(self) -> list[LayerRouting]:
        """Return the routing of every layer that has one, in the last micro-batch of the last step. A collective.

        Raises:
            RuntimeError: at every rank: `record_routing` was not set before that step.
        """
        return gather_routing(self._model, self._dims, num_chunks=self._num_chunks)

    def selection_maps(self) -> list[SelectionMap]:
        """Return the layers of `record_selections` in the last micro-batch of the last step. A collective.

        Raises:
            RuntimeError: at every rank: `record_selections` was not set before that step.
        """
        return gather_selections(self._selections, self._dims, num_chunks=self._num_chunks)

    def seconds_by_part(self) -> dict[str, float]:
        """Return the seconds that this rank's device spent on each part of the last step. Local; waits for the device.

        Call it before `exchange_statistics`, which takes the waits for K and V away.

        Returns:
            Seconds: "forward" and "backward" (with recomputation) of all micro-batches, without the attention's waits
            for K and V, which are "exchange"; "gradients", their reduction over the ranks; "optimizer", the gradient
            norm and the update; and "heat_map", where selections were recorded. The rest of a step is waiting, above
            all for other pipeline stages.

        Raises:
            RuntimeError: `record_seconds` was not set before that step.
        """
        seconds = self.timer.seconds()
        seconds["forward"] -= seconds.get("heat_map", 0.0)
        if self._dims.cp_size > 1:
            waited = [attention.traffic.waited() for _, attention in self._model.attentions()]
            in_forward, in_backward = (sum(part) for part in zip(*waited, strict=True))
            seconds["forward"] -= in_forward
            seconds["backward"] -= in_backward
            seconds["exchange"] = in_forward + in_backward
        return seconds

    def exchange_statistics(self) -> ExchangeStatistics | None:
        """Return the exchange statistics of the last step, at every rank; None without context parallelism.

        Waits for the device and takes the counters: call it once per step of interest. Every step starts its own count.

        Raises:
            RuntimeError: at every rank: there was no step since the last call.
        """
        if self._dims.cp_size == 1:
            return None
        return gather_traffic(self._model, self._dims, num_chunks=self._num_chunks, layout=self._layout)
