"""Tokenizer files that go with an export."""

from pathlib import Path

import pytest
import yaml

from dash_dist.checkpoints.commands import _check_adapters_are_all, _copy_tokenizer, _settings


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
    config = tmp_path / "config.yaml"
    assert _settings(config) == {}
    config.write_text(yaml.safe_dump({"data": {"tokenizer": tokenizer}}))
    _copy_tokenizer(_settings(config), out)
    assert {path.name for path in out.iterdir()} == copied


def test_an_adapter_of_a_run_that_trained_more_is_refused() -> None:
    _check_adapters_are_all({"trainable": {"parameters": [{"match": "*summary_query"}]}})
    with pytest.raises(ValueError, match=r"trained \*norm\* as well, which an adapter cannot hold"):
        _check_adapters_are_all({"trainable": {"parameters": [{"match": "*summary_query"}, {"match": "*norm*"}]}})
