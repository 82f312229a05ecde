"""`dash-dist generate` of tiny folders as an export writes them."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dash_dist.cli import app
from dash_dist.errors import ConfigError, RunError
from dash_dist.hf import load
from dash_dist.hf.command import generate
from tests.hf.tiny import save, tiny_model

DEFAULTS = {"max_new_tokens": 20, "temperature": 0.0, "routing_scale": None}


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    return save(tiny_model(vocab_size=257), tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    folder = save(tiny_model(vocab_size=40), tmp_path_factory.mktemp("words"))
    words = {"<eos>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, 40)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def continued(folder, prompt, **options):
    pieces = []
    generate(folder, prompt, **(DEFAULTS | options), write=pieces.append)
    return pieces


@pytest.mark.parametrize("prompt", ["Grüße an alle", ""])
def test_bytes_come_as_they_are_decoded(byte_folder, prompt):
    ids = torch.tensor([list(prompt.encode()) or [256]])
    with torch.no_grad():
        tokens = load(byte_folder).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=256,
            pad_token_id=0,
        )
    expected = bytes(token for token in tokens[0, ids.shape[1] :].tolist() if token < 256).decode("utf-8", "replace")
    pieces = continued(byte_folder, prompt)
    assert "".join(pieces) == expected
    assert len(pieces) > 5


def test_a_folder_with_a_tokenizer_is_read_with_it(word_folder):
    pieces = continued(word_folder, "w30 w31 w32", max_new_tokens=8)
    assert "".join(pieces).split() == ["w11", "w37", "w19", "w24", "w22", "w38", "w25", "w25"]
    assert len(pieces) > 5
    assert "".join(continued(word_folder, ""))


def test_the_temperature_and_the_routing_scale_take_effect(byte_folder):
    prompt = "a long enough prompt for a few chunks of sixteen bytes, and somewhat more than that"
    greedy = continued(byte_folder, prompt)
    assert continued(byte_folder, prompt) == greedy
    assert continued(byte_folder, prompt, routing_scale=100.0) != greedy
    torch.manual_seed(0)
    sampled = [continued(byte_folder, prompt, temperature=2.0) for _ in range(2)]
    assert sampled[0] != sampled[1]


def test_the_command_prints_the_text(byte_folder):
    arguments = ["generate", str(byte_folder), "Hello", "--max-new-tokens", "12", "--routing-scale", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = "".join(continued(byte_folder, "Hello", max_new_tokens=12, routing_scale=2.0))
    assert result.stdout == expected + "\n"


def test_errors_name_the_remedy(byte_folder, word_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"config.json is missing: name a folder"):
        continued(tmp_path, "x")
    with pytest.raises(ConfigError, match="the model has 256 positions: ask for at most 246"):
        continued(byte_folder, "0123456789", max_new_tokens=247)
    with pytest.raises(ConfigError, match="the model has 256 positions: shorten the prompt"):
        continued(byte_folder, "x" * 300)
    with pytest.raises(RunError, match=r"routing_scale is -1.0: give a positive number"):
        continued(byte_folder, "x", routing_scale=-1.0)
    no_tokenizer = save(tiny_model(vocab_size=40), tmp_path / "no tokenizer")
    with pytest.raises(ConfigError, match="has no tokenizer, and 40 tokens are not the 257"):
        continued(no_tokenizer, "x")
    (no_tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be loaded"):
        continued(no_tokenizer, "x")
    dense = save(tiny_model(vocab_size=257), tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    del config["dash_attention"]
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="cannot be loaded: the model's configuration has no 'dash_attention'"):
        continued(dense, "x")
    (dense / "config.json").write_text(json.dumps(config | {"dash_attention": {}}))
    (dense / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(RunError, match="cannot be loaded"):
        continued(dense, "x")
