"""Several methods on the same samples: each is what it would be alone, and what they share is computed once."""

import copy
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from mmssl import load_encoder
from mmssl.config import JointRecipe, Recipe
from mmssl.distributed import all_sum, world
from mmssl.errors import RecipeError
from mmssl.masks import uniform
from mmssl.methods import METHODS
from mmssl.methods.combined import Combined
from mmssl.methods.joint import Joint
from mmssl.model.configuration import MmsslConfig
from mmssl.model.decoder import ConvDecoderOptions
from mmssl.model.encoder import Encoder
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.parts import Teacher
from mmssl.random import generator
from mmssl.schedules import constant
from mmssl.training import checkpoint
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.state import load_model_state, model_state
from mmssl.types import Batch, Clock, Mask, View
from tests.ranks import on_two_ranks

CLOCK = Clock(3, 10, 1)
MLP = {"hidden": 16, "dim": 8}
DECODER = ConvDecoderOptions(dim=16, groups=4, kernel=3, layers=1)
TEACHER = {"momentum": constant(0.9)}
OPTIONS = {
    "data2vec2": {"top_k": 2, "decoder": DECODER, **TEACHER},
    "data2vec1": {"top_k": 1, **TEACHER},
    "mae": {"decoder": TokenDecoderOptions(16, 1, 2)},
    "simclr": MLP,
    "vicreg": MLP,
    "byol": MLP | TEACHER,
    "dino": {"prototypes": 6, "hidden": 16, "bottleneck": 8, "head_norm": True, **TEACHER},
    "mlm": {},
    "wav2vec2": {"dim": 8, "entries": 4, "negatives": 3, "dropout": 0.0},
}
SPOKEN = {"data2vec2": {"cls_weight": 0.0, "final_norm": "none", "teacher_features": "share"}}
SPOKEN |= {"data2vec1": {"teacher_features": "share"}}
WEIGHTS = (0.5, 2.0, 1.5)
MODELS = {
    "vision": {"image_size": 16, "patch_size": 4, "prenet_depth": 1},
    "speech": {"conv_channels": 8, "position_groups": 4, "extra_tokens": 0},
    "text": {"vocab_size": 50, "mask_token_id": 49, "pad_token_id": 1, "max_tokens": 16, "extra_tokens": 0},
}
# What is learned from what; passes of the student's transformer and of all teachers'.
RUNS = {
    ("data2vec2+mae", "vision"): (1, 1),
    ("data2vec2+simclr", "vision"): (2, 1),  # its views together
    ("mae+vicreg", "vision"): (3, 0),  # its views one by one
    ("dino+mae", "vision"): (3, 1),  # views of two sizes
    ("simclr+vicreg", "vision"): (1, 0),
    ("dino+byol", "vision"): (2, 1),
    ("byol+dino", "vision"): (3, 2),  # of dino only the smaller view
    ("data2vec2+mae+vicreg", "vision"): (3, 1),
    ("data2vec2+data2vec1", "speech"): (2, 1),  # without the hidden tokens, and with something else in their places
    ("wav2vec2+simclr", "speech"): (2, 0),
    ("mlm+vicreg", "text"): (3, 0),
    ("data2vec2+mlm", "text"): (2, 1),
}


def build(name: str, modality: str = "vision", **weights: float) -> Combined:
    """Weights of the student and of its average have moved apart."""
    torch.manual_seed(0)
    encoder = Encoder.from_config(
        MmsslConfig(modality=modality, hidden_size=16, depth=2, heads=2, norm_eps=1e-5, **MODELS[modality])
    )
    spoken = SPOKEN if modality != "vision" else {}
    factors = dict(zip(METHODS.members(name), WEIGHTS)) | weights
    options = {one: {**OPTIONS[one], **spoken.get(one, {}), "weight": factor} for one, factor in factors.items()}
    method = METHODS[name](encoder, **options).double().train()
    assert isinstance(method, Combined)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
    method.after_step(Clock(1))
    return method


