"""Compiles every kernel for a Hopper GPU, which needs none: Triton brings its assembler. Run without the interpreter.

What the interpreter accepts and the compiler refuses (a variable that changes its type, too much shared memory) shows
here. Prints one line per kernel: its name and the shared memory of a program, in bytes.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dash_kernels.spec import AttentionSpec
from dash_kernels.triton_backend import backward, forward, routing, summary
from dash_kernels.triton_backend.tiles import TileShape

HOPPER = GPUTarget("cuda", 90, 32)


def compile_for_hopper(kernel: Any, scalars: str, options: dict[str, Any], pointers: dict[str, str]) -> None:
    """scalars: types of the arguments after the pointers; options: compile-time constants and launch options."""
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in launch}
    names = kernel.arg_names
    rest = iter(scalars.split())
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = next(rest)
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=HOPPER, options=launch)
    print(kernel.__name__, compiled.metadata.shared, flush=True)


def main() -> None:
    kv_heads, group, head_dim = 2, 4, 96
    spec = AttentionSpec(chunk_size=48, alpha=1.5, routing_scale=1.0, prior_sigma=1.0, scale=0.1)
    q = torch.empty(1, 96, kv_heads * group, head_dim, dtype=torch.bfloat16)
    tile = TileShape.of(q, kv_heads, spec)
    stage1 = summary._constants(q[:, :, :kv_heads], spec)
    stage2 = routing._options(tile)
    stage3 = {**tile.constants, **tile.launch}
    inputs = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "grad_ptr")}
    ids = {name: "*i32" for name in ("ids_ptr", "query_ids_ptr", "key_ids_ptr", "selected_ptr")}
    pointers = inputs | ids
    compile_for_hopper(summary.summary_fwd_kernel, "i32 i32 fp32", stage1, pointers)
    compile_for_hopper(summary.summary_bwd_kernel, "i32 i32 fp32", stage1, pointers | {"grad_ptr": "*fp32"})
    compile_for_hopper(routing.route_fwd_kernel, "i32 i32 fp32", stage2 | {"HAS_SIGMA": True}, pointers)
    compile_for_hopper(routing.route_bwd_dq_kernel, "i32 i32 fp32 fp32", stage2, pointers)
    compile_for_hopper(routing.route_bwd_dsummary_kernel, "i32 i32 i32 fp32 fp32", stage2, pointers)
    compile_for_hopper(forward.attend_fwd_kernel, "i32 i32 i32 i32 fp32 fp32 fp32", stage3, pointers)
    scalars = "i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32 fp32"
    compile_for_hopper(backward.attend_bwd_dq_kernel, scalars, stage3, pointers)
    compile_for_hopper(backward.attend_bwd_dkdv_kernel, scalars, stage3 | {"num_warps": 8}, pointers)


if __name__ == "__main__":
    main()
