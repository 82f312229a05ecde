"""Versions against those that dash-dist supports, and whether the large packages can be imported.

Knows the metadata of installed packages; the supported ranges are those of dash-dist's own, from pyproject.toml.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import time

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, skipped, warning
from dash_dist.doctor.site import Site
from dash_dist.extras import MODULES

_DISTRIBUTION = "dash-dist"
_IMPORTED = ("megatron.core", "ray", "deepspeed")
_AGAIN = "Install again with `pip install -c requirements.lock -e kernels -e '.[all]'`"


def versions(site: Site) -> list[Finding]:
    """Gives one finding for all packages that fit, and one for each that does not or extra that is not installed."""
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
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    for extra in ("", *MODULES):
        missing = []
        for requirement in requirements:
            if not _belongs(requirement, extra):
                continue
            installed = _installed(requirement.name)
            if installed and requirement.specifier.contains(installed, prereleases=True):
                fitting.append(f"{requirement.name} {installed}")
            elif extra and not installed:
                missing.append(requirement.name)
            else:
                found = f"{installed} is installed" if installed else "not installed"
                requirement.marker = None  # an extra's marker has no place in the command
                findings.append(
                    failure(
                        requirement.name,
                        f"{found}, supported are {requirement.specifier}",
                        f"{_AGAIN}, or `pip install '{requirement}'` alone.",
                    )
                )
        if missing:
            findings.append(skipped(f"extra {extra}", f"{', '.join(missing)} not installed; {_install_extra(extra)}"))
    return [*findings, ok("versions", ", ".join(fitting), len(fitting), "packages")]


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Tells whether `extra` adds this requirement; "" stands for the requirements of every installation."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return not extra
    return marker.evaluate({"extra": extra})


def _installed(name: str) -> str:
    """Reads the installed version; "" without one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _install_extra(extra: str) -> str:
    return f"`pip install 'dash-dist[{extra}]'` installs the extra"


def imports(site: Site) -> list[Finding]:
    """Imports the large packages. Skips a package whose extra, of the same name, is not installed."""
    findings = []
    for name in _IMPORTED:
        if name in MODULES and importlib.util.find_spec(name) is None:
            findings.append(skipped(f"import {name}", f"not installed; {_install_extra(name)}"))
            continue
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
