"""Versions against those that dash-dist supports, and whether the large packages can be imported.

Knows the metadata of installed packages; the supported ranges are those of dash-dist's own, from pyproject.toml.
"""

import importlib
import importlib.metadata
import platform
import time

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, warning
from dash_dist.doctor.site import Site

_DISTRIBUTION = "dash-dist"
_IMPORTED = ("megatron.core", "ray", "deepspeed")
_AGAIN = "Install again with `pip install -c requirements.lock -e kernels -e '.[all]'`"


def versions(site: Site) -> list[Finding]:
    """One finding for all packages that fit, and one for each that does not."""
    try:
        metadata = importlib.metadata.metadata(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return [
            warning(
                "versions",
                "dash-dist runs from its folder and is not installed, so no supported versions are known",
                "Install it with `pip install -e .` in its folder.",
            )
        ]
    findings = []
    supported = metadata["Requires-Python"] or ""
    if not SpecifierSet(supported).contains(platform.python_version(), prereleases=True):
        findings.append(
            failure(
                "python", f"{platform.python_version()}, supported are {supported}", "Make the environment with one."
            )
        )
    fitting = []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        problem, installed = _problem_with(requirement)
        if problem:
            findings.append(failure(requirement.name, problem, f"{_AGAIN}, or `pip install '{requirement}'` alone."))
        else:
            fitting.append(f"{requirement.name} {installed}")
    return [*findings, ok("versions", ", ".join(fitting), len(fitting), "packages")]


def _problem_with(requirement: Requirement) -> tuple[str, str]:
    """(what is wrong, "" if nothing; the installed version)"""
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed, supported are {requirement.specifier}", ""
    if not requirement.specifier.contains(installed, prereleases=True):
        return f"{installed} is installed, supported are {requirement.specifier}", installed
    return "", installed


def imports(site: Site) -> list[Finding]:
    findings = []
    for name in _IMPORTED:
        started = time.monotonic()
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation raises whatever it likes
            findings.append(failure(f"import {name}", f"{type(error).__name__}: {error}", f"{_AGAIN}."))
            continue
        seconds = time.monotonic() - started
        findings.append(ok(f"import {name}", f"in {seconds:.1f} s", seconds, "s"))
    return findings


CHECKS = (
    Check("versions", versions, Where.HERE, f"{_AGAIN}."),
    Check(
        "imports",
        imports,
        Where.CHILD,
        f"{_AGAIN}. If imports take minutes, the environment is on slow storage: copy it to a local disk.",
        time_limit=90.0,
    ),
)
