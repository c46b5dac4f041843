"""Kinds of data whose rows are pairs, in one run."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from mmssl import load_encoder, losses
from mmssl.config import JointRecipe, Recipe, load_recipe
from mmssl.errors import RecipeError
from mmssl.evaluate.crossing import recall
from mmssl.hub.export import export_encoders
from mmssl.training import checkpoint
from mmssl.training.measure import measure
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.state import model_state
from mmssl.types import Batch, Clock, View
from modalities.text.tokenizer import train as train_tokenizer

RECIPE = """\
modalities:
  vision:
    data: {column: image}
    model: {image_size: 16, patch_size: 8}
    views: {scale: [1.0, 1.0]}
  text:
    data: {column: caption, label: label}
    model: {max_tokens: 16}
    views: {tokenizer: FOLDER/tokenizer}
data: {path: FOLDER/pairs, workers: 0}
model: {hidden_size: 32, depth: 2, heads: 2, norm_eps: 1.0e-6}
method: {name: bind, dim: 16}
optim: {lr: 3.0e-3, warmup: 2}
train: {steps: 6, global_batch: 16, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 40, linear: false}
save: {every: 3, keep: 2}
"""
NAMES = ("black", "dark grey", "light grey", "white")


def picture(level: int, draw: np.random.Generator) -> bytes:
    pixels = np.clip(80 * level + draw.integers(-8, 9, (16, 16, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def table(rows: int, draw: np.random.Generator) -> pyarrow.Table:
    levels = [i % 4 for i in range(rows)]
    columns = {
        "image": [picture(level, draw) for level in levels],
        "caption": [NAMES[level] for level in levels],
        "label": [NAMES[level] for level in levels],
    }
    return pyarrow.table(columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four shades of grey with their names, and the recipe that learns what belongs together."""
    place, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    (place / "pairs").mkdir()
    for split, rows in (("train", 64), ("test", 20)):
        pyarrow.parquet.write_table(table(rows, draw), place / "pairs" / f"{split}.parquet")
    train_tokenizer(NAMES, "unigram", 20, place / "tokenizer")
    (place / "bind.yaml").write_text(RECIPE.replace("FOLDER", str(place)))
    return place


def recipe(folder: Path, out: Path, *words: str) -> JointRecipe:
    found = load_recipe(folder / "bind.yaml", f"out={out}", *words)
    assert isinstance(found, JointRecipe)
    return found


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    return pretrain(recipe(folder, tmp_path_factory.mktemp("whole") / "run"))


def lines(run: Path, key: str = "loss") -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]


def changed(folder: Path, to: Path, **columns) -> Path:
    """A copy of the training table in which a function has changed some columns."""
    found = pyarrow.parquet.read_table(folder / "pairs" / "train.parquet").to_pydict()
    to.mkdir()
    shutil.copy(folder / "pairs" / "test.parquet", to)
    whole = found | {name: change(found[name]) for name, change in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(whole), to / "train.parquet")
    return to


# What is learned -----------------------------------------------------------------------------------------------------


def test_binding_beside_an_objective_of_its_own(folder, tmp_path):
    """Images also rebuild what is hidden; what binds them is the same projection, whatever is hidden."""
    method = "{name: bind+mae, bind: {dim: 16}, mae: {weight: 0.5, decoder: {dim: 16, depth: 1, heads: 2}}}"
    words = (f"modalities.vision.method={method}", "modalities.vision.views.mask={kind: random, ratio: 0.5}")
    run = prepare(recipe(folder, tmp_path / "run", *words))
    joint, batch = run.objective, next(iter(run._loader(0)))
    assert isinstance(joint, JointObjective)
    joint.train()
    out = joint(batch, joint.keys(batch, 0, 0, 0), Clock(0, 6, 0))
    assert {"loss/vision.mae.rebuilt", "loss/bind.vision-text"} <= {*out}
    z = {name: joint({n: t for n, t in batch.items() if n.startswith(name)})["bound"] for name in ("vision", "text")}
    content = {name: batch[f"{name}.content"] for name in z}
    index = {name: batch[f"{name}.index"] for name in z}
    assert_close(out["loss/bind.vision-text"], joint.binding(z, index, content)["loss/vision-text"].detach())
    assert_close(out["loss"], out["loss/vision.mae.rebuilt"] + out["loss/bind.vision-text"])
    run.train()
    assert len(lines(tmp_path / "run")) == 6


