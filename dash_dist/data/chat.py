"""The text of a conversation by a chat template, and the parts of it that the assistant has said.

Knows templates and messages; does not know tokens. transformers renders, so that training reads the text that models
are used with.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dash_dist.data.columns import DamagedDocument
from dash_dist.extras import require_extra

ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The tokens of a document must not depend on the day on which they are made: the date of Llama 3's own template.
_FIXED_DATE = (
    '{% macro strftime_now(format) %}{{ {"%Y-%m-%d": "2024-07-26", "%d %B %Y": "26 July 2024"}'
    '.get(format, "26 Jul 2024") }}{% endmacro %}\n'
)
_PROBE = [
    {"role": role, "content": content}
    for role, content in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."))
]

Message = Mapping[str, Any]


class InexactTurn(DamagedDocument):
    """The template does not show where a turn of the assistant begins and ends.

    Attributes:
        remedy: for a template that shows it in no conversation.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class MarkedText(NamedTuple):
    """A text, and the parts of it that count in the loss.

    Attributes:
        spans: first and last + 1 character of each part, ascending.
        trimmed: parts that end with white space behind their end-of-turn marker, which does not count.
    """

    text: str
    spans: list[tuple[int, int]]
    trimmed: list[bool]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, as the files of tokenizers hold it.

    Attributes:
        origin: where the template is from, for messages.
        special_tokens: name and text of the tokens that it may use, such as bos_token.
    """

    origin: str
    text: str
    special_tokens: tuple[tuple[str, str], ...]

    def mark(self, messages: Sequence[Message], tools: Sequence[Any]) -> MarkedText:
        """Render a conversation, and mark the turns of the assistant with their end-of-turn markers.

        A template with {% generation %} marks them itself. Otherwise a turn begins where the conversation before it,
        with the generation prompt, ends; and it ends where the conversation up to it does.

        Raises:
            InexactTurn: the rendered conversation does not begin with one of its parts.
            DamagedDocument: the template does not take the conversation.
        """
        if _MARKS.search(self.text):
            text, spans = self._render(messages, tools, marks=True)
            return MarkedText(text, spans, [False] * len(spans))
        text, _ = self._render(messages, tools)
        marked = MarkedText(text, [], [])
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, _ = self._render(messages[:number], tools, prompt=True)
            upto, _ = self._render(messages[: number + 1], tools)
            if not (text.startswith(upto) and upto.startswith(before)):
                raise InexactTurn(
                    f"by {self.origin} the conversation up to message {number + 1} is not the beginning of the whole",
                    "one with {% generation %} and {% endgeneration %} around the turns of the assistant",
                )
            turn, content = upto[len(before) :].rstrip(), str(message.get("content", "")).rstrip()
            marked.spans.append((len(before), len(upto)))
            marked.trimmed.append(bool(turn) and not (content and turn.endswith(content)))
        return marked

    def check(self) -> None:
        """Refuse, with ValueError, what is not Jinja, and with ConfigError a lack of the extra `hub`."""
        require_extra("hub", self.origin)
        from jinja2 import TemplateSyntaxError

        try:
            self.probe()
        except DamagedDocument as error:
            if isinstance(cause := error.__cause__, TemplateSyntaxError):
                raise ValueError(f"{self.origin} is not Jinja: line {cause.lineno}: {cause.message}") from error

    def probe(self) -> MarkedText:
        """Render a plain conversation of two turns. Raises as `mark` does."""
        return self.mark(_PROBE, ())

    def mentions(self, name: str) -> bool:
        """Return whether the template reads the field `name`."""
        return re.search(rf"\b{name}\b", self.text) is not None

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = _FIXED_DATE + self.text if self.mentions("strftime_now") else self.text
        try:
            rendered, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **dict(self.special_tokens),
            )
        except Exception as error:  # a template is a program, which can raise anything
            raise DamagedDocument(f"{self.origin} does not take it: {error}") from error
        return rendered[0], [(start, stop) for start, stop in spans[0] if start < stop] if marks else []


def read_template(path: Path, special_tokens: Iterable[tuple[str, str]]) -> ChatTemplate:
    """Read a template from a file of Jinja. Raises OSError or ValueError if it cannot be read."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {path}: not UTF-8: {error}") from error
    return ChatTemplate(f"the chat template {path}", text, tuple(special_tokens))


def template_in_settings(origin: str, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the template in the settings of a tokenizer's tokenizer_config.json; of several the one named default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        return None
    special = {name: _text_of(value) for name, value in settings.items() if name.endswith("_token")}
    named = sorted((name, text) for name, text in special.items() if text is not None)
    return ChatTemplate(f"the chat template of {origin}", found, tuple(named))


def _text_of(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def conversation_of(value: object, tools: object, template: ChatTemplate) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return the messages of a row and its tools, as a template takes them.

    Contents in parts of text are joined. Fields without a value are left out: tables give every message all of them.

    Raises DamagedDocument for anything that the template would leave out or spell as Python does.
    """
    if not isinstance(value, list):
        raise DamagedDocument(f"messages are {type(value).__name__}, not a list")
    messages = [_message_of(number, one) for number, one in enumerate(value, start=1)]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise DamagedDocument(f"no message has the role {ASSISTANT}: nothing counts in the loss")
    tools = _tools_of(tools)
    if tools and not template.mentions("tools"):
        raise DamagedDocument(f"it has tools, which {template.origin} leaves out")
    if any(message.get("tool_calls") for message in messages) and not template.mentions("tool_calls"):
        raise DamagedDocument(f"it has tool_calls, which {template.origin} leaves out")
    return messages, tools


def _message_of(number: int, given: object) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise DamagedDocument(f"message {number} has no role: give each a role and a content")
    message: dict[str, Any] = _without_none(given)
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in content}
        if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
            raise DamagedDocument(f"message {number} holds {', '.join(sorted(map(str, kinds)))}: only text is read")
        message["content"] = "".join(part["text"] for part in content)
    elif content is None:
        if not message.get("tool_calls"):
            raise DamagedDocument(f"message {number} has no content")
    elif not isinstance(content, str):
        raise DamagedDocument(f"message {number} has the content {type(content).__name__}, not text")
    return message


def _tools_of(tools: object) -> list[Any]:
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DamagedDocument(f"tools are not JSON: {error}") from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DamagedDocument("tools are not a list of objects")
    return [_without_none(tool) for tool in tools]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value
