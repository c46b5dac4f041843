"""Several kinds of data in one run."""

import copy
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
import yaml
from PIL import Image
from torch.testing import assert_close

from mmssl import embed, load_encoder
from mmssl.cli import main
from mmssl.config import JointRecipe, Recipe, check_recipe, load_recipe
from mmssl.config.reading import apply_override
from mmssl.errors import NonFiniteError, RecipeError
from mmssl.methods.joint import Joint
from mmssl.training import checkpoint
from mmssl.training.export import export
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.replay import replay
from mmssl.types import Clock
from tools.soak.engines import JOINT

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (
    JOINT[0].replace("    weight: 0.5\n", "").replace("hidden_size: 32", "hidden_size: 16")
    + """\
optim: {lr: 1.0e-3, warmup: 2}
train: {steps: 6, global_batch: 16, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 20}
save: {every: 3, keep: 2}
"""
)
MAE = (
    "modalities.vision.method={name: mae, decoder: {dim: 16, depth: 1, heads: 2}}",
    "modalities.vision.views={mask: {kind: random, ratio: 0.75}}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Dark and light pictures, low and high tones of unequal length, and the recipe that learns from both."""
    place, draw = tmp_path_factory.mktemp("joint"), np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(32):
            name = ("a", "b")[i % 2]
            for kind in ("pictures", "sounds"):
                (place / kind / split / name).mkdir(parents=True, exist_ok=True)
            pixels = (draw.integers(0, 128, (18, 20, 3)) + 127 * (i % 2)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "pictures" / split / name / f"{i:02}.png")
            time = np.arange(int(draw.integers(6000, 9000))) / 16000
            tone = 0.3 * np.sin(2 * np.pi * (300 + 500 * (i % 2)) * time) + 0.05 * draw.standard_normal(len(time))
            soundfile.write(place / "sounds" / split / name / f"{i:02}.wav", tone, 16000)
    (place / "joint.yaml").write_text(RECIPE.replace("FOLDER", str(place)))
    return place


def recipe(folder: Path, out: Path, *words: str) -> JointRecipe:
    found = load_recipe(folder / "joint.yaml", f"out={out}", *words)
    assert isinstance(found, JointRecipe)
    return found


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    return pretrain(recipe(folder, tmp_path_factory.mktemp("whole") / "run"))


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def curve(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]


# What is learned -----------------------------------------------------------------------------------------------------


def alone(folder: Path, out: Path, kind: str, *words: str) -> Recipe:
    """The recipe of one kind of data, which says the same in the ordinary way."""
    member = recipe(folder, out).members[kind]
    return Recipe.check({**member.model_dump(mode="json"), "out": str(out)})


def test_a_run_of_one_kind_of_data_is_the_ordinary_one(folder, tmp_path):
    """What a member learns from is drawn, masked and weighed as if it were alone."""
    raw = load_recipe(folder / "joint.yaml").model_dump(mode="json")
    raw["modalities"].pop("speech")
    raw["train"]["global_batch"] = 8
    joint = pretrain(JointRecipe.check({**raw, "out": str(tmp_path / "joint")}))
    single = pretrain(alone(folder, tmp_path / "single", "vision"))
    assert curve(joint) == curve(single)
    theirs, mine = tensors(single), tensors(joint)
    assert {name.removeprefix("members.vision.") for name in mine} == {*theirs}
    assert all(torch.equal(mine[f"members.vision.{name}"], tensor) for name, tensor in theirs.items())


def test_another_kind_of_data_leaves_the_first_losses_of_a_kind_as_they_are(folder, whole, tmp_path):
    first = pretrain(alone(folder, tmp_path / "vision", "vision"))
    for part in ("tokens", "cls"):
        assert curve(whole, f"loss/vision.{part}")[:2] == curve(first, f"loss/{part}")[:2]  # the first rate is 0
        assert curve(whole, f"loss/vision.{part}")[3] != curve(first, f"loss/{part}")[3]  # what they share has moved


def batches(run) -> dict[str, torch.Tensor]:
    return next(iter(run._loader(0)))


def test_loss_and_gradients_are_the_weighted_sum(folder, tmp_path):
    words = ("modalities.vision.weight=0.25", "modalities.speech.weight=2")
    run = prepare(recipe(folder, tmp_path / "run", *words))
    joint, clock = run.objective, Clock(0, 6, 0)
    assert isinstance(joint, JointObjective)
    batch = batches(run)
    keys = joint.keys(batch, 0, 0, 0)
    out = joint(batch, keys, clock)
    out["total"].backward()
    found = {name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None}
    expected = {name: torch.zeros_like(grad) for name, grad in found.items()}
    total = 0.0
    for name, weight in (("vision", 0.25), ("speech", 2.0)):
        joint.zero_grad()
        method = joint.members[name].method
        one = Objective(method)(joint.split(batch)[name], keys[name], clock)
        assert {f"loss/{name}.{k.removeprefix('loss/')}" for k in one if k.startswith("loss/")} <= {*out}
        assert all(out[f"loss/{name}.{k[5:]}"] == value for k, value in one.items() if k.startswith("loss/"))
        one["total"].backward()
        total += weight * float(one["loss"])
        for parameter, p in joint.named_parameters():
            if p.grad is not None and parameter in expected and ".probe." not in parameter:
                expected[parameter] += weight * p.grad
    assert float(out["loss"]) == pytest.approx(total, rel=1e-6)
    for parameter, grad in found.items():
        if ".probe." not in parameter:
            assert_close(grad, expected[parameter], rtol=1e-5, atol=1e-7)


def test_a_weight_of_zero_pauses_a_kind_of_data(folder, tmp_path):
    run = pretrain(recipe(folder, tmp_path / "run", "modalities.speech.weight=0", "optim.weight_decay=0"))
    methods = recipe(folder, tmp_path).build()
    start = dict(methods["speech"].student.encoder.features.named_parameters())
    after = tensors(run)
    for name, parameter in start.items():
        assert torch.equal(after[f"members.speech.method.student.encoder.features.{name}"], parameter)
    sums = [line["loss/vision.tokens"] + line["loss/vision.cls"] for line in lines(run)]
    assert curve(run) == pytest.approx(sums, rel=1e-6)


def test_one_trunk_is_trained_and_one_is_averaged(folder, tmp_path):
    joint = Joint(recipe(folder, tmp_path).build())
    vision, speech = joint.members["vision"], joint.members["speech"]
    ours, theirs = vision.student.encoder.transformer, speech.student.encoder.transformer
    assert ours.blocks is theirs.blocks
    assert ours.norm is theirs.norm
    assert ours.extra is not theirs.extra
    mean, follower = vision.teacher.encoder.transformer, speech.teacher.encoder.transformer
    assert mean.blocks is follower.blocks
    assert mean.blocks is not ours.blocks
    assert not any(".transformer.blocks." in name for name in speech.teacher.state_dict())
    before = {name: p.clone() for name, p in vision.teacher.network.named_parameters()}
    with torch.no_grad():
        for parameter in joint.parameters():
            parameter.add_(1.0)
    joint.after_step(Clock(1, 6, 0))
    for name, p in vision.teacher.network.named_parameters():
        if "transformer.blocks" in name:
            assert_close(p, before[name] + 0.5)  # once, not once for each kind of data
    for name, p in speech.teacher.network.named_parameters():
        if "features" in name:
            assert_close(p, dict(speech.student.named_parameters())[name] - 0.5)


def test_teachers_that_move_otherwise_have_a_trunk_each(folder, tmp_path):
    methods = recipe(folder, tmp_path, "modalities.speech.method.momentum=0.9").build()
    joint = Joint(methods)
    assert (
        joint.members["speech"].teacher.encoder.transformer.blocks is not methods["vision"].teacher.encoder.transformer.blocks
    )


def test_methods_may_differ_between_kinds_of_data(folder, tmp_path):
    run = pretrain(recipe(folder, tmp_path / "run", *MAE))
    assert {key for key in lines(run)[0] if key.startswith("loss/")} == {"loss/vision.rebuilt", "loss/speech.tokens"}
    assert (run / "report" / "vision-rebuilt-0000006.png").stat().st_size > 1000


# Nothing is lost -----------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    again = load_recipe(run / "config.yaml", f"out={run}")
    pretrain(again, resume=True)
    assert curve(run) == curve(whole)
    mine, theirs = tensors(run), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def more(run: Path, folder: Path, *words: str) -> JointRecipe:
    """The recipe of a run with the sounds once more, from a feature encoder of their own."""
    raw = yaml.safe_load((run / "config.yaml").read_text())
    hums = copy.deepcopy(raw["modalities"]["speech"])
    hums["data"] |= {"path": str(folder / "sounds")}
    raw["modalities"]["hums"] = hums
    for word in words:
        apply_override(raw, word)
    found = check_recipe({**raw, "out": str(run)})
    assert isinstance(found, JointRecipe)
    return found


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """The run as it was at its first save."""
    shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoints/step-00000006")
    return tmp_path / "half"


def test_a_kind_of_data_added_later_leaves_the_losses_of_that_step_as_they_are(folder, whole, half):
    """Of the others; from the next update on the trunk learns from it too, and the run goes on and resumes as any other."""
    pretrain(more(half, folder, "train.global_batch=24"), resume=True)
    assert curve(half)[:3] == curve(whole)[:3]
    for part in ("vision.tokens", "vision.cls", "speech.tokens"):
        mine, theirs = ([line[f"loss/{part}"] for line in lines(run)] for run in (half, whole))
        assert mine[3] == theirs[3]
        assert mine[4] != theirs[4]
    assert [("loss/hums.tokens" in line) for line in lines(half)] == [False] * 3 + [True] * 3
    assert (half / "model/hums/config.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("train.global_batch=30",),
            r"train\.global_batch: an update had 8 samples of \w+ when the run was saved.* Set train\.global_batch=24",
        ),
        (("train.global_batch=24", "modalities.speech.views.longest=0.6"), r"modalities\.speech\.views\.longest was 0\.5"),
    ],
)
def test_what_is_added_must_not_change_what_is_there(folder, half, words, told):
    with pytest.raises(RecipeError, match=told):
        prepare(more(half, folder, *words), resume=True)