def test_members_draw_the_same_rows_and_the_loss_is_that_of_their_projections(folder, tmp_path):
    run = prepare(recipe(folder, tmp_path / "run"))
    joint, batches = run.objective, [batch for _, batch in zip(range(5), run._loader(0), strict=False)]
    assert isinstance(joint, JointObjective)
    for batch in batches:
        assert torch.equal(batch["vision.index"], batch["text.index"])
    assert not torch.equal(batches[0]["vision.index"].sort().values, batches[1]["vision.index"].sort().values)
    batch = batches[0]
    joint.train()
    out = joint(batch, joint.keys(batch, 0, 0, 0), Clock(0, 6, 0))
    z = {name: joint({n: t for n, t in batch.items() if n.startswith(name)})["bound"] for name in ("vision", "text")}
    shade = batch["text.label"]
    expected = losses.clip(z["vision"], z["text"], 1 / 0.07, alike=shade[:, None] == shade)
    assert_close(out["loss/bind.vision-text"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert_close(out["loss"], out["loss/bind.vision-text"])
    out["total"].backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in joint.parameters() if p.requires_grad)


def test_a_few_updates_name_shades_and_find_other_sides(folder, tmp_path):
    run = pretrain(recipe(folder, tmp_path / "run", "train.steps=40", "save.every=40"))
    (measured,) = lines(run, "probe/vision.test/zeroshot")
    assert measured["probe/vision.test/zeroshot"] > 0.9
    assert measured["probe/vision.test/zeroshot_chance"] == 0.25
    assert measured["probe/vision-text.test/recall"] > 0.9
    assert measured["probe/text-vision.test/recall"] > 0.4
    assert {"health/bind.scale", "health/bind.pairs", "health/vision.unit_std"} <= {*lines(run)[0]}
    assert lines(run)[0]["health/bind.pairs"] == 1


def test_the_probe_is_what_a_hand_finds(folder, whole, tmp_path):
    run = prepare(recipe(folder, tmp_path / "run"))
    run.objective.load_state_dict(tensors(whole), strict=False)
    found = measure(whole)
    (logged,) = lines(whole, "probe/vision.test/zeroshot")
    assert found == pytest.approx({name: logged[name] for name in found}, rel=1e-4)
    vision, text = run.members
    test = pyarrow.parquet.read_table(folder / "pairs" / "test.parquet").to_pydict()
    run.objective.eval()
    with torch.no_grad():

        def embedded(member, samples):
            network = member.method.student
            return F.normalize(network.projector(network.embed(member.views.plain(samples))).double(), dim=1)

        names = sorted(NAMES)
        classes = embedded(text, names)
        seen = embedded(vision, [Image.open(io.BytesIO(one)) for one in test["image"]])
        right = [names[int((classes @ z).argmax())] == label for z, label in zip(seen, test["label"], strict=True)]
    assert found["probe/vision.test/zeroshot"] == pytest.approx(sum(right) / len(right))


def test_recall_counts_the_same_content_as_found():
    z = torch.eye(4)
    assert recall(z, z, torch.arange(4), torch.arange(4)) == 1
    turned = z[[1, 0, 3, 2]]
    assert recall(z, turned, torch.arange(4), torch.arange(4)) == 0
    assert recall(z, turned, torch.arange(4), torch.tensor([5, 5, 6, 7])) == 0.5
    assert recall(z, turned, torch.tensor([1, 2, 5, 5]), torch.arange(4)) == 0.5


def test_sigmoid_and_own_trunks_of_unlike_shape_and_a_frozen_encoder(folder, tmp_path):
    first = pretrain(recipe(folder, tmp_path / "first"))
    words = ("share_trunk=false", "modalities.vision.model.freeze=true", "modalities.text.model.depth=1", "bind.loss=sigmoid")
    init = f"modalities.vision.model.init={first / 'model/vision'}"
    run = pretrain(recipe(folder, tmp_path / "run", *words, init))
    before, after = tensors(first), tensors(run)
    frozen = "members.vision.method.student.encoder."
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith(frozen))
    assert not any(".text." in name and ".blocks.1." in name for name in after)
    assert float(after["binding.bias"]) != -10
    assert lines(run)[0]["health/bind.bias"] == -10
    theirs, mine = (load_encoder(run_ / "model/vision").state_dict() for run_ in (first, run))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    text, ids = load_encoder(run / "model/text"), torch.tensor([[2, 5, 3]])
    assert len(text.encoder.transformer.blocks) == 1
    assert_close(load_encoder(run / "model")(input_ids=ids).pooler_output, text(input_ids=ids).pooler_output)


