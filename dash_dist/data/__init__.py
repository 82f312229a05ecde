"""Documents, tokenizers, packing, and the position in the data.

Knows its data-parallel index. Does not know other ranks or models.
"""

from dash_dist.data.config import DataConfig
from dash_dist.data.stream import Batch, DataStream, build_data_stream, merge_states
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

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
