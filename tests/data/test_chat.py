"""Conversations, and prompts with completions: their tokens, and those that count in the loss."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dash_dist.config.data import DataConfig
from dash_dist.data.corpus import Corpus
from dash_dist.data.prepare import Preparation, prepare_here, read_first_documents
from dash_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.chat_templates import (
    CHATML,
    CHATML_MARKED,
    DATED,
    FORGETFUL,
    LLAMA3,
    MISTRAL,
    PLAIN,
    TALK,
    lines_of,
    save_tokenizer,
)
from tests.data.data_streams import build, files


def chat(path: Path, **options: Any) -> DataConfig:
    return files(path, rows="messages", **options)


def documents(config: DataConfig, tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """Text of each document, and the parts of it that count in the loss."""
    (source,) = prepare_here(config, tokenizer).sources.values()
    found = []
    for number in np.flatnonzero(source.lengths).tolist():
        length = int(source.lengths[number])
        tokens, mask = source.read(number, 0, length), source.loss_mask(number, 0, length)
        borders = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
        shown = [_shown(tokenizer, tokens[start:stop]) for start, stop in borders.tolist()]
        found.append((_shown(tokenizer, tokens), shown))
        assert source.count_loss_tokens(number, 0, length) == mask.sum()
    return found


def _shown(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Text with the end of document as $."""
    cuts = np.flatnonzero(tokens == tokenizer.end_of_document)
    parts = np.split(tokens, cuts)
    return "$".join([tokenizer.decode(parts[0]), *(tokenizer.decode(part[1:]) for part in parts[1:])])


def loaded(tmp_path: Path, template: str | None, kind: str = "file", **options: Any) -> Tokenizer:
    path = save_tokenizer(tmp_path / "tokenizer", template, **options)
    return load_tokenizer(path if kind == "file" else str(Path(path).parent))


def write(tmp_path: Path, *conversations: Any, column: str = "messages") -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines_of(*({column: one} for one in conversations)))
    return path


SHAPES = {
    "chatml": (CHATML, {}, "No, near.<|im_end|>", "Far ✓<|im_end|>"),
    "chatml-marked": (CHATML_MARKED, {}, "No, near.<|im_end|>", "Far ✓<|im_end|>"),
    "chatml-ends-documents": (CHATML, {"end": "<|im_end|>"}, "No, near.$", "Far ✓$"),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>"}, "No, near.<|eot_id|>", "Far ✓<|eot_id|>"),
    "mistral": (MISTRAL, {"end": "</s>"}, " No, near.$", " Far ✓$"),
    "plain": (PLAIN, {}, " No, near.\n", " Far ✓\n"),
}


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_turns_of_the_assistant_count_with_their_ends(tmp_path, shape, kind):
    template, options, first, second = SHAPES[shape]
    tokenizer = loaded(tmp_path, template, kind, **options)
    ((text, counted),) = documents(chat(write(tmp_path, TALK)), tokenizer)
    assert counted == [first, second]
    assert text.endswith("$")
    assert text.count("Far") == 1
    # The text is the one of transformers' own tokenizer, tokens included.
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    expected = reference.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    (source,) = prepare_here(chat(tmp_path / "chat.jsonl"), tokenizer).sources.values()
    tokens = source.read(0, 0, int(source.lengths[0])).tolist()
    ends = shape in ("mistral",)  # the template's own last token ends the document
    assert tokens == [*expected, *[tokenizer.end_of_document] * (not ends)]


def test_marks_of_the_template_agree_with_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = loaded(tmp_path, CHATML_MARKED)
    (source,) = prepare_here(chat(write(tmp_path, TALK)), tokenizer).sources.values()
    reference = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    expected = reference.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mask = source.loss_mask(0, 0, int(source.lengths[0]))
    assert mask.astype(int).tolist() == [*expected["assistant_masks"], 0]


