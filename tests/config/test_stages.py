"""The list `stages:`: what a stage changes, and what is refused."""

import pytest
import yaml

from dash_dist.config.file import load_config, to_yaml
from dash_dist.errors import ConfigError
from tests.support.runs import TINY

SHORT = {"name": "short", "steps": 10}
LONG = {"name": "long", "steps": 5, "training": {"sequence_length": 512}}


@pytest.fixture
def load(tmp_path):
    def load(*stages, **sections):
        config = {**TINY, "training": {"sequence_length": 256, "global_batch_size": 2}, "stages": list(stages)}
        for name, settings in sections.items():
            config[name] = {**config.get(name, {}), **settings}
        path = tmp_path / "staged.yaml"
        path.write_text(yaml.safe_dump(config))
        return load_config(path)

    return load


def test_a_run_without_stages_is_one(load):
    config = load(training={"steps": 20})
    (stage,) = config.stage_list
    assert (stage.name, stage.first_step, stage.last_step) == ("", 0, 20)
    assert stage.config is config


def test_stages_follow_each_other_and_change_what_they_name(load):
    config = load(
        SHORT,
        {
            **LONG,
            "model": {"rotary_base": 5e5, "positions": {"type": "linear", "factor": 2.0, "max_positions": 512}},
            "parallel": {"context": 1, "recompute": "full"},
            "optimizer": {"lr": 1e-3},
        },
        {"name": "last", "steps": 3, "attention": {"routing_scale": 2.0}},
        model={"positions": {"max_positions": 256}},
    )
    short, long, last = config.stage_list
    assert [(one.first_step, one.last_step) for one in (short, long, last)] == [(0, 10), (10, 15), (15, 18)]
    assert config.training.steps == 18
    assert long.config.training.sequence_length == 512
    assert long.config.training.global_batch_size == 2
    assert long.config.model.rotary_base == 5e5
    assert long.config.model.positions.max_positions == 512
    assert (long.config.parallel.context, long.config.parallel.recompute) == (1, "full")
    assert (long.config.optimizer.lr, long.config.optimizer.warmup_steps) == (1e-3, 2)
    # As the run, not as the stage before.
    assert last.config.training.sequence_length == 256
    assert last.config.parallel.context == 2
    assert last.config.model.rotary_base == short.config.model.rotary_base == 10_000.0
    assert [config.stage_at(step).name for step in (0, 9, 10, 14, 15, 18)] == [
        "short", "short", "long", "long", "last", "last",
    ]  # fmt: skip
    assert config.model_ranks == 2
    assert config.tokens_of_steps(12) == 10 * 512 + 2 * 1024


def test_tokens_are_rounded_up_to_steps(load):
    config = load({"name": "a", "tokens": 2049}, {"name": "b", "tokens": 2049, "training": {"sequence_length": 512}})
    assert [stage.last_step for stage in config.stage_list] == [5, 8]


@pytest.mark.parametrize(("schedule", "expected"), [("restart", (10, 5)), ("continue", (0, 15))])
def test_the_schedule_restarts_or_is_of_the_whole_run(load, schedule, expected):
    long = load(SHORT, {**LONG, "schedule": schedule}).stage_list[1]
    found = long.config.optimizer.schedule(long.last_step)
    assert (found["schedule_start"], found["decay_steps"]) == expected


def test_held_out_documents_follow_the_documents(load):
    heldout = {"interval": 5, "sequences": 2, "data": {"source": "files", "paths": "x"}}
    separate = load(SHORT, {**LONG, "data": {"documents": "separate"}}, evaluation=heldout).stage_list[1]
    assert separate.config.evaluation.data.documents == "separate"
    joined = load(
        SHORT,
        {
            **LONG,
            "data": {"documents": "separate"},
            "evaluation": {"data": {"source": "files", "paths": "y", "documents": "joined"}},
        },
        evaluation=heldout,
    ).stage_list[1]
    assert joined.config.evaluation.data.documents == "joined"


def test_a_configuration_with_stages_reads_back_equal(load, tmp_path):
    config = load(SHORT, {**LONG, "evaluation": {"buckets": [128, 512]}, "gate": {}})
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    again = load_config(path)
    assert again == config
    assert [stage.config for stage in again.stage_list] == [stage.config for stage in config.stage_list]


