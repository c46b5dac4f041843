"""python -m tools.bench NAME [--json] [key=value ...]; without a name, what there is."""

from __future__ import annotations

import importlib
import json
import sys

NAMES = {
    "masks": "a step of data2vec 2 with 8 masks per sample against one with a single mask, base shape",
    "claim": "time data2vec 2 needs for the k-NN accuracy that data2vec 1 reaches, on CIFAR-10",
    "reach": "time until a k-NN accuracy on CIFAR-10, of data2vec 2 with 1 to 16 masks, MAE, DINO and SimCLR",
    "visible": "an encoder that sees a quarter of the tokens against the same one that sees all",
    "save": "a checkpoint of the base image model against torch.save and fsync of the same bytes",
    "step": "a training step of MAE, wav2vec 2.0 or masked language modelling against transformers: time and memory",
    "joint": "a step of SimCLR, BYOL, VICReg, Barlow Twins, SwAV or DINO, or its loss alone, against lightly",
    "views": "photos to two views by SimCLR's policy, images a second of one core, against lightly or torchvision",
    "finish": "crops changed in a batch where the model is against crops changed one by one in a worker",
    "feed": "sound and text from files to batches, of one core, against the pipelines of transformers' examples",
    "losses": "NT-Xent, InfoNCE with a queue, VICReg, Barlow Twins and Sinkhorn as their batch grows: time and memory",
    "watch": "updates with online watching at the default interval against updates without",
    "parts": "a step of MoCo v3 whose encoder sees a quarter of the samples at once against all of them: time and memory",
    "start": "from a command to its first result: mmssl --help, and the demo's first update",
    "scale": "what a step costs against tokens, width, depth, batch and masks",
    "nt_xent": "NT-Xent in blocks against the plain one, 16384 samples of 128 dimensions: time and memory",
}


def main() -> None:
    """Run one."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not words or words[0] not in NAMES:
        sys.exit("\n".join([__doc__ or "", *(f"  {name:10}{line}" for name, line in NAMES.items())]))
    options = dict(word.split("=", 1) for word in words[1:])
    found = importlib.import_module(f"tools.bench.{words[0]}").run(**options)
    if "--json" in sys.argv:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:24}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