def batch_of(method: Combined, modality: str, rows: slice = slice(None)) -> Batch:
    """As many views as the method takes, full-size ones with two masks of each sample, of four samples."""
    draw, samples, longest = generator("combined"), 4, 16
    views = []
    for _ in range(method.views):
        if modality == "vision":
            x = torch.randn(samples, 3, 16, 16, generator=draw, dtype=torch.float64)
        elif modality == "speech":
            x = torch.randn(samples, 400 + 320 * (longest - 1), generator=draw, dtype=torch.float64)
        else:
            x = torch.randint(4, 49, (samples, longest), generator=draw)
        hidden = uniform(longest, 2 * samples, 0.5, draw).unflatten(0, (samples, 2))[rows].flatten(0, 1)
        views.append(View(x[rows], modality, None, Mask.of(hidden)))
    if method.crops:
        views.append(View(views[0].x[:, :, :8, :8], modality))
    index = torch.arange(samples)[rows]
    return Batch(views, index, tuple(range(100, 100 + samples))[rows])


def alone(method: Combined, name: str, batch: Batch):
    """A member as it is by itself, with an encoder and an average of its own, and the batch that a run of it has."""
    one = copy.deepcopy(method.members[name])
    for part in one.parts():
        if isinstance(part, Teacher):
            part.elsewhere = ()
    full = [view if one.masks else view._replace(mask=None) for view in batch.views[: one.views]]
    small = [view for view in batch.views if view.mask is None] if one.crops else []
    return one, batch._replace(views=full + small)


@pytest.mark.parametrize(("name", "modality"), RUNS)
def test_terms_are_those_of_each_method_alone_and_gradients_are_the_weighted_sum(name, modality):
    method = build(name, modality)
    batch = batch_of(method, modality)
    expected, wanted, names = {}, {}, {p: key for key, p in method.named_parameters()}
    for (own, member), weight in zip(method.methods(), WEIGHTS):
        one, its = alone(method, own, batch)
        found = one(its, CLOCK)
        expected |= {f"{own}.{term}": weight * value for term, value in found.losses.items()}
        torch.stack(list(found.losses.values())).sum().backward()
        mine = dict(member.named_parameters())
        for key, parameter in one.named_parameters():
            if parameter.grad is not None:
                place = names[mine[key]]
                wanted[place] = wanted.get(place, 0) + weight * parameter.grad
    out = method(batch, CLOCK)
    assert_close(out.losses, expected, rtol=1e-10, atol=1e-12)
    for own, weight in zip(method.members, WEIGHTS):
        mine = sum(float(value.detach()) for term, value in out.losses.items() if term.startswith(f"{own}."))
        assert float(out.health[f"{own}.loss"]) == pytest.approx(mine / weight, rel=1e-6)
    torch.stack(list(out.losses.values())).sum().backward()
    gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys() == {key for key, p in method.named_parameters() if p.requires_grad}
    assert_close(gradients, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "modality"), RUNS)
def test_what_methods_share_is_passed_once_and_not_kept(name, modality):
    method, passes = build(name, modality), {"student": 0, "teacher": 0, "features": 0}

    def count(kind):
        return lambda *_: passes.__setitem__(kind, passes[kind] + 1)

    student = method.student.encoder
    averages = {part.encoder for part in method.parts() if isinstance(part, Teacher)}
    student.transformer.register_forward_hook(count("student"))
    student.features.register_forward_hook(count("features"))
    for encoder in averages:
        encoder.transformer.register_forward_hook(count("teacher"))
    assert len(averages) <= 1  # all momenta are equal
    batch = batch_of(method, modality)
    method(batch, CLOCK)
    assert (passes["student"], passes["teacher"]) == RUNS[name, modality]
    if name in ("data2vec2+mae", "data2vec2+data2vec1"):
        assert passes["features"] == 1
    assert student.passes is None
    assert all(encoder.passes is None for encoder in averages)
    assert_close(method(batch, CLOCK).losses, method(batch, CLOCK).losses)  # nothing of one forward is in the next


