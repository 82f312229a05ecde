"""What the ranks of these tests do: train the model and batches of tests/megatron by either engine.

The test process itself does not import this: it would load Megatron-core and DeepSpeed.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"  # read where DeepSpeed is imported, and that is here

import deepspeed
import torch

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.deepspeed import DeepSpeedSection, DeepSpeedSettings, ZeroSettings
from dash_dist.config.optimizer import OptimizerConfig
from dash_dist.config.parallel import ParallelConfig
from dash_dist.config.trainable import TrainableSection
from dash_dist.deepspeed_engine.checkpoint import load_checkpoint, start_save
from dash_dist.deepspeed_engine.engine import DeepSpeedEngine
from dash_dist.deepspeed_engine.slices import owned_slices
from dash_dist.deepspeed_engine.zero import ZeroOptimizer
from dash_dist.megatron import trained_model as model_module
from dash_dist.megatron.checkpoint import EngineState
from dash_dist.megatron.engine import MegatronEngine
from dash_dist.megatron.loss import summed_loss as megatron_summed_loss
from dash_dist.megatron.parallel import ParallelDims
from tests.deepspeed_engine.deepspeed_cases import STEPS, STEPS_AFTER_LOAD, STEPS_BEFORE_SAVE, Run, Trained
from tests.megatron.megatron_jobs import micro_batches
from tests.support.models import CHUNK_SIZE, MODEL, ROUTING_SCALE, SEQUENCE_LENGTH, VOCAB_SIZE, Case, global_batch

NEXT_TOKENS_AT = torch.tensor([[0, 1, 63, 127], [5, 5, 100, 31], [126, 16, 15, 0]])

# Small buckets and no parameter that stays whole: a model this small would never be cut otherwise.
SMALL = {
    "reduce_bucket_size": 4000,
    "allgather_bucket_size": 4000,
    "stage3_param_persistence_threshold": 100,
    "sub_group_size": 5000,
}


@contextmanager
def engine_of(run: Run, folder: Path) -> Iterator[MegatronEngine]:
    case = run.case
    parallel = ParallelConfig(
        context=case.context,
        recompute=case.recompute,
        recompute_modules=case.recompute_modules,
        recompute_layers=case.recompute_layers,
        mlp_tile_tokens=case.mlp_tile_tokens,
        fp8_linears=case.fp8_linears,
        offload_activations=case.offload_activations,
    )
    dims = ParallelDims.initialise(parallel, timeout=timedelta(seconds=60))
    arguments: dict[str, Any] = {
        "model": MODEL.model_copy(update={"tie_embeddings": case.tie_embeddings}),
        "attention": AttentionConfig(
            kind=run.case.kind,
            window=run.case.window,
            top_chunks=run.case.top_chunks,
            nsa=run.case.nsa,
            chunk_size=CHUNK_SIZE,
            routing_scale=ROUTING_SCALE,
            exchange="selective",
        ),
        "parallel": parallel,
        "optimizer": OptimizerConfig(lr=1e-2, warmup_steps=2, decay_steps=run.decay_steps, grad_clip=0.5),
        "dims": dims,
        "vocab_size": VOCAB_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        "total_steps": STEPS,
        "trainable": TrainableSection.model_validate({"parameters": run.trainable, "lora": run.lora}),
    }
    real = model_module.transformer_config

    def config(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
        return real(*args, dtype=torch.bfloat16 if run.bfloat16 else dtype, **kwargs)

    with mock.patch.object(model_module, "transformer_config", config):
        try:
            if run.zero_stage is None:
                yield MegatronEngine(**arguments)
            else:
                file = folder / f"zero{run.zero_stage}_{dims.rank}.json"
                file.write_text(json.dumps({"zero_optimization": {"stage": run.zero_stage, **SMALL}}))
                yield DeepSpeedEngine(deepspeed=DeepSpeedSection(file=file), **arguments)
        finally:
            dims.close()


def full_weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """The model's own, not the optimizer's copies."""
    if not isinstance(engine, DeepSpeedEngine):
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def one_after_another(runs: dict[str, Run], then: list[tuple[str, Any]], folder: Path) -> list[Any]:
    """Several jobs in the same processes, whose start is what takes longest."""
    jobs: dict[str, Any] = {"change_parameters": change_parameters}
    jobs |= {"save_and_go_on": save_and_go_on, "load_and_train": load_and_train, "odd_sizes": odd_sizes}
    return [train(runs, folder), *(jobs[name](argument, folder) for name, argument in then)]


def train(runs: dict[str, Run], folder: Path) -> dict[str, Trained]:
    by_name = {}
    for name, run in runs.items():
        with engine_of(run, folder) as engine:
            by_name[name] = trained = Trained()
            for step in range(run.steps):
                if step == run.steps - 1:
                    engine.telemetry.record_seconds, engine.telemetry.record_selections = True, [0]
                take_step(engine, run, trained, bad=step == run.bad_step)
            trained.seconds = engine.telemetry.seconds_by_part()
            (trained.chunks,) = (found.selected for found in engine.telemetry.selection_maps())
            exchange = engine.telemetry.exchange_statistics()
            trained.sent_bytes = None if exchange is None else exchange.sent_bytes
            trained.weights = full_weights(engine)
    return by_name


def take_step(engine: MegatronEngine, run: Run, trained: Trained, *, bad: bool = False) -> None:
    before = state_of(engine) if bad else []
    with contextlib.ExitStack() as patches:
        if bad and engine.dims.rank == engine.dims.world_size - 1:
            patches.enter_context(mock.patch("dash_dist.megatron.model.summed_loss", infinite_loss))
        result = engine.train_step(micro_batches(engine.step, engine.dims, run.case))
    if bad:
        trained.unchanged = all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    if result.skipped:
        trained.skipped.append(engine.step - 1)
        return
    trained.losses.append(result.loss)
    trained.grad_norms.append(result.grad_norm)
    trained.learning_rates.append(result.learning_rate)


def infinite_loss(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> torch.Tensor:
    return megatron_summed_loss(loss_mask, token_losses) + math.inf


def state_of(engine: MegatronEngine) -> list[torch.Tensor]:
    """The model's weights, and what the optimizer has of this rank's."""
    state = list(full_weights(engine).values())
    if isinstance(engine, DeepSpeedEngine):
        state.append(torch.tensor(engine._zero.updates))
        for one in owned_slices(engine.model, engine._zero):
            state += [tensor.clone() for tensor in one.tensors.values()]
    return state


def save_and_go_on(run: Run, folder: Path) -> dict[str, list[float]]:
    """Losses after a checkpoint, written while training goes on: of the run itself, then after a rollback."""
    with engine_of(run, folder) as engine:
        before, undisturbed, rolled_back = Trained(), Trained(), Trained()
        for _ in range(STEPS_BEFORE_SAVE):
            take_step(engine, run, before)
        pending = engine.start_save(folder / "saved", background=True)
        for _ in range(STEPS_AFTER_LOAD):
            take_step(engine, run, undisturbed)
        assert list(pending.finish()) == [f"rank_{engine.dims.rank:05d}.safetensors"]
        assert pending.done()
        assert engine.load(folder / "saved") == []
        for _ in range(STEPS_AFTER_LOAD):
            take_step(engine, run, rolled_back)
        return {"undisturbed": undisturbed.losses, "rolled back": rolled_back.losses}


def load_and_train(runs: dict[str, Run], folder: Path) -> dict[str, list[float]]:
    losses = {}
    for name, run in runs.items():
        with engine_of(run, folder) as engine:
            engine.load(folder / "saved")
            assert engine.step == STEPS_BEFORE_SAVE
            trained = Trained()
            for _ in range(STEPS_AFTER_LOAD):
                take_step(engine, run, trained)
            losses[name] = trained.losses
    return losses


def change_parameters(runs: tuple[Run, Run, Run], folder: Path) -> dict[str, Any]:
    """Save the first run; resume it by the second one, of the same parameters, and the third, of others."""
    first, same, other = runs
    with engine_of(first, folder) as engine:
        undisturbed = Trained()
        for _ in range(STEPS_BEFORE_SAVE):
            take_step(engine, first, Trained())
        engine.start_save(folder / "some", background=False).finish()
        for _ in range(STEPS_AFTER_LOAD):
            take_step(engine, first, undisturbed)
        undisturbed.weights = full_weights(engine)
    with engine_of(same, folder) as engine:
        engine.load(folder / "some")
        resumed, said = Trained(), engine.optimizer_changes
        for _ in range(STEPS_AFTER_LOAD):
            take_step(engine, same, resumed)
        resumed.weights = full_weights(engine)
    with engine_of(other, folder) as engine:
        engine.load(folder / "some")
        moments = {
            one.parameter: bool(one.tensors["exp_avg"].any())
            for one in owned_slices(engine.model, engine._zero)
            if "exp_avg" in one.tensors
        }
        changed = Trained()
        take_step(engine, other, changed)
        return {
            "undisturbed": undisturbed,
            "resumed": resumed,
            "said": said,
            "moments": moments,
            "changes": engine.optimizer_changes,
            "changed": changed,
        }


def odd_sizes(stages: list[int], folder: Path) -> dict[str, dict[str, list[float]]]:
    """Per stage: what all ranks own of a model whose parameters cannot be cut evenly, loaded from the stage before."""
    contents = {}
    dims = ParallelDims.initialise(ParallelConfig(), timeout=timedelta(seconds=60))
    run = EngineState(step=1, sequence_length=1, identity={}, function={})
    previous: Path | None = None
    for stage in stages:
        torch.manual_seed(stage)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))  # of 15, 5, 5 and 1 elements
        settings = DeepSpeedSettings(zero_optimization=ZeroSettings(stage=stage, stage3_param_persistence_threshold=0))
        zero = ZeroOptimizer(model, OptimizerConfig(lr=0.1), settings, dims, total_steps=10)
        if previous is None:
            zero.backward(zero.forward(torch.ones(2, 3), last=True).sum(), weight=1.0)
            zero.update()
        else:
            load_checkpoint(previous, model, zero, dims, {})
        previous = folder / f"odd {stage}"
        start_save(previous, model, zero, dims, run, copies=None).finish()
        of_ranks: list[Any] = [None] * dims.world_size
        torch.distributed.all_gather_object(of_ranks, owned_slices(model, zero))
        contents[f"zero {stage}"] = {
            f"{key} {name}": [
                element
                for one in sorted((one for rank in of_ranks for one in rank), key=lambda one: one.start)
                if one.parameter == name
                for element in one.tensors[key].tolist()
            ]
            for key in ("weight", "exp_avg", "exp_avg_sq")
            for name, _ in model.named_parameters()
        }
        # What the next forward pass would compute with is what the optimizer has.
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            for name, parameter in model.named_parameters():
                assert parameter.flatten().tolist() == contents[f"zero {stage}"][f"weight {name}"]
    dims.close()
    return contents


def refused_checkpoints(folder: Path) -> dict[str, str]:
    """What is said to a checkpoint that does not fit or is damaged, and whether the engine is as before."""
    said: dict[str, str] = {}

    def load(name: str, engine: MegatronEngine, directory: Path) -> None:
        before = state_of(engine)
        try:
            engine.load(directory)
        except (OSError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))

    with engine_of(Run(None), folder) as engine:
        engine.start_save(folder / "of megatron", background=False).finish()
        load("deepspeed's to megatron", engine, folder / "saved")
    with engine_of(Run(1), folder) as engine:
        load("megatron's to deepspeed", engine, folder / "of megatron")
        load("nothing", engine, folder / "nowhere")
        (file,) = sorted((folder / "saved").glob("rank_*1.safetensors"))
        whole = file.read_bytes()
        for name, content in {"truncated": whole[: len(whole) // 2], "no header": b"x" * 64, "missing": None}.items():
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            try:
                engine.load(folder / "saved")
            except ValueError as error:
                said[name] = str(error)
            file.write_bytes(whole)
        index = folder / "saved" / "deepspeed.json"
        text = index.read_text()
        index.write_text(text.replace('"output_layer.weight", 0', '"output_layer.weight", 1'))
        load("damaged index", engine, folder / "saved")
        index.write_text(text)
        said["taken directory"] = ""
        try:
            engine.start_save(folder / "saved", background=False)
        except OSError as error:
            said["taken directory"] = str(error)
    with engine_of(Run(1, Case(tie_embeddings=True)), folder) as engine:
        load("other model", engine, folder / "saved")
    return said


def evaluations(runs: dict[str, Run], folder: Path) -> dict[str, dict[str, Any]]:
    """Losses by position and next tokens before training; the losses of three steps without and with them between."""
    seen: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        seen[name] = {}
        for evaluate in (False, True):
            with engine_of(run, folder) as engine:
                losses = []
                for step in range(3):
                    if evaluate:
                        buckets = engine.evaluate(micro_batches(0, engine.dims, run.case), (16, 48, 128))
                        seen[name].setdefault("buckets", buckets)
                        tokens = engine.next_tokens(global_batch(0).tokens[:3], NEXT_TOKENS_AT)
                        seen[name].setdefault("next", tokens.tolist())
                    result = engine.train_step(micro_batches(step, engine.dims, run.case))
                    losses.append((result.loss, result.grad_norm))
                seen[name]["with" if evaluate else "without"] = losses
    return seen
