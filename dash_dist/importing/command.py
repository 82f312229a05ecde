"""The command `dash-dist import`: a folder that runs can start from, or one error and nothing left behind.

Knows files, and the order of the checks; does not know how logits are computed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.errors import ConfigError
from dash_dist.extras import require_extra
from dash_dist.models.hugging_face import TOKENIZER_FILES, model_from, read_config, windows_of
from dash_dist.models.safetensors_folder import INDEX, SafetensorsFolder
from dash_dist.models.table import parameter_table
from dash_dist.models.windows import attention_of

LIMIT = 1e-4
"""Relative difference of the logits above which an import is refused."""


def import_model(source: str, out: Path) -> float:
    """Check the model in `source` and write `out`: its files, model.yaml and import.json.

    Args:
        source: folder, or name on the hub, `owner/name`.
        out: new or empty.

    Returns:
        The relative difference of the logits from those of transformers.

    Raises:
        ConfigError: the model cannot be imported; `out` is left as it was.
    """
    require_extra("hub", "dash-dist import")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: import to a new folder")
    folder = _local(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as working:
            staged = Path(working) / "model"
            parity = _stage(folder, staged, out)
            if out.exists():
                out.rmdir()
            staged.rename(out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be imported: {error}") from error
    return parity


def _local(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConfigError(f"{source} is no folder, nor the name of a model on the hub (owner/name): name one of them")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ConfigError(f"{source} cannot be downloaded: {error}") from error


def _stage(folder: Path, staged: Path, out: Path) -> float:
    from dash_dist.importing.parity import compared_layers, measure_parity

    settings = read_config(folder)
    model, windows = model_from(settings), windows_of(settings)
    staged.mkdir()
    with SafetensorsFolder(folder, parameter_table(model, model.vocab_size or 0)) as weights:
        for name in ["config.json", INDEX, *TOKENIZER_FILES]:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged / name)
        for name in weights.files:
            _link(folder / name, staged / name)
        parity = measure_parity(model, windows, folder, weights)
    if not parity <= LIMIT:
        raise ValueError(
            f"its logits differ from those of transformers by {parity:.1e} of their norm, and {LIMIT:g} is allowed: "
            "report the model, with its config.json"
        )
    record = {"logits_difference": parity, "layers_compared": compared_layers(model), "layers": model.num_layers}
    (staged / "import.json").write_text(json.dumps(record, indent=2) + "\n")
    (staged / "model.yaml").write_text(_sections(model, attention_of(windows, others="dash"), folder, out))
    return parity


def _link(source: Path, target: Path) -> None:
    """Link a file, whichever way the hub's cache keeps it; copy it to another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _sections(model: ModelConfig, attention: AttentionConfig, folder: Path, out: Path) -> str:
    """The section `model`, `attention` where there are windows, and `data.tokenizer` where there is one, as YAML."""
    settings = model.model_copy(update={"weights": out.resolve()}).model_dump(mode="json", exclude_defaults=True)
    sections: dict[str, object] = {"model": settings}
    if attention.window is not None:
        sections["attention"] = attention.model_dump(mode="json", exclude_defaults=True)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        sections["data"] = {"tokenizer": str(out.resolve())}
    return yaml.safe_dump(sections, sort_keys=False)
