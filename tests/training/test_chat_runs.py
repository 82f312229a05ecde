"""Runs on conversations and completions: the same losses in every layout, and counts of what was seen."""

import pytest

from tests.support.ranks import run_ranks
from tests.support.runs import losses, read_curves, write_config

pytestmark = pytest.mark.slow

TEMPLATE = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '.' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LAYOUTS = {
    "context": [],
    "context, two micro-batches": ["training.micro_batch_size=1"],
    "data": ["parallel.context=1"],
    "tensor": ["parallel.context=1", "parallel.tensor=2"],
    "pipeline": ["parallel.context=1", "parallel.pipeline=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chats")


@pytest.fixture(scope="module")
def outcomes(folder):
    (folder / "t.jinja").write_text(TEMPLATE)
    talk = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}\n'
    pair = '{"prompt": "%s", "completion": "%s"}\n'
    for name, line in (("chats", talk), ("pairs", pair), ("held", talk)):
        lines = [line % (f"question {i} " * (3 + i % 20), f"answer {i} " * (1 + i % 3)) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    chats = f"rows: messages, chat_template: {folder / 't.jinja'}"
    sources = (
        f"[{{label: chats, paths: [{folder / 'chats.jsonl'}], {chats}}}, "
        f"{{label: pairs, paths: [{folder / 'pairs.jsonl'}], rows: completions}}]"
    )
    common = [
        f"data.sources={sources}",
        "data.source=stdlib",
        "training.steps=4",
        "training.global_batch_size=4",
        "evaluation.interval=4",
        "evaluation.sequences=4",
        f"evaluation.data={{source: files, paths: [{folder / 'held.jsonl'}], {chats}}}",
    ]
    runs = [[f"run.name={name.replace(', ', '-').replace(' ', '-')}", *common, *more] for name, more in LAYOUTS.items()]
    runs.append(["run.name=separate", *common, "data.documents=separate", "training.micro_batch_size=1"])
    return run_ranks("tests.support.attempts:attempts", 2, write_config(folder), runs, cpu_only=True)


def curves_of(folder, name: str) -> dict[str, float]:
    """The last value of each curve."""
    curves = read_curves(folder / "runs" / name)
    return {tag: curves.Scalars(tag)[-1].value for tag in curves.Tags()["scalars"]}


def test_losses_are_those_of_one_layout(folder, outcomes):
    assert [outcome.error for outcome in outcomes[0]] == [""] * (len(LAYOUTS) + 1)
    names = [name.replace(", ", "-").replace(" ", "-") for name in LAYOUTS]
    first = losses(folder / "runs" / names[0])
    assert len(first) == 4
    for name in names[1:]:
        assert losses(folder / "runs" / name) == pytest.approx(first, rel=1e-4)
        held = [curves_of(folder, one)["heldout/loss"] for one in (names[0], name)]
        assert held[1] == pytest.approx(held[0], rel=1e-4)


@pytest.mark.parametrize("name", ["data", "separate"])
def test_tokens_that_were_seen_are_told_apart_from_those_in_the_loss(folder, outcomes, name):
    curves = curves_of(folder, name)
    seen = [curves[f"data/tokens/{source}"] for source in ("chats", "pairs")]
    counted = [curves[f"data/loss_tokens/{source}"] for source in ("chats", "pairs")]
    assert sum(seen) == curves["train/tokens"]
    assert all(0 < few < many / 2 for few, many in zip(counted, seen, strict=True))
    if name == "data":
        assert curves["data/padding"] == 0
    else:
        assert 0 < curves["data/padding"] < 0.5
