"""The interfaces that NCCL and gloo would use.

Knows names and addresses; sends nothing.
"""

import os
import socket

import psutil

from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, warning
from dash_dist.doctor.site import Site

_OF_CONTAINERS = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "tailscale", "tun")


def interfaces(site: Site) -> list[Finding]:
    """Check that the interfaces named by variables exist; without variables, report several candidates."""
    up = _interfaces_up()
    findings = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if value:
            findings.append(_named(variable, value, up))
    if not findings:
        findings.append(_candidates(up))
    findings.append(_host_name())
    return findings


def _interfaces_up() -> dict[str, str]:
    """IPv4 address by name, of the interfaces that are up."""
    states = psutil.net_if_stats()
    return {
        name: next((one.address for one in addresses if one.family == socket.AF_INET), "no IPv4 address")
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def _named(variable: str, value: str, up: dict[str, str]) -> Finding:
    """NCCL takes prefixes, exact names after "=", and names to leave out after "^"; gloo names."""
    names = value.lstrip("^=").split(",")
    exact = variable.startswith("GLOO") or value.startswith("=")
    matching = [one for one in up if any(one == name if exact else one.startswith(name) for name in names)]
    used = [one for one in up if one not in matching] if value.startswith("^") else matching
    if used:
        return ok(variable, f"{value}: {', '.join(f'{one} ({up[one]})' for one in used)}")
    return failure(
        variable,
        f"{value} leaves no interface that is up; there are {', '.join(sorted(up)) or 'none'}",
        f"Set {variable} to the interface that the nodes share, or unset it.",
    )


def _candidates(up: dict[str, str]) -> Finding:
    name = "network interfaces"
    real = {one: address for one, address in up.items() if not address.startswith("127.") and one != "lo"}
    outward = [one for one in real if not one.startswith(_OF_CONTAINERS)]
    listed = ", ".join(f"{one} ({address})" for one, address in real.items()) or "loopback only"
    if len(outward) > 1:
        return warning(
            name,
            f"{listed}; NCCL and gloo choose one by themselves",
            "With several nodes, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the one that the nodes share.",
        )
    return ok(name, listed)


def _host_name() -> Finding:
    name, host = "host name", socket.gethostname()
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError as error:
        return failure(
            name,
            f"{host} has no address ({error.strerror}), and gloo looks its own up",
            f"Add {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use.",
        )
    return ok(name, f"{host} is {', '.join(sorted(map(str, addresses)))}")


CHECKS = (
    Check(
        "network interfaces",
        interfaces,
        Where.CHILD,  # a name server that does not answer is waited for
        "Add the host's name to /etc/hosts, or repair the name servers in /etc/resolv.conf.",
        time_limit=20.0,
    ),
)
