"""Reader of YAML for configurations, with the position of every error.

Knows YAML; does not know settings.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

_LARGEST_BITS = 64


def parse(text: str) -> Any:
    """Return the value of `text`, with sequences as tuples.

    Raises:
        yaml.YAMLError: `text` is not valid; the message gives the position. No other exception is raised.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-3 as a number and lists as tuples, and refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    message = f"the key {key.value!r} is given twice"
                    raise yaml.composer.ComposerError(None, None, message, key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        with _named_place(node):
            return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        with _named_place(node):
            return super().construct_mapping(node, deep)


@contextlib.contextmanager
def _named_place(node: yaml.Node) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, RecursionError):
        raise
    except (
        Exception
    ) as error:  # PyYAML lets through what Python raises for 2026-13-41, !!bool maybe or an unhashable key
        raise yaml.constructor.ConstructorError(
            None, None, f"it is not what its form or tag says ({type(error).__name__}: {error})", node.start_mark
        ) from error


def _construct_tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_yaml_int(node)
    if value.bit_length() > _LARGEST_BITS:
        message = f"an integer of {value.bit_length()} bits; no setting takes more than {_LARGEST_BITS}"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return value


def _construct_str(loader: _Loader, node: yaml.ScalarNode) -> str:
    value = loader.construct_yaml_str(node)
    if any("\ud800" <= character <= "\udfff" for character in value):
        message = "half of a surrogate pair, which is no character"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_tuple)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
# PyYAML follows YAML 1.1, where an exponent needs a point and a sign; people write 1e-3 and 3e8.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)