def test_a_kind_of_data_is_not_dropped_in_silence(half):
    raw = yaml.safe_load((half / "config.yaml").read_text())
    raw["modalities"].pop("speech")
    with pytest.raises(RecipeError, match=r"modalities\.speech: the run was saved with it .* weight=0 pauses it"):
        prepare(check_recipe({**raw, "out": str(half)}), resume=True)


# Balance -------------------------------------------------------------------------------------------------------------


def test_balanced_losses_are_divided_by_their_running_means(folder, tmp_path):
    """By hand, in float64: what the log says each is divided by, and that its logarithm is what is learned."""
    run = pretrain(recipe(folder, tmp_path / "run", "balance=magnitude", "modalities.speech.weight=0.5"))
    terms = {"vision": ("tokens", "cls"), "speech": ("tokens",)}
    running = dict.fromkeys(terms, 0.0)
    for number, line in enumerate(lines(run), 1):
        total = 0.0
        for name, weight in (("vision", 1.0), ("speech", 0.5)):
            loss = sum(line[f"loss/{name}.{term}"] for term in terms[name])
            total += weight * loss / (running[name] / (1 - 0.99 ** (number - 1)) if number > 1 else 1.0)
            running[name] += 0.01 * (loss - running[name])
            assert line[f"health/{name}.magnitude"] == pytest.approx(running[name] / (1 - 0.99**number), rel=1e-5)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_balance_goes_on_where_it_was_and_does_not_depend_on_micro_batches(folder, tmp_path):
    words = ("balance=magnitude", "train.steps=4", "save.every=2", "modalities.vision.weight=2")
    whole, parts = (
        pretrain(recipe(folder, tmp_path / name, *words, f"train.micro_batch={size}")) for name, size in (("a", 16), ("b", 8))
    )
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-5)
    shutil.rmtree(whole / "checkpoints/step-00000004")
    before = curve(whole)
    pretrain(load_recipe(whole / "config.yaml", f"out={whole}"), resume=True)
    assert curve(whole) == before


