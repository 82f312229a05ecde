"""Configurations that nobody meant: each is accepted or refused in words that name what is wrong, never a traceback.

HYPOTHESIS_PROFILE=long tries tens of thousands.
"""

import copy
import datetime
import functools
import json
import math
import os
import random
import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dash_dist.config.file import _settings, load_config, to_yaml
from dash_dist.config.run import RunConfig
from dash_dist.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.runs import TINY

CASES = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 400
FUZZ = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LEAVES = [key for key in _settings(RunConfig) if "." in key]
DEMO = (Path(__file__).parents[2] / "configs" / "demo.yaml").read_text()

integers = st.one_of(
    st.integers(-3, 300),
    st.integers(-(10**40), 10**40),
    st.sampled_from([0, 2**31, 2**63, 2**64, -(2**63), 1_000_000_007, 10**400]),
)
floats = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([math.inf, -math.inf, math.nan, 1e-300])
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "auto", "none", "\0", "\ud800", "../..", "1e-3", "ä/ö", "x" * 5000, "[", "files", "\n"]),
)
scalars = st.one_of(st.none(), st.booleans(), integers, floats, words, st.binary(max_size=4), st.dates())


# Named: hypothesis parses the source of a lambda, which Python 3.11.7 can fail (python/cpython#106905).
def lists_and_mappings(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(scalars, inner, max_size=3))


values = st.recursive(
    scalars,
    lists_and_mappings,
    max_leaves=6,
)


