"""Jobs of ranks that prepare one corpus together."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dash_dist.config.data import DataConfig
from dash_dist.data import prepare
from dash_dist.data.prepare import prepare_together
from dash_dist.data.stream import build_data_stream
from dash_dist.data.tokenizer import ByteTokenizer
from dash_dist.distributed.agreement import ControlGroup
from dash_dist.errors import ConfigError
from tests.data.data_streams import build, global_steps


def prepare_at_each_rank(config: dict[str, Any], caches: list[str], local_ranks: list[int]) -> dict[str, Any]:
    """Prepare the corpus twice: the shards that this rank has written, the steps of the data, or the error."""
    control = ControlGroup(timedelta(seconds=60))
    os.environ["LOCAL_RANK"] = str(local_ranks[control.rank])
    os.environ["XDG_CACHE_HOME"] = caches[control.rank]
    written: list[str] = []
    write = prepare._write

    def noted(shard, *arguments):
        written.append(shard.key)
        return write(shard, *arguments)

    prepare._write = noted
    beats: list[int] = []
    data = DataConfig(**config)

    def together():
        return prepare_together(data, ByteTokenizer(), control, note=lambda line: None, beat=lambda: beats.append(1))

    try:
        corpus = together()
        first = list(written)
        again = together()
    except ConfigError as error:
        return {"error": str(error), "written": written}
    rank, size = dist.get_rank(), dist.get_world_size()

    stream = build_data_stream(
        data,
        tokenizer=ByteTokenizer(),
        sequence_length=32,
        global_batch_size=size,
        dp_rank=rank,
        dp_size=size,
        micro_batch_size=1,
        chunk_size=4,
        corpus=corpus,
    )
    rows = [row for step in global_steps([stream], 5) for row in step]
    alone = global_steps([build(data, length=32, batch=size)], 5)
    return {
        "written": first,
        "again": written[len(first) :],
        "fingerprint": corpus.fingerprint,
        "same": again.fingerprint == corpus.fingerprint and rows == [step[rank] for step in alone],
        "inside": str(corpus.cache) == str(Path(caches[rank]) / "dash-dist" / "data"),
        "beats": len(beats),
        "documents": [len(source) for source in corpus.sources.values()],
    }