def test_the_first_token_of_a_turn_is_predicted_from_the_last_of_its_prompt(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    config = chat(write(tmp_path, talk), chat_template=tmp_path / "t.jinja", shuffle_seed=None)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role[0] + m.content + '.' }}{% endfor %}"
                                      "{% if add_generation_prompt %}a{% endif %}")  # fmt: skip
    # ua.abc.$
    for documents_ in ("joined", "separate"):
        length = 7 if documents_ == "joined" else 8
        (batch,) = build(config.model_copy(update={"documents": documents_}), length=length, batch=1).next_step()
        assert bytes(batch.tokens[0, :7].tolist()) == b"ua.abc."
        assert batch.loss_mask[0, :7].tolist() == [False, False, False, True, True, True, False]
        assert bytes(batch.labels[0, :6].tolist()) == b"a.abc."


def test_completions_count_with_the_end_of_the_document(tmp_path):
    tokenizer = loaded(tmp_path, None)
    rows = [
        {"prompt": "Is it far?", "completion": " No"},
        {"prompt": "", "completion": "Far"},
        {"prompt": "And", "completion": ""},
        {"prompt": "", "completion": ""},
        {"prompt": "And", "completion": None},
        {"prompt": "And"},
        {"prompt": 1, "completion": "a"},
        {"prompt": "it ", "completion": "now"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_of(*rows))
    config = files(path, rows="completions")
    expected = [("Is it far? No$", [" No$"]), ("Far$", ["Far$"]), ("And$", ["$"])]
    assert documents(config, tokenizer) == expected
    (record,) = [source.record for source in prepare_here(config, tokenizer).sources.values()]
    assert (record.empty, record.damaged) == (1, 4)
    reasons = [
        "line 5: column 'completion' has no",
        "line 6: no column 'completion'",
        "line 7: column 'prompt' holds int",
    ]
    for told, reason in zip(record.named, reasons, strict=False):
        assert reason in told


def test_tokens_around_documents_go_around_completions_and_not_around_conversations(tmp_path):
    tokenizer = loaded(tmp_path, CHATML)
    tokenizer.special_tokens = ((7,), (8,))
    (tmp_path / "rows.jsonl").write_bytes(lines_of({"q": "far", "a": " near"}))
    config = files(
        tmp_path / "rows.jsonl", rows="completions", prompt_column="q", completion_column="a", special_tokens=True
    )
    assert documents(config, tokenizer) == [("<s>far near</s>$", [" near</s>$"])]
    ((text, _),) = documents(chat(write(tmp_path, TALK), special_tokens=True), tokenizer)
    assert text.startswith("<|im_start|>user")


def test_a_completion_of_which_the_prompts_white_space_is_a_part_is_damaged(tmp_path):
    tokenizer = loaded(tmp_path, None)
    (tmp_path / "rows.jsonl").write_bytes(lines_of({"prompt": "Is ", "completion": "it"}))
    with pytest.raises(ValueError, match=r"has no text: .*between 'Is ' and 'it', are not those of the text before"):
        documents(files(tmp_path / "rows.jsonl", rows="completions"), tokenizer)
    # Bytes have no such tokens.
    assert documents(files(tmp_path / "rows.jsonl", rows="completions"), ByteTokenizer()) == [("Is it$", ["it$"])]


@pytest.mark.parametrize("format_", ["jsonl", "parquet", "hub"])
def test_every_format(tmp_path, format_):
    tokenizer = loaded(tmp_path, CHATML)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"messages": TALK}, {"messages": None}, {"messages": [{"role": "user", "content": "far"}, TALK[1]]}]
    if format_ == "jsonl":
        (folder / "a.jsonl").write_bytes(lines_of(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    config = chat(folder) if format_ != "hub" else DataConfig(source="hub", name=str(folder), rows="messages")
    assert [counted for _, counted in documents(config, tokenizer)] == [
        ["No, near.<|im_end|>", "Far ✓<|im_end|>"],
        ["No, near.<|im_end|>"],
    ]
    with pytest.raises(ValueError, match=r"no column 'talk', it has \['messages'\]: set .*data\.rows"):
        documents(config.model_copy(update={"messages_column": "talk"}), tokenizer)
    read_first_documents(Preparation.of(config, tokenizer))


TOOLS = [{"type": "function", "function": {"name": "far"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "far", "arguments": {}}}]}
TOOL_TEMPLATE = (
    "{% if tools %}{{ 'tools ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{{ (m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_tools_are_rendered_where_the_template_has_a_place_for_them(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines_of({"messages": [TALK[0], CALL, {"role": "tool", "content": "1"}, TALK[3]], "tools": TOOLS}))
    ((text, counted),) = documents(chat(path), loaded(tmp_path, TOOL_TEMPLATE))
    assert text.startswith(f"tools {json.dumps(TOOLS)}\n")
    assert counted == ['[{"function": {"name": "far", "arguments": {}}}]<|im_end|>', "Far ✓<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "x"}], "no message has the role assistant"),
        ([TALK[0], CALL], "it has tool_calls, which the chat template of tokenizer .* leaves out"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[1]], "message 1 holds image"),
        ([{"role": "user", "content": 3}, TALK[1]], "message 1 has the content int"),
        ([{"role": "user"}, TALK[1]], "message 1 has no content"),
        ([{"from": "gpt", "value": "x"}], "message 1 has no role"),
        ("text", "messages are str, not a list"),
        ([{"role": "system", "content": "x"}, *TALK], "does not take it: Only user and assistant roles"),
        ([TALK[0], {"role": "assistant", "content": "\ud800"}], "surrogates not allowed"),
    ],
)
def test_rows_that_cannot_be_rendered_are_damaged(tmp_path, messages, reason):
    tokenizer = loaded(tmp_path, MISTRAL, end="</s>")
    config = chat(write(tmp_path, TALK, messages, TALK))
    assert len(documents(config, tokenizer)) == 2
    (told,) = prepare_here(config, tokenizer).damage
    assert re.search(rf"1 of 3 documents are skipped: .* line 2: .*{reason}", told), told
    with pytest.raises(ValueError, match=r"line 2: .*set data\.damaged=skip"):
        documents(config.model_copy(update={"damaged": "stop", "cache": tmp_path / "other"}), tokenizer)


