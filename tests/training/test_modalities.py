"""Whole runs on speech and text: what holds for images holds for them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.evaluate.probe import probe
from mmssl.training import checkpoint
from mmssl.training.pretrain import prepare, pretrain
from modalities.text.tokenizer import train as train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "stone",
    "river",
    "cloud",
    "night",
    "green",
    "paper",
    "table",
    "seven",
    "horse",
    "light",
    "sound",
    "water",
    "grass",
    "north",
    "winter",
    "engine",
    "copper",
    "violin",
]
SPEECH = """
data: {path: DATA, modality: speech, workers: 0, buckets: 3}
model: {hidden_size: 16, depth: 2, heads: 2, extra_tokens: 0, conv_channels: 8, position_groups: 4, norm_eps: 1.0e-5}
method:
  name: data2vec2
  top_k: 2
  final_norm: none
  cls_weight: 0.0
  teacher_features: share
  decoder: {dim: 16, groups: 4, layers: 2}
views: {longest: 0.6, shortest: 0.2, mask: {width: 3, copies: 2}}
"""
TEXT = """
data: {path: DATA, modality: text, workers: 0}
model: {vocab_size: null, max_tokens: 24, hidden_size: 16, depth: 2, heads: 2, extra_tokens: 0}
method:
  name: data2vec2
  top_k: 2
  final_norm: none
  loss_scale: 1.0
  cls_weight: 0.0
  teacher_features: share
  decoder: {dim: 16, groups: 1, kernel: 3, layers: 2}
