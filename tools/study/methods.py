"""The methods that are compared: sections `attention:` of a configuration, by name.

Knows settings of the attention; does not know models or texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.study.sizes import Settings, Size

_ALWAYS = {"first_chunks": 1, "local_chunks": 1}
"""Chunks that infllmv2 and nsa always select beside the own one; infllmv2's default, 32, is more than a budget here."""
_WINDOW = 128
"""Tokens of nsa's window, of which its authors take 512: those texts are longer than the ones here."""
FIXED = ("topk", "infllmv2", "nsa")


@dataclass(frozen=True)
class Method:
    """One way to attend, as it is trained.

    Attributes:
        attention: section of the configuration.
        dials: settings of the section that one trained model is also tested with.
    """

    name: str
    attention: Settings
    dials: tuple[Settings, ...] = ()


def methods(size: Size) -> dict[str, Method]:
    """Return the methods of a study by name."""
    found = [_method("dense", size, {"kind": "dense"})]
    found += [_dash(f"dash-{scale:g}", size, routing_scale=scale) for scale in size.scales]
    found += [_fixed(kind, size, budget) for kind in FIXED for budget in size.budgets]
    found += [_dash(f"sigma-{sigma:.0f}", size, prior_sigma=sigma) for sigma in (1.0, 4.0, 1e6)]
    found += [_dash(f"alpha-{alpha:g}", size, alpha=alpha) for alpha in (1.25, 2.0)]
    found += [_dash(f"chunk-{chunk}", size, chunk_size=chunk) for chunk in other_chunks(size)]
    warmup = {"steps": size.steps_before_texts + max(1, len(size.texts) * size.tasks.steps // 4)}
    found += [_dash(f"warmup-from-{start:g}", size, routing_warmup={"start": start, **warmup}) for start in (0.1, 8.0)]
    found.append(_dash("first-chunk", size, attend_first_chunk=True))
    return {one.name: one for one in found}


def main_methods(size: Size) -> tuple[str, ...]:
    """Return the names of the methods that every question is asked of."""
    scales, budget = size.scales, size.budgets[1]
    return ("dense", f"dash-{scales[0]:g}", f"dash-{scales[2]:g}", *(f"{kind}-{budget}" for kind in FIXED))


def budget_methods(size: Size) -> tuple[str, ...]:
    """Return the names of the methods at all densities."""
    return (
        *(f"dash-{scale:g}" for scale in size.scales),
        *(f"{kind}-{budget}" for kind in FIXED for budget in size.budgets),
    )


def ablations(size: Size) -> tuple[str, ...]:
    """Return the names of DashAttention and its variations."""
    named = methods(size)
    beginnings = ("sigma-", "alpha-", "chunk-", "warmup-", "first-chunk")
    return (f"dash-{size.scales[0]:g}", *(name for name in named if name.startswith(beginnings)))


def other_chunks(size: Size) -> tuple[int, int]:
    """Return the sizes of chunks to compare with that of the study."""
    return size.chunk_size // 2, size.chunk_size * 2


def _method(name: str, size: Size, attention: Settings, dials: tuple[Settings, ...] = ()) -> Method:
    return Method(name, {"chunk_size": size.chunk_size, **attention}, dials)


def _dash(name: str, size: Size, **settings: object) -> Method:
    own = settings.get("routing_scale", 1.0)
    dials = tuple({"routing_scale": scale} for scale in size.scales if scale != own)
    return _method(name, size, {"kind": "dash", "routing_scale": 1.0, **settings}, dials)


def _fixed(kind: str, size: Size, budget: int) -> Method:
    rules: Settings = {
        "topk": {},
        "infllmv2": {"infllmv2": {**_ALWAYS, "dense_length": 0}},
        "nsa": {"nsa": {**_ALWAYS, "window": _WINDOW}},
    }
    dials = tuple({"top_chunks": other} for other in size.budgets if other != budget)
    return _method(f"{kind}-{budget}", size, {"kind": kind, "top_chunks": budget, **rules[kind]}, dials)