def test_micro_batches_do_not_change_the_curve(folder, whole, tmp_path):
    """Recordings differ in length, so that micro-batches of theirs weigh unequally while those of pictures do not."""
    run = pretrain(recipe(folder, tmp_path / "run", "train.micro_batch=8"))
    assert curve(run, "loss/vision.tokens") == pytest.approx(curve(whole, "loss/vision.tokens"), rel=1e-5)


def test_what_is_not_finite_in_one_kind_of_data_spoils_the_update(folder, tmp_path):
    run = prepare(recipe(folder, tmp_path / "run", "train.max_skips=0"))
    inputs_of = run.trainer._prepare_inputs

    def spoilt(inputs):
        inputs = inputs_of(inputs)
        return {name: t.fill_(float("nan")) if name == "speech.0.speech.x" else t for name, t in inputs.items()}

    run.trainer._prepare_inputs = spoilt
    with pytest.raises(NonFiniteError, match=r"loss/speech\.tokens nan, is in"):
        run.train()
    told = json.loads((tmp_path / "run/replay/step-00000001.json").read_text())["ranks"][0][0]
    assert {kind: len(samples) for kind, samples in told["samples"].items()} == {"vision": 8, "speech": 8}
    assert len(told["names"]) == 16
    with pytest.raises(RecipeError, match="several kinds of data, whose batches are not replayed"):
        replay(tmp_path / "run")


