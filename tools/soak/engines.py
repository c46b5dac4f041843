"""DDP and ZeRO-1, 2, 3 on two ranks against one process: losses, weights and what the exported encoder says.

Updates are plain SGD, in fp32 or under autocast to bf16, where rounding depends on how a batch is cut: there only what teachers
say is judged, and engines are compared with each other as well. AdamW divides by the root of what it saw, which makes something
of rounding where a gradient is truly zero, as for the biases of attention keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.training import checkpoint
from tools.soak.runs import Child, Row, curve, free_port, launch, mmssl

ENGINES = ("ddp", "zero1", "zero2", "zero3")
STEPS = 20
VISION = """\
data: {path: FOLDER/pictures, modality: vision, workers: 0}
model: {image_size: 16, patch_size: 4, hidden_size: 32, depth: 2, heads: 2, norm: pre}
"""
CROPS = "views: {crops: [{count: 2, scale: [0.4, 1.0]}]}\n"
JOINT = (  # model and data of each as below; both have a teacher, of which one averages the trunk
    """\
modalities:
  vision:
    data: {path: FOLDER/pictures}
    model: {image_size: 16, patch_size: 4}
    method: {decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}
    views: {mask: {ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}
  speech:
    weight: 0.5
    data: {path: FOLDER/sounds}
    model: {conv_channels: 16, position_kernel: 7, position_groups: 4}
    method: {decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}, cls_weight: 0}
    views: {longest: 0.5, shortest: 0.3, normalise: true, mask: {kind: block, ratio: 0.5, width: 3, copies: 2}}
data: {workers: 0}
model: {hidden_size: 32, depth: 2, heads: 2, norm: pre, norm_eps: 1.0e-5}
method: {name: data2vec2, top_k: 2, momentum: 0.5}
""",
    0.02,
)
PAIRS = (  # the picture and the sound of the same number belong together
    """\
modalities:
  vision:
    data: {column: image}
    model: {image_size: 16, patch_size: 4}
  speech:
    data: {column: audio}
    model: {conv_channels: 16, position_kernel: 7, position_groups: 4}
    views: {longest: 0.5, shortest: 0.3, normalise: true}
data: {path: FOLDER/pairs, workers: 0}
model: {hidden_size: 32, depth: 2, heads: 2, norm: pre, norm_eps: 1.0e-5}
method: {name: bind, dim: 16}
bind: {temperature: 0.5}
""",
    0.02,
)
COMBINED = (
    VISION
    + """method:
  name: data2vec2+mae+vicreg
  data2vec2: {top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}
  mae: {weight: 0.5, decoder: {dim: 16, depth: 1, heads: 2}}
  vicreg: {weight: 0.04, hidden: 32, dim: 16}