views: {tokenizer: TOKENIZER, pack: PACK, mask: {copies: 2}}
"""
ONE = """
method: {name: data2vec1, top_k: 2, teacher_features: copy}
views: {REST, mask: {kind: span, width: 3, ratio: 0.5, copies: 1}}
"""
REST = """
optim: {lr: 1.0e-2, warmup: 2}
train: {steps: 6, global_batch: 8, micro_batch: 4, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 20}
save: {every: 3, keep: 3}
"""
KINDS = {"speech": SPEECH, "packed": TEXT.replace("PACK", "true"), "documents": TEXT.replace("PACK", "false")}
FIRST = {  # data2vec 1, under transformers' own architectures
    "speech": SPEECH.split("method:")[0].replace("norm_eps", "alibi: false, norm_eps")
    + ONE.replace("REST", "longest: 0.6, shortest: 0.2"),
    "documents": TEXT.split("method:")[0] + ONE.replace("REST", "tokenizer: TOKENIZER, pack: false"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """FOLDER/{speech,text}/{train,test}/{a,b}/*, two classes that differ in pitch or in words, and FOLDER/tokenizer."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    texts = []
    for split, count in (("train", 40), ("test", 24)):
        for i in range(count):
            name, length = "ab"[i % 2], int(draw.integers(4000, 12_000))
            for kind in ("speech", "text"):
                (folder / kind / split / name).mkdir(parents=True, exist_ok=True)
            wave = np.sin(np.arange(length) * (0.05, 0.2)[i % 2]) * np.sin(np.arange(length) * 0.002 * draw.random())
            soundfile.write(folder / "speech" / split / name / f"{i}.wav", wave * 0.5 + draw.normal(0, 0.01, length), 16_000)
            texts.append(" ".join(draw.choice(WORDS[(i % 2) * 6 : (i % 2) * 6 + 12], int(draw.integers(8, 60)))))
            (folder / "text" / split / name / f"{i}.txt").write_text(texts[-1])
    train_tokenizer(texts, "bpe", 90, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def load(data):
    """Function: kind, run folder, overrides -> recipe."""

    def build(kind: str, out: Path, *overrides: str, texts: dict[str, str] = KINDS) -> Recipe:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.parent / f"{kind}.yaml"
        text = texts[kind].replace("DATA", str(data / ("speech" if kind == "speech" else "text"))) + REST
        file.write_text(text.replace("TOKENIZER", str(data / "tokenizer")))
        return Recipe.load(file, f"out={out}", *overrides)

    return build


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory):
    """Function: kind -> a run that nothing disturbed."""
    runs: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in runs:
            runs[kind] = pretrain(load(kind, tmp_path_factory.mktemp(kind) / "run"))
        return runs[kind]

    return run


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_with_a_bit_identical_curve_and_another_number_of_workers(kind, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole(kind), out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    found = Recipe.load(out / "config.yaml", f"out={out}", "data.workers=2")
    pretrain(found, resume=True)
    assert curve(out) == curve(whole(kind))
    mine, theirs = (checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0] for run in (out, whole(kind)))
    for part in theirs:
        assert all(torch.equal(mine[part][name], theirs[part][name]) for name in theirs[part])


@pytest.mark.distributed
@pytest.mark.parametrize(("profile", "kind"), [(p, k) for p in ("cpu2-ddp", "cpu2-zero3") for k in ("speech", "documents")])
def test_two_processes_equal_one(profile, kind, whole, load, tmp_path):
    load(kind, out := tmp_path / "run")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["accelerate", "launch", "--config_file", f"recipes/accelerate/{profile}.yaml", "recipes/pretrain.py"]
    done = subprocess.run(
        [*command, str(tmp_path / f"{kind}.yaml"), f"out={out}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "status.json").read_text())["launch"]["processes"]["torch"] == 2
    assert curve(out) == pytest.approx(curve(whole(kind)), rel=1e-5)
    mine, theirs = (checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"] for run in (out, whole(kind)))
    for name in (name for name in theirs if name.startswith("method.teacher.")):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["speech", "documents"])
def test_micro_batches_of_unequal_tokens_do_not_change_the_curve(kind, whole, load, tmp_path):
    whole_budget = {"speech": 76_800, "documents": 192}[kind]  # of eight samples of the longest kind
    one, other = (
        pretrain(
            load(
                kind,
                tmp_path / str(n) / "run",
                f"train.micro_batch={8 // n}",
                f"data.budget={whole_budget // n}",
                "data.buckets=1",
            )
        )
        for n in (1, 2)
    )
    assert curve(one) == pytest.approx(curve(other), rel=1e-5)


@pytest.mark.parametrize(("kind", "model"), [("speech", "MmsslModel"), ("packed", "RobertaModel")])
def test_what_a_run_leaves_is_measured_and_starts_another(kind, model, whole, load, data, tmp_path):
    folder = whole(kind) / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == [model]
    found = probe(folder, str(data / ("speech" if kind == "speech" else "text")), random=True)
    assert {name: {*scores} for name, scores in found.items()} == {
        "raw": {"knn"}, "random": {"knn", "linear"}, "model": {"knn", "linear"},
    }  # fmt: skip
    assert found["model"]["linear"] > 0.8  # tones and words are easy
    run = prepare(load(kind, tmp_path / "run", f"model.init={folder}"))
    saved = checkpoint.load(checkpoint.find(whole(kind) / "checkpoints")[0])[0]["model"]
    for name, tensor in run.objective.method.student.encoder.state_dict().items():
        torch.testing.assert_close(tensor, saved[f"method.student.encoder.{name}"])


@pytest.mark.parametrize(("kind", "model"), [("speech", "Data2VecAudioModel"), ("documents", "RobertaModel")])
def test_data2vec1_trains_resumes_and_is_exported_for_transformers_alone(kind, model, load, tmp_path):
    whole = pretrain(load(kind, tmp_path / "whole" / "run", texts=FIRST))
    assert json.loads((whole / "model" / "config.json").read_text())["architectures"] == [model]
    assert not (whole / "model" / "modeling_mmssl.py").exists()
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    pretrain(Recipe.load(out / "config.yaml", f"out={out}"), resume=True)
    assert curve(out) == curve(whole)
    assert all(np.isfinite(curve(out)))


def test_a_plain_accelerate_loop_gives_the_same_losses(whole, load, tmp_path):
    from recipes.no_trainer import train

    for kind in ("speech", "packed"):
        words = ["train.micro_batch=8"] + (["data.budget=76800"] if kind == "speech" else [])
        wanted = curve(pretrain(load(kind, tmp_path / kind / "run", *words)))
        assert train(load(kind, tmp_path / kind / "plain", *words)) == pytest.approx(wanted, rel=1e-6)


def test_a_kind_of_data_that_is_not_there_is_a_mistake_with_its_mend(load, data, tmp_path):
    with pytest.raises(RecipeError, match=r"data\.path: .* holds nothing usable for data\.modality=speech"):
        prepare(load("speech", tmp_path / "run", f"data.path={data / 'text'}"))
    with pytest.raises(RecipeError, match=r"data\.path: .* holds nothing usable for data\.modality=text"):
        prepare(load("packed", tmp_path / "run", f"data.path={data / 'speech'}"))
    assert not (tmp_path / "run").exists()


def test_thin_local_features_are_told_once(load, tmp_path, capsys):
    run = prepare(load("speech", tmp_path / "run"))
    for rank in (3.0, 1.2, 1.1):
        run.members[0].probes.warn(rank)
    told = capsys.readouterr().err
    assert told.count("health/feature_rankme") == 1
    assert "1.2 dimensions" in told