def accelerate(profile: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["accelerate", "launch", "--config_file", f"recipes/accelerate/{profile}.yaml", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.distributed
@pytest.mark.parametrize("profile", ["cpu2-ddp", "cpu2-zero3"])
def test_two_ranks_go_on_with_what_one_process_saved_and_add_a_kind_of_data(profile, folder, whole, half):
    """Losses of the others are those of one process without it, up to rounding; it is learned, averaged and saved."""
    (half / "config.yaml").write_text(more(half, folder, "train.global_batch=24").dump())
    done = accelerate(profile, "-m", "mmssl", "resume", str(half))
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("vision.tokens", "vision.cls", "speech.tokens"):
        assert lines(half)[3][f"loss/{part}"] == pytest.approx(lines(whole)[3][f"loss/{part}"], rel=1e-5)
    start, end = more(half, folder, "train.global_batch=24").build()["hums"].state_dict(), tensors(half)
    for network in ("student.encoder.features.", "teacher.network."):
        own = {
            n.removeprefix("members.hums.method."): t for n, t in end.items() if n.startswith(f"members.hums.method.{network}")
        }
        assert any(not torch.equal(tensor, start[name]) for name, tensor in own.items())


SCRIPT = """
import sys, torch
from mmssl.config import load_recipe
from mmssl.distributed import rank
from mmssl.errors import MmsslError
from mmssl.training.pretrain import prepare

torch.set_num_threads(1)
run = prepare(load_recipe(*sys.argv[1:]))
begin = run.trainer.begin_update

def turned():
    begin()
    if rank() and not run.trainer.state.global_step:  # when the engine has been built
        run.objective.members._modules = dict(reversed(run.objective.members._modules.items()))

run.trainer.begin_update = turned
try:
    run.train()
except MmsslError as error:
    print(f"rank {rank()} exit {error.code}: {error}", flush=True)
"""


@pytest.mark.distributed
def test_t08_ranks_that_go_through_kinds_of_data_in_another_order_are_stopped_under_zero3(folder, tmp_path):
    """Without the check this hangs; that ranks agree under each engine is in tests/test_soak.py."""
    (tmp_path / "unlike.py").write_text(SCRIPT)
    done = accelerate("cpu2-zero3", str(tmp_path / "unlike.py"), str(folder / "joint.yaml"), f"out={tmp_path / 'run'}")
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert sorted(line[:13] for line in said) == ["rank 0 exit 7", "rank 1 exit 7"], done.stderr[-3000:]
    assert all("Rank 1 comes to members.speech where rank 0 comes to members.vision" in line for line in said)


# What comes out ------------------------------------------------------------------------------------------------------


def test_there_is_a_model_for_each_kind_of_data(folder, whole, tmp_path):
    """What each says is what the student said in training."""
    methods = recipe(folder, tmp_path).build()
    joint = JointObjective({name: Objective(method, 2) for name, method in methods.items()})
    missing, unexpected = joint.load_state_dict(tensors(whole), strict=False)
    assert not unexpected
    assert all(".transformer." in name for name in missing)  # under another name
    inputs = {"vision": torch.randn(2, 3, 16, 16), "speech": torch.randn(2, 6400)}
    for place in (whole / "model", export(whole, tmp_path / "exported")):
        files = {"config.json", "model.safetensors", "modeling_mmssl.py", "README.md"}
        assert {path.name for path in place.iterdir()} == {"vision", "speech", *files}
        together = load_encoder(place)
        for name, x in inputs.items():
            encoder = methods[name].student.encoder.eval()
            with torch.no_grad():
                mine = load_encoder(place / name)(**{encoder.input_name: x}).pooler_output
                expected = encoder.pool(encoder(type("V", (), {"x": x, "pad": None})()))
                shared = together(**{encoder.input_name: x}).pooler_output
            assert_close(mine, expected, rtol=1e-5, atol=1e-5)
            assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    card = (whole / "README.md").read_text()
    assert "# Encoders of vision, speech with one transformer" in card
    assert "probe/speech.test/knn" in card
    assert "learned from speech as well" in (whole / "model/vision/README.md").read_text()
    assert "loss/" not in (whole / "model/vision/README.md").read_text()
    assert "| `probe/test/knn` |" in (whole / "model/vision/README.md").read_text()


def test_the_model_of_a_run_starts_another(folder, whole, tmp_path):
    run = prepare(recipe(folder, tmp_path / "run", f"model.init={whole / 'model'}", "train.seed=3"))
    model = load_encoder(whole / "model")
    for name, method in run.objective.method.members.items():
        assert_close(dict(method.student.encoder.state_dict()), dict(model.members[name].state_dict()), rtol=0, atol=0)


def test_what_measures_a_model_is_told_whose_encoder_is_meant(folder, whole):
    model, data = whole / "model", str(folder / "pictures")
    with pytest.raises(RecipeError, match=r"member: .*model takes (speech and vision|vision and speech); say which with"):
        embed(model, data)
    with pytest.raises(RecipeError, match=r"member: .*vision is a model of one kind of data; leave it out"):
        embed(model / "vision", data, member="vision")
    found, alone = embed(model, data, member="vision", samples=20), embed(model / "vision", data, samples=20)
    assert_close(found["embedding"], alone["embedding"])


def test_probes_and_verdicts_are_told_by_kind_of_data(whole):
    found = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in found if "probe/vision.test/knn" in line)
    for kind in ("vision", "speech"):
        assert {f"probe/{kind}.test/linear", f"health/{kind}.rankme", f"health/{kind}.embedding_std"} <= {*measured}
        assert {f"health/{kind}.target_std", f"health/{kind}.momentum"} <= {*found[0]}


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("modalities.speech.model.depth=3",), r"model\.depth: 2 for vision and 3 for speech; the transformer that they share"),
        (("modalities.vision.weight=0", "modalities.speech.weight=0"), r"modalities: all weights are 0"),
        (("modalities.vision.weight=-1",), r"modalities\.vision\.weight: found -1"),
        (("modalities.vision.share=2",), r"train\.global_batch: 16 samples cannot be shared as 2 : 1; take 15 or 18"),
        (("train.micro_batch=5",), r"train\.micro_batch: 5 samples cannot be shared as 1 : 1; take 4 or 6"),
        (("modalities.vision.wieght=2",), r"modalities\.vision\.wieght: unknown key \(did you mean weight\?\)"),
        (("vews={}",), r"vews: unknown key \(did you mean views\?\)"),
        (("modalities.vision.views.flp=0",), r"modalities\.vision\.views\.flp: unknown key \(did you mean flip\?\)"),
        (("modalities={}",), r"modalities: .*at least 1"),
        (("modalities.vision=3",), r"modalities\.vision: found 3"),
        (("modalities.speech.data.modality=smell",), r"no modality is named 'smell'"),
        (("modalities.a-b.data.path=x",), r"modalities\.a-b: a name is made of letters"),
        (("train.steps=null", "train.epochs=2"), r"train\.epochs: passes over several data sets are of unlike length"),
        (("optim.lr=-1",), r"optim\.lr: found -1"),
        (
            ("modalities.vision.watch.guard={target_std: 0.1}",),
            r"modalities\.vision\.watch\.guard: is for the whole run; set watch",
        ),
        (("modalities.vision.watch.smples=3",), r"modalities\.vision\.watch\.smples: unknown key \(did you mean samples\?\)"),
        (("optim.by=epoch",), r"optim\.by: epoch, and a run of several data sets has none"),
        (("modalities.vision.model={backbone: resnet18}",), r"modalities\.vision\.model\.backbone"),
        (("method.name=data2vec3",), r"modalities\.vision\.method\.name: found 'data2vec3'"),
    ],
)
def test_mistakes_are_told_by_their_key(folder, tmp_path, words, told):
    with pytest.raises(RecipeError, match=told) as error:
        recipe(folder, tmp_path, *words)
    assert str(error.value).startswith(f"{folder / 'joint.yaml'} has ")


