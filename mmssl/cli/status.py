"""how a run stands: mmssl status RUN

Exit status: 0 finished, 75 resumable (preempted or killed, with a complete checkpoint or before its first), 1 failed, 3 still
running.
A run on another host counts as killed once it has written nothing for 15 minutes. Files of checkpoints are compared by
size here; `mmssl resume` reads and verifies them.
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse
from mmssl.training import checkpoint
from mmssl.training.run_folder import RunFolder

OPTIONS = {"json": (bool, False, "print JSON")}
EXIT = {"finished": 0, "resumable": 75, "failed": 1, "running": 3}


def run(arguments: list[str]) -> int:
    """`mmssl status RUN`."""
    given = parse(arguments, ("RUN",), OPTIONS)
    folder = RunFolder.open(given["run"])
    status = folder.read_status()
    newest, rejected = checkpoint.find(folder.checkpoints, hashes=False)
    resumable = newest is not None or (not rejected and folder.config.exists())
    verdict = judge(status["state"], folder.is_alive(), resumable)
    facts = {
        "run": given["run"],
        "verdict": verdict,
        **{name: status.get(name) for name in ("state", "step", "steps", "health", "error", "change", "early", "best", "hub")},
        "checkpoint": None if newest is None else checkpoint.step_of(newest),
        "metrics": folder.last_metrics(),
        "seconds_since_write": round(folder.silence(), 1),
    }
    print(json.dumps(facts) if given["json"] else _text(facts))
    return EXIT[verdict]


def judge(state: str, alive: bool, resumable: bool) -> str:
    """Finished, resumable, failed or running. A run that says `running` without a process was killed."""
    if state in ("finished", "failed"):
        return state
    return "running" if alive else "resumable" if resumable else "failed"


def _text(facts: dict) -> str:
    best, hub = facts["best"] or {}, facts["hub"] or {}
    state, verdict = facts["state"], facts["verdict"]
    state = "killed" if state == "running" != verdict else state
    can = verdict == "resumable" or (verdict == "failed" and facts["checkpoint"] is not None)
    resume = f"mmssl resume {facts['run']}" if can else None
    metrics = "  ".join(f"{name} {value:.6g}" for name, value in facts["metrics"].items() if isinstance(value, (int, float)))
    lines = {
        "state": state if state == verdict else f"{state}, {verdict}",
        "step": f"{facts['step']} of {facts['steps'] or 'an unknown number'}",
        "health": facts["health"],
        "metrics": metrics or "none yet",
        "last write": f"{facts['seconds_since_write']:.0f} s ago",
        "checkpoint": "none" if facts["checkpoint"] is None else f"step {facts['checkpoint']}",
        "ended early": facts["early"],
        "best": facts["best"] and f"step {best['step']}: {best['metric']} {best['value']:.6g}, in best/",
        "gained": facts["change"],
        "hub": hub and f"{hub['repo']}: {_sent(hub)}",
        "error": facts["error"],
        "continue": resume,
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


def _sent(hub: dict) -> str:
    """What is there, and why no more than that."""
    there = "nothing was sent" if hub["step"] is None else f"model of step {hub['step']}"
    return there + (f"; {hub['error']}" if hub["error"] else "")
