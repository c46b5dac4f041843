"""Seconds of training until a k-NN accuracy: data2vec 2.0 by its masks, MAE, DINO and SimCLR, on the same images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tools.bench.claim import train

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
# As in `claim`, where it was tried what serves so short a run.
MANY = (
    "views.mask.ratio=0.85",
    "views.mask.width=2",
    "method.decoder.layers=2",
    "method.cls_weight=0",
    "train.global_batch=16",
)
MANY += ("model.position_scale=0.5", "optim.warmup=100", "optim.lr=3e-3", "optim.lr_end=1e-3")
TRUNK = {"image_size": 32, "patch_size": 4, "hidden_size": 128, "depth": 4, "heads": 4, "norm": "pre", "position_scale": 0.5}
VIEWS = {  # of the methods that compare whole images, whose small recipes have ResNets
    "dino": {
        "method": {"name": "dino", "prototypes": 512, "hidden": 256, "bottleneck": 64, "head_norm": True, "freeze_epochs": 0,
                   "momentum": {"start": 0.98, "end": 1.0, "shape": "cosine"}},
        "views": {"crops": "asymmetric", "mean": MEAN, "std": STD},
    },
    "simclr": {
        "method": {"name": "simclr", "hidden": 256, "dim": 64, "temperature": 0.2},
        "views": {"crops": "simclr-cifar", "mean": MEAN, "std": STD},
    },
}  # fmt: skip
SETTINGS = {  # recipe, updates, updates between two looks, options
    **{
        f"data2vec2-{masks}": ("vision/data2vec2-cifar10-cpu", steps, steps // 7, (*MANY, f"views.mask.copies={masks}"))
        for masks, steps in ((1, 1400), (4, 1050), (8, 700), (16, 420))
    },
    "mae": ("vision/mae-cifar10-cpu", 2100, 300, ("model.position_scale=0.5",)),
    "dino": ("dino", 700, 100, ()),
    "simclr": ("simclr", 700, 100, ()),
}


def run(data: str = "../shared/data/cifar10", wanted: str = "34,36,38", only: str = "", samples: str = "5000",
        seed: str = "0") -> dict[str, Any]:  # fmt: skip
    """Train each on all images of CIFAR-10, one after the other, alike in encoder (width 128, depth 4, patches of 4 pixels).

    Args:
        wanted: accuracies in percent, of the student's pooled features with a memory of 5 000.
        only: names that the settings begin with, by commas; all if empty.  samples: of the memory, and to classify.
    Returns: of each: `seconds` until each accuracy, None where it is not reached, and the curve; time for looking is left out.
    """
    chosen = [name for name in SETTINGS if not only or any(name.startswith(word) for word in only.split(","))]
    levels, found = [float(one) / 100 for one in wanted.split(",")], {}
    for name in chosen:
        recipe, steps, every, words = SETTINGS[name]
        with tempfile.TemporaryDirectory() as folder:
            _, curve = train(
                _written(recipe, Path(folder)), *words, f"data.path={Path(data)}", f"train.seed={seed}", f"train.steps={steps}",
                f"watch.every={every}", f"watch.samples={samples}", "watch.linear=false", "watch.change=false",
            )  # fmt: skip
        reached = [next((round(at, 1) for at, accuracy in curve if accuracy >= level), None) for level in levels]
        found[name] = {
            "seconds": dict(zip(wanted.split(","), reached, strict=True)),
            "curve": [(round(at, 1), round(accuracy, 4)) for at, accuracy in curve],
        }
    return {"name": f"seconds of training until {wanted} % k-NN, CIFAR-10", **found, "threads": torch.get_num_threads()}


def _written(recipe: str, folder: Path) -> str:
    """A recipe's name, or where the one with views of whole images has been written."""
    if recipe not in VIEWS:
        return recipe
    whole = {
        "data": {"path": None, "modality": "vision", "workers": 1},
        "model": TRUNK,
        "optim": {"lr": 2.0e-3, "warmup": 50, "weight_decay": 0.05, "clip": 4.0},
        "train": {"steps": 1, "global_batch": 128, "precision": "fp32", "device": "cpu"},
        **VIEWS[recipe],
    }
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)
