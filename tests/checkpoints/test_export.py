"""Exported weights, read by transformers: the model they make computes what this one does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dash_dist.hf
from dash_dist.checkpoints.export import export_weights
from tests.support.models import CHUNK_SIZE, MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case, global_batch
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

SAVED = {
    "tp 2": Case(tensor=2),
    "cp 2, first chunk": Case(context=2, attend_first_chunk=True),
    "pp 2, tied": Case(pipeline=2, tie_embeddings=True, distributed_optimizer=True),
}

ALONE = {name: dataclasses.replace(case, tensor=1, context=1, pipeline=1) for name, case in SAVED.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine checkpoints written by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks("tests.megatron.megatron_jobs:train_and_save", 2, SAVED, folder, cpu_only=True)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(logits of the first chunk of a sequence, summary queries), of each checkpoint loaded on one rank."""
    (loaded,) = run_ranks("tests.megatron.megatron_jobs:load_and_read", 1, ALONE, folder, cpu_only=True)
    return loaded


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("name", SAVED)
def test_transformers_computes_the_same(
    folder: Path, loaded: dict[str, tuple[torch.Tensor, torch.Tensor]], tmp_path: Path, name: str, shard_bytes: int
) -> None:
    out = tmp_path / "out"
    written: list[str] = []
    export_weights(folder / name, out, shard_bytes=shard_bytes, progress=written.append)
    assert (len(written) == 1) == (shard_bytes == 10**9)
    assert all((out / file).stat().st_size < shard_bytes + 10_000 for file in written)

    logits, summary_queries = loaded[name]
    model, report = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation=dash_dist.hf.NAME, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    names = [f"model.layers.{layer}.self_attn.summary_query" for layer in range(MODEL.num_layers)]
    with torch.no_grad():
        found = model(global_batch(0).tokens[:, :CHUNK_SIZE]).logits
    assert found.std() > 0.1
    torch.testing.assert_close(found, logits[..., :VOCAB_SIZE], rtol=1e-4, atol=1e-5)
    for file in written:
        with safe_open(out / file, framework="pt") as tensors:
            for layer, key in enumerate(names):
                if key in tensors.keys():  # noqa: SIM118
                    torch.testing.assert_close(tensors.get_tensor(key), summary_queries[layer], rtol=0, atol=0)
                    names[layer] = "found"
    assert names == ["found", "found"]


def test_trainer_evaluation_and_exported_model_agree_on_the_loss(folder: Path, tmp_path: Path) -> None:
    (judged,) = run_ranks("tests.megatron.megatron_jobs:load_and_judge", 1, ALONE, folder, cpu_only=True)
    batch = global_batch(0)
    for name, (trained, evaluated) in judged.items():
        export_weights(folder / name, tmp_path / name)
        with torch.no_grad():
            logits = dash_dist.hf.load(tmp_path / name)(batch.tokens).logits  # [b, s, vocab]
        exported = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask]).item()
        assert [trained, evaluated] == pytest.approx([exported] * 2, rel=1e-6), name


def test_the_configuration_says_what_a_llama_does_not(folder: Path, tmp_path: Path) -> None:
    export_weights(folder / "tp 2", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dash_attention"]["chunk_size"] == CHUNK_SIZE
    assert "attend_first_chunk" not in config["dash_attention"]
    assert config["max_position_embeddings"] == SEQUENCE_LENGTH
    export_weights(folder / "cp 2, first chunk", tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["dash_attention"]["attend_first_chunk"] is True
    with pytest.raises(ValueError, match="out is not empty: export to a new folder"):
        export_weights(folder / "tp 2", tmp_path / "out")
