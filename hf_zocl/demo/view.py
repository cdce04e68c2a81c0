"""A model's predictions for an image as HTML, with all text escaped."""

from __future__ import annotations

from html import escape

import torch

from ..hub.series import Stage, TaskSeries


SHOWN = 6

CSS = """
.zocl {font-size: 15px; line-height: 1.45; color: var(--body-text-color)}
.zocl h1 {font-size: 1.35em; margin: 0 0 .2em} .zocl h2 {font-size: 1.05em; margin: 1.1em 0 .3em}
.zocl p {margin: .15em 0; overflow-wrap: anywhere} .zocl .quiet {color: var(--body-text-color-subdued)}
.zocl .says {font-size: 1.5em; font-weight: 650}
.zocl .row {display: grid; grid-template-columns: minmax(5em, 9em) 1fr 4.2em; gap: .6em; align-items: center;
  margin: .3em 0}
.zocl .name {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.zocl .track {height: .85em; border-radius: .4em; background: var(--border-color-primary); overflow: hidden}
.zocl .fill {height: 100%; border-radius: .4em; background: #7b8ba5; transition: width .15s}
.zocl .true .fill {background: #1f8a5b} .zocl .true .name {font-weight: 650}
.zocl .number {text-align: right; font-variant-numeric: tabular-nums}
.zocl table {width: 100%; border: 0 !important; border-collapse: collapse; table-layout: fixed; margin: 0}
.zocl tr {border: 0 !important}
.zocl th, .zocl td {border: solid var(--border-color-primary) !important; border-width: 1px 0 0 !important;
  padding: .25em .4em; text-align: left;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; background: transparent}
.zocl th {font-weight: 500; color: var(--body-text-color-subdued)}
.zocl tr.now td {font-weight: 650; background: var(--border-color-primary)}
.zocl .wrong {color: #b4452f} .dark .zocl .wrong {color: #ef9a86}
.zocl .right {color: #1f8a5b} .dark .zocl .right {color: #6ed3a5}
#zocl-gallery img {image-rendering: pixelated}
#zocl-gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important}
@media (max-width: 700px) {
  #zocl-left {display: contents} #zocl-left > *:first-child {order: 0; width: 100%} #zocl-right {order: 1}
  #zocl-pictures {order: 2}
}
"""


def heading(series: TaskSeries, name: str, note: str = "") -> str:
    """The heading of the page."""
    info, tasks = series.info, series.stages[-1].task
    own = {"task": "task", "cross-dataset": "dataset"}.get(info.get("scenario", "class"))
    if own is not None and tasks > 1:
        known = f"Here an image is predicted among all classes known; the run was tested among those of its own {own}."
        note = f"{known} {note}".strip()
    text = f"{len(series.classes)} classes, {tasks} {'task' if tasks == 1 else 'tasks'}, {info['benchmark']}"
    note = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f'<div class="zocl"><h1>{escape(name)}</h1><p class="quiet">{escape(text)}</p>{note}</div>'


def stage_name(stage: Stage, last: int) -> str:
    return "Zero-shot" if stage.task == 0 else f"After task {stage.task} of {last}"


def render(series: TaskSeries, probabilities: torch.Tensor, place: int, truth: int | None = None) -> str:
    """The predictions at one stage in detail, and at every stage in brief, as HTML.

    Args:
        series: The run.
        probabilities: The probabilities for one image, `(stages, classes)`.
        place: The position of the stage.
        truth: The position of the true class, if it is known.
    """
    stage, last = series.stages[place], series.stages[-1].task
    now = probabilities[place]
    said = int(now.argmax())
    about = "the base model without an adapter"
    if stage.task:
        about = f"learned: {stage.title or ', '.join(stage.learned)}"
    lines = [
        f'<div class="zocl" data-stage="{place}"><h2>{stage_name(stage, last)}</h2>',
        f'<p class="quiet">{escape(about)}</p>',
        f'<p class="says">{escape(series.classes[said])} {_percent(now[said])}</p>',
        f"<p>{_verdict(series, stage, said, truth)}</p>",
        *(_bar(series.classes[c], now[c], c == truth) for c in _shown(now, stage, truth)),
        _history(series, probabilities, place, truth),
        "</div>",
    ]
    return "".join(lines)


def message(text: str) -> str:
    """A line of text in place of a prediction."""
    return f'<div class="zocl"><p>{escape(text)}</p></div>'


def _shown(now: torch.Tensor, stage: Stage, truth: int | None) -> list[int]:
    """The likeliest classes; the true one is always among them, if the model has learned it by then."""
    order = sorted(stage.known, key=lambda place: -float(now[place]))
    shown = order[:SHOWN]
    if truth is not None and truth in stage.known and truth not in shown:
        shown[-1] = truth
    return shown


def _verdict(series: TaskSeries, stage: Stage, said: int, truth: int | None) -> str:
    if truth is None:
        return "&nbsp;"
    if said == truth:
        return '<span class="right">✓ right</span>'
    name = escape(series.classes[truth])
    not_yet = "" if truth in stage.known else ", which it has not learned yet"
    return f'<span class="wrong">✗ true class: {name}{not_yet}</span>'


def _bar(name: str, probability: torch.Tensor, is_true: bool) -> str:
    share = f"{100 * float(probability):.2f}"
    kind, mark = ("row true", "✓ ") if is_true else ("row", "")
    return (
        f'<div class="{kind}"><span class="name" title="{escape(name)}">{mark}{escape(name)}</span>'
        f'<span class="track"><span class="fill" style="display:block;width:{share}%"></span></span>'
        f'<span class="number">{_percent(probability)}</span></div>'
    )


def _history(series: TaskSeries, probabilities: torch.Tensor, place: int, truth: int | None) -> str:
    head = "<th>stage</th><th>says</th>" + ("<th>true class</th>" if truth is not None else "<th>probability</th>")
    rows = []
    for number, (stage, now) in enumerate(zip(series.stages, probabilities, strict=True)):
        said = int(now.argmax())
        name, cell = escape(series.classes[said]), _percent(now[said])
        if truth is not None:
            name = (
                f'<span class="{"right" if said == truth else "wrong"}">{"✓" if said == truth else "✗"}</span> {name}'
            )
            cell = _percent(now[truth]) if truth in stage.known else "–"
        where = "zero-shot" if stage.task == 0 else f"task {stage.task}"
        now_row = ' class="now"' if number == place else ""
        rows.append(f"<tr{now_row}><td>{where}</td><td>{name}</td><td>{cell}</td></tr>")
    return f"<h2>Stage by stage</h2><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _percent(probability: torch.Tensor) -> str:
    return f"{100 * float(probability):.1f} %"