def load(folder: Path, content: str | bytes, overrides: tuple[str, ...] = ()) -> RunConfig | str:
    """The configuration, which reads back equal from what a run saves; or the words of its refusal."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors="surrogatepass"))
    refusal = ""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        refusal = str(error)
        if not refusal.strip():
            raise
    if refusal:
        assert len(refusal) < 20_000
        return refusal
    saved = folder / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config
    return config


def changed(key: str, value: object) -> dict:
    config = copy.deepcopy(TINY)
    *sections, leaf = key.split(".")
    settings = config
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[leaf] = value
    return config


@pytest.mark.slow
@FUZZ
@given(key=st.sampled_from(LEAVES), value=values)
@example(key="optimizer.lr", value=math.inf)
@example(key="model.num_attention_heads", value=1_000_000_007)
@example(key="model.num_layers", value=10**400)
@example(key="training.distributed_timeout_seconds", value=10**18)
@example(key="run.directory", value="\0")
@example(key="run.directory", value="\ud800")
@example(key="data.chat_template", value="\ud800")
@example(key="attention.infllmv2.first_chunks", value=0)
@example(key="attention.routing_warmup.start", value=1)
@example(key="data.paths", value=[{(1, 2): datetime.date(2026, 1, 1)}])
def test_a_setting_of_any_value_is_taken_or_named(tmp_path, key, value):
    result = load(tmp_path, yaml.dump(changed(key, value), Dumper=yaml.SafeDumper))
    if isinstance(result, RunConfig):
        *sections, leaf = key.split(".")
        assert functools.reduce(getattr, sections, result).model_fields_set >= {leaf}
        assert result.training.distributed_timeout.total_seconds() > 0
        for number in (result.optimizer.lr, result.attention.routing_scale, result.model.rotary_base):
            assert math.isfinite(number)
    else:
        section, leaf = key.rsplit(".", 1)
        words_of = result.replace("_", " ")
        named = leaf.replace("_", " ") in words_of or "cp x chunk size" in words_of
        named |= "." in section and section in result  # one setting of a section that TINY does not have
        assert named or re.search(r"(?s)not valid YAML.*line \d+, column \d+", result), result


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_file_of_changed_sections_is_taken_or_refused_in_words(tmp_path, data):
    config: dict = copy.deepcopy(TINY)
    for _ in range(data.draw(st.integers(1, 5))):
        section = data.draw(st.sampled_from([*RunConfig.model_fields, "unknown"]))
        match data.draw(st.sampled_from(["drop", "replace", "empty", "add", "alias", "top"])):
            case "drop":
                config.pop(section, None)
            case "replace":
                config[section] = data.draw(values)
            case "empty":
                config[section] = None
            case "add" if isinstance(config.get(section), dict):
                config[section][data.draw(scalars)] = data.draw(values)
            case "alias" if section in config:
                config[data.draw(st.sampled_from(list(RunConfig.model_fields)))] = config[section]
            case "top":
                config[data.draw(scalars)] = data.draw(values)
    try:
        text = yaml.safe_dump(config)
    except TypeError:  # PyYAML sorts keys, and some cannot be compared
        text = yaml.safe_dump(config, sort_keys=False)
    load(tmp_path, text)


yaml_pieces = st.one_of(
    st.text(string.printable, max_size=6),
    st.text(max_size=4),
    st.sampled_from(
        ["&a ", "*a", "<<: *a", "!!int ", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary \xff", "!!set ", "? "]
        + ["!!python/object:os.system ", "---\n", "...\n", "\t", "|\n", ">-\n", "%YAML 9.9\n", "{" * 8, "[" * 8]
        + [
            "2026-13-41",
            "0b_",
            "0x_",
            "1:99:99",
            "-.inf",
            ".NaN",
            "~",
            "1: a\n1.0: b\n",
            "'",
            '"',
            "\\x",
            "#",
            "=",
            "\ufeff",
        ]
    ),
)


@pytest.mark.slow
@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, len(DEMO)), st.integers(0, 30), yaml_pieces), min_size=1, max_size=4))
@example(edits=[(0, len(DEMO), "1: a\n1.0: b\n")])
@example(edits=[(0, len(DEMO), "[" * 30_000)])
@example(edits=[(0, len(DEMO), "run: " + "9" * 5000)])
@example(edits=[(0, len(DEMO), "run: 0x" + "f" * 9000)])
@example(edits=[(0, len(DEMO), "run: 2026-13-41")])
@example(edits=[(0, len(DEMO), "run: !!bool maybe")])
@example(edits=[(0, len(DEMO), "? [{a: b}]\n: c")])
@example(edits=[(0, len(DEMO), "run: &a {b: *a}")])
def test_a_file_with_any_text_in_it_is_taken_or_refused_in_words(tmp_path, edits):
    text = DEMO
    for at, removed, inserted in edits:
        text = text[:at] + inserted + text[at + removed :]
    load(tmp_path, text)


@FUZZ
@given(content=st.binary(max_size=200))
@example(content=b"\xff\xfe\x00\x00")
@example(content=b"\x89PNG\r\n\x1a\n\x00\x00")
def test_a_file_that_is_no_text_is_refused_in_words(tmp_path, content):
    assert isinstance(load(tmp_path, content), str)


@pytest.mark.slow
@FUZZ
@given(
    overrides=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(LEAVES), st.one_of(yaml_pieces, scalars.map(str))).map("=".join),
            st.tuples(st.text("abcRun._[]", max_size=12), st.text(max_size=5)).map("=".join),
            st.text(max_size=10),
        ),
        max_size=4,
    )
)
@example(overrides=["training.steps=" + "[" * 30_000])
@example(overrides=["training.steps=!!int ''"])
def test_any_overrides_are_taken_or_refused_in_words(tmp_path, overrides):
    load(tmp_path, yaml.safe_dump(TINY), tuple(overrides))


def test_aliases_that_stand_for_a_great_deal_are_refused_at_once(tmp_path):
    """Each line is nine times the one before: written out, the last would fill the memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    refusal = load(tmp_path, "\n".join(lines))
    assert 'a9 = [[[[[[[[[["x", "x", ' in refusal
    assert re.search(r"\n  and \d+ more$", refusal)