def test_tools_that_the_template_leaves_out_damage_a_row(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines_of({"messages": TALK}, {"messages": TALK, "tools": TOOLS}, {"messages": TALK, "tools": []}))
    (record,) = [one.record for one in prepare_here(chat(path), loaded(tmp_path, CHATML)).sources.values()]
    assert record.damaged == 1
    assert "it has tools, which the chat template of tokenizer" in record.named[0]


def test_contents_in_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": " far?"}]
    talk = [{"role": "user", "content": parts}, TALK[1]]
    ((text, _),) = documents(chat(write(tmp_path, talk)), loaded(tmp_path, CHATML))
    assert "Is it far?<|im_end|>" in text


def test_a_template_whose_turns_are_not_parts_of_the_whole_is_refused(tmp_path):
    tokenizer = loaded(tmp_path, FORGETFUL)
    with pytest.raises(
        ValueError,
        match=r"chat\.jsonl line 1: .* not show which tokens .* up to message 2 is not .* to one with {% generation %}",
    ):
        documents(chat(write(tmp_path, TALK)), tokenizer)
    # One turn is exact.
    ((_, counted),) = documents(chat(write(tmp_path, TALK[:2])), tokenizer)
    assert counted == ["<think>\n\n</think>\n\nNo, near.<|im_end|>"]


def test_a_template_with_tokens_on_both_sides_of_a_border_is_refused(tmp_path):
    template = PLAIN.replace("'assistant:'", "'assistant: '")
    with pytest.raises(
        ValueError,
        match=r"does not show .* between '.*assistant: ' and 'Two.*; set data\.chat_template to one whose generation",
    ):
        documents(chat(write(tmp_path, TALK)), loaded(tmp_path, template))
    counted = documents(chat(write(tmp_path, TALK)), ByteTokenizerWith(template))[0][1]
    assert counted == ["No, near.\n", "Far ✓\n"]


class ByteTokenizerWith(ByteTokenizer):
    """Bytes with a template of their own."""

    def __init__(self, template: str) -> None:
        from dash_dist.data.chat import ChatTemplate

        self.chat_template = ChatTemplate("a template", template, ())


def test_a_row_with_tokens_on_both_sides_of_a_border_is_damaged(tmp_path):
    talk = [TALK[0], {"role": "assistant", "content": "\n  x"}]
    config = chat(write(tmp_path, TALK, talk))
    tokenizer = loaded(tmp_path, LLAMA3.replace(" | trim", ""))
    assert len(documents(config, tokenizer)) == 1
    (told,) = prepare_here(config, tokenizer).damage
    assert "move white space from one side to the other" in told


