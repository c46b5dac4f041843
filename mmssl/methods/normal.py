"""What is normal of health metrics, and what it means if it is not."""

from __future__ import annotations

import math
from typing import NamedTuple


class Normal(NamedTuple):
    """What a health metric is between when a method works, and what it means if it is not."""

    metric: str
    least: float
    below: str  # a format of `value` and of `dim`, the width of the encoder
    most: float = math.inf
    above: str = ""
    # Healthy networks may begin below `least`. With a floor, what lies between the two is an alarm only if it has halved since.
    floor: float | None = None
    by: float = math.inf  # updates after which it is one all the same
    drops: bool = True  # whether having halved counts before then; not where first targets are alike for all samples
    after: int = 0  # updates before which it is not judged
    samples: int = 0  # of a micro-batch of all ranks, below which it says nothing

    def told(self, value: float, first: float | None, step: float, dim: int, samples: float = math.inf) -> str | None:
        """What is wrong, in words; None if nothing is.

        Args:
            first: the value at the start of the run, if it is known.
            step: updates so far.
            samples: of the smallest micro-batch.
        """
        if self.least <= value <= self.most or step < self.after or samples < self.samples:
            return None
        if value > self.most:
            return self._words(self.above, value, dim, f"normal below {self.most:g}")
        begun = ""
        if self.floor is not None and first is not None and not value < self.floor:
            if (value > first / 2 or not self.drops) and step < self.by:
                return None
            begun = f", {first:.3g} at the start"
        return self._words(self.below, value, dim, f"normal above {self.least:g}{begun}")

    def _words(self, meaning: str, value: float, dim: int, normal: str) -> str:
        return f"{meaning.format(value=value, dim=dim)} ({self.metric} {value:.3g}, {normal})"


# Of self-distillation with prototypes: what the head of a new network says is much the same of all samples, so that students
# aim at a few outputs until centring has spread targets. Early collapse shows in `target_use` and in outputs.
ALIKE, ONE_WAY = "collapsed: embeddings hardly differ between samples", "collapsed: embeddings differ in one direction only"
DISTILLED = (
    Normal("target_use", 0.1, "collapsed: one output takes all samples; is method.center_momentum below 1?", samples=8),
    Normal("target_entropy", 0.0, "", 0.995, "collapsed: targets are uniform; lower method.teacher_temperature", after=1000),
    Normal("unit_std", 0.1, ALIKE, floor=1e-3, by=1000, drops=False),
    Normal("dimensions", 1.5, ONE_WAY, floor=1.01, by=1000, drops=False, samples=8),
)

# A metric means the same whichever method reports it. A method declares what is its own, or otherwise there.
NORMAL = (
    # Of all: the pooled outputs of the encoder.
    # Those of healthy speech have all but 0.003 of their length in common for some hundred updates.
    Normal("output_std", 0.001, "collapsed: all outputs are alike"),
    Normal("output_dimensions", 1.2, "collapsed: {value:.1f} of {dim} dimensions carry everything", floor=1.01, samples=8),
    Normal("output_dead", 0.0, "", 0.3, "collapsing: {value:.0%} of the {dim} dimensions are dead, the same for all samples"),
    # Of joint embedding: projections.
    Normal("unit_std", 0.1, ALIKE, floor=1e-3, by=200),
    Normal("dimensions", 1.5, ONE_WAY, floor=1.01, by=200, samples=8),
    # Of masked and predictive methods: predictions, whose heads may begin small, what they see, and what they aim at.
    Normal("prediction_std", 0.02, "the same prediction everywhere", floor=0.002, by=1000),
    Normal("encoder_std", 0.02, "collapsed: all tokens are alike"),
    Normal("feature_std", 0.02, "collapsed: the feature encoder says the same of all tokens", floor=0.002),
    Normal("target_std", 0.1, "collapsed: targets hardly differ between places and samples"),
)
