"""The GPUs of this machine: whether PyTorch sees them, computes right and fast on them, and compiles for them.

Knows one device at a time; `links` knows what is between them.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dash_dist.doctor.checks.storage import trial_folder
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, skipped, warning
from dash_dist.doctor.site import Site

_SMI_SECONDS = 15.0
_MATMUL_SIZE = 1024
_BUSY_SHARE = 0.1
"""Of a GPU's memory, in use before a run has begun."""
_END_IT = "See with nvidia-smi which process uses it, and end it."
_LEAST_CLOCK = 0.7
"""Share of the highest clock. Some clouds set A100s to 0.78."""
_PAUSE_SECONDS = 0.001
"""Between two products: together with it they are a light load on the smallest GPUs, too."""
_CLOCK_SECONDS = 0.5
"""A clock rises within this time of load."""
_CACHE_BYTES = 2**20
"""More than a compiled kernel."""


def devices(site: Site) -> list[Finding]:
    """Check that there are GPUs, and that each computes a matrix product with known entries."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None or "GPU" not in _smi("-L"):
            return [skipped("GPUs", "no CUDA device")]
        built = torch.version.cuda or "no CUDA at all"
        return [
            failure(
                "GPUs",
                f"nvidia-smi lists some, but PyTorch {torch.__version__}, built for {built}, can use none",
                "Install a PyTorch build for CUDA that the driver supports (`nvidia-smi` shows its CUDA version), and "
                "look whether CUDA_VISIBLE_DEVICES hides the GPUs.",
            )
        ]
    visible = torch.cuda.device_count()
    return [_driver(torch.version.cuda), *_unused(visible), *(_device(index) for index in range(visible))]


def _driver(built_for: str | None) -> Finding:
    """Within a major version of CUDA, a driver runs what was built for any minor one."""
    found = re.search(r"Driver Version: (\S+).*CUDA Version: (\d+)\.(\d+)", _smi())
    if found is None or built_for is None:
        return skipped("driver", "nvidia-smi does not tell its version")
    text = f"{found[1]}, for CUDA up to {found[2]}.{found[3]}; PyTorch is built for {built_for}"
    if int(built_for.split(".")[0]) > int(found[2]):
        return failure("driver", text, "Update the driver, or install a PyTorch build for an earlier CUDA.")
    return ok("driver", text)


def _unused(visible: int) -> list[Finding]:
    """Report GPUs that the driver lists beyond the `visible` ones. Parts of a GPU (MIG) are not counted."""
    listed = _smi("-L")
    count = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
    if count <= visible or "MIG" in listed:
        return []
    if "SLURM_JOB_ID" in os.environ:
        return []  # the others may be those of other jobs
    text = f"nvidia-smi lists {count}, PyTorch can use {visible}"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        advice = "Unset CUDA_VISIBLE_DEVICES, unless the other GPUs belong to somebody else."
        return [warning("GPUs", f"{text}: CUDA_VISIBLE_DEVICES={chosen}", advice)]
    advice = "Look for errors of the others with `nvidia-smi` and `dmesg | grep Xid`, and reboot the machine."
    return [failure("GPUs", text, advice)]


def _device(index: int) -> Finding:
    """Check that a GPU computes right and that its memory is free."""
    import torch

    name = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        wrong = _wrong_product(index)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return failure(name, "too little memory is free for a product of two small matrices", _END_IT)
    if wrong:
        return failure(
            name, wrong, "Take this GPU out of use and have it replaced; look for Xid errors with `dmesg | grep Xid`."
        )
    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, {total / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    in_use = 1.0 - free / total
    if in_use > _BUSY_SHARE:
        return warning(name, f"{text}; {in_use:.0%} of its memory is in use", _END_IT)
    return ok(name, f"{text}; products right", total / 2**30, "GiB")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether PyTorch, CUDA or cuBLAS found too little memory free."""
    return any(words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def _wrong_product(index: int) -> str:
    """Multiply matrices of small integers, which every dtype holds exactly; returns what is wrong, or ""."""
    import torch

    size = _MATMUL_SIZE
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None, :]
    a, b = (rows + 2 * columns) % 5 - 2, (3 * rows + columns) % 7 - 3
    expected = (a.double() @ b.double()).float()
    device = torch.device("cuda", index)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for dtype in (torch.bfloat16, torch.float32):
        # Rounded once, from the exact sum: a bfloat16 result keeps fewer digits than the sums need.
        got = torch.mm(a.to(device, dtype), b.to(device, dtype)).float().cpu()
        wrong = int((got != expected.to(dtype).float()).sum())
        if wrong:
            return f"a product of {size} x {size} integer matrices in {dtype} has {wrong} wrong entries"
    return ""


def clocks(site: Site) -> list[Finding]:
    """Check that a GPU with little to do runs near its highest clock: neither capped, nor hot, nor short of power."""
    if site.gpus == 0:
        return [skipped("GPU clocks", "no CUDA device")]
    return [_clock_of(index) for index in range(site.gpus)]


def _clock_of(index: int) -> Finding:
    name = f"GPU {index} clock"
    try:
        return _clock(name, _clocks_under_load(index))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return skipped(name, "too little memory is free for a load")


def _clock(name: str, reading: str) -> Finding:
    """Judge a line of nvidia-smi: the clock and the highest one, in MHz."""
    found = re.fullmatch(r"(\d+), (\d+)", reading.strip())
    if found is None:
        return skipped(name, "nvidia-smi does not tell")
    now, highest = int(found[1]), int(found[2])
    text = f"{now} of at most {highest} MHz"
    if now < _LEAST_CLOCK * highest:
        advice = (
            "`nvidia-smi -q -d CLOCK,PERFORMANCE` tells why: a cap (lift it with `nvidia-smi -rgc`), heat or power."
        )
        return warning(name, text, advice, now, "MHz")
    return ok(name, text, now, "MHz")


