"""`dash-dist doctor` on a terminal: from its arguments to its table and exit status.

Knows how a person asks and is answered; does not know what is checked.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dash_dist.config.file import load_config
from dash_dist.config.run import RunSection
from dash_dist.doctor import Finding, Report, Site, Status, diagnose
from dash_dist.doctor.processes import ProcessFailure, call_in_processes
from dash_dist.errors import ConfigError, RunError
from dash_dist.extras import require_extra

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red", Status.SKIPPED: "dim"}
_GPU_SECONDS = 60.0


def examine(
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    ranks: int | None,
    directory: Path | None,
    address: str | None,
    json_file: Path | None,
) -> bool:
    """Check the machine or cluster, show what was found, and say whether nothing failed.

    Raises:
        ConfigError: `address` without the extra `ray`.
        RunError: `json_file` cannot be written.
    """
    if address is not None:
        require_extra("ray", "dash-dist doctor --address")
    config, refused = None, None
    if config_file is not None:
        try:
            config = load_config(config_file, overrides)
        except ConfigError as error:
            refused = str(error)
    gpus = _gpus()
    site = Site(
        ranks=ranks or max(2, gpus),
        gpus=gpus,
        directory=directory or (config.run.directory if config else _default_directory()),
        address=address,
        config=config,
    )
    console = Console(file=sys.stdout, highlight=False)
    with console.status("...") as live:
        report = diagnose(site, refused=refused, watching=lambda name: live.update(f"{name} ..."))
    show(report, console)
    if json_file is not None:
        try:
            json_file.write_text(report.to_json(), encoding="utf-8")
        except OSError as error:
            raise RunError(f"--json {json_file}: {error.strerror}") from None
    return report.healthy


def show(report: Report, console: Console) -> None:
    """The findings as a table, and below it what to do."""
    table = Table(box=None, pad_edge=False)
    for title in ("status", "check"):
        table.add_column(title, no_wrap=True)
    table.add_column("found", overflow="fold")
    for family, findings in report.families.items():
        table.add_row("", f"[bold]{family}[/bold]", "")
        for finding in findings:
            style = _STYLES[finding.status]
            status = f"[{style}]{finding.status.value}[/{style}]"
            table.add_row(status, _plain(finding.name), _plain(finding.text))
    console.print(table)
    counts = {status: sum(finding.status is status for finding in report.findings) for status in Status}
    console.print()
    for advised in (Status.FAILURE, Status.WARNING):
        for finding in report.findings:
            if finding.status is advised:
                _advise(finding, console)
    console.print(
        f"{counts[Status.FAILURE]} failures, {counts[Status.WARNING]} warnings, {counts[Status.OK]} ok, "
        f"{counts[Status.SKIPPED]} skipped, in {report.seconds:.0f} s"
    )


def _advise(finding: Finding, console: Console) -> None:
    style = _STYLES[finding.status]
    console.print(f"[{style}]{finding.status.value}[/{style}] {_plain(finding.name)}: {_plain(finding.advice)}\n")


def _plain(text: str) -> str:
    """Without what rich would take for markup."""
    return text.replace("[", r"\[")


def _default_directory() -> Path:
    return RunSection.model_fields["directory"].default


def _gpus() -> int:
    """CUDA devices that PyTorch can use; a driver that hangs or fails is reported by the check of the GPUs."""
    try:
        return call_in_processes(_count_gpus, [()], time_limit=_GPU_SECONDS)[0]
    except ProcessFailure:
        return 0


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
