"""The documents of a stage, prepared, and the streams that read them.

Knows which settings a corpus depends on; does not know how documents become tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dash_dist.config.data import DataConfig
from dash_dist.config.run import RunConfig, Stage
from dash_dist.data.advice import advise
from dash_dist.data.corpus import Corpus
from dash_dist.data.prepare import prepare_together
from dash_dist.data.sizes import check_sizes, sizes_of
from dash_dist.data.stream import DataStream, build_data_stream
from dash_dist.data.tokenizer import Tokenizer, load_tokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.engine.ranks import Dims
from dash_dist.errors import ConfigError


@dataclass(frozen=True)
class StageData:
    """The prepared documents of one stage.

    Attributes:
        heldout: of `evaluation.data`; None without evaluations.
    """

    tokenizer: Tokenizer
    corpus: Corpus
    heldout: Corpus | None

    def stream(self, config: RunConfig, dims: Dims) -> DataStream:
        """Return this data-parallel rank's stream of a stage. Raises ValueError for sizes that do not fit."""
        return build_data_stream(
            config.data, tokenizer=self.tokenizer, corpus=self.corpus, **sizes_of(config, dims.dp_rank, dims.dp_size)
        )

    def advice(self, config: RunConfig) -> str | None:
        """Return what to change in how a stage reads its documents; None if nothing."""
        training = config.training
        return advise(
            config.data,
            self.corpus,
            sequence_length=training.sequence_length,
            global_batch_size=training.global_batch_size,
        )


def prepare_data(
    stages: Sequence[Stage], control: ControlGroup, *, note: Callable[[str], None], beat: Callable[[], None]
) -> list[StageData]:
    """Prepare the documents of every stage, so that a later stage does not fail for a file that is missing now.

    A collective. Raises ConfigError at every rank for documents or sizes that any rank cannot use.
    """
    with control.together("the run cannot start", ConfigError):
        data = stages[0].config.data  # the tokens are the same in every stage
        tokenizer = load_tokenizer(data.tokenizer, end_of_document=data.end_of_document)
        for stage in stages:
            config = stage.config
            config.model.embedded_tokens(tokenizer.vocab_size)
            # Before the documents are prepared, which can take long.
            check_sizes(config.data, **sizes_of(config, 0, config.parallel.data_parallel_size(control.size)))
    if data.special_tokens:
        before, after = tokenizer.special_tokens
        note(f"data.special_tokens puts {list(before)} before and {list(after)} after each document")
    prepared: list[tuple[DataConfig, Corpus]] = []

    def prepare(config: DataConfig) -> Corpus:
        for known, corpus in prepared:
            if known == config:
                return corpus
        prepared.append((config, prepare_together(config, tokenizer, control, note=note, beat=beat)))
        return prepared[-1][1]

    found = []
    for stage in stages:
        evaluation = stage.config.evaluation
        heldout = None
        corpus = prepare(stage.config.data)
        if evaluation.interval is not None:
            assert evaluation.data is not None  # the configuration refuses an interval without data
            heldout = prepare(evaluation.data)
        found.append(StageData(tokenizer, corpus, heldout))
    return found