def _clocks_under_load(index: int) -> str:
    """Return nvidia-smi's line of the clocks while a GPU multiplies a small matrix now and then.

    Under full load its limit of power would lower them.
    """
    import torch

    device = torch.device("cuda", index)
    a = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device=device)
    query = ("-i", f"GPU-{torch.cuda.get_device_properties(index).uuid}", "--query-gpu=clocks.sm,clocks.max.sm")
    with ThreadPoolExecutor(1) as pool:
        begun, asked = time.monotonic(), None
        while asked is None or not asked.done():
            torch.mm(a, a)
            torch.cuda.synchronize(device)
            time.sleep(_PAUSE_SECONDS)
            if asked is None and time.monotonic() - begun > _CLOCK_SECONDS:
                asked = pool.submit(_smi, *query, "--format=csv,noheader,nounits")
        return asked.result()


def errors(site: Site) -> list[Finding]:
    """Check the driver's counters: uncorrectable memory errors, rows that could not be remapped, Xid messages."""
    name = "GPU errors"
    if site.gpus == 0:
        return [skipped(name, "no CUDA device")]
    counters = "index,ecc.errors.uncorrected.volatile.total,remapped_rows.failure"
    table = _smi(f"--query-gpu={counters}", "--format=csv,noheader,nounits")
    findings = []
    for line in table.splitlines():
        index, *counts = [cell.strip() for cell in line.split(",")]
        if any(count not in ("0", "No") and not count.startswith("[") for count in counts):
            findings.append(
                failure(
                    f"GPU {index} memory",
                    f"uncorrectable errors and failed remapping of rows: {', '.join(counts)}",
                    f"Reset it (`nvidia-smi --gpu-reset -i {index}`); if the counts come back, have it replaced.",
                )
            )
    messages = _xid_messages()
    if messages:
        findings.append(
            warning(
                name,
                f"{len(messages)} Xid messages in the kernel's log, the last: {messages[-1]}",
                "Look the number up in NVIDIA's list of Xid errors: 48, 63, 74, 79, 94 and 95 mean hardware.",
            )
        )
    return findings or [ok(name, "none counted")]


def _xid_messages() -> list[str]:
    """Return the Xid messages of the kernel's log, where this user may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if "NVRM: Xid" in line]


def triton_cache(site: Site) -> list[Finding]:
    """Check the folder that Triton writes compiled kernels to and loads them from."""
    name = "Triton cache"
    if site.gpus == 0:
        return [skipped(name, "no CUDA device")]
    home = os.environ.get("TRITON_HOME") or Path.home()
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")).absolute()
    advice = "Set TRITON_CACHE_DIR to a folder on a local disk that this user may write to."
    try:
        with trial_folder(folder) as trial:
            (trial / "kernel.so").write_bytes(bytes(_CACHE_BYTES))
            cannot_load = os.statvfs(trial).f_flag & os.ST_NOEXEC
    except OSError as error:
        return [failure(name, f"{folder}: {error.strerror}", advice)]
    if cannot_load:
        return [failure(name, f"{folder} is mounted with noexec, and compiled kernels are loaded from it", advice)]
    return [ok(name, f"{folder} can be written")]


def kernels(site: Site) -> list[Finding]:
    """Our kernels, compiled without a cache, forward and backward, against the plain definition."""
    name = "Triton kernels"
    if site.gpus == 0:
        return [skipped(name, "no CUDA device")]
    with tempfile.TemporaryDirectory(prefix="dash-dist-doctor-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # read when Triton compiles for the first time
        import torch

        from dash_kernels import dash_attention
        from dash_kernels.reference import reference_dash_attention

        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 512, 4, 64), (1, 512, 2, 64), (1, 512, 2, 64), (2, 64))
        inputs = [torch.randn(shape, generator=generator).cuda().bfloat16().requires_grad_() for shape in shapes]
        started = time.monotonic()
        out = dash_attention(*inputs, backend="triton")
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        torch.cuda.synchronize()
        seconds = time.monotonic() - started
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected, _ = reference_dash_attention(*exact)
        wanted = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    # bfloat16 keeps 8 bits; a wrong kernel is wrong by the size of the values.
    off = max(
        ((got.double() - want).norm() / want.norm()).item()
        for got, want in zip([out, *gradients], [expected, *wanted], strict=True)
    )
    if not off < 0.1:
        return [
            failure(
                name,
                f"compiled in {seconds:.1f} s, but off by {off:.2g} of the values",
                "Install the Triton that belongs to this PyTorch, or set attention.backend=eager until it is repaired.",
            )
        ]
    return [ok(name, f"compiled without a cache and run in {seconds:.1f} s; off by {off:.1e}", seconds, "s")]


def _smi(*arguments: str) -> str:
    """Return nvidia-smi's output; "" where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


CHECKS = (
    Check(
        "GPUs",
        devices,
        Where.CHILD,
        "See whether `nvidia-smi` answers; if it hangs or shows ERR!, reboot the machine or reset the GPU.",
    ),
    Check("GPU errors", errors, Where.CHILD, "See whether `nvidia-smi` answers.", time_limit=40.0),
    Check("GPU clocks", clocks, Where.CHILD, "See whether `nvidia-smi` answers."),
    Check("Triton cache", triton_cache, Where.CHILD, "Set TRITON_CACHE_DIR to a folder on a local disk."),
    Check(
        "Triton kernels",
        kernels,
        Where.CHILD,
        "Install a C compiler (gcc) and the Triton that belongs to this PyTorch; attention.backend=eager does without.",
        time_limit=90.0,
    ),
)