def test_a_frozen_encoder_has_no_dropout(folder, tmp_path):
    words = ("share_trunk=false", "modalities.vision.model={image_size: 16, patch_size: 8, dropout: 0.5, freeze: true}")
    method = recipe(folder, tmp_path, *words).build()["vision"].train()
    assert method.student.projector.training
    assert not any(module.training for module in method.student.encoder.modules())


def test_models_of_transformers_are_bound_as_they_are(folder, tmp_path):
    shape = "hidden_size: 32, depth: 2, heads: 2, norm_eps: 1.0e-6"
    (tmp_path / "bind.yaml").write_text((folder / "bind.yaml").read_text().replace(f"model: {{{shape}}}\n", ""))
    words = (
        f"modalities.text.model={{max_tokens: 16, {shape}}}",
        "modalities.vision.model={backbone: resnet18, image_size: 32, stem: small}",
    )
    with pytest.raises(RecipeError, match=r"vision\.model\.backbone: a model of transformers has no trunk .*share_trunk=false"):
        recipe(tmp_path, tmp_path, *words)
    bound = recipe(tmp_path, tmp_path, *words, "share_trunk=false")
    methods = bound.build()
    method = methods["vision"]
    view = View(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "vision")
    out = method(Batch([view], torch.arange(2)), Clock())
    assert out.losses == {}
    assert out.bound is not None
    assert tuple(out.bound.shape) == (2, 16)
    assert out.bound.requires_grad
    weights = model_state(JointObjective({name: Objective(one) for name, one in methods.items()}))
    views = {name: one.build_views() for name, one in bound.members.items()}
    model = load_encoder(export_encoders(bound, views, weights, tmp_path / "model"))
    with torch.no_grad():
        wanted = method.student.encoder.eval()(view).cls
        assert_close(model(pixel_values=view.x).pooler_output, wanted, rtol=0, atol=1e-5)
        assert model(input_ids=torch.tensor([[2, 5, 3]])).pooler_output.shape == (1, 32)


# Rows that are no pairs ----------------------------------------------------------------------------------------------


def test_what_replaces_a_bad_sample_is_no_pair(folder, tmp_path):
    bad = changed(folder, tmp_path / "bad", image=lambda x: [b"no image" if i % 4 == 3 else one for i, one in enumerate(x)])
    run = prepare(recipe(folder, tmp_path / "run", f"data.path={bad}"))
    joint, batch = run.objective, next(iter(run._loader(0)))
    pairs = batch["vision.index"] == batch["text.index"]
    assert torch.equal(pairs, batch["text.index"] % 4 != 3)
    assert 0 < int(pairs.sum()) < len(pairs)
    keys, clock = joint.keys(batch, 0, 0, 0), Clock(0, 6, 0)
    out = joint(batch, keys, clock)
    assert float(out["health/bind.pairs"]) == pytest.approx(float(pairs.float().mean()))
    spoilt = {name: t.clone() for name, t in batch.items()}
    spoilt["vision.0.vision.x"][~pairs] = 9.0
    spoilt["text.0.text.x"][~pairs] = 5
    assert_close(joint(spoilt, keys, clock)["loss"], out["loss"], rtol=1e-6, atol=0)


