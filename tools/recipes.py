"""The table of docs/recipes.md: memory and speed of each recipe's stages, as `dash-dist plan` predicts them.

    python -m tools.recipes

Knows the recipes and their numbers of GPUs; does not know how a prediction is made.
"""

from __future__ import annotations

from pathlib import Path

from dash_dist.config.file import load_config
from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import GPUS, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.vocabulary import vocabulary_of
from tools.benchmarks.common.markdown import table

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = {
    "llama_3_2_1b_128k": (8, 64),
    "qwen3_0_6b_128k": (8, 64),
    "llama_3_1_8b_128k": (8, 64),
    "qwen3_8b_128k": (8, 64),
    "llama_3_1_70b_256k": (256, 512),
}
"""Configurations, and the numbers of GPUs that they are planned for."""
GPU = "H100"
_GIB = 2**30


def predictions(recipe: str, gpus: int) -> dict[str, Prediction]:
    """Return the prediction for each stage of a recipe on so many GPUs of kind `GPU`."""
    config = load_config(CONFIGS / f"{recipe}.yaml")
    machine = Machine(GPUS[GPU], gpus, 8, GPUS[GPU].memory * _GIB)
    found = {}
    for stage in config.stage_list:
        layout = Layout.of(stage.config, gpus)
        vocab_size = vocabulary_of(stage.config)
        found[stage.name] = predict(stage.config, layout, machine, Assumptions(), vocab_size=vocab_size)
    return found


def as_table() -> str:
    """Return one row for each recipe, number of GPUs and stage."""
    rows = []
    for recipe, numbers in RECIPES.items():
        for gpus in numbers:
            for stage, prediction in predictions(recipe, gpus).items():
                layout = prediction.layout
                rows.append(
                    [
                        recipe,
                        stage,
                        str(gpus),
                        f"{layout.tensor} x {layout.context} x {layout.pipeline} x {layout.data}",
                        f"{prediction.peak.total / _GIB:.1f}",
                        f"{prediction.seconds:.1f}",
                        f"{prediction.tokens / prediction.seconds / gpus:,.0f}",
                    ]
                )
    header = ["recipe", "stage", GPU, "TP x CP x PP x DP", "GiB a GPU", "seconds a step", "tokens/s a GPU"]
    return table("At density 0.1", header, rows)


if __name__ == "__main__":
    print(as_table())
