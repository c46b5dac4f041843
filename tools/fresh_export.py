"""A few updates of each method, its exported folder in a fresh environment, and the features there against those here.

python -m tools.fresh_export [recipes=methods] [venv=build/fresh]

recipes: names as `mmssl list recipes` shows them, by commas; `methods`, one of each method, of kinds of data in turn; or `all`,
one of each method for each kind of data. Demos are preferred. venv: folder of an environment with torch and transformers and
what they need, of the versions here; made if it is not there. Prints a row for each encoder and, in the end, JSON; exit status
1 if one does not load or differs by more than 1e-5.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmssl.config import JointRecipe, Recipe, load_recipe, shipped_recipes
from mmssl.hub.export import recommended
from mmssl.training.member import Member
from mmssl.training.pretrain import prepare
from mmssl.types import View

ROOT = Path(__file__).resolve().parent.parent
NEEDS = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
ALLOWED, WORDS, VOCABULARY = 1e-5, 12, 2000  # the last is what the demos of text have
SIZES = ("-demo", "-cifar10-cpu")  # of recipes, the preferred one first
# The least that each run can do. Batches are as small as the losses allow.
SHORT = ("train.steps=3", "train.epochs=null", "train.global_batch=16", "train.micro_batch=16", "train.threads=1")
SHORT += ("optim.warmup=0", "optim.hold=0", "save.every=3", "watch.every=0", "watch.linear=false", "watch.samples=20")
SHORT += ("watch.pictures=false", "watch.change=false", "train.device=cpu", "train.log_every=1")
ALONE = ("data.workers=0", "data.limit=64")
OWN = {  # method -> overrides: fewer clusters than there are samples
    "deepcluster": ("method.clusters=8", "method.pca=8"),
    "deepcluster_v2": ("method.prototypes=8",),
    "sela_v2": ("method.prototypes=8",),
    "hubert": ("method.units=8", "method.units_again=8", "method.again=[]"),
}


class Row(NamedTuple):
    """What came of one encoder."""

    name: str  # recipe, and member
    model: str
    difference: float
    error: str = ""


def choose(every_kind: bool) -> list[str]:
    """One recipe of each method, for every kind of data that has one or for kinds in turn."""
    found: dict[tuple[str, str], str] = {}
    for size in reversed(SIZES):
        for name in (name for name in shipped_recipes() if name.endswith(size)):
            kind, file = name.removesuffix(size).split("/")
            found[file, kind] = name
    if every_kind:
        return sorted(found.values())
    chosen: list[str] = []
    for method in sorted({method for method, _ in found}):
        own = [name for (other, _), name in sorted(found.items()) if other == method]
        chosen.append(own[len(chosen) % len(own)])
    return chosen


def write_data(folder: Path) -> dict[str, Path]:
    """Digits, tones and texts of made-up words with their tokenizer: kind of data -> folder, and `tokenizer`."""
    import soundfile
    from PIL import Image
    from sklearn.datasets import load_digits

    draw, found = np.random.default_rng(0), {name: folder / name for name in ("vision", "speech", "text", "tokenizer")}
    for name in ("vision", "speech", "text"):
        found[name].mkdir()
    digits: Any = load_digits()
    for i, values in enumerate(digits.images[:64]):
        Image.fromarray((values * 15.9).astype(np.uint8)).resize((32, 32)).save(found["vision"] / f"{i:02}.png")
    for i in range(64):
        time = np.arange(16_000) / 16_000
        wave = 0.1 * np.sin(2 * np.pi * draw.uniform(100, 1000) * time) + 0.01 * draw.normal(size=len(time))
        soundfile.write(found["speech"] / f"{i:02}.wav", wave, 16_000)
    lines = [" ".join(f"w{n}" for n in draw.integers(VOCABULARY - 5, size=3 * WORDS)) for _ in range(64)]
    (found["text"] / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    write_tokenizer(found["tokenizer"])
    return found | {"spectrogram": found["speech"]}


def write_tokenizer(folder: Path) -> None:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(VOCABULARY - 5)), "<mask>"]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


def overrides(name: str, data: dict[str, Path]) -> list[str]:
    """Of a recipe, so that it trains on that data, briefly."""
    recipe = load_recipe(name)
    words = [*SHORT, *ALONE]
    if isinstance(recipe, JointRecipe):
        words = [word for word in words if not word.startswith("data.limit")]
        for member in recipe.members.values():
            kind = member.data.modality
            words += [f"modalities.{kind}.data.path={data[kind]}", f"modalities.{kind}.data.limit=64"]
        return [*words, f"modalities.text.views.tokenizer={data['tokenizer']}"] if "text" in recipe.members else words
    assert isinstance(recipe, Recipe)
    own = OWN.get(recipe.method.name, ())  # type: ignore[attr-defined]
    words += [f"data.path={data[recipe.data.modality]}", *own]
    return [*words, f"views.tokenizer={data['tokenizer']}"] if recipe.data.modality == "text" else words


def example(member: Member, data: dict[str, Path]) -> View:
    """One sample as the model is given it, without padding."""
    kind = member.recipe.data.modality
    value = b" ".join(b"w%d" % n for n in range(WORDS)) if kind == "text" else min(data[kind].iterdir())
    view = member.views.plain([member.kind.decode(value)])
    return View(view.x, view.modality)


@torch.no_grad()
def features(member: Member, view: View) -> tuple[Tensor, int]:
    """(L, D) of the trained encoder that is exported, cls first, a map row by row; how many extra tokens it has."""
    method: Any = member.method
    student = method.student.encoder.eval()
    if recommended(member.recipe) == "student":
        encoded = student(view)
    else:
        teacher = method.teacher
        encoder = teacher.encoder.eval()  # its batch normalisation, too, which took the statistics of batches in training
        encoded = teacher.encode(view, student.features(view.x)) if teacher.shares else encoder(view)
    extra = getattr(getattr(student, "transformer", None), "extra_tokens", 0)
    return torch.cat([encoded.cls, encoded.tokens[0]]) if extra else encoded.tokens[0], extra


def train(name: str, data: dict[str, Path], place: Path) -> list[dict[str, Any]]:
    """A run of a recipe: what is to be loaded elsewhere, with what was found here."""
    recipe = load_recipe(name, *overrides(name, data), f"out={place / 'run'}")
    run = prepare(recipe)
    run.train()
    jobs = []
    for member in run.members:
        view, inner = example(member, data), member.name or "own"
        keyword = member.method.student.encoder.input_name
        torch.save({keyword: view.x}, place / f"{inner}.in")
        options = {"member": member.name} if member.name else {}
        job = {"folder": run.folder.model, "inputs": place / f"{inner}.in", "found": place / f"{inner}.out"}
        jobs.append({**{key: str(path) for key, path in job.items()}, "options": options})
        wanted, extra = features(member, view)
        jobs[-1] |= {"name": f"{name} {member.name}".strip(), "wanted": wanted, "extra": extra}
    return jobs


def fresh(folder: Path) -> Path:
    """The interpreter of an environment with torch and transformers only."""
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    if not mark.is_file() or mark.read_text("utf-8") != "\n".join(NEEDS):
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", *NEEDS]
        subprocess.run([str(word) for word in pip], check=True)
        mark.write_text("\n".join(NEEDS), "utf-8")
    return python.absolute()


def load(python: Path, jobs: list[dict[str, Any]], place: Path) -> None:
    """All models in one process of that interpreter, which sees nothing of what is here."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    bare |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    told = [{name: value for name, value in job.items() if name != "wanted"} for job in jobs]
    (place / "jobs.json").write_text(json.dumps(told), "utf-8")
    script = shutil.copy(ROOT / "tools" / "fresh_load.py", place)  # alone, so that nothing beside it can be imported
    subprocess.run([str(python), script, str(place / "jobs.json")], cwd=place, env=bare, check=True)


