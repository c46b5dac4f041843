"""Whether a run still learns, by what its method says of its own health metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmssl.config import WatchOptions
from mmssl.errors import CollapseError
from mmssl.methods.method import Guard

LINES = 3  # of metrics.jsonl in a row: a single one may be bad luck


class Limits:
    """Counts for how many lines a metric has been below what its method needs.

    Args:
        guards: of the method. Those that `watch.guard` names are left to it; all sleep until `watch.guard_after`.
    """

    def __init__(self, guards: Iterable[Guard], watch: WatchOptions):
        self.guards = [guard for guard in guards if guard.metric not in watch.guard]
        self.after = watch.guard_after
        self.below = dict.fromkeys((guard.metric for guard in self.guards), 0)

    def breached(self, line: Mapping[str, Any]) -> CollapseError | None:
        """What to say of a run that has collapsed. line: of metrics.jsonl, with `step` and `health/<metric>`."""
        for metric, least, advice in self.guards:
            value = line.get(f"health/{metric}")
            if value is None or line["step"] <= self.after:
                continue
            self.below[metric] = 0 if value >= least else self.below[metric] + 1
            if self.below[metric] == LINES:
                return CollapseError(
                    f"health/{metric} is {value:.4g} at step {line['step']}, and was below {least:g} in the last {LINES} lines "
                    f"of metrics.jsonl: {advice}. The last checkpoint is kept; watch.guard={{{metric}: 0}} turns the guard off."
                )
        return None
