"""The command `dash-dist import`, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.models.hugging_face import model_from, read_config, windows_of
from dash_dist.models.safetensors_folder import SafetensorsFolder
from dash_dist.models.start import advise_conversion
from dash_dist.models.table import parameter_table
from tests.models.tiny_models import SHAPE, WINDOW, save_tiny_model
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model("qwen3, yarn, tied", folder)
    return folder


def test_import_writes_a_section_and_the_parity(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    (parity,) = run_ranks("dash_dist.importing.command:import_model", 1, str(tiny), out, cpu_only=True)
    assert parity < 1e-5
    assert json.loads((out / "import.json").read_text())["logits_difference"] == parity
    model = ModelConfig.model_validate(yaml.safe_load((out / "model.yaml").read_text())["model"])
    assert model.weights == out
    assert model.model_copy(update={"weights": None}) == model_from(read_config(tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def damaged(tiny: Path, folder: Path, change: Callable[[Path], None]) -> str:
    """The refusal of a changed copy."""
    shutil.copytree(tiny, folder)
    change(folder)
    model = model_from(read_config(folder))
    with pytest.raises(ValueError, match=str(folder)) as caught:
        SafetensorsFolder(folder, parameter_table(model, model.vocab_size or 0))
    return str(caught.value)


def test_damaged_folders_are_refused(tiny: Path, tmp_path: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    name = sorted(index["weight_map"])[0]

    def truncate(folder: Path) -> None:
        path = folder / index["weight_map"][name]
        path.write_bytes(path.read_bytes()[:-100])

    def lose_file(folder: Path) -> None:
        (folder / index["weight_map"][name]).unlink()

    def lose_tensor(folder: Path) -> None:
        kept = {key: file for key, file in index["weight_map"].items() if key != name}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))

    def reshape(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
        (folder / "config.json").write_text(json.dumps(config))

    assert "truncated or damaged" in damaged(tiny, tmp_path / "a", truncate)
    assert "is missing" in damaged(tiny, tmp_path / "b", lose_file)
    assert f"has no tensor {name}" in damaged(tiny, tmp_path / "c", lose_tensor)
    assert "config.json makes it [64, 40]" in damaged(tiny, tmp_path / "d", reshape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"novel_key": 1}, "has the key 'novel_key'"),
        ({"model_type": "gemma3"}, "these can"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "remove the wrong one"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "'beta_fast' is not one of type"),
        ({"rope_scaling": {"type": "su"}}, "rope_type 'su'"),
        ({"sliding_window": 8}, "model_type llama has no windows"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "sliding_window is 4096 in every layer"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "use_sliding_window is not true"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention'"),
        ({"model_type": "olmo2", "sliding_window": 8}, "model_type olmo2 has no windows"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "has the key 'clip_qkv'"),
        (
            {"model_type": "olmo3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters is not given for full_attention and sliding_attention",
        ),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
            "gives sliding_attention the rope_theta 1000000.0, and only 10000.0",
        ),
        (
            {
                "model_type": "olmo3",
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            "factor 2.0 in rope_scaling and 4.0 elsewhere",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "layer_types has 3 entries"),
    ],
)
def test_configurations_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_from({"model_type": "llama", **SHAPE, **changes})


def test_runs_that_contradict_their_weights_are_refused(tiny: Path) -> None:
    model = model_from(read_config(tiny)).model_copy(update={"weights": tiny})
    bad = {
        "shape": model.model_copy(update={"ffn_hidden_size": 64}),
        "vocabulary": model.model_copy(update={"vocab_size": 40}),
        "folder": model.model_copy(update={"weights": tiny / "nothing"}),
    }
    for rank in run_ranks("tests.models.model_jobs:errors", 1, bad, cpu_only=True):
        assert "model.ffn_hidden_size is 64" in rank["shape"]
        assert "set model.vocab_size to 50" in rank["vocabulary"]
        assert "config.json cannot be read" in rank["folder"]
    with pytest.raises(ValueError, match="tokenizer has 60 tokens and model"):
        model.embedded_tokens(60)


def test_weights_without_routing_get_advice_on_the_prior(tiny: Path, tmp_path: Path) -> None:
    dense = model_from(read_config(tiny)).model_copy(update={"weights": tiny})
    advice = advise_conversion(dense, AttentionConfig())
    assert advice is not None
    assert advice.startswith(f"{tiny} was trained without routing, and attention.prior_sigma is null")
    assert "attend_first_chunk" in advice
    with_first = advise_conversion(dense, AttentionConfig(attend_first_chunk=True))
    assert with_first is not None
    assert "attend_first_chunk" not in with_first
    fine: list[dict[str, Any]] = [
        {"prior_sigma": 4.0},
        {"conversion": "output"},
        {"kind": "dense"},
        {"kind": "topk", "top_chunks": 4},
    ]
    assert [advise_conversion(dense, AttentionConfig(**settings)) for settings in fine] == [None] * len(fine)
    assert advise_conversion(dense.model_copy(update={"weights": None}), AttentionConfig()) is None
    routed, windows = tmp_path / "routed", tmp_path / "windows"
    for folder, settings in ((routed, {"chunk_size": 16}), (windows, {"kind": ["window", "dense"], "window": 8})):
        shutil.copytree(tiny, folder)
        (folder / "config.json").write_text(json.dumps(read_config(tiny) | {"dash_attention": settings}))
    assert advise_conversion(dense.model_copy(update={"weights": routed}), AttentionConfig()) is None
    assert advise_conversion(dense.model_copy(update={"weights": windows}), AttentionConfig()) is not None


def test_olmo3_in_the_spelling_of_transformers_4() -> None:
    """Every fourth layer is full and scaled; the windows of the others have default positions of the same base."""
    config = {"model_type": "olmo3", **SHAPE, "num_hidden_layers": 8, "rope_theta": 7e3, "sliding_window": 9}
    config |= {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    model = model_from(config)
    assert (model.rotary_base, model.positions.type, model.norm_epsilon) == (7e3, "yarn", 1e-5)
    assert model.norms_after
    assert model.windows_unscaled
    assert windows_of(config) == [9, 9, 9, None] * 2


def test_import_writes_the_kinds_of_a_model_with_windows(tmp_path: Path) -> None:
    """Layers with a window keep it, the others take the default kind; the comparison used both."""
    save_tiny_model("qwen3, windows by layer", tmp_path / "model")
    (parity,) = run_ranks(
        "dash_dist.importing.command:import_model", 1, str(tmp_path / "model"), tmp_path / "base", cpu_only=True
    )
    assert parity < 1e-5
    attention = yaml.safe_load((tmp_path / "base" / "model.yaml").read_text())["attention"]
    assert attention == {"kind": ["window", "dash", "window", "window"], "window": WINDOW}