@pytest.mark.parametrize(
    ("stages", "sections", "message"),
    [
        ([SHORT, SHORT], {}, "short is the name of two stages"),
        ([SHORT, {"name": "x"}], {}, "stage x has neither steps nor tokens"),
        ([{**SHORT, "tokens": 5}], {}, "stage short has both steps and tokens"),
        ([{**SHORT, "training": {"steps": 3}}], {}, "stage short sets training.steps: set `steps` of the stage itself"),
        ([{**SHORT, "model": {"num_layers": 3}}], {}, "stage short sets model.num_layers; weights carry over: only"),
        ([{**SHORT, "data": {"tokenizer": "x"}}], {}, "stage short sets data.tokenizer; the model reads the same"),
        ([{**SHORT, "optimizer": {"schedule_start": 3}}], {}, "the stage's `schedule` says where it begins"),
        ([{**SHORT, "checkpoint": {"keep": 3}}], {}, "stage short sets checkpoint.keep; it holds for all stages"),
        ([{**SHORT, "faults": {"hang_timeout_seconds": 9}}], {}, "sets faults.hang_timeout_seconds; it holds for all"),
        ([{**SHORT, "run": {"name": "y"}}], {}, "stages.0.run = .*no such setting; a stage has name, steps"),
        ([SHORT, {**LONG, "training": {"lenght": 3}}], {}, "stages.1.training.lenght = 3: there is no such setting"),
        ([SHORT, {**LONG, "optimizer": {"lr": "x"}}], {}, 'stages.1.optimizer.lr = "x": input should be a'),
        (
            [SHORT, {**LONG, "training": {"sequence_length": 250}}, {**LONG, "name": "z", "optimizer": {"lr": -1}}],
            {},
            r"stages.1: sequence length 250 is not a multiple .* pad to 256\n.*stages.2.optimizer.lr = -1",
        ),
        ([SHORT, {**LONG, "optimizer": {"warmup_steps": 5}}], {}, r"the 5 steps after optimizer\.schedule_start = 10"),
        ([SHORT, LONG], {"model": {"positions": {"max_positions": 256}}}, "stages.1: .*512.*max_positions"),
        ([SHORT, LONG], {"training": {"steps": 9}}, "training.steps = 9, and the stages have 15 steps: drop"),
        ([SHORT, LONG], {"run": {"resume": "a/step_1"}}, "run.resume = a/step_1 with stages"),
        ([{**SHORT, "gate": {"heldout_loss": 2.0}}], {}, "gate.heldout_loss = 2 and no evaluation: set"),
        ([{**SHORT, "gate": {"heldout": 2.0}}], {}, "stages.0.gate.heldout = 2.0: there is no such setting"),
        (
            [{**SHORT, "trainable": {"lora": {"linears": ["q_proj"], "rank": 2}}}, LONG],
            {},
            "stage short trains adapters and stage long has none: give both the same trainable.lora",
        ),
        (
            [SHORT, {**LONG, "attention": {"conversion": "output"}}],
            {},
            "stages.1: attention.conversion trains summary_query alone, and every parameter would get no gradient",
        ),
        ([3], {}, "stages.0 = 3"),
        ([{"name": "x", "steps": "3"}], {}, 'stages.0.steps = "3": input should be a valid integer'),
        ([{"name": "a/b", "steps": 3}], {}, "stages.0.name"),
    ],
)  # fmt: skip
def test_a_bad_stage_is_refused_with_what_to_change(load, stages, sections, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(*stages, **sections)


def test_a_number_of_processes_must_suit_every_stage(load):
    config = load(SHORT, {**LONG, "parallel": {"context": 1, "tensor": 1}, "training": {"global_batch_size": 2}})
    config.check_world_size(2)
    config = load(SHORT, {**LONG, "training": {"global_batch_size": 1}})
    with pytest.raises(ValueError, match=r"stage long: .*global_batch_size = 1 is not a multiple"):
        config.check_world_size(4)


def test_an_override_that_a_stage_would_hide_is_refused(load, tmp_path):
    load(SHORT, {**LONG, "optimizer": {"lr": 1e-3}})
    path = tmp_path / "staged.yaml"
    assert load_config(path, ["optimizer.weight_decay=0.5"]).stage_list[1].config.optimizer.weight_decay == 0.5
    with pytest.raises(ConfigError, match=r"'optimizer\.lr=0\.5': stage long sets optimizer\.lr itself"):
        load_config(path, ["optimizer.lr=0.5"])