def test_all_mistakes_are_told_at_once(folder, tmp_path):
    words = (
        "optim.lr=0",
        "modalities.vision.views.flip=x",
        "modalities.speech.views.mask.ratio=2",
        "modalities.speech.shar=1",
    )
    with pytest.raises(RecipeError, match="has 4 errors") as error:
        recipe(folder, tmp_path, *words)
    for told in ("optim.lr: found 0", "vision.views.flip: found 'x'", "speech.views.mask.ratio: 2", "speech.shar: unknown"):
        assert str(error.value).count(told) == 1  # though the rate is wrong for both


def test_a_method_that_keeps_something_for_every_sample_is_told_to_be_alone(folder, tmp_path):
    chosen = recipe(
        folder,
        tmp_path / "run",
        "modalities.vision.method={name: instance_discrimination, dim: 8}",
        "modalities.vision.views={crops: [{count: 1, scale: [0.4, 1.0]}]}",
    )
    with pytest.raises(RecipeError, match="modalities: this method keeps something for every sample"):
        prepare(chosen)


def test_an_ordinary_recipe_is_not_asked_for_several_kinds_of_data(folder):
    with pytest.raises(RecipeError, match="modalities: this recipe is for several kinds of data, and is asked for one"):
        Recipe.load(folder / "joint.yaml")


