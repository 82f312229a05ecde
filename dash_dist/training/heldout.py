"""The loss on sequences that a run holds out of its training, by position.

Knows when an evaluation is due and which sequences it reads; does not know how a loss is computed or shown.
"""

import itertools
import math
import time
from collections.abc import Callable

from dash_dist.config.run import RunConfig
from dash_dist.data.corpus import Corpus
from dash_dist.data.stream import DataStream, build_data_stream
from dash_dist.data.tokenizer import Tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.protocol import BucketLoss, Engine
from dash_dist.engine.ranks import Dims
from dash_dist.errors import ConfigError, RunError
from dash_dist.training.telemetry.metrics import HeldOutMetrics


class HeldOut:
    """Held-out sequences of a run: the first ones of a stream of their own, read anew for each evaluation.

    Every method is a collective: all ranks call it.

    Args:
        config: with `evaluation.interval`.
        corpus: the prepared documents of `evaluation.data`.
        first_step: steps of the run before the ones that `config` is for.
        tokenizer: the run's.
        note: called at every rank with remarks for the console.
        beat: called between batches.

    Raises:
        ConfigError: at every rank, if any rank cannot read the data.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        tokenizer: Tokenizer,
        dims: Dims,
        control: ControlGroup,
        *,
        first_step: int,
        note: Callable[[str], None],
        beat: Callable[[], None],
    ) -> None:
        assert config.evaluation.data is not None  # the configuration refuses an interval without data
        self._config, self._section, self._data = config, config.evaluation, config.evaluation.data
        self._tokenizer, self._dims, self._control = tokenizer, dims, control
        self._note, self._beat = note, beat
        # Whole micro-batches of every rank: both numbers are multiples of data-parallel size x micro-batch size.
        self._batch = math.gcd(self._section.sequences, config.training.global_batch_size)
        self._edges = self._section.edges(config.training.sequence_length)
        self._corpus = corpus
        self._first_step = first_step
        with control.together("the held-out data cannot be read", ConfigError):
            self._stream()
        for told in self._corpus.damage:
            note(f"evaluation.data: {told}")
        self._told = False

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation follows step `step`."""
        assert self._section.interval is not None
        return step in (self._first_step + 1, self._config.training.steps) or step % self._section.interval == 0

    def evaluate(self, engine: Engine, step: int) -> HeldOutMetrics:
        """Compute the loss after step `step`.

        Raises:
            RunError: at every rank, if any rank cannot read the sequences.
        """
        started = time.perf_counter()
        cannot_read = "cannot read the held-out data"
        with self._control.together(cannot_read, RunError):
            stream = self._stream()
        buckets = [BucketLoss(0.0, 0) for _ in self._edges]
        for _ in range(self._section.sequences // self._batch):
            self._beat()
            with self._control.together(cannot_read, RunError):
                micro_batches = stream.next_step()
            more = engine.evaluate(micro_batches, self._edges)
            buckets = [
                BucketLoss(one.total + other.total, one.tokens + other.tokens)
                for one, other in zip(buckets, more, strict=True)
            ]
        self._beat()
        self._tell_repetition(stream)
        names = [f"{start}-{end}" for start, end in itertools.pairwise((0, *self._edges))]
        return HeldOutMetrics(
            step=step,
            loss=sum(bucket.total for bucket in buckets) / sum(bucket.tokens for bucket in buckets),
            by_position={
                name: bucket.total / bucket.tokens for name, bucket in zip(names, buckets, strict=True) if bucket.tokens
            },
            seconds=time.perf_counter() - started,
        )

    def _stream(self) -> DataStream:
        training = self._config.training
        return build_data_stream(
            self._data,
            tokenizer=self._tokenizer,
            sequence_length=training.sequence_length,
            global_batch_size=self._batch,
            dp_rank=self._dims.dp_rank,
            dp_size=self._dims.dp_size,
            micro_batch_size=training.micro_batch_size,
            chunk_size=self._config.attention.chunk_size,
            corpus=self._corpus,
        )

    def _tell_repetition(self, stream: DataStream) -> None:
        """Note once which sources are too small for the sequences."""
        repeated = [title for title, progress in stream.progress.items() if progress.epochs > 1]
        if repeated and not self._told:
            self._note(
                f"evaluation.data: the documents of {', '.join(repeated)} repeat within "
                f"evaluation.sequences = {self._section.sequences}: lower it, or give more documents"
            )
        self._told = True


def in_words(metrics: HeldOutMetrics) -> str:
    """Return the losses as a line of progress."""
    by_position = ", ".join(f"{bucket} {loss:.4f}" for bucket, loss in metrics.by_position.items())
    return f"step {metrics.step}  held-out loss {metrics.loss:.4f}  by position: {by_position}"