def test_a_pass_without_gradient_and_one_under_batch_normalisation_are_nobody_elses():
    method = build("simclr+vicreg")
    encoder, calls = method.student.encoder, []
    encoder.transformer.register_forward_hook(lambda *_: calls.append(1))
    batch = batch_of(method, "vision")
    kind = type(method.members["simclr"])

    class Looking(kind):
        def forward(self, batch, clock):
            with torch.no_grad():
                self.student.embed_all(batch.views)
            return super().forward(batch, clock)

    method.members["simclr"].__class__ = Looking
    out = method(batch, CLOCK)
    assert len(calls) == 2
    assert all(term.requires_grad for term in out.losses.values())
    method.members["simclr"].__class__ = kind
    encoder.transformer.blocks[0].more = torch.nn.BatchNorm1d(4)
    calls.clear()
    method(batch, CLOCK)
    assert len(calls) == 3


# One teacher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data2vec2+byol", "dino+byol"])
def test_one_average_is_kept_of_the_encoder_and_follows_once(name):
    method = build(name)
    first, second = (method.members[one].teacher for one in method.members)
    assert method.teacher is first
    assert first.encoder is second.encoder
    assert not any(key.startswith("network.encoder.") for key in second.state_dict())
    before = {key: p.clone() for key, p in first.network.named_parameters()}
    heads = {key: p.clone() for key, p in second.network.named_parameters() if not key.startswith("encoder.")}
    assert heads
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0)
    method.after_step(CLOCK)
    for old, teacher in ((before, first), (heads, second)):
        students, now = dict(teacher.student.named_parameters()), dict(teacher.network.named_parameters())
        for key, value in old.items():
            assert_close(now[key], 0.9 * value + 0.1 * students[key].detach())
    health = method.health(CLOCK)
    assert {f"{one}.momentum" for one in method.members} <= {*health}
    assert health[f"{next(iter(method.members))}.teacher_norm"] > 0


def test_teachers_of_another_pace_or_treatment_are_their_own():
    encoder = build("byol+dino").student.encoder
    other = METHODS["byol+dino"](encoder, byol=MLP | {"momentum": constant(0.5)}, dino=OPTIONS["dino"])
    assert other.members["byol"].teacher.encoder is not other.members["dino"].teacher.encoder
    options = {"data2vec2": OPTIONS["data2vec2"], "data2vec1": OPTIONS["data2vec1"] | {"teacher_features": "copy"}}
    trunk = METHODS["data2vec2+data2vec1"](encoder, **options)
    first, second = (trunk.members[one].teacher.encoder for one in trunk.members)
    assert first is not second
    assert first.features is not second.features
    assert first.transformer.blocks is second.transformer.blocks
    whole = METHODS["data2vec2+data2vec1"](encoder, data2vec2=OPTIONS["data2vec2"], data2vec1=OPTIONS["data2vec1"])
    first, second = (whole.members[one].teacher for one in whole.members)
    assert first.encoder is second.encoder
    assert {*second.health(CLOCK)} == {"momentum"}  # it has no head
    whole.after_step(CLOCK)


def test_averages_are_shared_beyond_a_kind_of_data():
    """Whichever comes first."""
    for order in (("vision", "speech"), ("speech", "vision")):
        encoders = {
            kind: Encoder.from_config(MmsslConfig(modality=kind, hidden_size=16, depth=2, heads=2, **MODELS[kind]))
            for kind in order
        }
        encoders[order[1]].transformer.share(encoders[order[0]].transformer)
        names = {"vision": "data2vec2+byol+data2vec1", "speech": "data2vec2"}
        extra = {"data2vec1": OPTIONS["data2vec1"] | {"teacher_features": "copy"}}
        methods = {
            "vision": METHODS[names["vision"]](encoders["vision"], **{k: OPTIONS[k] for k in ("data2vec2", "byol")}, **extra),
            "speech": METHODS["data2vec2"](encoders["speech"], **OPTIONS["data2vec2"] | SPOKEN["data2vec2"]),
        }
        joint = Joint({kind: methods[kind] for kind in order})
        averages = [part for part in joint.parts() if isinstance(part, Teacher)]
        assert len({id(one.encoder.transformer.blocks) for one in averages}) == 1
        assert len({id(one.encoder) for one in averages}) == 3
        owned = [id(p) for one in averages for p in one._own(dict(one.network.named_parameters())).values()]
        every = {id(p) for one in averages for p in one.network.parameters()}
        assert len(owned) == len({*owned}) == len(every)  # each is averaged, and once


