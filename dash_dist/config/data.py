"""The section `data:`, the sources of the documents and their conversion to tokens and sequences.

Knows which options fit together, and which fit the sizes of a batch; does not know files or ranks. Opening the corpus
checks paths, on the machine that reads it.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dash_dist.config.section import Section

Share = Annotated[float, Field(gt=0)]


class SourceConfig(Section):
    """One source of documents. A meaningless combination is refused, with the option to change."""

    source: Literal["stdlib", "files", "hub", "megatron"] = "stdlib"
    """stdlib: the .py files of the running Python's standard library; files: `paths`; hub: `name`; megatron: `paths`
    of indexed datasets of Megatron-core, already tokenised."""

    paths: tuple[str, ...] = ()
    """Files, globs (including `**`) or folders, relative to the working directory. Folders are read recursively,
    without hidden files. Entries are read in this order, and the files of an entry in sorted order. A file
    named twice is read once. For source=megatron: path prefixes, without .bin and .idx."""

    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Format of the files. auto: by each file's suffix; .jsonl, .ndjson and .json are JSON Lines, .parquet is Parquet,
    others are text. A document is a text file, a line of JSON Lines or a row of Parquet. Text and JSON Lines may be
    compressed (.gz, .bz2, .xz, .zst)."""

    text_column: str = Field(default="text", min_length=1)
    """Column or JSON key that holds the document; `meta.body` is the field body of the column meta."""

    rows: Literal["text", "messages", "completions"] = "text"
    """Contents of a line or row. text: a document in `text_column`. messages: a conversation in `messages_column`, made
    a text by the chat template, of which the assistant's turns count in the loss. completions: a prompt and its
    completion, which alone counts, with the end of the document."""

    messages_column: str = Field(default="messages", min_length=1)
    """Column of a list of {role, content}. A column `tools`, where there is one, holds the tools of a conversation."""
    prompt_column: str = Field(default="prompt", min_length=1)
    completion_column: str = Field(default="completion", min_length=1)

    chat_template: Path | None = None
    """File of Jinja, instead of the chat template in the tokenizer's files."""

    length_weights: dict[Annotated[int, Field(gt=0)], Share] = Field(default_factory=dict)
    """Weights of documents by length: `{4096: 2, 32768: 5}` reads documents of at least 4096 tokens twice an epoch, and
    those of at least 32768 five times. Weights may be fractions."""

    name: str | None = None
    """Hub dataset, `owner/name`, or the folder of a dataset in the hub's layout."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Commit, tag or branch of the hub dataset. Pin it if the run must resume after the dataset is updated."""

    @field_validator("chat_template", "cache", mode="before", check_fields=False)
    @classmethod
    def _text_is_a_path(cls, value: object) -> object:
        return Path(value) if isinstance(value, str) else value

    @field_validator("length_weights", mode="before")
    @classmethod
    def _keys_are_numbers(cls, weights: object) -> object:
        if not isinstance(weights, dict):
            return weights
        # A resolved configuration spells keys as text.
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in weights.items()}

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> Self:
        with_paths = self.source in ("files", "megatron")
        if with_paths and not self.paths and not getattr(self, "sources", ()):
            raise ValueError(f"data.source={self.source} needs data.paths: give files, globs or folders")
        if not with_paths and self.paths:
            raise ValueError(
                f"data.paths is read only with data.source=files or megatron, not {self.source}: set it or drop paths"
            )
        if self.source != "files" and self.format != "auto":
            raise ValueError(f"data.format={self.format} is read only with data.source=files: drop it")
        if self.source == "hub" and self.name is None:
            raise ValueError("data.source=hub needs data.name, such as owner/name")
        if self.source != "hub":
            given = [
                option
                for option in ("name", "subset", "split", "revision")
                if getattr(self, option) != type(self).model_fields[option].default
            ]
            if given:
                raise ValueError(
                    f"data.{given[0]}={getattr(self, given[0])} is read only with data.source=hub, not {self.source}: "
                    "set it or drop the option"
                )
        self._check_rows()
        if self.text_column != "text" and (self.source in ("stdlib", "megatron") or self.format == "text"):
            raise ValueError(
                f"data.text_column={self.text_column}: text files have no columns; drop it, or set data.format to "
                "jsonl or parquet"
            )
        return self

    def _check_rows(self) -> None:
        if self.rows != "text" and (self.source in ("stdlib", "megatron") or self.format == "text"):
            raise ValueError(
                f"data.rows={self.rows} needs rows: set data.source to files or hub, of JSON Lines or Parquet"
            )
        readers = {
            "text_column": "text",
            "messages_column": "messages",
            "chat_template": "messages",
            "prompt_column": "completions",
            "completion_column": "completions",
        }
        for option, rows in readers.items():
            value = getattr(self, option)
            if rows != self.rows and value != type(self).model_fields[option].default:
                raise ValueError(
                    f"data.{option}={value} is read only with data.rows={rows}, not {self.rows}: set it or drop the "
                    "option"
                )


class MixtureSource(SourceConfig):
    """One of several sources, and its share of the tokens: `weight` or `epochs`, the same one for all sources."""

    source: Literal["stdlib", "files", "hub", "megatron"] = "files"

    label: str | None = Field(default=None, min_length=1)
    """Name in curves and messages; by default the source's first path or its name."""

    weight: Share | None = None
    """Share of the tokens, relative to the other sources' weights."""

    epochs: Share | None = None
    """Passes over this source for every pass over a source with epochs=1."""

    @property
    def title(self) -> str:
        """The label, or what the source is read from."""
        return self.label or self.name or (self.paths[0] if self.paths else self.source)


