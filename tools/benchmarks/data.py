"""Times the preparation and the reading of a generated corpus of many documents.

Knows how a corpus is generated and what is measured; does not know GPUs or ranks.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dash_dist.config.data import DataConfig
from dash_dist.data.prepare import Preparation, prepare_in_processes, start_worker
from dash_dist.data.readers import FileRange
from dash_dist.data.sources import Shard
from dash_dist.data.stream import DataStream, build_data_stream
from dash_dist.data.token_shard import write_shard
from dash_dist.data.tokenizer import ByteTokenizer

_FILES = 16
_MIB = 1 << 20


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for documents and tokens, about 700 bytes a document.")],
    documents: Annotated[int, typer.Option(help="Documents in all.")] = 10_000_000,
    length: Annotated[int, typer.Option(help="Bytes of a document on average.")] = 200,
    processes: Annotated[int, typer.Option(help="Processes that tokenise.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of the steady reading.")] = 10_000,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    global_batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    out: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
) -> None:
    """Generate JSON Lines, prepare them, read batches, resume; print one line a figure."""
    config = DataConfig(source="files", paths=(str(folder / "text"),), cache=folder / "tokens")
    size = _generate(folder / "text", documents, length)
    figures: dict[str, Any] = {"command": " ".join(sys.argv[1:]), "documents": documents, "text_mib": size / _MIB}

    begin = time.perf_counter()
    preparation = Preparation.of(config, ByteTokenizer())
    missing = preparation.missing()
    if not missing:
        raise typer.BadParameter(f"{folder / 'tokens'} holds the tokens already: give an empty folder")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, start_worker, (config,)) as pool:
        prepare_in_processes(preparation, pool)
    seconds = time.perf_counter() - begin
    peak = _peak(resource.RUSAGE_CHILDREN) * processes + _peak(resource.RUSAGE_SELF)
    figures |= {
        "prepare_seconds": seconds,
        "prepare_mb_per_second_and_process": size / 1e6 / seconds / processes,
        "one_shard_mb_per_second": _speed_of_a_shard(missing[0], folder / "one_shard"),
        "prepare_peak_mib": peak / _MIB,
    }

    def stream() -> DataStream:
        return build_data_stream(
            config,
            tokenizer=ByteTokenizer(),
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            dp_rank=0,
            dp_size=1,
            micro_batch_size=1,
            chunk_size=64,
        )

    first = stream()
    memory, read, begin = [], 0, time.perf_counter()
    for step in range(steps):
        if step == 1:
            read, begin = _bytes_read(), time.perf_counter()
        first.next_step()
        if step in (steps // 10, steps - 1):
            memory.append(_resident())
    seconds, read = time.perf_counter() - begin, _bytes_read() - read
    used = (steps - 1) * global_batch_size * sequence_length * np.dtype(np.uint16).itemsize
    figures |= {
        "steps": steps,
        "tokens_per_second": used / 2 / seconds,
        "bytes_read_over_used": read / used,
        "memory_growth_mib": (memory[1] - memory[0]) / _MIB,
    }

    state = json.loads(json.dumps(first.state_dict()))
    begin = time.perf_counter()
    again = stream()
    again.load_state_dict(state)
    resumed = again.next_step()
    figures["resume_seconds"] = time.perf_counter() - begin
    expected = first.next_step()
    assert all((a.tokens == b.tokens).all() for a, b in zip(resumed, expected, strict=True))

    for name, value in figures.items():
        print(f"{name:36} {value:,.3f}" if isinstance(value, float) else f"{name:36} {value}")
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


def _generate(folder: Path, documents: int, length: int) -> int:
    """Write the documents unless they are there; returns their bytes."""
    if not folder.exists():
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        words = np.array(["of", "attention", "chunk", "long", "sequence", "rank", "key", "é", "token", "a"])
        text = " ".join(random.choice(words, 100_000))
        for file in range(_FILES):
            with open(folder / f"{file:02}.jsonl", "w", encoding="utf-8") as lines:
                count = documents * (file + 1) // _FILES - documents * file // _FILES
                starts = random.integers(0, len(text) // 2, count)
                lengths = random.geometric(1 / length, count)
                for start, chosen in zip(starts.tolist(), lengths.tolist(), strict=True):
                    lines.write(json.dumps({"text": text[start : start + chosen]}, ensure_ascii=False) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def _speed_of_a_shard(shard: Shard, folder: Path) -> float:
    """Return the speed in this process, without the start of another one."""
    size = sum(os.path.getsize(part.path) for part in shard.parts if isinstance(part, FileRange))
    begin = time.perf_counter()
    write_shard(shard, folder, ByteTokenizer(), stop_at_damage=False, special_tokens=False)
    return size / 1e6 / (time.perf_counter() - begin)


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


if __name__ == "__main__":
    typer.run(main)
