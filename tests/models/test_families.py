"""Models of every family that transformers makes: read, trained over ranks, exported, read by transformers again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_dist.checkpoints.export import export_weights
from dash_dist.config.model import ModelConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.models.hugging_face import model_from, read_config, windows_of
from tests.models.tiny_models import CASES, SHAPE, logits_in_transformers, save_tiny_model, tokens
from tests.support.cases import exhaustive
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

ONE_OF_EACH = (
    "llama, tied, llama3",
    "mistral, dynamic",
    "qwen2, yarn",
    "qwen3, windows by layer",
    "smollm3",
    "olmo3, yarn in full layers, tied",
)
OTHERS = tuple(name for name in CASES if name not in ONE_OF_EACH)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, ModelConfig], dict[str, torch.Tensor]]:
    """Name -> the section `model` that starts from the files, and the logits of transformers."""
    folder = tmp_path_factory.mktemp("models")
    logits = {name: save_tiny_model(name, folder / name) for name in CASES}
    models = {
        name: model_from(read_config(folder / name)).model_copy(update={"weights": folder / name}) for name in CASES
    }
    return models, logits


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_logits_equal_those_of_transformers(saved: Any) -> None:
    models, wanted = saved
    (found,) = run_ranks("tests.models.model_jobs:logits_of", 1, models, cpu_only=True)
    for name in CASES:
        assert not isinstance(found[name], str), found[name]
        assert wanted[name].std() > 0.1
        assert difference(found[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("names", exhaustive([ONE_OF_EACH, OTHERS], [OTHERS]), ids=lambda names: f"{len(names)} models")
def test_trained_over_ranks_and_exported(saved: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    models, before = {name: saved[0][name] for name in names}, saved[1]
    parallel = ParallelConfig(tensor=2, context=2)
    ranks = run_ranks("tests.models.model_jobs:train_and_save", 4, models, parallel, tmp_path, cpu_only=True)
    (alone,) = run_ranks(
        "tests.models.model_jobs:train_and_save", 1, models, ParallelConfig(), tmp_path / "alone", cpu_only=True
    )
    for rank in ranks:
        for name in names:
            assert rank[name] == pytest.approx(alone[name], rel=1e-5), name
    (trained,) = run_ranks("tests.models.model_jobs:load_and_read", 1, models, tmp_path, cpu_only=True)
    for name, model in models.items():
        out = tmp_path / "exported" / name
        export_weights(tmp_path / name, out)
        assert difference(logits_in_transformers(out), trained[name]) < 1e-5, name
        assert difference(trained[name], before[name]) > 1e-2, name
        ours, theirs = read_config(out), read_config(model.weights)
        assert ours["architectures"] == theirs["architectures"]
        assert "dash_attention" not in ours
        assert windows_of(ours) == windows_of(theirs)
        again = model_from(ours)
        expected = model.model_copy(update={"weights": None, "init_std": again.init_std})
        if model.positions.type == "dynamic":  # frozen: the same frequencies, as default positions
            expected = expected.model_copy(update={"positions": again.positions})
        assert again.model_dump() == expected.model_dump() | {"head_dim": model.resolved_head_dim}


def test_a_model_of_mixed_kinds_computes_the_same_in_transformers(tmp_path: Path) -> None:
    """Windows are spelled by the family where it can; with `dash_attention` every layer is that of the trainer."""
    import dash_dist.hf

    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_kv_heads": 2}
    models = {
        f"{family}, mixed": ModelConfig.model_validate(
            {
                **shape,
                "family": family,
                "vocab_size": SHAPE["vocab_size"],
                "init_std": 0.2,
                "qk_norm": family == "qwen3",
            }
        )
        for family in ("llama", "qwen3")
    }
    run_ranks(
        "tests.models.model_jobs:train_and_save",
        4,
        models,
        ParallelConfig(tensor=2, context=2),
        tmp_path,
        cpu_only=True,
    )
    (trained,) = run_ranks("tests.models.model_jobs:load_and_read", 1, models, tmp_path, cpu_only=True)
    for name in models:
        out = tmp_path / "exported" / name
        export_weights(tmp_path / name, out)
        model = dash_dist.hf.load(out, dtype=torch.float32)
        with torch.no_grad():
            assert difference(model(tokens()).logits, trained[name]) < 1e-5, name
        assert difference(logits_in_transformers(out), trained[name]) > 1e-3, name  # dense where it is dash
        config = read_config(out)
        assert config["dash_attention"]["kind"] == ["window", "dash", "dense", "window"]
        assert windows_of(config) == ([40, None, None, 40] if "qwen3" in name else [None] * 4)
        queries = [tensor for tensor in model.state_dict() if "summary_query" in tensor]
        assert queries == ["model.layers.1.self_attn.summary_query"]
        assert model.state_dict()[queries[0]].any()