class DataConfig(SourceConfig):
    """Options of the data: one source, or several in `sources`, and what is made of their documents."""

    sources: tuple[MixtureSource, ...] = ()
    """Several sources instead of the one above. Without weights or epochs, shares follow the sources' tokens."""

    temperature: Annotated[float, Field(gt=0)] | None = None
    """Exponent of the shares without weights: tokens ** (1 / temperature). 1 is proportional, more is more even."""

    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that `transformers.AutoTokenizer` loads."""

    end_of_document: str | None = None
    """Text of the token put after each document, for tokenizers whose files do not name it."""

    special_tokens: bool = False
    """Add the tokens to each document that the tokenizer's post-processor adds, such as a beginning-of-text token."""

    damaged: Literal["skip", "stop"] = "skip"
    """Treatment of a document that cannot be read (a line that is not JSON, bytes that are not UTF-8): skip, count and
    name it, or refuse the corpus with its name."""

    accept_changes: bool = False
    """Resume although documents have changed since the checkpoint."""

    cache: Path | None = None
    """Folder of the tokens, written once and read by every rank; best on storage that all nodes share. Default:
    dash-dist/data in XDG_CACHE_HOME or ~/.cache."""

    documents: Literal["joined", "separate"] = "joined"
    """Attention across the borders between documents in a sequence. joined: allowed. Documents follow each other
    without padding, which suits pretraining on documents that are short relative to a sequence. separate: not allowed.
    Each document is padded to whole chunks (`attention.chunk_size`) and computed as a sequence of its own."""

    long_documents: Literal["split", "drop"] = "split"
    """Treatment of documents longer than a sequence where documents are separate."""

    lookahead: Annotated[int, Field(ge=1, le=65536)] = 256
    """Documents from which a sequence of separate documents is filled, the best fit first."""

    length_buckets: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Ascending lengths in tokens. Separate documents share a sequence only with documents of the same bucket."""

    shuffle_seed: int | None = Field(default=0, ge=0)
    """Seed of the order of the documents, which is new in each epoch; None reads them in the order of the files."""

    cut_documents: Annotated[int, Field(ge=2)] | None = None
    """Tokens of the parts into which longer documents are cut. The parts are shuffled one by one, as documents are, so
    that a batch has parts of many documents. Neither attention nor labels of separate documents cross from one part to
    the next. None keeps documents whole."""

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if self.sources:
            # By value: a resolved configuration, read back, has set all of them.
            fields = SourceConfig.model_fields.items()
            single = [
                name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)
            ]
            if single:
                raise ValueError(f"data.{single[0]} and data.sources are both given: move it into data.sources")
            weighted = [one for one in self.sources if one.weight is not None]
            counted = [one for one in self.sources if one.epochs is not None]
            if (weighted and len(weighted) < len(self.sources)) or (counted and len(counted) < len(self.sources)):
                raise ValueError("data.sources: give weight (or epochs) to every source or to none")
            if weighted and counted:
                raise ValueError("data.sources: give weight or epochs, not both")
            if self.temperature is not None and (weighted or counted):
                raise ValueError("data.temperature is read only where data.sources have no weight and no epochs")
            titles = [one.title for one in self.sources]
            if twice := [title for title in titles if titles.count(title) > 1]:
                raise ValueError(f"data.sources: two sources are named {twice[0]!r}: give each a label of its own")
        elif self.temperature is not None:
            raise ValueError("data.temperature is read only with data.sources: drop it")
        if self.tokenizer == "bytes" and self.end_of_document is not None:
            raise ValueError(
                f"data.end_of_document={self.end_of_document!r}: the bytes tokenizer has its own end-of-document "
                "token: drop the option or name another data.tokenizer"
            )
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise ValueError(f"data.length_buckets={list(self.length_buckets)} is not ascending: sort it")
        if self.shuffle_seed is None and any(one.length_weights for one in self.all_sources):
            raise ValueError("data.length_weights needs an order by chance: set data.shuffle_seed, or drop it")
        if self.shuffle_seed is None and self.cut_documents is not None:
            raise ValueError("data.cut_documents needs an order by chance: set data.shuffle_seed, or drop it")
        if self.documents == "joined":
            given = [
                name
                for name in ("long_documents", "lookahead", "length_buckets")
                if getattr(self, name) != type(self).model_fields[name].default
            ]
            if given:
                raise ValueError(f"data.{given[0]} is read only with data.documents=separate: drop it")
        return self

    @property
    def all_sources(self) -> tuple[MixtureSource, ...]:
        """The sources, also where there is one."""
        if self.sources:
            return self.sources
        return (MixtureSource(**{name: getattr(self, name) for name in SourceConfig.model_fields}),)


def check_separate(*, sequence_length: int, micro_batch_size: int, chunk_size: int) -> None:
    """Refuse, with ValueError, sizes into which data.documents=separate cannot be packed."""
    if micro_batch_size != 1:
        raise ValueError(
            f"training.micro_batch_size = {micro_batch_size} with data.documents = separate: sequences of separate "
            "documents are computed one at a time; set training.micro_batch_size to 1, or data.documents to joined"
        )
    if sequence_length % chunk_size:
        raise ValueError(
            f"training.sequence_length = {sequence_length} is not a multiple of attention.chunk_size = {chunk_size}, "
            f"and data.documents = separate pads documents to whole chunks: set training.sequence_length to "
            f"{-(-sequence_length // chunk_size) * chunk_size}"
        )
