"""The weights that a new run starts from, checked against the run's configuration.

Knows which settings must be those of the folder, and which a run may change. Does not know ranks.
"""

from __future__ import annotations

from dash_dist.config.attention import AttentionConfig
from dash_dist.config.model import ModelConfig
from dash_dist.models.hugging_face import model_from, read_config
from dash_dist.models.safetensors_folder import SafetensorsFolder
from dash_dist.models.table import parameter_table

MAY_DIFFER = frozenset({"weights", "init_std", "rotary_base", "positions"})
"""Settings in which a run may differ from its weights: positions are changed to extend a model's context."""


def open_start(model: ModelConfig, *, vocab_size: int) -> SafetensorsFolder:
    """Open `model.weights`, the folder of a Hugging Face model, for the weights of `model`.

    Args:
        vocab_size: tokens of the embedding.

    Raises:
        ValueError: the folder is damaged, or holds another model than `model`; names the first setting that differs.
    """
    assert model.weights is not None
    folder = model.weights.expanduser()
    described = model_from(read_config(folder))
    for name in ModelConfig.model_fields.keys() - MAY_DIFFER - {"head_dim", "vocab_size"}:
        ours, theirs = getattr(model, name), getattr(described, name)
        if ours != theirs:
            raise ValueError(f"model.{name} is {ours}, and {folder / 'config.json'} makes it {theirs}: set it to that")
    if model.resolved_head_dim != described.resolved_head_dim:
        raise ValueError(
            f"model.head_dim is {model.resolved_head_dim}, and {folder / 'config.json'} makes it "
            f"{described.resolved_head_dim}: set it to that"
        )
    if vocab_size != described.vocab_size:
        raise ValueError(
            f"the embedding of this run has {vocab_size} tokens, and that of {folder} has {described.vocab_size}: "
            f"set model.vocab_size to {described.vocab_size}, and data.tokenizer to the tokenizer of the model"
        )
    return SafetensorsFolder(folder, parameter_table(model, vocab_size))


def advise_conversion(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return what happens to weights of a dense model that get routing with the bias log P; None for others.

    Raises:
        ValueError: config.json of `model.weights` cannot be read.
    """
    if model.weights is None or "dash" not in attention.pattern or attention.prior_sigma is not None:
        return None
    if attention.conversion is not None:
        return None
    trained = read_config(model.weights.expanduser()).get("dash_attention")
    kinds = "dense" if trained is None else trained.get("kind", "dash")
    if "dash" in ([kinds] if isinstance(kinds, str) else kinds):
        return None
    first = "" if attention.attend_first_chunk else ", and attention.attend_first_chunk"
    return (
        f"{model.weights} was trained without routing, and attention.prior_sigma is null: its bias log P weakens "
        "earlier chunks wherever more than one is selected, so the loss jumps and comes down with training. For a "
        f"start without a jump set attention.prior_sigma with attention.routing_warmup{first}, see docs/extending.md"
    )
