"""Whether a run still learns, by what its recipe and its method say of health metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmssl.config import WatchOptions
from mmssl.errors import CollapseError, RecipeError
from mmssl.methods.method import Guard

LINES = 3  # of metrics.jsonl in a row below what a method needs: a single one may be bad luck


class Limits:
    """What is asked of health metrics, and for how many lines one has been below what the method needs.

    Args:
        guards: of the method. Those that `watch.guard` names are left to it.
        watch: all sleep until `watch.guard_after`.
        judge: what the method makes of a line, in words.
    """

    def __init__(
        self, guards: Iterable[Guard], watch: WatchOptions, judge: Callable[[Mapping[str, Any]], list[str]] = lambda line: []
    ):
        self.guards = [guard for guard in guards if guard.metric not in watch.guard]
        self.watch, self.judge = watch, judge
        self.below = dict.fromkeys((guard.metric for guard in self.guards), 0)

    def breached(self, line: Mapping[str, Any]) -> dict[str, CollapseError]:
        """Metric -> what to say of a run that has collapsed by it.

        Args:
            line: of metrics.jsonl, with `step`, `loss` and `health/<metric>`; one without an applied update tells nothing.
        Raises: RecipeError if `watch.guard` names a metric that the method does not report.
        """
        return {} if line.get("loss") is None else self._asked(line) | self._needed(line)

    def _asked(self, line: Mapping[str, Any]) -> dict[str, CollapseError]:
        found, known = {}, sorted(name[7:] for name in line if name.startswith("health/"))
        for name, least in self.watch.guard.items():
            if name not in known:
                raise RecipeError(f"watch.guard.{name}: the method reports no such metric; known are {', '.join(known)}.")
            value = line[f"health/{name}"]
            if line["step"] > self.watch.guard_after and not value >= least:  # what is no number is not above anything
                found[name] = CollapseError(
                    f"health/{name} is {value:.4g} at step {line['step']}, below the {least:g} of watch.guard: the run has "
                    "collapsed, or is about to. Lower optim.lr, raise method.momentum or take a larger train.global_batch, and "
                    "judge by the probes; watch.guard={} turns the guard off. The last checkpoint is kept."
                    + "".join(f" The method says: {said}." for said in self.judge(line))
                )
        return found

    def _needed(self, line: Mapping[str, Any]) -> dict[str, CollapseError]:
        found = {}
        for metric, least, advice in self.guards:
            value = line.get(f"health/{metric}")
            if value is None or line["step"] <= self.watch.guard_after:
                continue
            self.below[metric] = 0 if value >= least else self.below[metric] + 1
            if self.below[metric] == LINES:
                self.below[metric] = 0  # a run that goes back begins to count again
                found[metric] = CollapseError(
                    f"health/{metric} is {value:.4g} at step {line['step']}, and was below {least:g} in the last {LINES} lines "
                    f"of metrics.jsonl: {advice}. The last checkpoint is kept; watch.guard={{{metric}: 0}} turns the guard off."
                )
        return found
