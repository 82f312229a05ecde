"""Commands on checkpoints: list them, verify them, export their weights.

Knows folders and their content; does not know the training loop, and needs none of its processes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich import filesize
from rich.table import Table

from dash_dist.checkpoints.folders import HIDDEN_STATES, hidden_checkpoints, visible_checkpoints
from dash_dist.checkpoints.integrity import (
    ENGINE,
    METADATA,
    CheckpointMetadata,
    DamagedCheckpoint,
    find_damage,
    read_metadata,
)
from dash_dist.errors import CheckpointError
from dash_dist.models.hugging_face import TOKENIZER_FILES


@dataclass(frozen=True)
class Listed:
    """One checkpoint of a run; `metadata` is None where it cannot be read. `state` is in words, "complete" if it is."""

    folder: Path
    metadata: CheckpointMetadata | None
    state: str


def list_checkpoints(run: Path) -> list[Listed]:
    """Every checkpoint of a run, those being written and set aside included; files are not read, only measured.

    Args:
        run: the run's folder, or the `checkpoints` folder in it.

    Raises CheckpointError if there is no such folder.
    """
    directory = _directory_of(run)
    if directory is None:
        raise CheckpointError(f"{run} is not the folder of a run with checkpoints: name one such as runs/NAME")
    listed = []
    for folder in visible_checkpoints(directory):
        metadata, problems = _check(folder, sizes_only=True)
        state = "complete" if not problems else f"damaged: {problems[0].removeprefix(f'{folder}/')}"
        listed.append(Listed(folder, metadata, state))
    for folder, suffix in hidden_checkpoints(directory):
        metadata, _ = _check(folder, sizes_only=True)
        listed.append(Listed(folder, metadata, HIDDEN_STATES[suffix]))
    return listed


def table_of(listed: list[Listed]) -> Table:
    """One row per checkpoint."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "saved", "tokens", "loss", "size"):
        table.add_column(column, justify="right")
    table.add_column("state")
    table.add_column("folder")
    for one in listed:
        cells = ["", "", "", "", ""]
        if one.metadata is not None:
            state = one.metadata.state
            cells = [
                f"{state.step:,}",
                datetime.fromtimestamp(one.metadata.saved_at).strftime("%Y-%m-%d %H:%M:%S"),
                f"{state.tokens:,}",
                "" if state.last_loss is None else f"{state.last_loss:.4f}",
                filesize.decimal(one.metadata.size),
            ]
        table.add_row(*cells, one.state, one.folder.name)
    return table


def verify(path: Path, progress: Callable[[Path], None] = lambda _: None) -> Iterator[str]:
    """Read every file of a checkpoint, or of all complete checkpoints of a run; yields a message per damaged file.

    Args:
        path: a checkpoint's folder, a run's, or the `checkpoints` folder in it.
        progress: told each checkpoint before it is read.

    Raises CheckpointError if `path` is none of these, or has no checkpoint.
    """
    directory = _directory_of(path)
    checkpoints = [path] if directory is None else visible_checkpoints(directory)
    if not path.is_dir() or not checkpoints:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with checkpoints: name a step_* folder or a run"
        )
    for folder in checkpoints:
        progress(folder)
        yield from _check(folder)[1]


def export(source: Path, out: Path, progress: Callable[[str], None], *, adapter: bool = False) -> None:
    """Write the weights of a verified checkpoint, or its LoRA adapters alone, to `out`; see `checkpoints.export`.

    Args:
        source: a checkpoint's folder, or a run's, for its newest checkpoint.

    Raises CheckpointError: the checkpoint is damaged or not one of the Megatron engine, or `out` cannot be written; or
    other weights than the adapters and `summary_query` were trained.
    """
    from dash_dist.checkpoints.export import export_adapters, export_weights

    directory = _directory_of(source)
    found = [source] if directory is None else visible_checkpoints(directory)
    if not found:
        raise CheckpointError(f"{source} has no complete checkpoint: let the run save one")
    checkpoint = found[-1]
    problems = list(verify(checkpoint)) if (checkpoint / METADATA).exists() else [f"{checkpoint / METADATA} is missing"]
    if problems:
        raise CheckpointError(f"{checkpoint} is not exported: {problems[0]}")
    settings = _settings(checkpoint.absolute().parents[1] / "config.yaml")
    try:
        if adapter:
            _check_adapters_are_all(settings)
            # A run that began from another one's checkpoint did not read model.weights.
            started_here = read_metadata(checkpoint).state.origin is None
            base = settings.get("model", {}).get("weights") if started_here else None
            export_adapters(checkpoint / ENGINE, out, base=base)
        else:
            export_weights(checkpoint / ENGINE, out, progress=progress)
        _copy_tokenizer(settings, out)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be exported: {error}") from error


def _settings(config: Path) -> dict[str, Any]:
    """Settings of the run of a checkpoint; none where its file is not there."""
    if not config.is_file():
        return {}
    return yaml.safe_load(config.read_text(encoding="utf-8")) or {}


def _check_adapters_are_all(settings: dict[str, Any]) -> None:
    """Refuse, with ValueError, adapters beside other trained weights, which they cannot hold."""
    if any(stage.get("trainable") for stage in settings.get("stages") or ()):
        raise ValueError(
            "stages of the run train different parameters, and an adapter holds those of one: export without --adapter"
        )
    patterns = (settings.get("trainable") or {}).get("parameters") or ()
    if others := [one["match"] for one in patterns if not one["match"].endswith("summary_query")]:
        raise ValueError(
            f"trainable.parameters trained {others[0]} as well, which an adapter cannot hold: export without --adapter"
        )


def _copy_tokenizer(settings: dict[str, Any], out: Path) -> None:
    """Copy the files of the run's `data.tokenizer`, where it is a file or a folder that is there."""
    tokenizer = Path(str(settings.get("data", {}).get("tokenizer", ""))).expanduser()
    if tokenizer.is_file():
        beside = tokenizer.with_name("tokenizer_config.json")
        shutil.copyfile(tokenizer, out / "tokenizer.json")
        if beside.is_file():
            shutil.copyfile(beside, out / beside.name)
    elif settings.get("data", {}).get("tokenizer") and tokenizer.is_dir():
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / name)


def _check(folder: Path, *, sizes_only: bool = False) -> tuple[CheckpointMetadata | None, list[str]]:
    try:
        metadata = read_metadata(folder)
        return metadata, list(find_damage(folder, metadata, sizes_only=sizes_only).values())
    except DamagedCheckpoint as error:
        return None, [str(error)]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _directory_of(run: Path) -> Path | None:
    """Where the checkpoints of a run are; None if `run` is no run."""
    if (run / "checkpoints").is_dir():
        return run / "checkpoints"
    return run if run.name == "checkpoints" and run.is_dir() else None
