"""what a data set holds: mmssl data stats|scan PATH

stats counts samples, bytes and classes of each split and gives quantiles of sizes, durations or lengths. scan finds what
cannot be read, by name and as training would say it, samples of equal content (and whether their labels agree), and content
that two splits share; against=PATH compares with another data set as well, such as the one you will test on. model=MODEL finds
near duplicates, too: pairs whose embeddings have a cosine of at least `cosine`. What any two have
on average is told, too: where that is near 1, ask for more. All samples are read and decoded.
"""

from __future__ import annotations

import json
from typing import Any

from mmssl.cli.options import nearest, parse
from mmssl.errors import RecipeError

ACTIONS = ("stats", "scan")
SHOWN = 10  # names of a list; json=true has all
OPTIONS = {
    "against": (str, None, "scan: folder, table or Hub id that shares no sample with PATH"),
    "model": (str, None, "scan: folder, run folder or Hub id of a model that embeds the samples, to find near duplicates"),
    "cosine": (float, 0.98, "scan: of embeddings that count as near"),
    "member": (str, None, "whose encoder, of a model of several kinds of data"),
    "modality": (str, None, "kind of data, found by the data if unset"),
    "column": (str, None, "column of the data, found by name if unset"),
    "label": (str, None, "column of the labels, found by name if unset"),
    "root": (str, None, "folder that names in a table are relative to"),
    "workers": (int, 2, "processes that decode"),
    "json": (bool, False, "print JSON"),
}


def run(arguments: list[str]) -> int:
    """`mmssl data stats|scan PATH`."""
    given = parse(arguments, ("ACTION", "PATH"), OPTIONS)
    action = given["action"]
    if action not in ACTIONS:
        raise RecipeError(f"data: found {action!r}{nearest(action, ACTIONS)}, expected {' or '.join(ACTIONS)}.")
    if action == "stats" and (given["against"] or given["model"]):
        raise RecipeError("against, model: are for mmssl data scan.")
    from mmssl.data.scan import look, scan, stats

    options = {name: given[name] for name in ("column", "label", "root")}
    kind, found = look(given["path"], given["modality"], given["workers"], **options)
    if action == "stats":
        results: dict[str, Any] = {"modality": kind.name, "splits": stats(found)}
    else:
        others = look(given["against"], kind.name, given["workers"], **options)[1] if given["against"] else None
        counts = {name: len(split.samples) for name, split in found.items()}
        results = {"modality": kind.name, "samples": counts, **scan(found, others)}
        if given["model"]:
            from mmssl.evaluate.near import near

            results["near"] = near(given["model"], kind, found, others, given["cosine"], given["member"])
    print(json.dumps(results) if given["json"] else "\n".join(_stats(results) if action == "stats" else _scan(results)))
    return 0


def _stats(results: dict[str, Any]) -> list[str]:
    lines = [f"modality: {results['modality']}"]
    for name, split in results["splits"].items():
        bad = f", {split['unreadable']} unreadable" if split["unreadable"] else ""
        lines += ["", f"{name}: {split['samples']} samples{bad}, {split['bytes']:,} bytes"]
        for what, found in split["sizes"].items():
            lines.append(f"  {what:12}" + "  ".join(f"{quantile} {value:.6g}" for quantile, value in found.items()))
        if split["classes"]:
            lines.append(f"  {'classes':12}" + "  ".join(f"{label} {n}" for label, n in split["classes"].items()))
        lines += [f"  {'unlabelled':12}{split['unlabelled']}"] if split["unlabelled"] else []
    return lines


def _scan(results: dict[str, Any]) -> list[str]:
    lines = [f"modality: {results['modality']}"]
    for name, count in results["samples"].items():
        groups, unlike, bad = (results[what][name] for what in ("duplicates", "conflicts", "unreadable"))
        copies = sum(len(group) - 1 for group in groups)
        lines += ["", f"{name}: {count} samples, {len(bad)} unreadable, {copies} copies of others"]
        lines += _some([f"unreadable: {one['name']} ({one['kind']}: {one['reason']})" for one in bad])
        lines += _some([f"equal: {' = '.join(group)}" for group in groups])
        lines += _some([f"equal, with other labels: {' = '.join(group)}" for group in unlike])
    for leak in results["leaks"]:
        lines += ["", f"{leak['first']} and {leak['second']} share {len(leak['names'])} samples"]
        lines += _some([" = ".join(pair) for pair in leak["names"]])
    for one in results.get("near", []):
        where = f"in {one['first']}" if one["first"] == one["second"] else f"of {one['first']} and {one['second']}"
        lines += ["", f"{one['count']} near pairs {where}, where two samples have a cosine of {one['typical']:.4f} on average"]
        lines += _some([f"{a} ~ {b} ({value:.4f})" for a, b, value in one["pairs"]])
    return lines


def _some(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more (json=true has all)"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
