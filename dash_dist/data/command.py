"""`dash-dist data prepare`: the tokens of a corpus, made before a run needs them.

Knows progress bars and tables; does not know how tokens are made.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dash_dist.config.data import DataConfig
from dash_dist.data.corpus import Corpus
from dash_dist.data.mixture import shares_of
from dash_dist.data.prepare import Preparation, prepare_in_processes, start_worker
from dash_dist.data.sources import Shard
from dash_dist.data.tokenizer import load_tokenizer
from dash_dist.errors import ConfigError, RunError


def prepare(config: DataConfig, *, processes: int, console: Console) -> None:
    """Tokenise what is missing in the cache in `processes` processes; print the sources and where their tokens are.

    Raises:
        ConfigError: the configuration, a file or the storage does not allow it; nothing half-written is left.
    """
    try:
        tokenizer = load_tokenizer(config.tokenizer, end_of_document=config.end_of_document)
        preparation = Preparation.of(config, tokenizer)
        missing = preparation.missing()
        columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        context = multiprocessing.get_context("spawn")
        workers = max(1, min(processes, len(missing)))
        with (
            Progress(*columns, console=console, disable=not missing) as progress,
            ProcessPoolExecutor(workers, context, start_worker, (config,)) as pool,
        ):
            bar = progress.add_task("", total=len(missing))

            def advance(shard: Shard, tokens: int) -> None:
                progress.advance(bar)

            corpus = prepare_in_processes(preparation, pool, advance)
    except BrokenProcessPool as error:
        raise RunError(
            f"a process that tokenises was killed ({error}): free memory, or start fewer with --processes"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot prepare the data: {error}") from error
    console.print(_table(config, corpus))
    for told in corpus.damage:
        console.print(told, markup=False)
    console.print(f"{preparation.cache} holds the tokens", markup=False)


def _table(config: DataConfig, corpus: Corpus) -> Table:
    table = Table("source", "documents", "empty", "damaged", "tokens", "in the loss", "share")
    for (title, source), share in zip(corpus.sources.items(), shares_of(config, corpus), strict=True):
        record = source.record
        counted = record.tokens if record.loss_tokens is None else record.loss_tokens
        numbers = (len(source), record.empty, record.damaged, record.tokens, counted)
        table.add_row(title, *(f"{number:,}" for number in numbers), f"{share:.2%}")
    return table
