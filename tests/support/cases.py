"""Cases of tests that share a fixture: the exhaustive ones, and those that this session asks for."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def exhaustive(values: Iterable[Any], among: Collection[Any]) -> list[Any]:
    """Return parameters of a test, with those in `among` left out of continuous integration."""
    among = set(among)
    assert among <= set(values), among - set(values)
    return [pytest.param(value, marks=pytest.mark.exhaustive) if value in among else value for value in values]


def asked(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """Return the values of a parameter in the selected tests of the fixture's module.

    A fixture that measures one case for each of them has nothing to do for those which are left out.
    """
    return {
        item.callspec.params[argument]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
        and argument in item.callspec.params
    }
