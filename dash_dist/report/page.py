"""The HTML page: a header that says how the run stands, the figures, the tables.

Knows the order of the page and how to say things; does not know files, nor how a figure is drawn. The page carries all
it shows: no script, no style sheet, no font and no picture from elsewhere.
"""

import base64
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from dash_dist.report.figures import Figure, figures
from dash_dist.report.health import remarks, verdict
from dash_dist.report.record import RunRecord, numbered
from dash_dist.run.profile import facts_of, rows_of

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1c2126; --soft: #5b646e; --line: #dfe3e7;
  --good: #1b7f4d; --bad: #b3401f; --busy: #22639f; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2125; --text: #e4e8eb; --soft: #9aa5ae;
  --line: #323a41; --good: #5cc78f; --bad: #f08a64; --busy: #75b2ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 92rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2rem 0 .8rem; font-size: 1.2rem; }
figcaption strong { font-size: 1rem; } p { margin: .4rem 0; }
.soft, figcaption span { color: var(--soft); font-size: .9rem; }
.verdict { font-weight: 600; } .finished { color: var(--good); } .running { color: var(--busy); }
.stopped, .failed, .interrupted, .not-started { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
dl div, figure, section.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
dl div { padding: .6rem .9rem; } dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; }
section.card { padding: .6rem 1.2rem; } section.card ul { padding-left: 1.2rem; margin: .4rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .9rem; min-width: 0; } figcaption span { display: block; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; overflow: visible; }
figure img { display: block; width: 100%; max-width: 40rem; margin: .4rem auto 0; border-radius: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.4; } summary { cursor: pointer; }
"""
MAX_EVENTS = 200


def render(record: RunRecord) -> str:
    """The page as a string, a whole HTML document."""
    name = escape(record.directory.resolve().name)
    drawn = figures(record)
    body = "\n".join(
        [
            *_header(record, name),
            *_figures(drawn),
            *_pictures(record),
            *_anatomy(record),
            *_events(record),
            *_checkpoints(record),
            *_config(record),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>Run {name}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _header(record: RunRecord, name: str) -> Iterator[str]:
    state = verdict(record)
    yield f"<header>\n<h1>Run {name}: <span class='verdict {state.replace(' ', '-')}'>{state}</span></h1>"
    yield f"<p class='soft'>Read on {_date(record.read_at)}, last written {_date(record.last_write)}.</p>"
    facts = {"step": f"{record.last_step:,}" + (f" of {record.steps:,}" if record.steps else "")}
    tokens, loss = record.curve("train/tokens"), record.curve("train/loss")
    if tokens is not None:
        facts["tokens seen"] = f"{tokens.last:,.0f}"
    if loss is not None:
        facts["loss, first and last"] = f"{loss.values[0]:.4f}, {loss.last:.4f}"
        facts["time from first to last step"] = _duration(loss.times[-1] - loss.times[0])
    for title, tag, form in (
        ("tokens/s per GPU", "perf/tokens_per_second_per_gpu", ",.0f"),
        ("MFU", "perf/mfu", ".1%"),
        ("density", "routing/mean_density", ".3f"),
        ("overlap", "cp/overlap", ".0%"),
    ):
        curve = record.curve(tag)
        if curve is not None and len(curve.recent):
            facts[title] = f"{curve.recent.mean():{form}}"
    yield "<dl>" + "".join(f"<div><dt>{title}</dt><dd>{fact}</dd></div>" for title, fact in facts.items()) + "</dl>"
    if loss is None:
        yield "<p>Nothing was logged yet: the first step writes the first points.</p>\n</header>"
        return
    found = remarks(record)
    yield "<section class='card' aria-label='Health'>"
    if found:
        lines = (
            f"<li>{escape(remark.text)}{f': {escape(remark.advice)}' if remark.advice else ''}</li>" for remark in found
        )
        yield "<p>To look at:</p><ul>" + "".join(lines) + "</ul>"
    else:
        yield "<p>Nothing unusual.</p>"
    yield "</section>\n</header>"


def _figures(drawn: Sequence[Figure]) -> Iterator[str]:
    if not drawn:
        return
    yield "<h2>Curves</h2>\n<p class='soft'>Over tokens seen, where nothing else is said.</p>\n<div class='figures'>"
    for figure in drawn:
        label = escape(figure.description, quote=True)
        svg = figure.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        yield _figure(figure.name, figure.title, figure.meaning, svg)
    yield "</div>"


def _pictures(record: RunRecord) -> Iterator[str]:
    maps = {tag: picture for tag, picture in record.pictures.items() if tag.startswith("routing/heat_map/")}
    if not maps:
        return
    yield "<h2>Routing</h2>\n<div class='figures'>"
    for tag in sorted(maps, key=numbered):
        layer, picture = tag.rpartition("_")[2], maps[tag]
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        description = (
            f"Heat map of layer {layer}: share of the tokens and KV heads at each position that selected the chunks at "
            f"each earlier position, at step {picture.step}."
        )
        meaning = f"Which chunks (across) the queries (down) selected at step {picture.step}; the future is white."
        image = f'<img src="{source}" alt="{description}">'
        yield _figure(f"heat-map-{layer}", f"Heat map of layer {layer}", meaning, image)
    yield "</div>"


def _anatomy(record: RunRecord) -> Iterator[str]:
    profile = record.profile
    if profile is None:
        return
    of_stage = f", stage {escape(profile.stage)}" if profile.stage else ""
    yield "<h2>A step's anatomy</h2>"
    yield (
        f"<p class='soft'>{profile.steps} steps on {escape(profile.layout)}{of_stage}, {escape(profile.device)}, from "
        "the initial weights. The parts and the gaps add up to a step under the profiler.</p>"
    )
    facts = "".join(f"<div><dt>{title}</dt><dd>{text}</dd></div>" for title, text in facts_of(profile).items())
    yield f"<dl>{facts}</dl>"
    head, *rows = rows_of(profile)
    yield _table("Parts of a step", head, rows)


def _events(record: RunRecord) -> Iterator[str]:
    yield "<h2>Events</h2>"
    if not record.events:
        yield "<p>None: no fault, no restart, no skipped batch.</p>"
        return
    shown = record.events[-MAX_EVENTS:]
    if len(shown) < len(record.events):
        yield f"<p class='soft'>The last {len(shown)} of {len(record.events):,}; all are in events.jsonl.</p>"
    rows = (
        (
            _date(event.time),
            "-" if event.step is None else f"{event.step:,}",
            event.kind.replace("_", " "),
            event.message,
        )
        for event in shown
    )
    yield _table("Events of the run", ("time", "step", "event", "what happened"), rows)


def _checkpoints(record: RunRecord) -> Iterator[str]:
    yield "<h2>Checkpoints</h2>"
    if not record.checkpoints:
        yield "<p>None that is complete.</p>"
        return
    rows = (
        (
            checkpoint.name,
            f"{checkpoint.step:,}",
            _date(checkpoint.written),
            f"{checkpoint.size / (1 << 20):,.1f} MiB",
            "-" if checkpoint.loss is None else f"{checkpoint.loss:.4f}",
        )
        for checkpoint in record.checkpoints
    )
    yield _table("Complete checkpoints", ("folder", "step", "written", "size", "loss"), rows)


def _config(record: RunRecord) -> Iterator[str]:
    if record.config_text:
        yield "<h2>Configuration</h2>\n<details><summary>config.yaml, every default filled in</summary>"
        yield f"<pre>{escape(record.config_text)}</pre></details>"


def _figure(name: str, title: str, meaning: str, content: str) -> str:
    caption = f"<figcaption><strong>{escape(title)}</strong><span>{escape(meaning)}</span></figcaption>"
    return f'<figure id="{name}">{caption}{content}</figure>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table aria-label='{caption}'><thead><tr>{titles}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"
