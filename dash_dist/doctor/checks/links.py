"""Checks of the links between ranks: collectives with known results, bandwidth, clock offsets.

Knows a process group; does not know models. The ranks of one machine read one clock, unless something is wrong with it.
"""

import re
import subprocess
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from dash_dist.distributed.agreement import Agreement
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, warning
from dash_dist.doctor.site import Site

_GPU_ELEMENTS = 64 * 2**20
_CPU_ELEMENTS = 4 * 2**20
_ROUNDS = 5
_NVLINK_GBPS = 25.0
"""One way, of each NVLink of Ampere and later."""
_PCIE_GBPS = 20.0
"""One way, of sixteen lanes of PCIe 4, the least that machines of this kind have."""
_LEAST_SHARE = 0.4
_CLOCK_WARNING = 0.1
_CLOCK_FAILURE = 2.0
_EXCHANGES_OF_TIME = 10


def collectives(site: Site) -> list[Finding]:
    """All-reduce and all-to-all, checked against what they must give, and timed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    over = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if gpu else "gloo"
    count = (_GPU_ELEMENTS if gpu else _CPU_ELEMENTS) // size * size
    # Small integers: exact sums, whatever order they are added in.
    pattern = torch.arange(count, device=device).remainder_(7).float()
    expected_sum = pattern * size + sum(range(size))
    reduced = pattern + rank
    dist.all_reduce(reduced)
    sent = torch.arange(size, device=device).repeat_interleave(count // size).float() + 100.0 * rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    expected = rank + 100.0 * torch.arange(size, device=device).repeat_interleave(count // size).float()
    results = {"all-reduce": torch.equal(reduced, expected_sum), "all-to-all": torch.equal(received, expected)}
    verdicts = Agreement().gather(results)
    findings = []
    for name in results:
        wrong = [index for index, verdict in enumerate(verdicts) if not verdict[name]]
        title = f"{name} ({over.split()[0]})"
        if wrong:
            findings.append(
                failure(
                    title,
                    f"over {over}, wrong at ranks {wrong} of {size}",
                    "Try NCCL_P2P_DISABLE=1: if that is right, peer access is broken (IOMMU or ACS settings). "
                    "Otherwise install another NCCL.",
                )
            )
            continue
        seconds = _seconds(name, sent, received, gpu)
        bytes_sent = sent.nbytes * (size - 1) / size * (2 if name == "all-reduce" else 1)
        findings.append(_bandwidth(title, f"{over}, {size} ranks", bytes_sent / seconds / 1e9, gpu))
    return findings


def _seconds(name: str, sent: torch.Tensor, received: torch.Tensor, gpu: bool) -> float:
    """Return the mean seconds of a collective over several calls."""

    def run() -> None:
        if name == "all-reduce":
            dist.all_reduce(received)
        else:
            dist.all_to_all_single(received, sent)

    run()
    if gpu:
        torch.cuda.synchronize()
    dist.barrier()
    started = time.monotonic()
    for _ in range(_ROUNDS):
        run()
    if gpu:
        torch.cuda.synchronize()
    return (time.monotonic() - started) / _ROUNDS


def _bandwidth(title: str, over: str, measured: float, gpu: bool) -> Finding:
    text = f"right over {over}; {measured:.1f} GB/s sent by a rank"
    link = _slowest_link() if gpu else None
    if link is None:
        return ok(title, text, measured, "GB/s")
    name, promised = link
    if measured < _LEAST_SHARE * promised:
        return warning(
            title,
            f"{text}, and {name} should do about {promised:.0f}",
            "Look at `nvidia-smi topo -m` and `nvidia-smi nvlink -s` for links that are down, and for other jobs.",
            measured,
            "GB/s",
        )
    return ok(title, f"{text} over {name}", measured, "GB/s")


def _slowest_link() -> tuple[str, float] | None:
    """The slowest link between GPUs here and its GB/s one way, from the matrix that nvidia-smi prints."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return slowest_link(done.stdout)


def slowest_link(matrix: str) -> tuple[str, float] | None:
    """As `_slowest_link`, of the text of a matrix; None where it names no pair of GPUs."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s+\S", line)]
    names = [row for row in rows if "X" in row]
    cells = {cell for row in names for cell in row[1 : len(names) + 1]} - {"X"}
    links = [(int(cell[2:]) * _NVLINK_GBPS, f"{cell[2:]} NVLinks") for cell in cells if re.fullmatch(r"NV\d+", cell)]
    links += [(_PCIE_GBPS, f"PCIe ({cell})") for cell in cells if cell in ("PIX", "PXB", "PHB", "NODE", "SYS")]
    if not links:
        return None
    speed, name = min(links)
    return name, speed


def clocks(site: Site) -> list[Finding]:
    """Rank 0's clock against every other's."""
    offsets = clock_offsets(time.time)
    worst = max(offsets, key=lambda one: abs(one[0]))
    return [clock_finding("clocks of the ranks", [offset for offset, _ in offsets], worst[1])]


def clock_offsets(now: Callable[[], float]) -> list[tuple[float, float]]:
    """(seconds that a rank's clock is ahead of rank 0's, half of the quickest exchange) by rank; at rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = [(0.0, 0.0)]
    theirs = torch.zeros(1, dtype=torch.float64)
    for other in range(1, size):
        quickest, offset = float("inf"), 0.0
        for _ in range(_EXCHANGES_OF_TIME):
            if rank == 0:
                asked = now()
                dist.send(theirs, other)
                dist.recv(theirs, other)
                answered = now()
                if answered - asked < quickest:
                    quickest, offset = answered - asked, theirs.item() - (asked + answered) / 2
            elif rank == other:
                dist.recv(theirs, 0)
                theirs.fill_(now())
                dist.send(theirs, 0)
        found.append((offset, quickest / 2))
    return found


def clock_finding(name: str, offsets: list[float], uncertainty: float) -> Finding:
    """Judge the clocks' offsets, in seconds, for a run."""
    worst = max(map(abs, offsets))
    text = f"at most {worst * 1e3:.2f} ms apart, to within {uncertainty * 1e3:.2f} ms"
    advice = (
        "Run chrony or systemd-timesyncd on every node, with the same servers; `chronyc tracking` shows the offset."
    )
    if worst - uncertainty > _CLOCK_FAILURE:
        return failure(name, text, advice, worst, "s")
    if worst - uncertainty > _CLOCK_WARNING:
        return warning(name, text, advice, worst, "s")
    return ok(name, text, worst, "s")


CHECKS = (
    Check(
        "collectives (gloo)",
        collectives,
        Where.RANKS,
        "Look whether a firewall or sandbox forbids connections on the loopback interface.",
    ),
    Check(
        "collectives (NCCL)",
        collectives,
        Where.GPU_RANKS,
        "Run again with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find the link that is broken.",
    ),
    Check(
        "clocks of the ranks",
        clocks,
        Where.RANKS,
        "Look whether a firewall or sandbox forbids connections on the loopback interface.",
        time_limit=40.0,
    ),
)
