"""Hugging Face's config.json, to and from the section `model`.

Knows the keys of every family in the spellings of transformers 4 and 5, and refuses keys that it does not know. Does
not know tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dash_dist.config.model import FAMILIES, ModelConfig
from dash_dist.config.positions import NEEDED, OPTIONAL, PositionsConfig
from dash_dist.models.frequencies import frozen_base
from dash_dist.models.windows import FULL, SLIDING, attention_from, layer_windows, write_windows

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside the weights that go with a model."""

IRRELEVANT = frozenset(
    """
    _name_or_path _model_name_or_path architectures bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id unk_token_id use_cache torch_dtype dtype transformers_version transformers.js_config
    auto_map is_llama_config pretraining_tp return_dict output_attentions output_hidden_states
    return_dict_in_generate output_scores torchscript id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix bad_words_ids chunk_size_feed_forward max_length min_length
    do_sample early_stopping num_beams temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences num_beam_groups diversity_penalty
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss use_bfloat16 pruned_heads keys_to_ignore_at_inference attn_implementation
    _attn_implementation _attn_implementation_autoset language tokenizer_name
    """.split()  # noqa: SIM905
)
"""Keys that change nothing of the function in training: names, generation, files."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),  # with it, transformers adds a bias to the output projection, too
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "resid_pdrop": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "use_qk_norm": (None,),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
}
"""Keys with one function that is supported."""

_READ = frozenset(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim hidden_act max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings rope_theta
    rope_scaling rope_parameters original_max_position_embeddings sliding_window use_sliding_window max_window_layers
    layer_types no_rope_layers no_rope_layer_interval dash_attention
    """.split()  # noqa: SIM905
)

# Theirs -> ours.
_PARAMETERS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    **{
        name: name
        for name in (
            "low_freq_factor",
            "high_freq_factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "short_factor",
            "long_factor",
        )
    },
}
_DEFAULT_THETA = {"smollm3": 2_000_000.0, "olmo3": 500_000.0}
_DEFAULT_EPSILON = {"olmo2": 1e-5, "olmo3": 1e-5}
_DEFAULT_MAX_POSITIONS = {
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "smollm3": 32768,
    "olmo2": 2048,
    "olmo3": 2048,
}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "smollm3": 4}
_DEFAULT_TIED = {"smollm3": True}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's config.json. Raises ValueError if it is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name the folder of a Hugging Face model") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; get it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings: get it again")
    return config


