"""Adapters train the same at every layout, and exports with them compute what the trainer does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dash_dist.checkpoints.export import export_adapters, export_weights
from dash_dist.config.trainable import LoraConfig
from tests.megatron.test_layouts import joined
from tests.megatron.test_trainable import assert_same_weights
from tests.support.models import MODEL, SEQUENCE_LENGTH, VOCAB_SIZE, Case
from tests.support.ranks import run_ranks

JOBS = "tests.megatron.lora_jobs"
LORA = {"rank": 4, "alpha": 8.0, "lr": 2e-2}
SOME = {"linears": ["o_proj", "v_proj", "up_proj"], "rank": 2, "alpha": 6.0}
ALONE = Case(grad_clip=0.5)
ON_TWO = {
    "tp": dataclasses.replace(ALONE, tensor=2),
    "tp, recompute": dataclasses.replace(ALONE, tensor=2, recompute="full"),
    "cp": dataclasses.replace(ALONE, context=2),
    "cp, selective": dataclasses.replace(ALONE, context=2, recompute="selective"),
    "pp, distributed": dataclasses.replace(ALONE, pipeline=2, distributed_optimizer=True),
}
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, list[Any]]:
    """Case -> what each rank saw; its checkpoint is in `folder`."""
    (alone,) = run_ranks(f"{JOBS}:run_all", 1, {"alone": ALONE}, LORA, folder, STEPS, cpu_only=True)
    ranks = run_ranks(f"{JOBS}:run_all", 2, ON_TWO, LORA, folder, STEPS, cpu_only=True)
    (some,) = run_ranks(f"{JOBS}:run_all", 1, {"some": ALONE}, SOME, folder, STEPS, cpu_only=True)
    return {"alone": [alone["alone"]], "some": [some["some"]]} | {
        name: [rank[name] for rank in ranks] for name in ON_TWO
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_every_layout_trains_the_same(seen: dict[str, list[Any]], name: str) -> None:
    (alone,) = seen["alone"]
    for rank in seen[name]:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-6)
        assert rank.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
    assert_same_weights(seen[name], [alone], relative=1e-4)


@pytest.mark.slow
def test_adapters_and_routing_train_alone(seen: dict[str, list[Any]]) -> None:
    (start,) = run_ranks(f"{JOBS}:initial", 1, ALONE, LORA, cpu_only=True)
    (alone,) = seen["alone"]
    moved = {name for name, (weight, _) in alone.weights.items() if not torch.equal(weight, start.weights[name][0])}
    assert moved == {name for name in alone.weights if ".lora." in name or name.endswith("summary_query")}
    assert alone.gradients.keys() == moved
    assert len(moved) == MODEL.num_layers * (7 * 2 + 1)
    b = [weight for name, (weight, _) in start.weights.items() if name.endswith("_proj.b")]
    assert not any(one.any() for one in b)
    base, *groups = alone.learning_rates[-1]
    assert groups == pytest.approx([base, 2 * base])


@pytest.mark.slow
def test_first_adapters_do_not_depend_on_the_layout() -> None:
    (one,) = run_ranks(f"{JOBS}:initial", 1, ALONE, LORA, cpu_only=True)
    two = run_ranks(f"{JOBS}:initial", 2, ON_TWO["tp"], LORA, cpu_only=True)
    full = joined(two, "weights")
    for name, (weight, _) in one.weights.items():
        torch.testing.assert_close(full[name], weight, rtol=0, atol=0)


@pytest.mark.slow
def test_a_checkpoint_without_adapters_can_begin_a_run_with_them(folder: Path) -> None:
    run_ranks(f"{JOBS}:run_all", 1, {"base": ALONE}, None, folder, 2, cpu_only=True)
    (resumed,) = run_ranks(f"{JOBS}:run", 1, ALONE, LORA, folder / "with", 1, folder / "base", cpu_only=True)
    (plain,) = run_ranks(f"{JOBS}:run", 1, ALONE, None, None, 1, folder / "base", cpu_only=True)
    assert resumed.losses == pytest.approx(plain.losses)
    (message,) = run_ranks(f"{JOBS}:refused", 1, ALONE, None, folder / "with", cpu_only=True)
    assert "export it, and name that in model.weights" in message


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("tp", LORA), ("pp, distributed", LORA), ("some", SOME)])
def test_exports_compute_what_the_trainer_does(
    seen: dict[str, list[Any]], folder: Path, tmp_path: Path, name: str, lora: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    import dash_dist.hf  # noqa: F401

    tokens = torch.arange(SEQUENCE_LENGTH)[None] * 7 % VOCAB_SIZE
    case = dataclasses.replace(ALONE, distributed_optimizer="distributed" in name)
    (expected,) = run_ranks(f"{JOBS}:logits", 1, case, lora, folder / name, tokens, cpu_only=True)
    export_weights(folder / name, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="dash_attention")
    with torch.no_grad():
        found = model(tokens).logits
    torch.testing.assert_close(found, expected[..., :VOCAB_SIZE], rtol=1e-3, atol=1e-4)

    export_adapters(folder / name, tmp_path / "adapter", base=str(tmp_path / "merged"))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == set(LoraConfig.model_validate(lora).linears)
    merged, scale = load_file(tmp_path / "merged" / "model.safetensors"), lora["alpha"] / lora["rank"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * MODEL.num_layers * len(settings["target_modules"])
    base = dict(merged)
    for tensor, a in tensors.items():
        if "lora_A" in tensor:
            weight = tensor.removeprefix("base_model.model.").replace("lora_A.", "")
            base[weight] = merged[weight] - scale * tensors[tensor.replace("lora_A", "lora_B")] @ a
    _check_with_peft(tmp_path, base, tokens, expected)


def _check_with_peft(folder: Path, base: dict[str, torch.Tensor], tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Load the base without adapters, and the adapters by the real package."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    save_file(base, folder / "merged" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="dash_attention")
    with torch.no_grad():
        without = model(tokens).logits
        found = peft.PeftModel.from_pretrained(model, folder / "adapter")(tokens).logits
    assert (without - expected[..., :VOCAB_SIZE]).norm() > 1e-2 * expected[..., :VOCAB_SIZE].norm()
    torch.testing.assert_close(found, expected[..., :VOCAB_SIZE], rtol=1e-3, atol=1e-4)
