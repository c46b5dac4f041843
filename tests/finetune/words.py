"""Recipes for the tests of fine-tuning."""

from mmssl.config import FinetuneRecipe


def checked(*words: str, task: str = "image-classification", model: str = "MODEL", data: str = "DATA") -> FinetuneRecipe:
    """A recipe with those words that override it, which takes a second."""
    raw = {
        "task": task,
        "out": "OUT",
        "model": model,
        "data": {"path": data, "workers": 0},
        "train": {"steps": 4, "global_batch": 8, "device": "cpu", "log_every": 1, "threads": 1},
    }
    from mmssl.config.reading import apply_override

    raw["model"] = {"init": model}
    for word in words:
        apply_override(raw, word)
    return FinetuneRecipe.check(raw)