# State and ranks -----------------------------------------------------------------------------------------------------


def test_each_tensor_is_saved_once_and_all_come_back():
    objective, other = Objective(build("dino+byol+mae")), Objective(build("dino+byol+mae"))
    with torch.no_grad():
        for tensor in other.state_dict(keep_vars=True).values():
            tensor.zero_()
    saved = model_state(objective)
    stems = ("method.student.encoder.", "method.teacher.network.encoder.")
    assert all("encoder." not in name or name.startswith(stems) for name in saved if "decoder" not in name)
    assert {"method.student.projector", "method.members.byol.predictor", "method.members.byol.student.projector"} <= {
        ".".join(name.split(".")[:n]) for name in saved for n in (3, 4, 5)
    }
    load_model_state(other, saved)
    assert_close(model_state(other), saved, rtol=0, atol=0)
    twin = copy.deepcopy(objective.method)
    assert twin.teacher.encoder is twin.members["byol"].teacher.encoder
    assert twin.student is twin.members["dino"].student


def step(rank: int, name: str):
    """Losses and gradients of all ranks, of four samples."""
    method = build(name)
    batch = batch_of(method, "vision", slice(rank, None, world()))
    losses = method(batch, CLOCK).losses
    torch.stack(list(losses.values())).sum().backward()
    method.after_step(CLOCK)
    gradients = {key: all_sum(p.grad) / world() for key, p in method.named_parameters()}
    average = {key: t.clone() for key, t in method.state_dict().items() if "teacher" in key or "center" in key}
    return {key: all_sum(term.detach()) / world() for key, term in losses.items()}, gradients, average


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path):
    name = "data2vec2+mae+dino"
    wanted = step(0, name)
    for one in on_two_ranks(step, name, folder=tmp_path):
        assert_close(one, wanted, rtol=1e-6, atol=1e-9)


# From the recipe -----------------------------------------------------------------------------------------------------

RECIPE = """
data: {path: FOLDER, modality: vision, workers: 0}
model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2}
method:
  name: dino+mae+byol
  dino: {prototypes: 6, hidden: 16, bottleneck: 8, freeze_epochs: 0, head_norm: true, momentum: 0.9}
  mae: {weight: 0.5, decoder: {dim: 16, depth: 1, heads: 2}}
  byol: {hidden: 16, dim: 8, momentum: 0.9}
views: {crops: [{count: 2}, {count: 1, size: 8, scale: [0.1, 0.4]}], mask: {copies: 2}}
optim: {lr: 1.0e-3, warmup: 1}
train: {steps: 4, global_batch: 8, device: cpu, log_every: 1, threads: 1}
watch: {every: 0, samples: 20}
save: {every: 2, keep: 2}
"""


@pytest.fixture(scope="module")
def file(image_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("combined") / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(image_folder)))
    return path


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    return pretrain(Recipe.load(file, f"out={tmp_path_factory.mktemp('whole') / 'run'}"))


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def tensors(run):
    return checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]


def test_a_run_resumes_to_the_same_bits_and_weights_may_change_from_there(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    pretrain(Recipe.load(run / "config.yaml", f"out={run}"), resume=True)
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(whole)]
    mine, theirs = tensors(run), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    pretrain(Recipe.load(run / "config.yaml", f"out={run}", "method.mae.weight=0.25"), resume=True)
    assert "method.mae.weight was 0.5 when the run was saved, and is 0.25" in capsys.readouterr().err
    before, after = lines(whole)[2], lines(run)[2]
    assert after["loss/mae.rebuilt"] == pytest.approx(before["loss/mae.rebuilt"] / 2)
    assert after["health/mae.loss"] == before["health/mae.loss"]


