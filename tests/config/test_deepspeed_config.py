"""What a run may say about DeepSpeed, and what is said to everything else."""

import json
from pathlib import Path

import pytest

from dash_dist.config.deepspeed import DECIDED_BY_RUN, read_settings
from dash_dist.config.file import load_config, to_yaml
from dash_dist.errors import ConfigError
from tests.support.runs import write_config

FILES = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
DEEPSPEED = "engine=deepspeed"


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path)


def file_with(folder: Path, settings: object) -> str:
    path = folder / "deepspeed.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return f"deepspeed.file={path}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_in_the_repository_is_valid(tiny, path):
    config = load_config(tiny, [DEEPSPEED, f"deepspeed.file={path}"])
    assert config.deepspeed.settings().zero_optimization.stage == int(path.stem.removeprefix("zero"))


def test_the_files_are_there():
    assert [path.stem for path in FILES] == ["zero1", "zero2", "zero3"]


def test_the_stage_is_that_of_the_section_or_of_the_file_or_one(tiny, tmp_path):
    def stage(*overrides: str) -> int:
        return load_config(tiny, [DEEPSPEED, *overrides]).deepspeed.settings().zero_optimization.stage

    file = file_with(tmp_path, {"zero_optimization": {"stage": 2}})
    assert [stage(), stage("deepspeed.zero_stage=3"), stage(file), stage(file, "deepspeed.zero_stage=2")] == [
        1,
        3,
        2,
        2,
    ]


def test_the_resolved_configuration_reads_back_equal(tiny, tmp_path):
    config = load_config(tiny, [DEEPSPEED, file_with(tmp_path, {})])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config


def test_what_the_run_decides_may_be_left_to_it(tmp_path):
    path = tmp_path / "auto.json"
    path.write_text(json.dumps({**dict.fromkeys(DECIDED_BY_RUN, "auto"), "communication_data_type": "bf16"}))
    assert read_settings(path).communication_data_type == "bf16"


def test_large_sizes_may_be_written_as_in_the_documentation(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}')
    assert read_settings(path).zero_optimization.reduce_bucket_size == 500_000_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=deepsped"], r"engine = \"deepsped\": input should be 'megatron' or 'deepspeed'"),
        (
            ["parallel.tensor=2", "parallel.sequence_parallel=true"],
            "sequence_parallel is true, and engine: deepspeed has no tensor parallelism to split over: set .* to null",
        ),
        (["parallel.tensor=2"], r"parallel\.tensor is 2, and engine: deepspeed shards .* to 1, or engine to megatron"),
        (["parallel.pipeline=2"], r"parallel\.pipeline is 2, and engine: deepspeed"),
        (["parallel.overlap_gradients=true"], r"false, and zero_optimization\.overlap_comm in deepspeed\.file"),
        (
            ["deepspeed.zero_stage=3", "parallel.mlp_tile_tokens=4096"],
            r"mlp_tile_tokens is 4096, and ZeRO stage 3 .* set deepspeed\.zero_stage to 1 or 2",
        ),
        (
            ["deepspeed.zero_stage=3", "attention.kind=nsa", "attention.top_chunks=4"],
            r"attention\.kind has nsa layers, and ZeRO stage 3 .* set deepspeed\.zero_stage to 1 or 2",
        ),
        (["deepspeed.zero_stage=4"], r"deepspeed\.zero_stage = 4"),
        (["deepspeed.file=nowhere.json"], r"deepspeed\.file: cannot read nowhere\.json: No such file"),
        (
            ["deepspeed.stage=2"],
            r"deepspeed\.stage = 2: there is no such setting; did you mean deepspeed\.zero_stage\?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_is_refused_with_what_to_change(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny, [DEEPSPEED, *overrides])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "is not valid JSON"),
        ([], r"holds \[\], not DeepSpeed's settings"),
        ({"train_batch_size": 8}, r"train_batch_size is decided by training\.global_batch_size: remove it"),
        (
            {"fp16": {"enabled": True}, "optimizer": {}},
            "optimizer is decided by the section optimizer.*fp16 is decided",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, r"zero_optimization\.offload_optimizer is not"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage = 0: input should be 1, 2 or 3"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, r"zero_optimization\.overlap_comm = \"yes\""),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"reduce_bucket_size = 0: input should be greater than 0"),
        ({"comms_logger": {}}, "comms_logger is not supported here, only zero_optimization, communication_data_type"),
        ({"zero_optimization": {"stage": 3}}, r"deepspeed\.zero_stage is 2, and zero_optimization\.stage is 3 in"),
    ],
    ids=lambda value: json.dumps(value) if not isinstance(value, str) else "",
)
def test_a_bad_file_is_refused_with_what_to_change(tiny, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny, [DEEPSPEED, "deepspeed.zero_stage=2", file_with(tmp_path, settings)])


def test_the_section_is_not_read_for_the_other_engine(tiny):
    assert load_config(tiny, ["parallel.tensor=2", "deepspeed.file=nowhere.json"]).engine == "megatron"
