"""The pretrained model of a package: what is missing is named."""

import pytest
import typer

from tools.benchmarks import published


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_PACKAGE", "no_such_package")
    with pytest.raises(typer.BadParameter, match=r"no_such_package has 0 \.gguf files, and not one: install it"):
        published._of_package()
