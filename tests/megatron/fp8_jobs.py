"""What the ranks of the tests of FP8 linears do. The test process itself does not import this."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from dash_dist.megatron import fp8
from dash_kernels.fp8 import emulated_product
from tests.megatron.megatron_jobs import copy_tensors, engine_of, micro_batches, ranks_of, train
from tests.support.models import MODEL, Case, Measured

WIDE = MODEL.model_copy(update={"ffn_hidden_size": 64, "attention_bias": True})
"""Two tensor-parallel ranks have multiples of 16."""
TOKENS, BATCH = 22, 3
LINEARS = {"qkv": "self_attention.linear_qkv", "proj": "self_attention.linear_proj"} | {
    name: f"mlp.linear_{name}" for name in ("fc1", "fc2")
}


def linears(case: Case, frozen: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, outputs and gradients of a layer's linears, by name; inputs and gradients are those of `given`."""
    found = {}
    with engine_of(case, model=WIDE) as engine:
        rank, ranks = engine.dims.tp_rank, engine.dims.tp_size
        for name, path in LINEARS.items():
            linear = engine.model.decoder.layers[0].get_submodule(path)
            assert isinstance(linear, fp8._Fp8)
            shards = bool(linear.sequence_parallel)
            columns = name in ("qkv", "fc1")
            inputs = linear.weight.shape[1] * (1 if columns else ranks)
            x, gradient = given(name, inputs, linear.weight.shape[0] * (ranks if columns else 1))
            if columns:
                x, gradient = x.chunk(ranks)[rank] if shards else x, gradient.chunk(ranks, -1)[rank]
            else:
                x, gradient = x.chunk(ranks, -1)[rank], gradient.chunk(ranks)[rank] if shards else gradient
            x.requires_grad_()
            linear.weight.requires_grad_(not frozen)
            bias = [] if linear.bias is None else [linear.bias]
            for one in bias:
                one.data.normal_(generator=torch.Generator().manual_seed(rank))
            output, _ = linear(x)
            trained = [x, *bias, *([] if frozen else [linear.weight])]
            gradients = torch.autograd.grad(output, trained, gradient.contiguous())
            names = ["x", *("bias" for _ in bias), *([] if frozen else ["weight"])]
            found[name] = {f"gradient of {of}": one for of, one in zip(names, gradients, strict=True)}
            found[name] |= {"weight": linear.weight.detach().clone(), "output": output.detach()}
            if linear.bias is not None:
                found[name]["bias"] = linear.bias.detach().clone()
    return found


def given(name: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input [s, b, in] of a whole linear, and the gradient of its output [s, b, out]; tokens differ in size."""
    generator = torch.Generator().manual_seed(len(name) + inputs)
    sizes = 10.0 ** torch.linspace(-4, 2, TOKENS)[:, None, None]
    return tuple(torch.randn(TOKENS, BATCH, width, generator=generator) * sizes for width in (inputs, outputs))  # type: ignore[return-value]


def measure(cases: dict[str, Case]) -> dict[str, Measured]:
    """Loss, gradients of a step and the weights after it, by name."""
    found = {}
    for name, case in cases.items():
        with engine_of(case, model=WIDE) as engine:
            measured = Measured(ranks_of(engine.dims))
            result = engine.train_step(micro_batches(0, engine.dims, case))
            measured.losses, measured.grad_norm = [result.loss], result.grad_norm
            copy_tensors(engine, measured)
            found[name] = measured
    return found


def classes(case: Case) -> dict[str, str]:
    """Name of the class of each module with a weight matrix, by its name in a layer or in the model."""
    with engine_of(case) as engine:
        return {
            name.rsplit(".", 1)[-1]: type(module).__name__
            for name, module in engine.model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 2
        }


def resumed(folder: Path) -> tuple[list[float], list[float], list[str]]:
    """Losses of two steps in FP8, of two that follow without it from the checkpoint between them, and what changed."""
    with engine_of(Case(fp8_linears=True)) as engine:
        before = train(engine, Case(), 2)
        engine.start_save(folder, background=False).finish()
    with engine_of(Case()) as engine:
        changes = engine.load(folder)
        return before, train(engine, Case(), 2), changes


def sizes_without_tokens() -> tuple[list[int], list[int]]:
    """Shapes of an output of no tokens and of its input's gradient."""
    x, weight = torch.zeros(0, 3, 32, requires_grad=True), torch.zeros(16, 32, requires_grad=True)
    output = fp8._Product.apply(x, weight, None, False, False)
    (gradient,) = torch.autograd.grad(output, x, torch.zeros_like(output))
    return list(output.shape), list(gradient.shape)


def refusal() -> str:
    """The message for a GPU before Ada."""
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="A100"),
    ):
        try:
            fp8.check_device(torch.device("cuda", 0))
        except ValueError as error:
            return str(error)
    return ""


def errors_on_gpu(shapes: list[tuple[int, int]], tokens: list[int]) -> dict[Any, dict[str, float]]:
    """Relative distance of the emulation and of FP8 products on a GPU, by shape and tokens; output and gradients.

    "bf16" names the distance of FP8 from products in float32.
    """
    found: dict[Any, dict[str, float]] = {}
    for outputs, inputs in shapes:
        for count in tokens:
            generator = torch.Generator("cuda").manual_seed(count)
            made = [
                torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()
                for shape in ((count, 1, inputs), (outputs, inputs), (count, 1, outputs))
            ]
            x, weight, gradient = made
            by_way = {}
            for way in ("gpu", "emulated", "float32"):
                if way == "float32":
                    leaves = [one.detach().float().requires_grad_() for one in (x, weight)]
                    output = leaves[0] @ leaves[1].t()
                    by_way[way] = (output, *torch.autograd.grad(output, leaves, gradient.float()))
                    continue
                multiply = emulated if way == "emulated" else fp8.scaled_product
                with mock.patch.object(fp8, "scaled_product", multiply):
                    output = fp8._Product.apply(x, weight, None, False, False)
                    by_way[way] = (output, *torch.autograd.grad(output, (x, weight), gradient))
            for name, *of_ways in zip(("output", "input", "weight"), *by_way.values(), strict=True):
                gpu, emulation, exact = (one.detach().double() for one in of_ways)
                found.setdefault((outputs, inputs, count), {}).update(
                    {
                        name: float((gpu - emulation).norm() / emulation.norm()),
                        f"{name}, bf16": float((gpu - exact).norm() / exact.norm()),
                    }
                )
    return found


def emulated(a: Any, b: Any, dtype: torch.dtype, *, fast: bool) -> torch.Tensor:
    """Stand for `scaled_product`."""
    return emulated_product(a, b, dtype)
