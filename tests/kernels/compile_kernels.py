"""Compiles every kernel for a Hopper GPU, which needs none: Triton brings its assembler. Run without the interpreter.

    python compile_kernels.py NAME    # of a shape in SHAPES

What the interpreter accepts and the compiler refuses (a variable that changes its type, too much shared memory) shows
here. The stages are called as they are, with tensors on the CPU that no kernel reads or writes, and what they would
launch is compiled: no launch is written down twice. Prints one line of JSON per compiled kernel; see `Compiled`.
"""

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dash_kernels import triton as triton_backend
from dash_kernels.chunks import ChunkGrid
from dash_kernels.device import Device
from dash_kernels.selection import SelectionRule, TopChunks
from dash_kernels.spec import AttentionSpec, Blocks, OutputGradient, Part, Queries
from dash_kernels.triton.fp8 import cast
from dash_kernels.triton.rotary import turn

TARGET = GPUTarget("cuda", 90, 32)
HOPPER = Device("sm_90", multiprocessors=132)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Shape:
    """by_parts: also the kernels of K and V that come in parts, with prior_sigma; else those of a whole part only.
    selection: in the place of routing.
    """

    dtype: torch.dtype
    group: int
    head_dim: int
    chunk_size: int
    by_parts: bool
    selection: SelectionRule | None = None


SHAPES = {
    "model": Shape(torch.bfloat16, group=4, head_dim=128, chunk_size=64, by_parts=True),
    "group of 16": Shape(torch.bfloat16, group=16, head_dim=128, chunk_size=64, by_parts=False),
    "float16": Shape(torch.float16, group=4, head_dim=128, chunk_size=64, by_parts=False),
    "padded": Shape(torch.bfloat16, group=3, head_dim=96, chunk_size=48, by_parts=True),
    "largest": Shape(torch.bfloat16, group=1, head_dim=256, chunk_size=128, by_parts=False),
    "largest float32": Shape(torch.float32, group=4, head_dim=128, chunk_size=64, by_parts=False),
    "narrow": Shape(torch.bfloat16, group=4, head_dim=64, chunk_size=64, by_parts=False),
    "listed": Shape(torch.bfloat16, 4, head_dim=128, chunk_size=64, by_parts=True, selection=TopChunks(2)),
}


@dataclass(frozen=True)
class Compiled:
    """variant: the kernel's compile-time flags; shared: bytes of shared memory of a program; serialised: the assembler
    found matrix instructions that it could not let overlap, which costs a third of their speed and more; seconds: that
    compiling took, next to nothing where Triton's cache had it.
    """

    kernel: str
    variant: str
    shared: int
    serialised: bool
    seconds: float


@dataclass(frozen=True)
class Launch:
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def variant(self) -> str:
        flags: dict[str, Any] = {}
        for name, value in self.constants.items():
            flags |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
        return " ".join(f"{name}={value}" for name, value in flags.items() if isinstance(value, bool))


def type_of(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, GluonTensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, (int, float)):
        return "i32" if isinstance(value, int) else "fp32"
    raise TypeError(f"argument {name} is of type {type(value).__name__}")


@contextlib.contextmanager
def noted(launches: list[Launch]) -> Iterator[None]:
    """Kernels launched inside are noted instead of run."""

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {}
        for parameter in kernel.params:
            name = parameter.name
            signature[name] = "constexpr" if parameter.is_constexpr else type_of(name, values[name])
            if signature[name] == "i32" and not parameter.do_not_specialize:
                raise TypeError(f"{kernel.__name__} would be compiled again for other values of {name}")
        options = {name: value for name, value in options.items() if value is not None}
        launches.append(Launch(kernel, signature, constants, options))

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = original


