"""The recipes in configs/: resolved, planned, built on the meta device, and described as they are."""

import pytest

from dash_dist.config.file import load_config
from tests.support.ranks import run_ranks
from tools.recipes import CONFIGS, RECIPES, as_table, predictions

# Parameters in billions, as the models' cards give them.
SIZES = {
    "llama_3_2_1b_128k": 1.24,
    "qwen3_0_6b_128k": 0.60,
    "llama_3_1_8b_128k": 8.03,
    "qwen3_8b_128k": 8.19,
    "llama_3_1_70b_256k": 70.6,
}


def test_every_recipe_is_listed():
    extended = {path.stem for path in CONFIGS.glob("*.yaml") if load_config(path).stages}
    assert extended == RECIPES.keys() == SIZES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_gpus(recipe):
    for gpus in RECIPES[recipe]:
        for stage, prediction in predictions(recipe, gpus).items():
            assert prediction.fits, (stage, gpus)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_extends_a_model_with_separate_documents(recipe):
    config = load_config(CONFIGS / f"{recipe}.yaml")
    for stage in config.stage_list:
        assert stage.config.data.documents == "separate"
        assert stage.config.model.weights is not None
        limit = stage.config.model.positions.limit
        assert limit is not None
        assert limit >= stage.config.training.sequence_length


def test_the_page_of_recipes_is_what_the_planner_says():
    assert as_table() in (CONFIGS.parent / "docs" / "recipes.md").read_text()


@pytest.mark.slow
def test_every_recipe_is_the_model_of_its_name():
    (found,) = run_ranks(
        "tests.config.recipe_jobs:parameters_on_meta",
        1,
        [CONFIGS / f"{recipe}.yaml" for recipe in RECIPES],
        cpu_only=True,
    )
    for recipe, (ours, theirs) in found.items():
        assert ours == theirs, recipe
        assert round(theirs / 1e9, 1 if theirs > 1e10 else 2) == SIZES[recipe]
