"""A run as one page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from mmssl.redaction import redact
from mmssl.report.curves import chart
from mmssl.report.record import Picture, Record
from mmssl.report.style import STYLE

UNSET = "as the default"
LISTED = 20  # entries of a list that is shown in part
SMALL = 110  # pixels, height of a chart of health
LARGEST = 4 << 20  # bytes of a picture that is put into the page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser loads nothing, whatever stands below
REBUILT = (
    "Samples of the split that probes classify, or of the one that is learned from, under the same masks each time. From top "
    "to bottom: as they are; what was seen of them, or instead of them; what was made of the rest (of text: right guesses in "
    "green)."
)
TITLES = {
    "rebuilt": "What was hidden, and what was made of it",
    "patches": "Feature maps",
    "attention": "Where the last layer looks",
    "map": "Map of the features",
    "similarity": "Similarity of pairs",
    "spectrum": "Singular values of the features",
    "neighbours": "Nearest neighbours",
}


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def page(record: Record, differing: Mapping[str, Any] | None) -> str:
    """One run.

    Args:
        differing: what its recipe sets otherwise than the defaults; None if that is not known.
    """
    several = record.members != [""]
    body = [_head(record)]
    whole = {"loss": record.curve("loss")} if several else _terms(record, "")
    body.append(f'<h2>Curves</h2><div class="two">{_figure("Loss", chart(whole, powers=True))}')
    body.append("" if several else _probes(record, ""))
    body.append(f"{_figure('Learning rate', chart({'lr': record.curve('lr')}))}</div>{_missing(record)}{_verdicts(record)}")
    for member in record.members:
        if several:
            terms, probes = _figure("Loss", chart(_terms(record, member), powers=True)), _probes(record, member)
            body.append(f'<h2>{escape(member)}</h2><div class="two">{terms}{probes}</div>')
        body += [_metrics(record, member), _pictures(record, member)]
    return document(f"{record.path.name}: {_state(record)}", [*body, _data(record), _use(record), _config(record, differing)])


def comparison(records: Sequence[Record], differing: Sequence[Mapping[str, Any] | None]) -> str:
    """Several runs: one chart for each metric, with a curve of each run."""
    names = _distinct(records)
    titled = " and ".join(names)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(_state(record))}</td><td>{_verdict(record)}</td></tr>"
        for name, record in zip(names, records, strict=True)
    )
    body = [f"<h1>{escape(titled)}</h1><table><tr><th>run</th><th>state</th><th>health</th></tr>{rows}</table>"]
    metrics = dict.fromkeys(
        metric
        for kind in ("loss", "probe", "health")
        for record in records
        for metric in [*(["loss"] if kind == "loss" else []), *record.names(kind)]
    )
    for metric in [*metrics, "lr"]:
        curves = {name: record.curve(metric) for name, record in zip(names, records, strict=True) if record.curve(metric)}
        if metric in ("loss", "lr") or len(curves) > 1:
            body.append(_figure(metric, chart(curves, metric.startswith("probe/"), powers=metric.startswith("loss"))))
    flat = [_flat(one) for one in differing if one is not None]
    if len(flat) == len(records):
        keys = [key for key in dict.fromkeys(k for one in flat for k in one) if len({str(one.get(key)) for one in flat}) > 1]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        cells = {key: "".join(f"<td>{escape(str(one.get(key, UNSET)))}</td>" for one in flat) for key in keys}
        lines = "".join(f"<tr><td>{escape(key)}</td>{each}</tr>" for key, each in cells.items())
        body.append(f'<h2>What differs</h2><div class="scroll"><table><tr><th>key</th>{head}</tr>{lines}</table></div>')
    head, *figures = body
    wide = [part for part in figures if part.startswith("<h2>")]
    charts = "".join(part for part in figures if not part.startswith("<h2>"))
    return document(titled, [head, f'<h2>Curves</h2><div class="two">{charts}</div>', *wide])


def _distinct(records: Sequence[Record]) -> list[str]:
    """Names of runs, with as much of their paths as tells them apart."""
    short = [record.path.resolve().name for record in records]
    return short if len({*short}) == len(short) else [str(record.path) for record in records]


def _state(record: Record) -> str:
    step, steps = record.status.get("step"), record.status.get("steps")
    return f"{record.state} at step {step or 0} of {steps or 'an unknown number'}"


def _verdict(record: Record) -> str:
    """Health in words, in its colour."""
    told = next((line["verdict"] for line in reversed(record.lines) if "verdict" in line), record.status.get("health"))
    if told is None:
        return '<span class="note">not judged yet</span>'
    return f'<span class="{"good" if told in ("healthy", "normal") else "bad"}">{escape(str(told))}</span>'


def _head(record: Record) -> str:
    error = record.status.get("error")
    probes = [name for name in record.names("probe") if record.curve(name)[-1][1] is not None]
    scores = ", ".join(f"{name.removeprefix('probe/')} {record.curve(name)[-1][1]:.1%}" for name in probes)
    return (
        f"<h1>{escape(record.path.resolve().name)}</h1><p><b>{escape(_state(record))}</b></p><p>Health: {_verdict(record)}</p>"
        + (f"<p>Last probes: {escape(scores)}</p>" if scores else "")
        + (f'<p class="bad">{escape(str(error))}</p>' if error else "")
    )


def _figure(title: str, drawn: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawn}</figure>"


def _terms(record: Record, member: str) -> dict[str, list[tuple[int, float | None]]]:
    """Loss and its terms; only the latter of a member."""
    names = record.names("loss", member)
    names = [] if len(names) == 1 and not member else names  # the sum says the same
    return {_short(name, "loss", member): record.curve(name) for name in [*([] if member else ["loss"]), *names]}


def _probes(record: Record, member: str) -> str:
    curves = {_short(name, "probe", member): record.curve(name) for name in record.names("probe", member)}
    return _figure("Probes", chart(curves, percent=True)) if curves else ""


def _short(name: str, kind: str, member: str) -> str:
    return name.removeprefix(f"{kind}/").removeprefix(f"{member}." if member else "")


def _missing(record: Record) -> str:
    steps = [str(step) for step, value in record.curve("loss") if value is None]
    if not steps:
        return ""
    some = ", ".join(steps[:LISTED]) + (", ..." if len(steps) > LISTED else "")
    return f'<p class="bad">No update was applied in the lines of steps {some}: their loss is missing, and left out above.</p>'


def _verdicts(record: Record) -> str:
    """What was said of health, each time that other things were said."""
    told: list[tuple[int, str]] = []
    for line in record.lines:
        said = line.get("verdict")
        if said is not None and (not told or _bare(told[-1][1]) != _bare(said)):
            told.append((line.get("step", 0), said))
    rows = "".join(f"<li>from step {step}: {escape(said)}</li>" for step, said in told[-LISTED:])
    return f"<h2>Health</h2><ul>{rows}</ul>" if rows else ""


def _bare(verdict: str) -> str:
    """Without its numbers."""
    return re.sub(r"[\d.%]+| \(.*?\)", "", verdict)


def _metrics(record: Record, member: str) -> str:
    """All that is measured of health."""
    charts = "".join(
        f"<figure>{chart({_short(name, 'health', member): record.curve(name)}, height=SMALL)}</figure>"
        for name in record.names("health", member)
    )
    return f'<details><summary>Metrics of health</summary><div class="three">{charts}</div></details>' if charts else ""


def _pictures(record: Record, member: str) -> str:
    found = {what: shown for what, shown in record.pictures.items() if _member(what, record.members) == member}
    if not found:
        return ""
    parts = []
    kinds = {what.removeprefix(f"{member}-") if member else what: shown for what, shown in found.items()}
    order = [*TITLES]
    for kind, shown in sorted(kinds.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)):
        newest = shown[-1]
        drawn = _embedded(newest, TITLES.get(kind, kind))
        if len(shown) > 1:
            steps = f"step {shown[0].step}"
            drawn += f"<details><summary>The same at {steps}</summary>{_embedded(shown[0], TITLES.get(kind, kind))}</details>"
        parts.append(_figure(TITLES.get(kind, kind), drawn))
    level = "h3" if member else "h2"
    return f'<{level}>Pictures</{level}><div class="wide">{"".join(parts)}</div>'


def _member(what: str, members: Sequence[str]) -> str:
    return next((member for member in members if member and what.startswith(f"{member}-")), members[0])


def _embedded(picture: Picture, title: str) -> str:
    """A picture within the page, as large as it is; a phone scrolls it sideways."""
    caption = picture.caption or f"{REBUILT if picture.what.endswith('rebuilt') else ''} At step {picture.step}.".strip()
    try:
        data = picture.path.read_bytes()
        width = int.from_bytes(data[16:20], "big")
    except OSError:
        return ""
    if len(data) > LARGEST:
        return f'<p class="note">{escape(picture.path.name)} is too large for this page; it lies beside it.</p>'
    source, alt = base64.b64encode(data).decode(), f"{title}. {caption}"
    return (
        f'<div class="scroll"><img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{source}"></div>'
        f"<figcaption>{escape(caption)}</figcaption>"
    )


def _data(record: Record) -> str:
    bad = record.rejected
    rows = "".join(
        f"<tr><td>{escape(str(one.get('identity', one.get('more', ''))))}</td><td>{escape(str(one.get('kind', '')))}</td>"
        f"<td>{escape(str(one.get('reason', '')))}</td></tr>"
        for one in bad[:LISTED]
    )
    more = f'<p class="note">{len(bad) - LISTED} more are in quarantine.jsonl.</p>' if len(bad) > LISTED else ""
    listed = (
        f'<h3>Samples that could not be used: {len(bad)}</h3><div class="scroll"><table>{rows}</table></div>{more}'
        if bad
        else '<p class="note">No sample was quarantined.</p>'
    )
    return f"<h2>Data</h2>{_table(_flat(record.data))}{listed}"


def _use(record: Record) -> str:
    where = shlex.quote(str(record.path))
    parts = ["<h2>Use</h2>"]
    if record.commands:
        parts.append(f"<h3>Started with</h3><pre>{escape(chr(10).join(record.commands))}</pre>")
    if record.state == "finished":
        parts.append(f'<p class="note">It has ended. To train on from its weights: model.init={escape(where)}/model</p>')
    else:
        note = "Goes on from the newest whole checkpoint."
        parts.append(f'<h3>Resume</h3><pre>mmssl resume {escape(where)}</pre><p class="note">{note}</p>')
    code = re.search(r"```python\n(.*?)```", record.card, re.S)
    if code:
        loaded = code[1].replace("PATH", str(record.path / "model"))
        parts.append(f"<h3>Load the model</h3><pre>{escape(loaded)}</pre>")
    else:
        parts.append('<p class="note">There is no model yet; the first is written with the first checkpoint.</p>')
    packages = record.machine.get("packages") or {}
    versions = ", ".join(f"{name} {packages[name]}" for name in ("mmssl", "torch", "transformers") if packages.get(name))
    parts.append(f'<p class="note">{escape(versions)}</p>' if versions else "")
    return "".join(parts)


def _config(record: Record, differing: Mapping[str, Any] | None) -> str:
    whole = io.StringIO()
    yaml.safe_dump(record.config, whole, sort_keys=False)
    part = "" if differing is None else f"<h3>What differs from the defaults</h3>{_table(_flat(differing))}"
    return f"<h2>Configuration</h2>{part}<details><summary>All of it</summary><pre>{escape(whole.getvalue())}</pre></details>"


def _flat(given: Any, key: str = "") -> dict[str, Any]:
    """Nested options as `block.key`."""
    if not isinstance(given, Mapping) or not given:
        return {key: given} if key else {}
    return {k: v for name, inner in given.items() for k, v in _flat(inner, f"{key}.{name}" if key else str(name)).items()}


def _table(rows: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list) and len(value) > LISTED:
            return f"{len(value)}: {', '.join(map(str, value[:LISTED]))}, ..."
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(redact(shown(value)))}</td></tr>" for name, value in rows.items())
    return f'<div class="scroll"><table>{lines}</table></div>'
