"""State of an engine that is not a tensor, as a checkpoint holds it.

Knows the file it is in. Does not import Megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMMON = "common.pt"
"""Megatron's file for everything that is not a tensor cut over ranks."""
CONFIG = "metadata.json"
"""Megatron's file that says how the others are written; it is written last."""
RUN = "run"
"""The entry of `COMMON` that holds the `EngineState`."""

LORA = "lora"
"""The entry of an identity that describes adapters."""


@dataclass(frozen=True)
class EngineState:
    """State of an engine that is not a tensor.

    Attributes:
        step: steps done.
        sequence_length: tokens of a whole sequence in training.
        identity: settings that must be the same for the weights and the optimizer's state to fit.
        function: settings of the function that the weights were trained in; others fit them too.
    """

    step: int
    sequence_length: int
    identity: dict[str, Any]
    function: dict[str, Any]


def read_engine_state(directory: Path) -> EngineState:
    """State of an engine that is not a tensor.

    Raises:
        FileNotFoundError: there is no complete checkpoint in the directory.
        OSError: the storage does not give it.
        ValueError: the file that it is in is damaged or of another program; names it.
    """
    if (directory / "deepspeed.json").is_file():
        raise ValueError(
            f"{directory} was written by engine: deepspeed and this run has engine: megatron, which cannot load it: "
            "set engine to deepspeed"
        )
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is not a checkpoint, or not written to its end")
    path = directory / COMMON
    try:
        return EngineState(**torch.load(path, map_location="cpu", weights_only=True)[RUN])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    except OSError:
        raise
    except Exception as error:  # what torch, and then the lookup, make of a foreign file can be anything
        raise ValueError(f"{path} is damaged or of another program: {error}") from error
