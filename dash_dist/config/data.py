"""The section `data:`, the source of the documents and their conversion to tokens.

Knows which options fit together, and which fit the sizes of a batch; does not know files or ranks. Opening the corpus
checks paths, on the machine that reads it.
"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dash_dist.config.section import Section


class DataConfig(Section):
    """Options of one corpus. A meaningless combination is refused, with the option to change."""

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    """stdlib: the .py files of the running Python's standard library; files: `paths`; hub: `name`."""

    paths: tuple[str, ...] = ()
    """Files, globs (including `**`) or folders, relative to the working directory. Folders are read recursively,
    without hidden files. Entries are read in this order, and the files of an entry in sorted order. A file
    named twice is read once."""

    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Format of the files. auto: by suffix (.jsonl, .ndjson and .json are JSON Lines, .parquet is Parquet, others are
    text). A document is a text file, a line of JSON Lines or a row of Parquet."""

    text_column: str = Field(default="text", min_length=1)
    """Column or JSON key that holds the document."""

    name: str | None = None
    """Hub dataset, `owner/name`, or the folder of a dataset in the hub's layout."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Commit, tag or branch of the hub dataset. Pin it if the run must resume after the dataset is updated."""

    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that `transformers.AutoTokenizer` loads."""

    end_of_document: str | None = None
    """Text of the token put after each document, for tokenizers whose files do not name it."""

    undecodable: Literal["skip", "error"] = "skip"
    """Treatment of a document whose bytes are not UTF-8: skip and count it, or raise with its name. Hub datasets are
    decoded by `datasets`, which raises."""

    documents: Literal["joined", "separate"] = "joined"
    """Attention across the borders between documents in a sequence. joined: allowed. Documents follow each other
    without padding, which suits pretraining on documents that are short relative to a sequence. separate: not allowed.
    Each document is padded to whole chunks (`attention.chunk_size`) and computed as a sequence of its own."""

    shuffle_seed: int | None = Field(default=None, ge=0)
    """Seed of the order of the files, which is new in each epoch; None keeps them sorted. Documents inside a file keep
    their order, because a shuffle buffer could not be resumed exactly."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("data.source=files needs data.paths: give files, globs or folders")
        if self.source != "files" and self.paths:
            raise ValueError(f"data.paths is read only with data.source=files, not {self.source}: set it or drop paths")
        if self.source != "files" and self.format != "auto":
            raise ValueError(f"data.format={self.format} is read only with data.source=files: drop it")
        if self.source == "hub" and self.name is None:
            raise ValueError("data.source=hub needs data.name, such as owner/name")
        if self.source == "hub" and self.shuffle_seed is not None:
            raise ValueError(
                "data.shuffle_seed orders the files of data.source=files or stdlib; "
                "a hub dataset is read in its own order: drop data.shuffle_seed"
            )
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
        if self.text_column != "text" and (self.source == "stdlib" or self.format == "text"):
            raise ValueError(
                f"data.text_column={self.text_column}: text files have no columns; drop it, or set data.format to "
                "jsonl or parquet"
            )
        if self.tokenizer == "bytes" and self.end_of_document is not None:
            raise ValueError(
                f"data.end_of_document={self.end_of_document!r}: the bytes tokenizer has its own end-of-document "
                "token: drop the option or name another data.tokenizer"
            )
        return self


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