def compare(job: dict[str, Any]) -> Row:
    """Of features here and there, the largest difference."""
    found = torch.load(job["found"], weights_only=True)
    if "error" in found:
        return Row(job["name"], "", float("inf"), found["error"])
    last, wanted = found["last"][0], job["wanted"]
    last = last.flatten(1).T if found["last"].ndim == 4 else torch.cat([last[: job["extra"]][:1], last[job["extra"] :]])
    if last.shape != wanted.shape:
        return Row(job["name"], found["class"], float("inf"), f"shape {[*last.shape]}, here {[*wanted.shape]}")
    return Row(job["name"], found["class"], float((last - wanted).abs().max()))


def main() -> None:
    """Read the words, train, load, compare."""
    given = {"recipes": "methods", "venv": "build/fresh"} | dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - {"recipes", "venv"}:
        sys.exit(f"unknown: {', '.join(unknown)}\n{__doc__}")
    wanted = given["recipes"]
    names = choose(wanted == "all") if wanted in ("methods", "all") else wanted.split(",")
    rows, jobs, python = [], [], fresh(Path(given["venv"]))
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for number, name in enumerate(names):
            (place := Path(folder) / f"{number}").mkdir()
            try:
                jobs += train(name, data, place)
            except Exception as error:  # the others are tried
                rows.append(Row(name, "", float("inf"), f"not trained: {type(error).__name__}: {error}"))
        load(python, jobs, Path(folder))
        rows += [compare(job) for job in jobs]
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:{width}}  {row.model:24}  {row.difference:.1e}  {row.error}".rstrip())
    wrong = [row.name for row in rows if not row.difference <= ALLOWED]
    largest = max(row.difference for row in rows)
    methods = {method for name in names for one in load_recipe(name).members.values() for method in one.method.name.split("+")}  # type: ignore[attr-defined]
    print(json.dumps({"encoders": len(rows), "methods": len(methods), "largest": f"{largest:.1e}", "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