def test_a_tokenizer_without_template_is_refused_with_the_remedy(tmp_path):
    path = write(tmp_path, TALK)
    for tokenizer in (ByteTokenizer(), loaded(tmp_path, None)):
        with pytest.raises(
            ValueError, match=r"tokenizer=bytes has no chat template: set data\.chat_template to a file of Jinja"
        ):
            documents(chat(path), tokenizer)
    (tmp_path / "own.jinja").write_text(CHATML)
    ((_, counted),) = documents(chat(path, chat_template=tmp_path / "own.jinja"), ByteTokenizer())
    assert counted == ["No, near.<|im_end|>", "Far ✓<|im_end|>"]
    (tmp_path / "own.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match=r"own\.jinja is not Jinja: line 1: "):
        documents(chat(path, chat_template=tmp_path / "own.jinja"), ByteTokenizer())
    with pytest.raises(FileNotFoundError, match="none"):
        documents(chat(path, chat_template=tmp_path / "none.jinja"), ByteTokenizer())


@pytest.mark.parametrize("kind", ["list", "jinja"])
def test_templates_elsewhere_in_the_files_of_a_tokenizer(tmp_path, kind):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    path = save_tokenizer(tmp_path / "tokenizer", None, **({"chat_template": named} if kind == "list" else {}))
    if kind == "jinja":
        Path(path).with_name("chat_template.jinja").write_text(CHATML)
    for spec in (path, str(Path(path).parent)):
        assert len(documents(chat(write(tmp_path, TALK)), load_tokenizer(spec))[0][1]) == 2


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_the_day_is_no_part_of_a_document(tmp_path, template):
    config = chat(write(tmp_path, TALK))
    ((text, counted),) = documents(config, loaded(tmp_path, DATED + template))
    assert text.startswith("Today: 26 Jul 2024\n<|im_start|>")
    assert counted == documents(config, loaded(tmp_path, template))[0][1]


def test_a_template_and_its_columns_are_part_of_the_key_and_texts_keep_theirs(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of({"messages": TALK, "text": "x", "prompt": "a", "completion": "b"}))

    def key(template: str, **options: Any) -> str:
        tokenizer = ByteTokenizerWith(template)
        (shard,) = Preparation.of(files(tmp_path / "a.jsonl", **options), tokenizer).shards
        return shard.key

    keys = [
        key(CHATML),
        key(CHATML, rows="messages"),
        key(LLAMA3, rows="messages"),
        key(CHATML, rows="messages", messages_column="other"),
        key(CHATML, rows="completions"),
    ]
    assert len(set(keys)) == 5
    assert key(LLAMA3) == keys[0]


def test_texts_have_no_files_of_spans(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": "x"}))
    config = files(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    corpus: Corpus = prepare_here(config, ByteTokenizer())
    assert not list((tmp_path / "cache").rglob("loss_*"))
    (source,) = corpus.sources.values()
    assert not source.is_masked


@pytest.mark.parametrize("name", ["loss_spans.npy", "loss_first.npy"])
def test_damaged_spans_are_refused_with_the_remedy(tmp_path, name):
    config = chat(write(tmp_path, TALK), cache=tmp_path / "cache")
    tokenizer = ByteTokenizerWith(CHATML)
    prepare_here(config, tokenizer)
    (path,) = (tmp_path / "cache").rglob(name)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"list of tokens that count .* remove its folder"):
            prepare_here(config, tokenizer)
    np.save(path, np.load(io.BytesIO(whole))[:-1])
    with pytest.raises(ValueError, match=r"list of tokens that count .* remove its folder"):
        prepare_here(config, tokenizer)


def test_texts_in_a_folder_of_conversations_are_refused(tmp_path):
    write(tmp_path, TALK)
    (tmp_path / "readme.md").write_text("text")
    with pytest.raises(ValueError, match=r"data\.rows=messages: .*readme\.md is read as text, which has no rows"):
        documents(chat(tmp_path), ByteTokenizerWith(CHATML))
