"""The run: whether its processes, its tokenizer and its documents are there.

Knows the configuration, which is valid in itself by then; builds no model.
"""

from dash_dist.config.run import Stage
from dash_dist.data.prepare import Preparation, read_first_documents
from dash_dist.data.sizes import sizes_of
from dash_dist.data.stream import build_data_stream
from dash_dist.data.tokenizer import Tokenizer, load_tokenizer
from dash_dist.doctor.findings import Check, Finding, Where, failure, ok, skipped, warning
from dash_dist.doctor.site import Site

_NO_CONFIG = "no CONFIG given"
_SMALL = 64 << 20  # bytes of documents that are tokenised within the time of a check


def world_size(site: Site) -> list[Finding]:
    """Return the number of this machine's GPUs; without GPUs, or for a cluster, that of one replica of the model."""
    if site.config is None:
        return [skipped("processes", _NO_CONFIG)]
    return [_world_size(site, stage) for stage in site.config.stage_list]


def _world_size(site: Site, stage: Stage) -> Finding:
    name = _of(stage, "processes")
    parallel = stage.config.parallel
    replica = parallel.tensor * parallel.context * parallel.pipeline
    of_model = f"tensor x context x pipeline = {parallel.tensor} x {parallel.context} x {parallel.pipeline} = {replica}"
    if site.gpus == 0 or site.address is not None:
        return ok(name, f"one replica takes {replica}: {of_model}", replica, "processes")
    if site.gpus < replica:
        return warning(
            name,
            f"this machine has {site.gpus} GPUs, and one replica takes {replica}: {of_model}",
            "Start the run on more nodes, or lower parallel.context, parallel.tensor or parallel.pipeline.",
            site.gpus,
            "GPUs",
        )
    try:
        stage.config.check_world_size(site.gpus)
    except ValueError as error:
        return warning(name, f"not all {site.gpus} GPUs: {error}", "Change the setting named, or start fewer.")
    return ok(name, f"{site.gpus} GPUs fit; one replica takes {replica}: {of_model}", site.gpus, "GPUs")


def data(site: Site) -> list[Finding]:
    """The first batch, as the run would read it; the first documents only of a large corpus without tokens."""
    if site.config is None:
        return [skipped("data", _NO_CONFIG)]
    config = site.config
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
    except (OSError, ValueError) as error:
        return [failure("tokenizer", str(error), "Set data.tokenizer to one that every node can read.")]
    loaded = ok("tokenizer", f"{config.data.tokenizer}, {tokenizer.vocab_size} tokens", tokenizer.vocab_size, "tokens")
    return [loaded, *(_data(stage, tokenizer) for stage in config.stage_list)]


def _data(stage: Stage, tokenizer: Tokenizer) -> Finding:
    name, config = _of(stage, "data"), stage.config
    try:
        preparation = Preparation.of(config.data, tokenizer)
        missing = preparation.missing()
        if sum(shard.size or _SMALL for shard in missing) >= _SMALL:
            read_first_documents(preparation)
            left = f"{len(missing)} of {len(preparation.shards)} shards have no tokens yet"
            advice = "Run dash-dist data prepare CONFIG before the GPUs wait for it."
            return warning(name, f"{config.data.source}: the documents can be read; {left}", advice)
        stream = build_data_stream(config.data, tokenizer=tokenizer, **sizes_of(config, 0, 1))
        stream.next_step()
    except (OSError, ValueError) as error:
        return failure(name, str(error), "Correct data.* so that every node can read the documents.")
    skips = f", {stream.skipped_documents} documents skipped" if stream.skipped_documents else ""
    tokens = config.training.tokens_per_step
    return ok(name, f"{config.data.source}: a first batch of {tokens} tokens read{skips}", tokens, "tokens")


def _of(stage: Stage, name: str) -> str:
    return f"{name}, stage {stage.name}" if stage.name else name


CHECKS = (
    Check("processes", world_size, Where.HERE, "Correct the section parallel."),
    Check(
        "data",
        data,
        Where.CHILD,
        "See whether the storage or the hub that data.* names answers from this machine.",
        time_limit=60.0,
    ),
)
