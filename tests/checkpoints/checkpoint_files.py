"""Real checkpoints of a tiny run, and ways to damage them."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from dash_dist.checkpoints.integrity import CheckpointMetadata, checksum_of, read_metadata, write_metadata


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint, in the order in which they are written."""
    order = ["engine/__0_0.distcp", "engine/common.pt", "engine/.metadata", "engine/metadata.json", "data.json"]
    files = [*(folder / name for name in order), folder / "metadata.json"]
    assert {path for path in folder.rglob("*") if path.is_file()} == set(files)
    return files


def with_right_checksums(folder: Path) -> None:
    """Make what is in the folder now what `metadata.json` says was written."""
    old = read_metadata(folder)
    files = {name: checksum_of(folder / name) for name in old.files}
    write_metadata(folder, CheckpointMetadata(old.state, old.saved_at, files))


def truncate(folder: Path, rng: random.Random, *_: Path) -> list[Path]:
    file = rng.choice(files_of(folder))
    os.truncate(file, rng.randrange(file.stat().st_size))
    return [file]


def flip_a_bit(folder: Path, rng: random.Random, *_: Path) -> list[Path]:
    file = rng.choice(files_of(folder))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return [file]


def lose_a_file(folder: Path, rng: random.Random, *_: Path) -> list[Path]:
    file = rng.choice(files_of(folder))
    file.unlink()
    return [file]


def stop_half_way(folder: Path, rng: random.Random, *_: Path) -> list[Path]:
    """As a copy that was interrupted: some files are there, one in part, the others not."""
    files = files_of(folder)
    rng.shuffle(files)
    reached = rng.randrange(len(files))
    os.truncate(files[reached], rng.randrange(files[reached].stat().st_size))
    for file in files[reached + 1 :]:
        file.unlink()
    return files[reached:]


def mix_up(folder: Path, rng: random.Random, previous: Path, of_other_model: Path) -> list[Path]:
    """Files that are whole, and in the wrong place."""
    source = rng.choice([previous, of_other_model])
    kind = rng.choice(["one file", "two files", "index and state", "everything"])
    if kind == "everything":  # of another step, or of a run of the same length with another model
        shutil.rmtree(folder)
        shutil.copytree(previous, folder)
        return [folder / "metadata.json"]
    if kind == "two files":
        one, two = rng.sample([file for file in files_of(folder) if file.name != "metadata.json"], 2)
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
        return [one, two]
    names = ["engine/.metadata", "engine/common.pt"]
    if kind == "one file":
        names = [rng.choice(["engine/__0_0.distcp", "engine/.metadata", "metadata.json"])]
    for name in names:
        shutil.copy(source / name, folder / name)
    return [folder / name for name in names] if names != ["metadata.json"] else files_of(folder)


DAMAGES: dict[str, Callable[..., list[Path]]] = {
    "truncated": truncate,
    "bit-flipped": flip_a_bit,
    "missing file": lose_a_file,
    "half-written": stop_half_way,
    "wrong layout": mix_up,
}
