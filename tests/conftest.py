from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmssl.config import Recipe
from mmssl.masks import blocks, uniform
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.methods.method import Method
from mmssl.model.configuration import MmsslConfig
from mmssl.model.decoder import ConvDecoderOptions
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.types import Batch, Mask, View

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    if not REAL_DATA.is_dir():
        for item in items:
            if item.get_closest_marker("realdata"):
                item.add_marker(pytest.mark.skip(reason=f"not run: there are no real data sets at {REAL_DATA}"))


@pytest.fixture
def real_data():
    """The folder of real data sets; for tests marked `realdata`, which are skipped without it."""
    return REAL_DATA


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """FOLDER/{train,test}/{dark,light}/*.png, 32 and 24 images of 20 x 18 pixels."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 24)):
        for i in range(count):
            place = folder / split / ("dark", "light")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 128, (18, 20, 3)) + 127 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:02}.png")
    return folder


@pytest.fixture
def tiny_recipe(image_folder, tmp_path):
    """Function: overrides such as `optim.lr=1e-2` -> checked recipe that trains on `image_folder` in a second."""

    def build(*overrides: str) -> Recipe:
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
            "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2, prenet_depth: 1}\n"
            "method: {name: data2vec2, top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}\n"
            "views: {mask: {ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}\n"
            "train: {steps: 2, global_batch: 8, device: cpu, log_every: 1}\n"
            "watch: {samples: 20}\n"
        )
        return Recipe.load(path, f"out={tmp_path / 'run'}", *overrides)

    return build


@pytest.fixture
def trained():
    """Function: recipe -> the run after training without probes and saving; `change(run)` comes before the first update."""
    from mmssl.training.pretrain import prepare

    def train(recipe: Recipe, change=lambda run: None):
        run = prepare(recipe, overwrite=True)
        run.lines = []
        run.trainer.save_run, run.trainer.probe, run.trainer.report = lambda _: None, lambda _: {}, run.lines.append
        change(run)
        run.trainer.train()
        return run

    return train


SHAPES = {
    "vision": {"image_size": 16, "patch_size": 4, "prenet_depth": 1},
    "speech": {"conv_channels": 8, "position_groups": 4, "extra_tokens": 0, "prenet_depth": 1},
    "text": {"vocab_size": 50, "mask_token_id": 49, "max_tokens": 16, "extra_tokens": 0},
}
DECODERS = {
    "vision": {"groups": 4, "layers": 2},
    "speech": {"groups": 4, "layers": 2, "kernel": 5},
    "text": {"groups": 1, "layers": 2, "kernel": 5, "residual": False, "hidden": 24},
}
SPOKEN = {"final_norm": "none", "teacher_features": "share", "cls_weight": 0.0}
OPTIONS = {"vision": {}, "speech": SPOKEN, "text": SPOKEN | {"loss_scale": 1.0}}


@pytest.fixture
def tiny():
    """Function: a small Data2Vec2 and a batch for it, both the same at each call with the same arguments.

    Of 16 tokens; three quarters are hidden in images, half of the valid ones in sound and text. `valid` is how many tokens of
    each sample are not padding. `options` are the method's, `config` the model's; `make(encoder, top_k, **options)` builds
    another method.
    """

    def build(
        samples: int = 3,
        copies: int = 4,
        dim: int = 16,
        top_k: int = 2,
        modality: str = "vision",
        valid: Sequence[int] | None = None,
        make: Callable[..., Method] | None = None,
        options: dict[str, Any] = {},  # noqa: B006
        **config: Any,
    ):
        if "cls_weight" in config:
            options = options | {"cls_weight": config.pop("cls_weight")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = {"depth": 3, "heads": 4} | SHAPES[modality] | config
            encoder = Encoder.from_config(MmsslConfig(modality=modality, hidden_size=dim, **shape))
            if make is None:
                decoder = ConvDecoderOptions(dim=dim, **DECODERS[modality])
                method = Data2Vec2(encoder, decoder, top_k, **(OPTIONS[modality] | options))
            else:
                method = make(encoder, top_k=top_k, **options)
        draw, pad = generator("batch"), None
        if modality == "vision":
            x = torch.randn(samples, 3, shape["image_size"], shape["image_size"], generator=draw)
            hidden = blocks(encoder.features.grid, samples * copies, 0.75, 2, 0.1, draw, inverse=True)
        else:
            lengths = valid or [16] * samples
            longest = max(lengths)
            rows = [F.pad(uniform(n, copies, 0.5, draw), (0, longest - n)) for n in lengths]
            hidden = torch.cat(rows)
            if modality == "text":
                x = torch.randint(2, 49, (samples, longest), generator=draw)
            else:
                x = torch.randn(samples, 400 + 320 * (longest - 1), generator=draw)
            if valid:
                pad = torch.arange(longest) >= torch.tensor(lengths)[:, None]
                x = x.masked_fill(pad, 1) if modality == "text" else x
        view = View(x, modality, pad, Mask.of(hidden, pad))
        return method, Batch([view], torch.arange(samples), tuple(range(100, 100 + samples)))

    return build