views: {crops: [{count: 2, scale: [0.4, 1.0]}], mask: {ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}
""",
    0.01,
)
LOW_RANK = (  # goes on from a model of transformers
    """\
data: {path: FOLDER/pictures, modality: vision, workers: 0}
model: {init: FOLDER/released, dropout: 0.0, lora: {rank: 4}}
method: {name: data2vec2, top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}
views: {mask: {ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}
""",
    0.05,
)
REST = """\
optim: {name: sgd, lr: RATE, weight_decay: 0.01, warmup: 2, clip: 1.0}
train: {steps: 20, global_batch: 16, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 20}
save: {every: 20, keep: 1}
"""
METHODS: dict[str, tuple[str, float]] = {  # name -> what differs, learning rate
    "data2vec2": (
        VISION
        + "method: {name: data2vec2, top_k: 2, momentum: 0.5, decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}}\n"
        + "views: {mask: {ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}\n",
        0.02,
    ),
    "dino": (VISION + "method: {name: dino, hidden: 32, bottleneck: 16, prototypes: 24, momentum: 0.5}\n" + CROPS, 0.05),
    "moco_v3": (VISION + "method: {name: moco_v3, hidden: 32, dim: 16, layers: 2, momentum: 0.5}\n" + CROPS, 0.005),
    "swav": (VISION + "method: {name: swav, hidden: 32, dim: 16, prototypes: 12, freeze_epochs: 0}\n" + CROPS, 0.005),
    "mae": (
        VISION + "method: {name: mae, decoder: {dim: 16, depth: 1, heads: 2}}\nviews: {mask: {kind: random, ratio: 0.75}}\n",
        0.05,
    ),
    "simclr": (VISION + "method: {name: simclr, hidden: 32, dim: 16, temperature: 0.5}\n" + CROPS, 0.005),
    "wav2vec2": (
        """\
data: {path: FOLDER/sounds, modality: speech, workers: 0}
model:
  {hidden_size: 32, depth: 2, heads: 2, norm: pre, extra_tokens: 0, conv_channels: 16, conv_norm: layer, positions: single,
   position_kernel: 7, position_groups: 4, alibi: false}
method: {name: wav2vec2, dropout: 0.0, dim: 16, entries: 8, negatives: 5, penalty: 0.0, feature_grad_scale: 1.0}
views: {longest: 0.5, shortest: 0.3, normalise: true, mask: {kind: block, ratio: 0.5, width: 3, copies: 2}}
""",
        0.02,
    ),
    "three at once": COMBINED,
    "images and speech": JOINT,
    "pairs": PAIRS,
    "low-rank updates": LOW_RANK,
}
SAVING = {"dino in parts": "train.encoder_batch=3", "mae recomputed": "train.recompute=true"}  # not in the one process
METHODS |= {name: METHODS[name.split()[0]] for name in SAVING}


class Limits(NamedTuple):
    """The largest difference: of losses and outputs relative, of weights absolute."""

    losses: float
    outputs: float
    weights: float


# Rounding to bf16 turns on the last bit of what is rounded, and what follows from it grows; teachers hold what is promised.
# Engines round alike, where each adds biases before it rounds.
EXACT, ROUNDED, ALIKE = Limits(1e-5, 1e-5, 1e-6), Limits(math.inf, 2e-3, math.inf), Limits(1e-5, 1e-5, 1e-5)
TEACHERS = ("data2vec2", "dino", "moco_v3", "images and speech")


class Found(NamedTuple):
    """The largest differences of a run from another."""

    losses: float
    outputs: float
    weights: float
    moved: float  # how far the farthest weight went in training; a run that stands still would equal any other
    limits: Limits = EXACT

    def wrong(self, name: str) -> tuple[str, ...]:
        """What is beyond its limit."""
        told = [
            f"{name}: {what} differ by {getattr(self, what):.2g}"
            for what, most in self.limits._asdict().items()
            if getattr(self, what) > most
        ]
        return (*told, *([f"{name}: weights went {self.moved:.2g} only"] if self.moved < 1e-3 else []))


def campaign(place: Path, methods: Iterable[str], engines: Sequence[str], precision: str) -> dict[str, dict[str, Found]]:
    """What is compared -> method -> differences. place: a folder that `runs.prepare` has filled."""
    child = Child(lambda: write_samples(place), place / "samples.log")
    child.wait()
    if child.code:
        raise RuntimeError(child.said())
    ending = "" if precision == "fp32" else f", {precision}"
    limits, (first, *others) = EXACT if precision == "fp32" else ROUNDED, engines
    found: dict[str, dict[str, Found]] = {engine + ending: {} for engine in engines}
    if precision != "fp32":
        found |= {f"{engine} and {first}{ending}": {} for engine in others}
    for method in methods:
        one = train(place, method, None, precision)
        runs = {engine: train(place, method, engine, precision) for engine in engines}
        for engine, run in runs.items():
            found[engine + ending][method] = ask(place, run, one)._replace(limits=limits)
            if (among := f"{engine} and {first}{ending}") in found:
                found[among][method] = ask(place, run, runs[first])._replace(limits=ALIKE)
    return found


def rows(found: dict[str, dict[str, Found]]) -> list[Row]:
    """Of the table, one for each comparison."""
    lines = []
    for name, methods in found.items():
        worst = {what: max(getattr(one, what) for one in methods.values()) for what in Limits._fields}
        result = "at most {losses:.1e} relative in losses, {outputs:.1e} in what encoders say, {weights:.1e} in weights"
        wrong = tuple(text for method, one in methods.items() for text in one.wrong(method))
        tried = "2 ranks and 2 ranks" if " and " in name else "2 ranks against one process"
        lines.append(Row(f"engine: {name}", f"{tried}: {', '.join(methods)}", result.format(**worst), wrong))
    return lines


def train(place: Path, method: str, engine: str | None, precision: str) -> Path:
    """The run folder; engine: None for one process."""
    run, (recipe, rate) = place / f"{method.replace(' ', '-')}-{engine}", METHODS[method]
    file = place / f"{method.replace(' ', '-')}.yaml"
    file.write_text((recipe + REST).replace("FOLDER", str(place)).replace("RATE", str(rate)))
    words = ["pretrain", str(file), f"out={run}", f"train.precision={precision}"]
    if precision == "bf16":  # engines sum the norm of gradients in another order, and its last bit would turn roundings
        words += ["optim.clip=0", f"optim.lr={rate / 10}"]
    if engine is not None and method in SAVING:
        words.append(SAVING[method])
    if engine is None:
        ranks = [mmssl(*words, log=place / f"{run.name}.log")]
    else:
        port, profile = free_port(), None if engine == "ddp" else zero_file(place, engine, precision)
        ranks = [
            mmssl(*words, log=place / f"{run.name}-{rank}.log", before=lambda rank=rank: launch(rank, port, profile))
            for rank in range(2)
        ]
    for rank in ranks:
        rank.wait()
    if failed := [rank.said() for rank in ranks if rank.code]:
        raise RuntimeError(f"{method} on {engine or 'one process'}:\n" + "\n".join(failed))
    return run


def zero_file(place: Path, engine: str, precision: str) -> Path:
    """The DeepSpeed file that is shipped for processors, with autocast where the recipe has it.

    Linear layers are then torch's own: ZeRO-3's save memory, and round to bf16 before they add a bias.
    """
    config = json.loads((Path(__file__).parents[2] / "recipes" / "accelerate" / f"{engine}_cpu.json").read_text())
    if precision == "bf16":
        shipped = Path(__file__).parents[2] / "recipes" / "accelerate" / "zero3_bf16.json"
        config["torch_autocast"] = json.loads(shipped.read_text())["torch_autocast"]
        config["zero_optimization"]["memory_efficient_linear"] = False
    file = place / f"{engine}-{precision}.json"
    file.write_text(json.dumps(config))
    return file


def ask(place: Path, run: Path, one: Path) -> Found:
    """`compare` in a process of its own: this one must not compute."""
    file = place / "compared.json"
    child = Child(lambda: file.write_text(json.dumps(compare(run, one))) * 0, place / "compared.log")
    child.wait()
    if child.code:
        raise RuntimeError(child.said())
    return Found(*json.loads(file.read_text())[:-1])  # its limits are what they are compared by, not found


def compare(run: Path, one: Path) -> Found:
    """Of two finished runs of the same recipe."""
    import torch

    mine, theirs = (state_of(folder) for folder in (run, one))
    start = dict(method_of(one).named_parameters())
    a, b = curve(run), curve(one)
    if [*a] != [*b] or len(b) != STEPS:
        raise RuntimeError(f"losses of steps {[*a]} and {[*b]}")
    outputs = [say(folder, state) for folder, state in ((run, mine), (one, theirs))]
    kept = [name for name, tensor in theirs.items() if tensor.is_floating_point()]
    apart = {name: float((mine[name] - theirs[name]).abs().max()) for name in kept}
    moved = [float((theirs[name] - parameter).detach().abs().max()) for name, parameter in start.items()]
    norm = torch.linalg.vector_norm
    return Found(
        max(abs(a[step] - b[step]) / abs(b[step]) for step in b),  # type: ignore[operator, arg-type]
        float(norm(outputs[0] - outputs[1]) / norm(outputs[1])),
        max(apart.values()),
        max(moved),
    )


def method_of(run: Path) -> Any:
    """As the recipe builds it, of one kind of data or of several."""
    from mmssl.config import JointRecipe, load_recipe
    from mmssl.methods.joint import Joint

    recipe = load_recipe(run / "config.yaml")
    return Joint(recipe.build()) if isinstance(recipe, JointRecipe) else recipe.members[""].build()


def state_of(run: Path) -> dict[str, Any]:
    """Of the method, teacher included, at the end."""
    path = checkpoint.newest(run / "checkpoints")
    assert path is not None
    whole = checkpoint.load(path)[0]["model"]
    return {name.replace("method.", "", 1): tensor for name, tensor in whole.items() if "method." in name}


def say(run: Path, state: dict[str, Any]) -> Any:
    """Tokens of the encoder that would be exported, the teacher's if there is one, for inputs that are always the same."""
    import torch

    from mmssl.types import View

    whole = method_of(run)
    several = hasattr(whole, "members")
    whole.load_state_dict(state, strict=not several)  # what is shared has several names there, and one in the checkpoint
    tokens = []
    for method in whole.members.values() if several else [whole]:
        network, student = getattr(method, "teacher", method.student), method.student.encoder.eval()
        speech = student.modality == "speech"
        x = torch.randn((4, 6400) if speech else (4, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        view = View(x, student.modality)
        with torch.no_grad():
            found = student(view) if network is method.student else network.encode(view, student.features(x))
        tokens.append(found.tokens.flatten())
    return torch.cat(tokens)


def write_samples(place: Path) -> None:
    """Pictures of four coloured quarters, and tones of half a second. All differ, or batch norm would blow up rounding.

    And a small ViT, as if it had been released.
    """
    import numpy as np
    import pyarrow.parquet
    import soundfile
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=4)).save_pretrained(place / "released")

    draw = np.random.default_rng(0)
    for name in ("pictures", "sounds"):
        (place / name / "train").mkdir(parents=True)
    for i in range(48):
        quarters = draw.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        Image.fromarray(quarters.repeat(10, 0).repeat(10, 1)).save(place / "pictures" / "train" / f"{i:02}.png")
        tone = np.sin(2 * np.pi * draw.uniform(200, 2000) * np.arange(8000) / 16000) + 0.3 * draw.standard_normal(8000)
        soundfile.write(place / "sounds" / "train" / f"{i:02}.wav", 0.1 * tone, 16000)
    (place / "pairs").mkdir()
    columns = {
        name: [file.read_bytes() for file in sorted((place / folder / "train").iterdir())]
        for name, folder in (("image", "pictures"), ("audio", "sounds"))
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), place / "pairs" / "train.parquet")
