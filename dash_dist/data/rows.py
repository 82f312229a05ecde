"""Kinds of rows: texts, prompts with completions, conversations; and the tokens of a row that count in the loss.

Knows columns and what is made of their values; does not know files. A template that does not show where turns begin
and end is refused; a row that does not is damaged.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from dash_dist.config.data import MixtureSource
from dash_dist.data.chat import ChatTemplate, InexactTurn, MarkedText, conversation_of, read_template
from dash_dist.data.columns import Columns, DamagedDocument, text_of
from dash_dist.data.tokenizer import Tokenizer

_TOOLS = "tools"

Values = tuple[Any, ...]


class MarkedTokens(NamedTuple):
    """Tokens of a row, without those that are put around documents.

    Attributes:
        ids: [n].
        spans: first and last + 1 token of each part that counts, ascending.
        digest: of the text and its parts.
    """

    ids: np.ndarray
    spans: list[tuple[int, int]]
    digest: int


class Rows(Protocol):
    """A kind of rows with columns besides one text."""

    @property
    def columns(self) -> Columns:
        """Columns that are read."""

    @property
    def identity(self) -> list[object]:
        """Everything that decides on the tokens of a row besides the tokenizer; JSON-serialisable."""

    @property
    def whole(self) -> bool:
        """Return whether rows bring their own first and last tokens, and what is put behind them does not count."""

    def mark(self, values: Values) -> MarkedText | None:
        """Make the text of a row from its columns; None for an empty row. Raises DamagedDocument."""

    def refusal(self, tokenizer: Tokenizer) -> str | None:
        """Return why no row can be read exactly, if the damage of one is not the row's."""


@dataclass(frozen=True)
class CompletionRows:
    """A prompt and its completion, which counts in the loss with the end of the document."""

    prompt: str
    completion: str
    whole: bool = False

    @property
    def columns(self) -> Columns:
        return Columns((self.prompt, self.completion))

    @property
    def identity(self) -> list[object]:
        return ["completions", self.prompt, self.completion]

    def mark(self, values: Values) -> MarkedText | None:
        prompt, completion = (text_of(value, column) for value, column in zip(values, self.columns.names, strict=True))
        if not prompt and not completion:
            return None
        if values[1] is None:
            raise DamagedDocument(f"column {self.completion!r} has no value")
        return MarkedText(prompt + completion, [(len(prompt), len(prompt) + len(completion))], [False])

    def refusal(self, tokenizer: Tokenizer) -> str | None:
        return None


@dataclass(frozen=True)
class ChatRows:
    """A conversation, of which the assistant's turns count in the loss."""

    messages: str
    template: ChatTemplate
    whole: bool = True

    @property
    def columns(self) -> Columns:
        return Columns((self.messages, _TOOLS), optional=(_TOOLS,), of_text=False)

    @property
    def identity(self) -> list[object]:
        return ["messages", self.messages, self.template.text, self.template.special_tokens]

    def mark(self, values: Values) -> MarkedText | None:
        messages, tools = values
        if not messages:
            return None
        return self.template.mark(*conversation_of(messages, tools, self.template))

    def refusal(self, tokenizer: Tokenizer) -> str | None:
        try:
            encode_marked(self.template.probe(), tokenizer)
        except InexactTurn as error:
            return (
                f"{self.template.origin} does not show which tokens are the assistant's: {error}; set "
                f"data.chat_template to {error.remedy}"
            )
        except DamagedDocument:
            return None  # it takes only other conversations, which may be exact
        return None


def rows_of(config: MixtureSource, tokenizer: Tokenizer, tokenizer_name: str) -> Rows | None:
    """Return the kind of rows of a source; None for texts.

    Args:
        tokenizer_name: `data.tokenizer`, for messages.

    Raises:
        OSError, ValueError: there is no chat template, or it is none.
        ConfigError: the extra `hub` is missing, which renders chat templates.
    """
    if config.rows == "text":
        return None
    if config.rows == "completions":
        return CompletionRows(config.prompt_column, config.completion_column)
    template = tokenizer.chat_template
    if config.chat_template is not None:
        template = read_template(config.chat_template, () if template is None else template.special_tokens)
    if template is None:
        raise ValueError(
            f"data.rows=messages of {config.title}, and data.tokenizer={tokenizer_name} has no chat template: set "
            "data.chat_template to a file of Jinja, or data.tokenizer to the folder of a chat model's tokenizer"
        )
    template.check()
    return ChatRows(config.messages_column, template)


def encode_row(rows: Rows, values: Values, tokenizer: Tokenizer) -> MarkedTokens | None:
    """Make the tokens of a row from its columns; None for an empty row.

    Raises:
        DamagedDocument: the row cannot be read exactly.
        ValueError: no row can.
    """
    try:
        marked = rows.mark(values)
        encoded = None if marked is None else encode_marked(marked, tokenizer)
        if encoded is not None and rows.whole and not encoded.spans:
            raise DamagedDocument("none of its tokens counts in the loss")
        return encoded
    except InexactTurn as error:
        if (refusal := rows.refusal(tokenizer)) is not None:
            raise ValueError(refusal) from error
        raise


def encode_marked(marked: MarkedText, tokenizer: Tokenizer) -> MarkedTokens:
    """Make the tokens of a text. Raises InexactTurn where tokens at a border depend on what follows it."""
    text = marked.text
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DamagedDocument(str(error)) from error
    cuts = [cut for span in marked.spans for cut in span]
    ids, counts = tokenizer.encode_cut(text, cuts)
    spans = []
    for number, trimmed in enumerate(marked.trimmed):
        for cut, count in zip(cuts[2 * number :][:2], counts[2 * number :][:2], strict=True):
            if count is None:
                raise InexactTurn(
                    f"the tokens at character {cut}, between {text[max(0, cut - 20) : cut]!r} and "
                    f"{text[cut : cut + 20]!r}, are not those of the text before it: move white space from one side "
                    "to the other",
                    "one whose generation prompt ends with a token that joins no other, such as a special token",
                )
        start, stop = (int(count or 0) for count in counts[2 * number :][:2])
        while trimmed and stop > start + 1 and tokenizer.decode(ids[stop - 1 : stop]).isspace():
            stop -= 1
        if start < stop:
            spans.append((start, stop))
    return MarkedTokens(ids, spans, zlib.crc32(repr(spans).encode(), zlib.crc32(encoded)))
