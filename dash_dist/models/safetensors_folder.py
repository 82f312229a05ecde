"""The weights of a Hugging Face model: a folder of safetensors files.

Knows the files, their index and their damages. Reads one parameter at a time. Does not know Megatron-core.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from dash_dist.models.table import Entry

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of the names of tensors that old versions of transformers saved and that positions give."""


class SafetensorsFolder:
    """Parameters of the model in a folder, by the names of a table.

    Args:
        folder: has model.safetensors, or the index of several files.
        table: from `parameter_table`.

    Raises:
        ValueError: a file is missing or damaged; or a tensor is missing, has another shape, or is not in the table.
    """

    def __init__(self, folder: Path, table: Mapping[str, Entry]) -> None:
        self.folder = folder
        self._table = table
        self._places = _places(folder)
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for name in sorted(set(self._places.values())):
                self._files[name] = self._open.enter_context(_opened(folder / name))
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._open.close()
        self._files.clear()

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self._places.values()))

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return one whole parameter in the files' dtype; None for an optional one that the folder does not have.

        Raises:
            OSError, ValueError: a file cannot be read.
        """
        entry = self._table[name]
        if entry.optional and not entry.tensors.keys() & self._places.keys():
            return None
        return entry.join([self.tensor(tensor) for tensor in entry.tensors])

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor of the files."""
        file = self._places[name]
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: {name} cannot be read: {error}") from error
        return tensor

    def _check(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        for entry in self._table.values():
            if not entry.optional or entry.tensors.keys() & self._places.keys():
                wanted |= entry.tensors
        missing = [name for name in wanted if name not in self._places]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.folder} has no tensor {missing[0]}{others}: it does not hold all weights of the model that its "
                "config.json describes; get it again"
            )
        tied = "lm_head.weight" not in wanted
        for name, file in self._places.items():
            if name.endswith(_IGNORED) or (tied and name == "lm_head.weight"):
                continue
            if name not in wanted:
                raise ValueError(
                    f"{self.folder / file} has the tensor {name}, which no part of the model takes: its config.json "
                    "describes another model"
                )
            handle = self._files[file]
            if name not in handle.keys():  # noqa: SIM118
                raise ValueError(f"{self.folder / file} has no tensor {name}, and {INDEX} says it has: get it again")
            piece = handle.get_slice(name)
            shape = tuple(piece.get_shape())
            if shape != wanted[name]:
                raise ValueError(
                    f"{self.folder / file}: {name} is {list(shape)}, and config.json makes it {list(wanted[name])}"
                )
            if piece.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"{self.folder / file}: {name} is {piece.get_dtype()}, and quantised weights cannot be trained: "
                    "get the model in bfloat16"
                )


def _places(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged: {error}; get it again") from None
        if not isinstance(places, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in places.values()
        ):
            raise ValueError(f"{index} is damaged: weight_map does not name files beside it; get it again")
        return places
    single = folder / SINGLE
    if not single.is_file():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}: name the folder of a Hugging Face model in safetensors format"
        )
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, and {INDEX} names it: get it again") from None
    except SafetensorError as error:  # the header says how long the file is
        raise ValueError(f"{path} is truncated or damaged ({error}): get it again") from None
