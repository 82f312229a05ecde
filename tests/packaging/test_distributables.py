"""The two distributables: versions, the lock file, and the checks that guard commits."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DIST, KERNELS = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "kernels")
)
EXTRAS = DIST["optional-dependencies"]
APART = "lm-eval"
"""An extra that nothing here imports: neither part of `all` nor pinned."""


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_two_versions_are_one_and_the_changelog_has_it():
    assert DIST["version"] == KERNELS["version"]
    assert f"dash-kernels=={KERNELS['version']}" in DIST["dependencies"]
    assert f"\n## [{DIST['version']}] - 20" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text() == (ROOT / "kernels" / "LICENSE").read_text()


def test_the_kernels_need_torch_and_triton_alone():
    assert [Requirement(text).name for text in KERNELS["dependencies"]] == ["torch", "triton"]


def test_the_lock_file_pins_every_dependency_within_its_range():
    locked = pins()
    extras = (text for name, extra in EXTRAS.items() if name != APART for text in extra)
    wanted = [*KERNELS["dependencies"], *DIST["dependencies"], *extras]
    for requirement in map(Requirement, wanted):
        if not requirement.name.startswith("dash-"):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement
    assert not any(name.startswith("nvidia-") for name in locked)  # a CPU build of torch has none


def test_all_holds_every_extra_of_a_user():
    [everything] = EXTRAS["all"]
    assert set(EXTRAS) - Requirement(everything).extras == {"all", "docs", "dev", APART}


def test_hooks_are_local():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in config["repos"]} == {"local"}


def test_continuous_integration_runs_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    github = [
        word for job in jobs for step in job["steps"] for word in re.findall(r"make ([a-z-]+)", step.get("run", ""))
    ]
    here = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert github == here
    assert set(here) <= targets


def check_prose(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/check_prose.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("kernels: skip tiles beyond the last document", None),
        ("Merge branch 'door'", None),
        ("How the kernels skip tiles", "without an area"),
        ("kernels: " + "x" * 64, "73 characters"),
    ],
)
def test_commit_subjects_are_checked(tmp_path, subject, problem):
    message = tmp_path / "message"
    message.write_text(f"# a comment\n{subject}\n\nA body of any length.\n")
    done = check_prose("--commit-msg", message)
    assert done.returncode == (problem is not None)
    assert problem is None or problem in done.stderr


def test_docstrings_are_checked(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""Offers."""\n\n\nclass A:\n    """Of a thing."""\n\n    def f(self):\n        """Howl."""\n')
    done = check_prose(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{module}:5: docstring begins with 'Of': begin with a verb or with the name of the thing"
    ]
