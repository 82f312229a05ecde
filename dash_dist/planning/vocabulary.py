"""Tokens of a run's tokenizer, read without the data.

Knows where a tokenizer says its size; does not know how text is tokenised.
"""

from __future__ import annotations

from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError


def vocabulary_of(config: RunConfig) -> int:
    """Tokens of the configuration's embedding. Raises ConfigError where its tokenizer cannot be read here."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from dash_dist.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document).vocab_size
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer: {error}; or give --vocab-size") from None