def test_rows_without_one_side_are_refused_or_skipped(folder, tmp_path):
    gaps = changed(folder, tmp_path / "gaps", caption=lambda x: [None, "", *x[2:]], image=lambda x: [*x[:7], None, *x[8:]])
    with pytest.raises(RecipeError, match=r"3 of 64 rows lack one side of their pair, .*row 7 has no 'image' .*=skip leaves"):
        prepare(recipe(folder, tmp_path / "run", f"data.path={gaps}"))
    assert not (tmp_path / "run").exists()
    run = pretrain(recipe(folder, tmp_path / "run", f"data.path={gaps}", "bind.incomplete=skip"))
    told = [line["kind"] for line in map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())]
    assert {*told} == {"empty"}
    assert min(line["health/bind.pairs"] for line in lines(run)) < 1


# Nothing is lost -----------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    pretrain(load_recipe(run / "config.yaml", f"out={run}"), resume=True)
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]
    mine, theirs = tensors(run), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert "binding.scale" in mine
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("modalities.text.data.path=elsewhere",), r"text\.data\.path: 'elsewhere', and .* for vision; pairs are rows of one"),
        (("modalities.text.data.limit=8",), r"text\.data\.limit: 8, and None for vision"),
        (("modalities.text.share=3",), r"text\.share: 3, and 1 for vision; pairs need equal ones"),
        (("data.streaming=true",), r"vision\.data\.streaming: pairs are found by their row in the table; set it to false"),
        (("data.budget=100",), r"vision\.data\.budget: pairs stay side by side"),
        (("bind.weight=0",), r"bind\.weight: found 0"),
        (("bind.temperature=0.001",), r"bind\.temperature: 0\.001, infonce keeps it at 0\.01 or above"),
        (("bind.prompts=[a photo]",), r"bind\.prompts: 'a photo' has no single place"),
        (("bind.loss=clip",), r"bind\.loss: found 'clip'"),
        (("bind.temprature=1",), r"bind\.temprature: unknown key \(did you mean temperature\?\)"),
        (("modalities.vision.model.freeze=true",), r"vision\.model\.freeze: its transformer is that of all .*set share_trunk"),
        (("modalities.vision.weight=0", "modalities.text.weight=0"), r"modalities: all weights are 0"),
        (
            ("modalities.vision.method={name: mae, decoder: {dim: 16, heads: 2}}", "modalities.vision.views={mask: {}}"),
            r"modalities\.text\.method\.name: bind compares the rows of two members or more",
        ),
    ],
)
def test_mistakes_are_told_by_their_key(folder, tmp_path, words, told):
    with pytest.raises(RecipeError, match=told):
        recipe(folder, tmp_path, *words)


def test_data_that_do_not_pair_are_refused_before_there_is_a_folder(folder, tmp_path):
    for words, told in (
        (("modalities.text.views.pack=true",), r"views\.pack: blocks run across documents, which belong to pairs"),
        (("modalities.text.data.column=captions",), r"data\.column: .* has no column 'captions'"),
        (('bind.prompts=["{} \\0"]',), r"bind\.prompts: text cannot read the name of a class of vision"),
    ):
        with pytest.raises(RecipeError, match=told):
            prepare(recipe(folder, tmp_path / "run", *words))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    alone = recipe(folder, tmp_path / "run").members["vision"].model_dump(mode="json")
    with pytest.raises(RecipeError, match=r"method\.name: bind compares several kinds of data"):
        prepare(Recipe.check({**alone, "out": str(tmp_path / "run")}))
    mixed = tmp_path / "mixed"  # pictures beside a table of other texts
    mixed.mkdir()
    (mixed / "a.png").write_bytes(picture(1, np.random.default_rng(0)))
    (mixed / "texts.csv").write_text("caption,label\nblack,0\nwhite,1\n")
    words = (f"data.path={mixed}", "modalities.vision.data.column=null")
    with pytest.raises(RecipeError, match=r"vision reads 1 of a folder, text reads 2 of a csv; pairs are rows of one table"):
        prepare(recipe(folder, tmp_path / "run", "train.global_batch=2", *words))
