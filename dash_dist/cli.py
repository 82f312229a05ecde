"""The `dash-dist` command.

Knows commands and their options; does not know the parts of a run. Each command imports torch and the training code
itself, so that `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dash_dist.cluster import limits
from dash_dist.command_line import ConfigFile, Overrides, SeveralValues, run_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on very long sequences with context-parallel DashAttention.",
)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank where torchrun or DeepSpeed started several."""
    from dash_dist.config.file import load_config
    from dash_dist.training.run import train as train_run

    train_run(load_config(config, overrides or []))


@app.command("config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration and print it with every default filled in."""
    from dash_dist.config.file import load_config, to_yaml

    sys.stdout.write(to_yaml(load_config(config, overrides or [])))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the run that is meant for this machine.")
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=2, help="Processes of the checks that need several. Default: the GPUs, at least 2."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where runs are kept. Default: run.directory of CONFIG, or runs.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of a Ray cluster to check as well, such as http://head:8265.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the findings as JSON.")] = None,
) -> None:
    """Check this machine, or a Ray cluster, in about a minute; every failure comes with its remedy."""
    try:
        from dash_dist.doctor.command import examine
    except (ImportError, OSError) as error:  # OSError: a shared library that PyTorch needs cannot be loaded
        advice = "install it again with `pip install -c requirements.lock -e kernels -e '.[all]'`"
        print(f"error: what the checks themselves need cannot be imported: {error}; {advice}", file=sys.stderr)
        raise typer.Exit(1) from None

    healthy = examine(config, overrides or [], ranks=ranks, directory=directory, address=address, json_file=json)
    if not healthy:
        raise typer.Exit(1)


data_app = typer.Typer(no_args_is_help=True, help="Prepare the data of a run.")
app.add_typer(data_app, name="data")


@data_app.command("prepare")
def prepare_data(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenise. Default: the cores of this machine.")
    ] = None,
) -> None:
    """Tokenise the documents of CONFIG, held-out ones included, into data.cache, where runs look for them; what is
    there is kept.
    """
    import os

    from rich.console import Console

    from dash_dist.config.file import load_config
    from dash_dist.data.command import prepare

    for data in load_config(config, overrides or []).all_data:
        prepare(data, processes=processes or len(os.sched_getaffinity(0)), console=Console())


checkpoint_app = typer.Typer(no_args_is_help=True, help="List and verify the checkpoints of a run.")
app.add_typer(checkpoint_app, name="checkpoint")


