"""A model on the Hub while it is trained: beside the training, whatever the Hub does."""

import json
import threading

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, load_file
from transformers import AutoModel, ViTConfig

from mmssl.cli import main
from mmssl.errors import RecipeError
from mmssl.hub import push as pushing
from mmssl.training import pushing as training_pushing
from mmssl.training.pretrain import prepare, pretrain
from tests.launcher import ROOT, befallen
from tests.test_push import REPO, TOKEN, hub  # noqa: F401  # a fixture

FAST = ("watch.every=0", "watch.change=false", "watch.linear=false", "watch.pictures=false", "save.every=1")
PATIENT = 120.0


@pytest.fixture
def recipe(hub, tiny_recipe, monkeypatch):  # noqa: F811
    """Function: overrides -> a recipe of four updates that pushes to the server."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
    return lambda *words: tiny_recipe("train.steps=4", f"hub.repo={REPO}", *FAST, *words)


def commits(hub):  # noqa: F811
    return hub.repos[REPO]["commits"][1:]


def settled(run):
    """The run, with each push over before the next update."""
    begin = run.pusher.turn

    def turn():
        begin()
        if run.pusher.running is not None:
            run.pusher.running.join(PATIENT)

    run.pusher.turn = turn
    return run


def test_each_wanted_save_is_pushed_and_the_last_one_awaited(hub, recipe, tmp_path):  # noqa: F811
    run = settled(prepare(recipe("hub.every=2", "train.steps=5")))
    run.train()
    assert len(commits(hub)) == 3  # of steps 2, 4 and the end
    assert hub.repos[REPO]["private"] is True
    model = run.folder.model
    assert hub.files()["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert b'from_pretrained("lab/encoder"' in hub.files()["README.md"]
    status = run.folder.read_status()
    assert (status["state"], status["hub"]) == ("finished", {"repo": REPO, "step": 5, "error": None})
    for file in (file for file in run.folder.path.rglob("*") if file.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file
    assert not (run.folder.path / ".tmp-push").exists()


def test_a_hub_that_fails_or_hangs_stops_nothing_and_is_tried_again(hub, recipe, capsys):  # noqa: F811
    run, gate, held = prepare(recipe()), threading.Event(), []

    def meet(number, path):
        if "/commit/" not in path:
            return None
        held.append(path)
        if len(held) == 1:
            gate.wait(PATIENT)  # until the training has ended
        return 500 if len(held) <= 3 else None  # the first push fails in all its tries

    hub.fails = meet
    finish = run.pusher.finish

    def ended(*args):
        assert run.trainer.state.global_step == 4  # though nothing has been answered yet
        gate.set()
        finish(*args)

    run.pusher.finish = ended
    run.train()
    assert run.folder.read_status()["hub"] == {"repo": REPO, "step": 4, "error": None}
    assert len(commits(hub)) == 1
    told = capsys.readouterr().err
    assert told.count("is not on the Hub") == 1
    assert "the model of step 1" in told
    assert TOKEN not in told


def test_a_run_whose_pushes_all_fail_ends_well_and_says_so(hub, recipe, capsys):  # noqa: F811
    hub.fails = lambda number, path: 500 if "/commit/" in path else None
    folder = pretrain(recipe("train.steps=2"))
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["hub"]["step"] is None
    assert "the Hub could not be written" in status["hub"]["error"]
    assert main(["status", str(folder)]) == 0
    assert "lab/encoder: nothing was sent; lab/encoder: the Hub could not be written" in capsys.readouterr().out


def test_a_resume_goes_on_pushing_also_where_the_hub_is_away_at_its_start(hub, recipe, capsys):  # noqa: F811
    run = settled(prepare(recipe()))
    run.trainer.add_callback(Stop(run.trainer))
    run.train()
    assert run.folder.read_status()["state"] == "preempted"
    hub.fails = lambda number, path: 403 if path.endswith("/auth-check/write") else None
    pretrain(recipe(), resume=True)
    assert "The run goes on, and each push tries again" in capsys.readouterr().err
    assert run.folder.read_status()["hub"]["step"] == 4
    assert hub.files()["model.safetensors"] == (run.folder.model / "model.safetensors").read_bytes()


class Stop(training_pushing.TrainerCallback):
    """A signal after the second update."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.hear(15)


def test_what_cannot_be_written_is_refused_before_anything_is(hub, recipe, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=r"hub.repo: others/encoder: the token may not write there"):
        pretrain(recipe("hub.repo=others/encoder"))
    hub.fails = lambda number, path: 403 if path.endswith("/auth-check/write") else None
    with pytest.raises(RecipeError, match=r"hub.repo: lab/encoder: the token may not write there"):
        pretrain(recipe())
    hub.fails = lambda number, path: "cut"
    with pytest.raises(RecipeError, match=r"hub.repo: lab/encoder: the Hub cannot be reached: .*Or leave out hub.repo"):
        pretrain(recipe())
    hub.fails = lambda number, path: None
    with pytest.raises(RecipeError, match=r"ORG/NAME"):
        pretrain(recipe("hub.repo=encoder"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        pretrain(recipe())
    huggingface_hub.close_session()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(RecipeError, match=r"hub.repo: There is no token for the Hub"):
        pretrain(recipe())
    assert not out.exists()


@pytest.mark.distributed
def test_of_two_ranks_one_pushes_what_both_learned(hub, image_folder, tmp_path, monkeypatch):  # noqa: F811
    """With low-rank updates of a released model, under DDP and where ranks share the teacher's and the optimizer's parts."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    AutoModel.from_config(ViTConfig(**shape, image_size=16, patch_size=4)).save_pretrained(tmp_path / "released")
    given = {
        "data": {"path": str(image_folder), "workers": 0, "modality": "vision"},
        "model": {"init": str(tmp_path / "released"), "lora": {"rank": 4}},
        "method": {"name": "data2vec2", "top_k": 2, "momentum": 0.5, "decoder": {"dim": 16, "groups": 4, "layers": 1}},
        "views": {"mask": {"ratio": 0.75, "copies": 2}},
        "optim": {"lr": 1e-2},
        "train": {"steps": 4, "global_batch": 8, "device": "cpu", "log_every": 1, "threads": 1},
    }
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(json.dumps(given))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    words = [word for word in FAST if not word.startswith("save")]
    profile = ROOT / "recipes" / "accelerate" / "zero2_cpu.json"
    engine = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(profile)}
    zero2 = f"import os; del os.environ['ACCELERATE_USE_CPU']; os.environ |= {engine}"
    trials = {
        "one": (1, "", *words),
        "ddp": (2, "", "hub.repo=lab/ddp", *words),
        "zero2": (2, zero2, "hub.repo=lab/zero2", *words),
    }
    codes, said = befallen(recipe, tmp_path, trials)
    assert set(codes.values()) == {0}, said
    alone = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name in ("ddp", "zero2"):
        assert len(hub.repos[f"lab/{name}"]["commits"]) == 2  # the first one, empty, and the model of the end, once
        sent = load(hub.files(f"lab/{name}")["model.safetensors"])
        assert sent.keys() == alone.keys()
        assert all(torch.allclose(sent[key], alone[key], rtol=0, atol=2e-4) for key in alone), name
        assert TOKEN not in said[name]