def test_the_log_tells_each_term_and_the_model_is_that_of_the_first_method(whole):
    line = lines(whole)[0]
    terms = {key: value for key, value in line.items() if key.startswith("loss/")}
    assert {*terms} == {"loss/dino.dino", "loss/mae.rebuilt", "loss/byol.prediction"}
    assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-6)
    assert line["health/mae.loss"] == pytest.approx(line["loss/mae.rebuilt"] / 0.5, rel=1e-6)
    assert {"health/dino.target_use", "health/dino.momentum", "health/mae.masked_share", "verdict"} <= {*line}
    saved = {
        name.removeprefix("method.teacher.network.encoder."): tensor
        for name, tensor in tensors(whole).items()
        if name.startswith("method.teacher.network.encoder.")
    }
    encoder = Recipe.load(whole / "config.yaml").build().student.encoder.eval()
    encoder.load_state_dict(saved)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        told = load_encoder(whole / "model")(pixel_values=x).pooler_output
        assert_close(told, encoder.pool(encoder(View(x, "vision"))), rtol=1e-5, atol=1e-5)
    card = (whole / "model" / "README.md").read_text()
    assert "tags: [self-supervised, vision, dino, mae, byol]" in card
    assert "The teacher of a dino+mae+byol run (arXiv:2104.14294, arXiv:2111.06377, arXiv:2006.07733)" in card
    assert [*(whole / "report").glob("rebuilt-*.png")]


def another(file, out, views, name, **method):
    """The same recipe with other methods."""
    raw = Recipe.load(file).model_dump(mode="json", include={"data", "model", "optim", "train", "watch", "save"})
    return Recipe.check({**raw, "out": str(out), "method": {"name": name, **method}, "views": views})


def test_what_is_common_to_all_samples_is_told_to_the_member_that_asks(file, tmp_path, trained):
    """A clustering method, which keeps something for every sample, beside one that does not."""
    clusters = MLP | {"prototypes": 3, "heads": 2}
    views = {"crops": [{"count": 2}]}
    recipe = another(file, tmp_path / "run", views, "simclr+deepcluster_v2", simclr=MLP, deepcluster_v2=clusters)
    run = trained(recipe)
    assert bool((run.objective.method.members["deepcluster_v2"].ids >= 0).all())
    assert all(line["loss"] > 0 for line in run.lines if "loss" in line)


REFUSED = [
    ("dino+may", (), r"method\.name: found 'may' in 'dino\+may', known methods are .*\(did you mean mae\?\)"),
    ("mae+mae", (), r"method\.name: found 'mae\+mae', which names a method twice; take each once"),
    ("beit+deepcluster_v2", (), r"method\.name: beit and deepcluster_v2 describe all samples.*take one of them"),
    ("mae+ijepa", (), r"views\.mask\.kind: ijepa needs groups of places to predict; set it to multiblock"),
    (
        "data2vec2+ibot",
        ("views.mask={kind: mixed, copies: 1}",),
        r"views\.mask\.kind: mixed may hide more of one sample.*data2vec2 needs equally many, take another, which suits ibot",
    ),
    ("data2vec2+ibot", (), r"views\.mask\.copies: ibot takes one mask of each full-size view; set it to 1"),
    ("mae+vicreg", ("views.crops=null",), r"views: mae\+vicreg takes 2 full-size views of a sample, these are 1"),
    ("simclr+vicreg", ("views.mask={}",), r"views\.mask: simclr\+vicreg sees whole views; leave it out"),
    ("mae+simclr", ("views.crops=dino",), r"views: mae\+simclr takes no smaller crops, these have \d+; leave them out"),
    ("mae+simclr", ("model.backbone=resnet18",), r"model\.backbone: mae\+simclr hides tokens"),
    ("data2vec2+mae", ("method.data2vec2.top_k=99",), r"method\.data2vec2\.top_k: 99 layers to average"),
    ("data2vec2+mae", ("method.mae.wieght=1",), r"method\.mae\.wieght: unknown key \(did you mean weight\?\)"),
    ("data2vec2+mae", ("method.mae.weight=-1",), r"method\.mae\.weight: found -1"),
    ("data2vec2+mae", ("method.top_k=4",), r"method\.top_k: unknown key; allowed are name, data2vec2, mae"),
    (
        "data2vec2+mae",
        ("method.mae.weight=0", "method.data2vec2.weight=0"),
        r"method\.data2vec2\.weight: 0, and so are all others; one at least must be above 0",
    ),
]


