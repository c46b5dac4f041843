"""make soak: faults on purpose, and whether anything was lost. Prints a table and keeps it in docs/reliability.md.

python -m tools.soak [only=engines,kills,ranks,files,recipes,disk,health,export] [engines=ddp,zero1,zero2,zero3]
                     [methods=data2vec2,dino,...] [precision=fp32,bf16] [kills=100] [settings=1,2,...] [ranks=10]
                     [under=ddp,zero2] [files=200] [recipes=500] [disk=20] [health=60] [export=methods] [seed=0] [write=true]

settings: numbers of those in tools/soak/runs.py; methods: of those in tools/soak/engines.py; all if unset, in bf16 those with
a teacher. Exit status 1 if anything was wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.soak.runs import SETTINGS, Row

DOCS = Path("docs/reliability.md")
BEGIN, END = "<!-- soak: written by `make soak` -->", "<!-- end -->"
DEFAULTS = {
    **{
        "only": "engines,kills,ranks,files,recipes,disk,health,export",
        "engines": "ddp,zero1,zero2,zero3",
        "methods": "",
        "precision": "fp32,bf16",
    },
    **{
        "kills": "100",
        "settings": "",
        "ranks": "10",
        "under": "ddp,zero2",
        "files": "200",
        "recipes": "500",
        "disk": "20",
        "export": "methods",
        "health": "60",
        "seed": "0",
        "write": "true",
    },
}


def engines(given: dict[str, str]) -> list[Row]:
    """Two ranks under each engine against one process."""
    from tools.soak import engines, runs

    rows = []
    for precision in given["precision"].split(","):
        every = [*engines.METHODS] if precision == "fp32" else [*engines.TEACHERS]
        methods = given["methods"].split(",") if given["methods"] else every
        with tempfile.TemporaryDirectory() as folder:
            runs.prepare(Path(folder))
            rows += engines.rows(engines.campaign(Path(folder), methods, given["engines"].split(","), precision))
    return rows


def kills(given: dict[str, str]) -> list[Row]:
    """SIGKILL at random moments."""
    from tools.soak import kills, runs

    chosen = [[*SETTINGS][int(n) - 1] for n in given["settings"].split(",") if n] or [*SETTINGS]
    with tempfile.TemporaryDirectory() as folder:
        runs.prepare(Path(folder))
        return kills.rows(kills.campaign(Path(folder), int(given["kills"]), int(given["seed"]), chosen))


def ranks(given: dict[str, str]) -> list[Row]:
    """SIGKILL to one of two ranks."""
    from tools.soak import ranks, runs

    rows = []
    for engine in given["under"].split(","):
        with tempfile.TemporaryDirectory() as folder:
            runs.prepare(Path(folder))
            rows.append(ranks.campaign(Path(folder), int(given["ranks"]), int(given["seed"]), engine))
    return rows


def disk(given: dict[str, str]) -> list[Row]:
    """Saves on a disk that fails."""
    from tools.soak import disk, runs

    with tempfile.TemporaryDirectory() as folder:
        runs.prepare(Path(folder))
        return [disk.campaign(Path(folder), int(given["disk"]), int(given["seed"]))]


def health(given: dict[str, str]) -> list[Row]:
    """Healthy runs."""
    from tools.soak import health, runs

    with tempfile.TemporaryDirectory() as folder:
        runs.prepare(Path(folder))
        return [health.campaign(Path(folder), int(given["health"]))]


def files(given: dict[str, str]) -> list[Row]:
    """Malformed files; each kind of data in a process of its own, so that a crash is seen."""
    rows = []
    for name in ("vision", "speech", "text"):
        found, wrong = call("tools.malformed", f"modality={name}", f"count={given['files']}", f"seed={given['seed']}")
        kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in found.get("reasons", {}).items())
        result = "all named ({}), the {} good ones used; at most {} s a file and {} MB more memory"
        result = result.format(kinds, *(found.get(key) for key in ("used", "slowest", "megabytes")))
        rows.append(Row(f"files: {name}", f"{given['files']} malformed files beside good ones", result, wrong))
    return rows


def recipes(given: dict[str, str]) -> list[Row]:
    """Mutated recipes."""
    found, wrong = call("tools.mutations", f"count={given['recipes']}", f"seed={given['seed']}")
    result = f"{found.get('refused')} refused by key or line, {found.get('built')} built; at most {found.get('slowest')} s each"
    return [Row("recipes", f"{given['recipes']} random mutations of shipped recipes", result, wrong)]


def export(given: dict[str, str]) -> list[Row]:
    """Exported models of all methods in an environment that has torch and transformers only."""
    found, wrong = call("tools.fresh_export", f"recipes={given['export']}")
    tried = f"{found.get('encoders')} encoders of {found.get('methods')} methods, after three updates"
    return [Row("export: fresh environment", tried, f"all load, features differ by at most {found.get('largest')}", wrong)]


def call(module: str, *words: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The JSON object that a tool prints, and what was wrong."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() or ["{}"]
    wrong = (f"exit {done.returncode}: {lines[-1][:2000]} {done.stderr[-2000:]}",) if done.returncode else ()
    return json.loads(lines[-1]) if lines[-1].startswith("{") else {}, wrong


def keep(rows: list[Row], command: str) -> None:
    """Put rows in the place of those of the same name in the table of the docs; others stay."""
    head, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    old, _, tail = rest.partition(END)
    lines = (line for line in old.splitlines() if line.startswith("| ") and not line.startswith("| fault"))
    table = {line.split(" | ")[0]: line for line in lines}
    date = time.strftime("%Y-%m-%d")
    for row in rows:
        result = row.result if not row.wrong else f"**{len(row.wrong)} wrong**"
        table[f"| {row.what}"] = f"| {row.what} | {row.tried} | {result} | `{command}`, {date} |"
    titles = "| fault | tried | result | command |\n|---|---|---|---|"
    DOCS.write_text("\n".join([head + BEGIN, "", titles, *table.values(), "", END + tail]), "utf-8")


def main() -> None:
    """Read the words, do what they name, print and keep the table."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := words.keys() - DEFAULTS.keys():
        sys.exit(f"unknown: {', '.join(unknown)}\n{__doc__}")
    given, wrong = DEFAULTS | words, False
    for part in given["only"].split(","):
        start = time.monotonic()
        rows = {
            "engines": engines,
            "kills": kills,
            "ranks": ranks,
            "files": files,
            "recipes": recipes,
            "disk": disk,
            "health": health,
            "export": export,
        }[part](given)
        for row in rows:
            print(f"{row.what}: {row.tried}: {row.result if not row.wrong else 'WRONG'}", *row.wrong, sep="\n  ", flush=True)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
        wrong |= any(row.wrong for row in rows)
        if given["write"] == "true":
            keep(rows, " ".join(["python -m tools.soak", f"only={part}", f"{part}={given[part]}", f"seed={given['seed']}"]))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