def test_what_changes_the_run_is_refused_at_a_resume_and_what_may_change_is_not(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    with pytest.raises(RecipeError, match=r"modalities\.speech\.method\.top_k was 2, is 1"):
        pretrain(load_recipe(run / "config.yaml", f"out={run}", "modalities.speech.method.top_k=1"), resume=True)
    pretrain(load_recipe(run / "config.yaml", f"out={run}", "modalities.speech.weight=0.5"), resume=True)
    assert "modalities.speech.weight was 1.0 when the run was saved, and is 0.5 from here on" in capsys.readouterr().err
    assert curve(run)[:3] == curve(whole)[:3]
    assert curve(run)[3] != curve(whole)[3]


def test_the_command_line_trains_checks_and_resumes(folder, tmp_path, capsys):
    def said(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    code, out, _ = said("check", str(folder / "joint.yaml"), "json=true")
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    assert "pictures, 32 samples" in facts["data"]
    assert "sounds, 32 samples" in facts["data"]
    code, out, error = said("pretrain", str(folder / "joint.yaml"), f"out={tmp_path / 'run'}", "train.steps=3")
    assert code == 0
    assert "vision.test/knn" in out + error
    assert said("resume", str(tmp_path / "run"), "train.steps=4")[0] == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    words = ("modalities.vision.data.path=nowhere", f"out={tmp_path / 'no'}")
    code, _, error = said("pretrain", str(folder / "joint.yaml"), *words)
    assert code == 2
    assert "nowhere" in error
    assert not (tmp_path / "no").exists()