@pytest.mark.parametrize(("name", "words", "told"), REFUSED)
def test_what_cannot_be_combined_is_refused_before_the_first_step(name, words, told, tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {path: images, modality: vision}\nmodel: {}\ntrain: {steps: 2}\n")
    with pytest.raises(RecipeError, match=told):
        Recipe.load(tmp_path / "recipe.yaml", f"method={name}", *words)


def test_batches_that_do_not_fit_are_told_by_the_member_that_minds(file, capsys, tmp_path):
    run, views = tmp_path / "run", {"crops": "moco2", "mask": {}}
    with pytest.raises(RecipeError, match=r"method\.moco_v2\.queue: 4 rows"):
        prepare(another(file, run, views, "mae+moco_v2", moco_v2=MLP | {"queue": 4}))
    assert not run.exists()
    prepare(another(file, run, views, "mae+swav", swav=MLP | {"prototypes": 40, "freeze_epochs": 2}))
    told = capsys.readouterr().err
    assert "note: method.swav.prototypes: 40, codes are spread over the 8 samples" in told
    assert "note: method.swav.freeze_epochs: 2, the run has 1 passes" in told


def test_defaults_of_the_kind_of_data_are_those_of_each_method(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {path: waves, modality: speech}\nmodel: {}\ntrain: {steps: 2}\n")
    recipe = Recipe.load(path, "method=data2vec2+vicreg", "method.data2vec2.top_k=3", "views.mask.width=3")
    assert (recipe.method.data2vec2.teacher_features, recipe.method.data2vec2.top_k) == ("share", 3)
    assert recipe.method.data2vec2.momentum.start == 0.999
    assert (recipe.method.data2vec2.weight, recipe.method.vicreg.weight) == (1.0, 1.0)
    assert recipe.model.extra_tokens == 0
    assert (recipe.views.crops, recipe.views.longest) == ("pair", 4.0)
    assert (recipe.views.mask.kind, recipe.views.mask.width) == ("block", 3)
    assert (METHODS["data2vec2+vicreg"].modalities, "data2vec2+vicreg" in METHODS) == (("vision", "speech", "text"), True)
    assert "data2vec2+vicreg" not in [*METHODS]


def test_a_kind_of_data_among_several_may_combine_methods(file):
    raw = Recipe.load(file).model_dump(mode="json", exclude={"data", "model", "method", "views"})
    vision = {"data": "images", "model": {"image_size": 16, "patch_size": 4}, "method": {"name": "data2vec2+mae"}}
    vision["method"] |= {"data2vec2": {"top_k": 2, "momentum": 0.9}, "mae": {"weight": 0.5}}
    speech = {"data": "waves", "method": {"name": "data2vec2", "top_k": 2, "momentum": 0.9}}
    shared = {"modalities": {"vision": vision, "speech": speech}, "method": {"name": "data2vec2"}}
    recipe = JointRecipe.check({**raw, **shared, "model": {"hidden_size": 16, "depth": 2, "heads": 2, "norm_eps": 1e-5}})
    joint = JointObjective({name: Objective(method) for name, method in recipe.build().items()})
    assert joint.method.members["vision"].weights == {"data2vec2": 1.0, "mae": 0.5}
    assert joint.method.members["vision"].teacher.encoder.transformer.blocks is (
        joint.method.members["speech"].teacher.encoder.transformer.blocks
    )
