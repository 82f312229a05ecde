import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dash_dist.config.file import load_config, to_yaml
from dash_dist.errors import ConfigError
from tests.support.runs import write_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


def test_what_the_makefile_sets_on_one_gpu_is_a_setting():
    makefile = (ROOT / "Makefile").read_text()
    (override,) = re.findall(r"^DEMO_OVERRIDES = .*,(\S+=\S+)\)$", makefile, re.MULTILINE)
    assert load_config(ROOT / "configs" / "demo.yaml", [override]).parallel.context == 1


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_is_valid(path):
    config = load_config(path)
    assert config.run.name
    # As docs/faults.md asks for: a rank that waits must not give up before it has written its stacks.
    hang = config.faults.hang_timeout_seconds
    assert hang is not None
    assert hang < config.training.distributed_timeout_seconds


def test_a_checkpoint_to_resume_from_may_be_on_storage_that_is_not_mounted_here(tiny):
    """`dash-dist submit` checks a configuration on another machine than the run's."""
    checkpoint = "/not/mounted/here/checkpoints/step_00000010"
    assert load_config(tiny, [f"run.resume={checkpoint}"]).run.resume == checkpoint


def test_the_resolved_configuration_reads_back_equal(tiny, tmp_path):
    config = load_config(tiny, ["data.source=files", "data.paths=[a.txt, b.txt]", "data.shuffle_seed=3"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config
    assert "keep" in yaml.safe_load(resolved.read_text())["checkpoint"]  # a default, filled in


def test_overrides_have_yaml_types(tiny):
    overrides = ["optimizer.lr=1e-3", "attention.prior_sigma=null", "model.tie_embeddings=true", "run.name=x"]
    config = load_config(tiny, [*overrides, "checkpoint.keep=5"])
    assert config.optimizer.lr == 1e-3
    assert config.attention.prior_sigma is None
    assert config.model.tie_embeddings is True
    assert config.run.name == "x"
    assert config.checkpoint.keep == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stepz=3"], r"training\.stepz = 3: there is no such setting; did you mean training\.steps\?"),
        (["trainig.steps=3"], r"trainig = .*there is no such setting; did you mean training\?"),
        (["training.lr=0.1"], r"training\.lr = 0\.1: there is no such setting; did you mean optimizer\.lr\?"),
        (["training.max_skipped_steps=3"], r"there is no such setting; did you mean faults\.max_skipped_steps\?"),
        (["faults.hang_timeout_seconds=0"], r"faults\.hang_timeout_seconds = 0: input should be greater than 0"),
        (["logging.zzz=1"], r"logging has interval, routing_interval"),
        (["training.steps=many"], r'training\.steps = "many": input should be a valid integer'),
        (["training.steps=true"], r"training\.steps = true"),
        (["training.steps='20'"], r'training\.steps = "20"'),
        (["training.global_batch_size=0"], r"training\.global_batch_size = 0: input should be greater than 0"),
        (["training.steps"], r"'training\.steps' is not section\.key=value"),
        (["steps=3"], r"'steps=3' is not section\.key=value"),
        (["training.steps="], r"has no value"),
        (["training.steps=[1"], r"not valid YAML"),
        (["training.steps.more=1"], r"training\.steps is 20, which has no settings of its own"),
        (["run.name=a/b"], r'run\.name = "a/b"'),
        (["run.resume=atuo"], r'run\.resume = "atuo": neither auto, never nor a folder'),
        (["training.sequence_length=250"], r"250 is not a multiple of 2 x cp x chunk_size = 128: pad to 256"),
        (
            ["training.sequence_length=80", "attention.layout=contiguous"],
            r"80 is not a multiple of cp x chunk_size = 64: pad to 128",
        ),
        (["training.micro_batch_size=4"], r"global_batch_size = 2 is not a multiple of .* 1 x 4: set it to 4"),
        (
            ["data.documents=separate", "training.micro_batch_size=2"],
            r"training\.micro_batch_size = 2 with data\.documents = separate: .* to 1, or data\.documents to joined",
        ),
        (
            ["data.documents=separate", "training.sequence_length=250", "parallel.context=1"],
            r"250 is not a multiple of attention\.chunk_size = 32, .* set training\.sequence_length to 256",
        ),
        (["attention.backend=triton", "attention.alpha=2.0"], r"attention\.alpha 1\.5 only, not 2\.0"),
        (["parallel.tensor=4"], r"num_kv_heads 2 is not a multiple of parallel\.tensor 4"),
        (["optimizer.warmup_steps=20"], r"warmup_steps = 20 is not below training\.steps = 20"),
        (
            ["optimizer.warmup_steps=8", "optimizer.decay_steps=8"],
            r"optimizer\.warmup_steps = 8 is not below optimizer\.decay_steps = 8: lower it, to 0 if need be, or decay",
        ),
        (["optimizer.decay_steps=0"], r"optimizer\.decay_steps = 0"),
        (["model.num_layers=x", "data.sourse=files"], r"(?s)model\.num_layers = \"x\".*data\.source\?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_is_refused_with_what_to_change(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds null, not the sections of a run"),
        ("run: [", "not valid YAML"),
        ("run: {name: a}\nrun: {name: b}\n", "the key 'run' is given twice"),
        ("run: {name: a}\n", r"model: must be set\n.*optimizer: must be set\n.*training: must be set"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_more_processes_than_the_batch_feeds_are_refused(tiny):
    config = load_config(tiny)
    config.check_world_size(4)
    with pytest.raises(ValueError, match=r"not a multiple of data-parallel size x .* = 4 x 1: set it to 4"):
        config.check_world_size(8)
    with pytest.raises(ValueError, match="world size 3 is not a multiple"):
        config.check_world_size(3)


@pytest.mark.parametrize(("resume", "later"), [("never", "auto"), ("auto", "auto"), ("runs/a/step_1", "runs/a/step_1")])
def test_an_attempt_after_the_first_goes_on_from_the_checkpoints_of_the_first(tiny, resume, later):
    assert load_config(tiny, [f"run.resume={resume}"]).going_on().run.resume == later


def test_the_command_line_shows_a_refusal_without_a_traceback(tiny):
    command = [sys.executable, "-m", "dash_dist.cli", "config", str(tiny), "training.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean training.steps?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_answers_without_importing_torch():
    program = (
        "import sys; from dash_dist.cli import app; app(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train" in done.stdout
