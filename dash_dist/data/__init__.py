"""Documents, tokenizers, packing, and the position in the data.

Knows its data-parallel index. Does not know other ranks or models. Names are imported on first use: a configuration is
checked, and a tokenizer read, without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_dist.data.config import DataConfig
    from dash_dist.data.stream import Batch, DataStream, build_data_stream, merge_states
    from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_MODULE_OF = {
    "Batch": "stream",
    "ByteTokenizer": "tokenizer",
    "DataConfig": "config",
    "DataStream": "stream",
    "Tokenizer": "tokenizer",
    "build_data_stream": "stream",
    "load_tokenizer": "tokenizer",
    "merge_states": "stream",
}

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "DataStream",
    "Tokenizer",
    "build_data_stream",
    "load_tokenizer",
    "merge_states",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