@checkpoint_app.command("list")
def list_checkpoints(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: runs/NAME.")]) -> None:
    """Show step, time, tokens, loss, size and state of each checkpoint."""
    from rich.console import Console

    from dash_dist.checkpoints.commands import list_checkpoints, table_of

    Console().print(table_of(list_checkpoints(run)))


@checkpoint_app.command("verify")
def verify_checkpoints(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint's step_* folder, or a run's folder.")],
) -> None:
    """Read every file and compare it with what was written; exit status 1 if any is damaged."""
    from dash_dist.checkpoints.commands import verify

    damaged = 0
    for message in verify(path, progress=lambda folder: print(f"verifying {folder}", file=sys.stderr)):
        print(message)
        damaged += 1
    if damaged:
        raise typer.Exit(1)
    print("all files are whole")


@app.command("export")
def export_weights(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, for its newest checkpoint, or a step_*.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the LoRA adapters alone, as peft reads them; default: merged.")
    ] = False,
) -> None:
    """Write the weights of a run as a Hugging Face model of its family, with its positions and its attention."""
    from dash_dist.checkpoints.commands import export

    export(source, out, progress=lambda name: print(f"wrote {out / name}", file=sys.stderr), adapter=adapter)


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model's folder, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Check a Hugging Face model, compare its logits with transformers', and write the section `model` of a run."""
    from dash_dist.importing.command import import_model as run_import

    parity = run_import(source, out)
    print(f"{out / 'model.yaml'}: relative difference of the logits from transformers {parity:.1e}")


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Dashboard of the cluster's head, such as http://head:8265."),
    ] = None,
    num_workers: limits.NumWorkers = None,
    min_workers: limits.MinWorkers = None,
    max_failures: limits.MaxFailures = limits.Limits.max_failures,
    node_wait_seconds: limits.NodeWait = limits.Limits.node_wait_seconds,
    start_timeout_seconds: limits.StartTimeout = limits.Limits.start_timeout_seconds,
    answer_timeout_seconds: limits.AnswerTimeout = limits.Limits.answer_timeout_seconds,
    grow_interval_seconds: limits.GrowInterval = limits.Limits.grow_interval_seconds,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Files to leave behind; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show, submit nothing.")] = False,
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends.")] = True,
) -> None:
    """Submit a run to a Ray cluster as a job, with the current folder as its working tree, and follow its log."""
    from dash_dist.cluster.environment import prepare
    from dash_dist.cluster.submit import submit_command

    prepare()
    allowed = limits.Limits(
        num_workers=num_workers,
        min_workers=min_workers,
        max_failures=max_failures,
        node_wait_seconds=node_wait_seconds,
        start_timeout_seconds=start_timeout_seconds,
        answer_timeout_seconds=answer_timeout_seconds,
        grow_interval_seconds=grow_interval_seconds,
    )
    sys.exit(
        submit_command(
            config,
            overrides or [],
            address=address,
            limits=allowed,
            exclude=exclude or [],
            dry_run=dry_run,
            follow=follow,
        )
    )


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the whole run.")] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind: H100, H200, A100 or B200.")] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of each; default: the memory of that kind.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs with NVLink between them.")] = 8,
    density: Annotated[float, typer.Option(help="Selected / causally available chunks, in (0, 1].")] = 0.1,
    independence: Annotated[
        float | None, typer.Option(help="Independence of neighbouring tokens' selections: 0 identical, 1 independent.")
    ] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Share of other ranks' chunks that a rank needs; default: from the density.")
    ] = None,
    document_length: Annotated[
        float | None, typer.Option(help="Mean length, over tokens, of a token's document; default: a whole sequence.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of the tokenizer, if it cannot be read here.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a measured run, a JSON file of measurements, or of a calibration. Repeatable."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the plan as JSON.")] = None,
) -> None:
    """Predict memory, traffic and time of a step on a number of GPUs, and the best layouts. Needs no GPU."""
    from dash_dist.planning.command import Options, run_plan

    options = Options(
        gpus=gpus,
        gpu=gpu,
        gpu_memory=gpu_memory,
        gpus_per_node=gpus_per_node,
        density=density,
        independence=independence,
        coverage=coverage,
        document_length=document_length,
        vocab_size=vocab_size,
        calibrate=tuple(calibrate or ()),
    )
    run_plan(config, overrides or [], options, json_path=json_path)


@app.command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps under the profiler, and as many without it.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder of table and traces; default: profile/ in the run's folder.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Name of the stage; default: the first one.")] = None,
) -> None:
    """Run a few steps and show where their time goes, in this process or as one rank of several."""
    from rich.console import Console

    from dash_dist.profiling.command import Options
    from dash_dist.profiling.command import profile as profile_steps

    profile_steps(config, overrides or [], Options(steps=steps, out=out, stage=stage), Console(highlight=False))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, such as runs/demo.")],
    output: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in that folder.")] = None,
) -> None:
    """Write one HTML page about a finished or running run."""
    from dash_dist.report import write_report

    print(write_report(run, output))


@app.command(cls=SeveralValues)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")],
    overrides: Overrides = None,
    length: Annotated[
        list[str] | None,
        typer.Option(metavar="LENGTH...", help="Tokens, such as 16K 64K. Default: as in training."),
    ] = None,
    suite: Annotated[str, typer.Option(help="retrieval, tracking, aggregation, all, or one task.")] = "retrieval",
    routing_scale: Annotated[
        list[float] | None,
        typer.Option(metavar="SCALE...", help="Scales to evaluate with, larger is sparser. Default: as in training."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task, length and scale.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint. Default: the newest.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: evaluation/SUITE-STEP.json in the run's folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture; default: beside the JSON file.")] = None,
) -> None:
    """Measure retrieval, tracking and counting on synthetic texts, in this process or as one rank of several."""
    from rich.console import Console

    from dash_dist.evaluation.options import Options

    options = Options(
        lengths=tuple(length or ()),
        suite=suite,
        routing_scales=tuple(routing_scale or ()),
        samples=samples,
        seed=seed,
        step=step,
        output=output,
        plot=plot,
    )
    from dash_dist.evaluation.command import evaluate as evaluate_run

    evaluate_run(run, overrides or [], options, Console(highlight=False))


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `dash-dist export` wrote.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; 1: as trained.")] = 0.0,
    routing_scale: Annotated[
        float | None, typer.Option(help="In place of the trained one; larger selects fewer chunks.")
    ] = None,
) -> None:
    """Continue PROMPT by an exported model, on a GPU if there is one, and print the text as it comes."""
    import functools

    from dash_dist.hf.command import generate as continue_prompt

    write = functools.partial(print, end="", flush=True)
    continue_prompt(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        routing_scale=routing_scale,
        write=write,
    )
    print()


def main() -> None:
    """Entry point of `dash-dist`."""
    run_app(app)


if __name__ == "__main__":
    main()