def call_the_stages(shape: Shape, prior_sigma: float | None, whole: bool) -> None:
    kv_heads, chunks = 2, 3
    spec = AttentionSpec(
        shape.chunk_size,
        alpha=1.5,
        routing_scale=1.0,
        prior_sigma=prior_sigma,
        softmax_scale=0.1,
        selection=shape.selection,
    )
    tokens = chunks * shape.chunk_size
    grid = ChunkGrid.whole_sequence(tokens, shape.chunk_size)
    q = torch.zeros(1, tokens, kv_heads * shape.group, shape.head_dim, dtype=shape.dtype)
    k = q[:, :, :kv_heads].contiguous()
    c = torch.zeros(kv_heads, shape.head_dim, dtype=shape.dtype)
    part = Part(k, k, grid)
    summaries = triton_backend.summarize(k, grid, c, spec)
    queries = Queries(q, grid, summaries, triton_backend.route(q, grid, summaries, spec))
    out, lse = triton_backend.attend(queries, part, spec, before=None, last=whole)
    upstream = OutputGradient(q, lse, triton_backend.row_dots(q, out))
    if whole:
        _, ratio = triton_backend.finish_query_gradient(queries, upstream, part, spec, None)
        triton_backend.key_gradient(queries, upstream, ratio, part, c, spec)
        return
    blocks = Blocks(q.new_zeros(2, 2, shape.chunk_size, shape.head_dim), torch.arange(2))
    triton_backend.reached(queries.routing, grid, chunks, spec)
    before = triton_backend.attend(queries, part, spec, before=(out, lse), last=False)  # of a ring
    triton_backend.attend(queries, blocks, spec, before=before, last=True)
    sums = triton_backend.query_gradient(queries, upstream, part, spec, None)
    sums = triton_backend.query_gradient(queries, upstream, part, spec, sums)
    _, ratio = triton_backend.finish_query_gradient(queries, upstream, blocks, spec, sums)
    triton_backend.key_gradient(queries, upstream, ratio, blocks, c, spec)


def rotate_the_heads(shape: Shape) -> None:
    q = torch.zeros(1, 2 * shape.chunk_size, 1, shape.group, shape.head_dim, dtype=shape.dtype)
    angles = torch.zeros(q.shape[1], shape.head_dim // 2)
    turn(q, q, angles, angles, back=False)
    turn(q, q, angles, angles, back=True)
    turn(q, q, None, None, back=False)


def cast_the_rows(shape: Shape) -> None:
    for columns in (shape.head_dim, 2048, 40_000):  # the last ones do not fit into a program
        cast(torch.zeros(2, columns, dtype=shape.dtype))


def launches_of(shape: Shape) -> list[Launch]:
    """Every kernel and variant once; those that take longest to compile, which come late in a call, first."""
    launches: list[Launch] = []
    with noted(launches), mock.patch.object(Device, "of", return_value=HOPPER):
        call_the_stages(shape, prior_sigma=None, whole=True)
        if shape.by_parts:
            call_the_stages(shape, prior_sigma=None if shape.selection else 1.0, whole=False)
            rotate_the_heads(shape)
            cast_the_rows(shape)
    return [launch for index, launch in enumerate(launches) if launch not in launches[:index]][::-1]


def compiled(launch: Launch) -> Compiled:
    """Raises what the compiler raises."""
    names = list(launch.signature)
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    # As at a launch: torch's memory begins at multiples of 16 bytes.
    pointers = [name for name, kind in launch.signature.items() if kind.startswith("*")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    of_language = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = of_language(launch.kernel, launch.signature, constants, aligned)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as log:
        binary = triton.compile(source, target=TARGET, options=launch.options)
    seconds = round(time.perf_counter() - started, 1)
    serialised = "wgmma.mma_async instructions are serialized" in log.getvalue()
    return Compiled(launch.kernel.__name__, launch.variant, binary.metadata.shared, serialised, seconds)


def compile_one(shape: str, index: int) -> Compiled:
    return compiled(launches_of(SHAPES[shape])[index])


def main() -> None:
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # what the assembler says, on stdout
    torch.set_num_threads(1)
    # Each process notes all launches itself, for a kernel does not pickle.
    shape = sys.argv[1]
    indices = range(len(launches_of(SHAPES[shape])))
    with multiprocessing.Pool(2) as pool:
        for kernel in pool.imap_unordered(functools.partial(compile_one, shape), indices):
            print(json.dumps(dataclasses.asdict(kernel)), flush=True)


if __name__ == "__main__":
    main()
