"""The section `evaluation:`, the sequences that a run holds out of its training and the loss on them.

Knows its own settings; does not know the training data. `run.py` compares the two.
"""

from typing import Annotated

from pydantic import Field, field_validator

from dash_dist.config.data import DataConfig
from dash_dist.config.section import Section

Positive = Annotated[int, Field(gt=0)]

SAME_TOKENS = ("tokenizer", "end_of_document", "special_tokens")
"""Settings of the held-out data that must be those of the run's data."""
TAKEN_OVER = (*SAME_TOKENS, "cache", "documents")
"""Settings of the held-out data that are those of the run's data where they are not given."""

_FIRST_BUCKET = 4096


class EvaluationSection(Section):
    """Loss on held-out sequences, by the position of a token in its sequence.

    Attributes:
        interval: steps between evaluations; the first and the last step have one, too. None disables them.
        sequences: held-out sequences of training.sequence_length tokens, the same ones at every evaluation. A multiple
            of the data-parallel size x training.micro_batch_size.
        data: documents that are not trained on, with the options of the section `data`. The options that fix the
            tokens, the cache and the treatment of documents are those of the run's data where they are not given.
        buckets: ascending ends of the buckets of positions, in tokens. Default: powers of two from 4096. The last
            bucket ends with the sequence.
    """

    interval: Positive | None = None
    sequences: Positive = 16
    data: DataConfig | None = None
    buckets: tuple[Positive, ...] = ()

    @field_validator("buckets")
    @classmethod
    def _buckets_ascend(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if list(buckets) != sorted(set(buckets)):
            raise ValueError("is not ascending: sort it, each length once")
        return buckets

    def edges(self, sequence_length: int) -> tuple[int, ...]:
        """Return the ends of the buckets: bucket i has the positions from edges[i - 1], or 0, to edges[i] - 1."""
        ends = self.buckets
        if not ends:
            powers = range(_FIRST_BUCKET.bit_length() - 1, sequence_length.bit_length())
            ends = tuple(1 << power for power in powers)
        return (*(end for end in ends if end < sequence_length), sequence_length)
