"""Write small data sets from what is installed anyway: `python -m tools.make_demo_data FOLDER`. No network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.demo_speech import speech
from tools.demo_text import text

TEST, SIDE, SEED = 360, 32, 0


def vision(folder: Path) -> None:
    """The 1797 scanned digits of scikit-learn as 32x32 grey PNG: FOLDER/vision/{train,test}/{0..9}/*.png."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    held_out = stratified(digits.target, TEST, SEED)
    for i, (values, label) in enumerate(zip(digits.images, digits.target)):
        image = Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))  # scanned as 0..16
        place = folder / "vision" / ("test" if i in held_out else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{i:04}.png")


def stratified(labels: np.ndarray, count: int, seed: int) -> set[int]:
    """`count` positions in which each class has its share of `labels`, to within one sample."""
    draw = np.random.default_rng(seed)
    groups = [draw.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    # Taking the samples by their rank within their class, relative to its size, serves all classes evenly.
    ranked = sorted((place / len(group), c, int(i)) for c, group in enumerate(groups) for place, i in enumerate(group))
    return {i for *_, i in ranked[:count]}


MAKERS = {"vision": vision, "speech": speech, "text": text}


def write(folder: Path) -> None:
    """All three."""
    for make in MAKERS.values():
        make(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
