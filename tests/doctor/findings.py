"""Helper of the tests of checks."""

from dash_dist.doctor import Finding, Status


def failed(findings: list[Finding], advice: str, status: Status = Status.FAILURE) -> Finding:
    """Return the one finding of this status; its advice has these words."""
    (finding,) = [one for one in findings if one.status is status]
    assert advice in finding.advice
    return finding