def test_an_override_changes_one_of_two_sections_that_an_alias_makes_equal(tmp_path):
    path = tmp_path / "aliased.yaml"
    config = copy.deepcopy(TINY)
    config["logging"] = config["checkpoint"] = {"interval": 7}
    path.write_text(yaml.safe_dump(config))
    assert "&id001" in path.read_text()
    loaded = load_config(path, ["logging.interval=3"])
    assert (loaded.logging.interval, loaded.checkpoint.interval) == (3, 7)


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config("\0")


def random_config(seed: int, folder: Path) -> dict:
    """A small configuration that is meant to be valid, at the edges of what is allowed more often than not."""
    pick = random.Random(seed)
    kv_heads = pick.choice([1, 2, 3])
    heads = kv_heads * pick.choice([1, 2, 4])
    chunk_size = pick.choice([16, 32, 48, 64, 128])
    separate = pick.random() < 0.3
    steps = 1
    return {
        "run": {"name": f"fuzz_{seed}", "directory": str(folder / "runs"), "seed": pick.choice([0, 1, 2**63])},
        "model": {
            "num_layers": pick.choice([1, 2, 3]),
            "hidden_size": pick.choice([8, 16, 24, 40]),
            "ffn_hidden_size": pick.choice([1, 7, 32]),
            "num_attention_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": pick.choice([2, 6, 8, 16]),
            "rotary_base": pick.choice([1.5, 1e4, 1e7]),
            "norm_epsilon": pick.choice([1e-12, 1e-5, 1.0]),
            "init_std": pick.choice([1e-8, 0.02, 2.0]),
            "tie_embeddings": pick.random() < 0.5,
        },
        "attention": {
            "chunk_size": chunk_size,
            "alpha": pick.choice([1.01, 1.3, 1.5, 2.0]),
            "routing_scale": pick.choice([1e-3, 1.0, 16.0, 1e4]),
            "prior_sigma": pick.choice([None, 1e-2, 1.0]),
            "attend_first_chunk": pick.random() < 0.3,
            "layout": pick.choice(["zigzag", "double_zigzag", "contiguous"]),
            "exchange": pick.choice(["auto", "selective", "allgather", "ring"]),
        },
        "parallel": {
            "distributed_optimizer": pick.random() < 0.5,
            "recompute": pick.choice(["none", "selective", "full"]),
        },
        "data": {
            "source": "files",
            "paths": [str(folder / "documents.jsonl")],
            "documents": "separate" if separate else "joined",
            "shuffle_seed": pick.choice([None, 0, 2**63]),
        },
        "optimizer": {
            "lr": pick.choice([1e-12, 1e-3, 1.0]),
            "weight_decay": pick.choice([0.0, 0.1, 10.0]),
            "beta1": pick.choice([0.0, 0.9]),
            "beta2": pick.choice([0.0, 0.999]),
            "eps": pick.choice([1e-30, 1e-8]),
            "grad_clip": pick.choice([None, 1e-6, 1.0, 1e9]),
        },
        "training": {
            "steps": steps,
            "sequence_length": chunk_size * pick.choice([1, 2, 3]) if separate else pick.choice([2, 3, 16, 65, 130]),
            "global_batch_size": 2,
            "micro_batch_size": 1 if separate else pick.choice([1, 2]),
            "distributed_timeout_seconds": 60,
        },
    }


def test_random_valid_configurations_train(tmp_path):
    """One optimizer step each, in one process; its time limit is for a machine that is very busy."""
    count = 120 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 6
    lines = [json.dumps({"text": f"document {index} " * index}) for index in range(1, 20)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    paths = []
    for seed in range(count):
        path = tmp_path / f"{seed}.yaml"
        path.write_text(yaml.safe_dump(random_config(seed, tmp_path)))
        assert load_config(path).training.steps == 1
        paths.append(path)
    (results,) = run_ranks(
        "tests.config.config_fuzz_jobs:train_each", 1, paths, cpu_only=True, time_limit=240.0 + 10.0 * count
    )
    for path, (summary, error) in zip(paths, results, strict=True):
        assert error == "", (path.read_text(), error)
        assert summary.completed
        assert math.isfinite(summary.last_loss)
