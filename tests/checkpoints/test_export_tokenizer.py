"""Tokenizer files that go with an export."""

from pathlib import Path

import pytest
import yaml

from dash_dist.checkpoints.commands import _copy_tokenizer


@pytest.mark.parametrize(
    ("given", "copied"), [("folder", {"tokenizer.json", "merges.txt"}), ("bytes", set()), ("", set())]
)
def test_tokenizer_files_are_copied(tmp_path: Path, given: str, copied: set[str]) -> None:
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "merges.txt", "notes.md"):
        (folder / name).write_text(name)
    tokenizer = str(folder) if given == "folder" else given
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"tokenizer": tokenizer}}))
    _copy_tokenizer(tmp_path / "config.yaml", out)
    assert {path.name for path in out.iterdir()} == copied
