"""The evaluations of a stage: the held-out loss at its intervals, and the gate at its end.

Knows when they are due and what they need; does not know how a loss or a token is computed.
"""

from collections.abc import Callable

from dash_dist.config.run import Stage
from dash_dist.engine.protocol import Engine
from dash_dist.engine.ranks import Dims
from dash_dist.errors import RunError
from dash_dist.evaluation.gate import evaluate_retrieval
from dash_dist.training.gate import missed
from dash_dist.training.heldout import HeldOut, in_words
from dash_dist.training.run_data import StageData
from dash_dist.training.session import Session
from dash_dist.training.telemetry.metrics import HeldOutMetrics


class StageEvaluation:
    """Evaluations of one stage at one rank. Every method but `is_due` is a collective: all ranks call it.

    Args:
        show: receives the held-out losses, at every rank.

    Attributes:
        with_heldout: the stage has held-out sequences.

    Raises:
        ConfigError: at every rank, if any rank cannot read the held-out sequences.
    """

    def __init__(
        self, session: Session, stage: Stage, data: StageData, dims: Dims, *, show: Callable[[HeldOutMetrics], None]
    ) -> None:
        self._session, self._stage, self._dims, self._show = session, stage, dims, show
        self._tokenizer = data.tokenizer
        self._last: HeldOutMetrics | None = None
        self._heldout: HeldOut | None = None
        if data.heldout is not None:
            self._heldout = HeldOut(
                stage.config,
                data.heldout,
                data.tokenizer,
                dims,
                session.control,
                first_step=stage.first_step,
                note=session.note,
                beat=session.watchdog.beat,
            )
        self.with_heldout = self._heldout is not None

    def is_due(self, step: int) -> bool:
        """Return whether the held-out loss is to be computed after step `step`."""
        return self._heldout is not None and self._heldout.is_due(step)

    def evaluate(self, engine: Engine, step: int) -> None:
        """Compute and show the held-out loss. Raises RunError at every rank, if any rank cannot read the sequences."""
        assert self._heldout is not None
        self._last = self._heldout.evaluate(engine, step)
        self._show(self._last)
        self._session.note(in_words(self._last))

    def check_gate(self, engine: Engine, step: int) -> None:
        """Measure what the gate of the stage asks for. Raises RunError at every rank if the stage misses it."""
        gate, config = self._stage.gate, self._stage.config
        if not gate.is_set:
            return
        if gate.heldout_loss is not None and (self._last is None or self._last.step != step):
            self.evaluate(engine, step)
        retrieval = None
        if gate.retrieval is not None:
            retrieval = evaluate_retrieval(
                engine,
                self._tokenizer,
                self._dims,
                self._session.control,
                sequence_length=config.training.sequence_length,
                special_tokens=config.data.special_tokens,
                beat=self._session.watchdog.beat,
            )
            self._session.note(f"step {step}  retrieval {retrieval:.3f}")
        problem = missed(self._stage, self._last, retrieval)
        if problem is not None:
            raise RunError(problem)
        self._session.log.record("stage", f"stage {self._stage.name} passes its gate", step=step)
