"""Trains small models through the project's loop, and times the kernels layer by layer on what they select.

    python -m tools.benchmarks.trained FOLDER --out docs/results/trained_h200.json

Knows the order of models and layers; does not know what is measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tools.benchmarks.common.environment import describe_environment
from tools.benchmarks.common.options import heads as parse_heads
from tools.benchmarks.extension.corpus import write_code
from tools.benchmarks.trained.capture import SIZES, settings, train_and_capture
from tools.benchmarks.trained.measure import errors, selection, times
from tools.benchmarks.trained.table import as_markdown

_PROGRAM = "tools.benchmarks.trained"


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for text, tokens and runs.")],
    out: Annotated[Path, typer.Option(help="Results as JSON, with tables beside it as .md.")],
    tokens: Annotated[list[int], typer.Option(help="Sequence length; may be repeated.")] = [32_768, 131_072],  # noqa: B006
    heads: Annotated[list[str], typer.Option(help="QUERY,KV heads; may be repeated.")] = ["8,2", "32,8"],  # noqa: B006
    size: Annotated[str, typer.Option(help="gpu, or cpu to try the program out, without times.")] = "gpu",
    head_dim: Annotated[int | None, typer.Option(help="Of all heads; default: the size's.")] = None,
    megabytes: Annotated[float, typer.Option(help="Text for training.")] = 60.0,
    commit: Annotated[str | None, typer.Option(help="Name of this tree; default: git's HEAD.")] = None,
) -> None:
    """Train a model for each pair of heads and length, and write the results after each layer."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size}: give one of {', '.join(SIZES)}")
    sizes = SIZES[size] if head_dim is None else dataclasses.replace(SIZES[size], head_dim=head_dim)
    folder = folder.absolute()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, Any] = describe_environment(_PROGRAM, sys.argv[1:], commit=commit, device=device)
    record["models"] = []
    write_code(folder / "text", document=max(tokens), megabytes=megabytes)
    for of_heads in (parse_heads(text) for text in heads):
        for length in tokens:
            config = settings(sizes, folder, folder / "text" / "train.jsonl", heads=of_heads, tokens=length)
            loss, layers = train_and_capture(config, folder / f"{config['run']['name']}.yaml")
            model: dict[str, Any] = {
                "heads": of_heads,
                "head_dim": sizes.head_dim,
                "tokens": length,
                "loss": loss,
                "layers": [],
            }
            record["models"].append(model)
            while layers:
                layer = layers.pop(0)  # its tensors go when it is measured
                row = selection(layer) | {"errors": errors(layer)}
                model["layers"].append(row | (times(layer) if device == "cuda" else {}))
                print(json.dumps(model["layers"][-1]), flush=True)
                _write(record, out)


def _write(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(as_markdown(record))


if __name__ == "__main__":
    typer.run(main)