def model_from(config: Mapping[str, Any]) -> ModelConfig:
    """Return the section `model` of a config.json.

    Raises:
        ValueError: a key is not known, contradicts another, or asks for a function that this project does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} cannot be imported: these can: {', '.join(FAMILIES)}")
    architectures = config.get("architectures") or [FAMILIES[family].architecture]
    if list(architectures) != [FAMILIES[family].architecture]:
        raise ValueError(
            f"architectures {list(architectures)} is not that of model_type {family}, {FAMILIES[family].architecture}: "
            "only language models with their output layer can be imported"
        )
    _refuse_unknown(config)
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if config.get(key) is None
    ]
    if missing:
        raise ValueError(f"config.json has no {missing[0]}: complete it; a guess would be another model")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} cannot be imported: silu can")
    layers = config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    windows_of(config)
    head_dim = config.get("head_dim")
    if head_dim is None and family == "qwen3":
        head_dim = 128
    base, positions = _positions_from(config)
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = heads if "num_key_value_heads" in config else _DEFAULT_KV_HEADS.get(family, heads)
    try:
        return ModelConfig(
            family=family,
            num_layers=layers,
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            attention_bias=FAMILIES[family].attention_bias,
            qk_norm=FAMILIES[family].qk_norm,
            rotary_base=base,
            positions=positions,
            layers_without_positions=_without_positions(config, layers) if family == "smollm3" else (),
            norm_epsilon=config.get("rms_norm_eps", _DEFAULT_EPSILON.get(family, 1e-6)),
            init_std=config.get("initializer_range") or 0.02,
            tie_embeddings=bool(config.get("tie_word_embeddings", _DEFAULT_TIED.get(family, False))),
        )
    except ValidationError as error:
        raise ValueError(_reason(error)) from None


def windows_of(config: Mapping[str, Any]) -> list[int | None]:
    """Return the window of each layer, as `layer_windows`."""
    without = _without_positions(config, config["num_hidden_layers"]) if config["model_type"] == "smollm3" else ()
    return layer_windows(config, without)


def config_of(
    model: ModelConfig, attention: dict[str, Any], *, vocab_size: int, sequence_length: int, dtype: str
) -> dict[str, Any]:
    """Return the config.json of a model, with the rotary keys of transformers 4, which 5 reads as well.

    Args:
        vocab_size: tokens of the embedding.
        sequence_length: tokens of a sequence in training: the model's limit where `model.positions` has none.
        attention: settings of the attention, by name. They are written as `dash_attention` unless the other keys say
            everything, as for a model of dense layers.
    """
    positions, family = model.positions, FAMILIES[model.family]
    base = model.rotary_base
    scaling: dict[str, Any] | None = None
    if positions.type == "dynamic":  # frozen: default positions with another base
        base = frozen_base(model.resolved_head_dim, base, positions)
    elif positions.type != "default":
        names = {ours: theirs for theirs, ours in _PARAMETERS.items()}
        scaling = {"rope_type": positions.type} | {
            names[name]: list(value) if isinstance(value, tuple) else value
            for name, value in positions.parameters.items()
        }
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model.family,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.resolved_head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions.limit or sequence_length,
        "hidden_act": model.hidden_act,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "rope_theta": base,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
    }
    if scaling is not None:
        config["rope_scaling"] = scaling
    if family.windows_unscaled:
        config["rope_parameters"] = {
            FULL: {"rope_type": "default", **(scaling or {}), "rope_theta": base},
            SLIDING: {"rope_type": "default", "rope_theta": base},
        }
    if model.family in ("llama", "qwen3", "smollm3", "olmo2", "olmo3"):
        config["attention_bias"] = False
    if model.family in ("llama", "smollm3"):
        config["mlp_bias"] = False
    if model.family == "smollm3":
        config["no_rope_layers"] = [
            int(layer not in model.layers_without_positions) for layer in range(model.num_layers)
        ]
    if model.family in ("smollm3", "olmo2", "olmo3"):
        config["pad_token_id"] = None
    layers = attention_from(attention)
    kinds = layers.kinds(model.num_layers)
    complete = write_windows(config, kinds, layers.window)
    if "dash" in kinds or not complete:
        config["dash_attention"] = attention
    return config


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                supported = _FIXED[key][0]
                raise ValueError(f"{key} is {value!r} in config.json, and only {supported!r} can be imported")
        elif key not in _READ and key not in IRRELEVANT:
            raise ValueError(
                f"config.json has the key {key!r}, which is not known: it may change the function. If it does not, "
                "remove it from a copy of config.json"
            )


def _without_positions(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = config.get("no_rope_layer_interval", 4)
        rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotated) != layers:
        raise ValueError(f"no_rope_layers has {len(rotated)} entries, and num_hidden_layers is {layers}")
    return tuple(layer for layer, with_positions in enumerate(rotated) if not with_positions)


def _positions_from(config: Mapping[str, Any]) -> tuple[float, PositionsConfig]:
    """The base and the positions, from `rope_theta` and `rope_scaling`, or from `rope_parameters`."""
    family = config["model_type"]
    rope = _merged(config)
    kind = rope.pop("rope_type", "default")
    base = float(rope.pop("rope_theta", _DEFAULT_THETA.get(family, 10_000.0)))
    if rope.pop("partial_rotary_factor", 1.0) not in (1, 1.0):
        raise ValueError("partial_rotary_factor is not 1, and only heads that are rotated whole can be imported")
    if kind not in NEEDED:
        raise ValueError(f"rope_type {kind!r} cannot be imported: these can: {', '.join(NEEDED)}")
    limit = int(config.get("max_position_embeddings") or _DEFAULT_MAX_POSITIONS[family])
    taken = {*NEEDED[kind], *OPTIONAL.get(kind, ())} - {"length"}
    original = config.get("original_max_position_embeddings")
    if original is not None:
        stated = rope.setdefault("original_max_position_embeddings", original)
        if stated != original:
            raise ValueError(
                f"original_max_position_embeddings is {original} in config.json and {stated} in its rope parameters: "
                "remove the wrong one"
            )
    settings: dict[str, Any] = {}
    for key, value in rope.items():
        if value is None:
            continue
        name = _PARAMETERS.get(key)
        if name not in taken:
            raise ValueError(
                f"the rope parameter {key!r} is not one of type {kind}, which has "
                f"{', '.join(sorted(key for key, name in _PARAMETERS.items() if name in taken)) or 'none'}: remove it"
            )
        settings[name] = tuple(value) if isinstance(value, list) else value
    if "original_max_positions" in taken:
        if kind == "dynamic":
            settings["original_max_positions"] = limit
        settings.setdefault("original_max_positions", limit)
    if kind == "dynamic":
        settings["length"] = limit
    else:
        settings["max_positions"] = limit
    if kind in ("yarn", "longrope") and "factor" not in settings:
        settings["factor"] = max(1.0, limit / settings["original_max_positions"])
    try:
        return base, PositionsConfig(type=kind, **settings)
    except ValidationError as error:
        raise ValueError(_reason(error)) from None


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary keys in one dictionary. Refuses two spellings that say different things."""
    rope: dict[str, Any] = {}

    def take(source: str, key: str, value: Any) -> None:
        if key == "type":
            key = "rope_type"
        if value is None:
            return
        if rope.setdefault(key, value) != value:
            raise ValueError(
                f"config.json says {key} {value!r} in {source} and {rope[key]!r} elsewhere: remove the wrong one"
            )

    for source in ("rope_parameters", "rope_scaling"):
        parameters = config.get(source)
        if parameters is None:
            continue
        if source == "rope_parameters" and FAMILIES[config["model_type"]].windows_unscaled:
            parameters = _of_full_layers(parameters)
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            raise ValueError(f"{source} is given per type of layer, and only one kind of positions can be imported")
        for key, value in parameters.items():
            take(source, key, value)
    take("rope_theta", "rope_theta", config.get("rope_theta"))
    return rope


def _of_full_layers(by_type: Any) -> dict[str, Any]:
    """Return the rotary keys of layers without windows. Refuses other positions of those with windows than unscaled."""
    if not isinstance(by_type, dict) or by_type.keys() != {FULL, SLIDING}:
        raise ValueError(f"rope_parameters is not given for {FULL} and {SLIDING}, as model_type olmo3 needs it")
    full = dict(by_type[FULL] or {})
    theta = full.get("rope_theta", _DEFAULT_THETA["olmo3"])
    for key, value in (by_type[SLIDING] or {}).items():
        expected = {"rope_type": "default", "rope_theta": theta}.get(key)
        if value is not None and value != expected:
            raise ValueError(
                f"rope_parameters gives {SLIDING} the {key} {value!r}, and only {expected!r} can be imported"
            )
    return full


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
