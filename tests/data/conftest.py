"""Small corpora on disk. Nothing here reaches the network, and the cache of `datasets` is a temporary
folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before the first import of datasets, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dash-dist-datasets-")

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dash_dist.config.data import DataConfig
from tests.data.data_streams import TEXTS


@pytest.fixture(scope="session", autouse=True)
def _remove_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., DataConfig]:
    """corpus(format, texts): writes the texts, several documents per file where the format can, gives the
    config."""

    def write(file_format: str, texts: list[str] = TEXTS, **options: Any) -> DataConfig:
        folder = tmp_path / file_format
        folder.mkdir()
        if file_format == "text":
            for i, text in enumerate(texts):
                (folder / f"{i:03d}.txt").write_text(text)
        for part, start in enumerate(range(0, len(texts), 4)):
            rows = texts[start : start + 4]
            if file_format == "jsonl":
                lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(rows)]
                (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n\n")
            if file_format in ("parquet", "hub"):
                table = pa.table({"text": rows, "id": range(len(rows))})
                pq.write_table(table, folder / f"train-{part}.parquet", row_group_size=3)
        if file_format == "hub":
            return DataConfig(source="hub", name=str(folder), **options)
        return DataConfig(source="files", paths=(str(folder),), **options)

    return write
