"""Tokens of a run's tokenizer, read without the data.

Knows where a tokenizer says its size; does not know how text is tokenised.
"""

from __future__ import annotations

from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError


def vocabulary_of(config: RunConfig) -> int:
    """Tokens of the configuration's tokenizer. Raises ConfigError where it cannot be read here."""
    from dash_dist.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document).vocab_size
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer: {error}; or give --vocab-size") from None
