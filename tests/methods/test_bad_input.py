"""What a joint-embedding method cannot work with is refused before the first step and before there is a run folder."""

import re

import pytest
import torch

from mmssl import losses
from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.training.pretrain import prepare
from mmssl.training.survey import check_stream

MLP = "hidden: 16, dim: 8"
OPTIONS = {
    "simclr": MLP,
    "moco_v1": "dim: 8, queue: 16, split: 1",
    "moco_v2": f"{MLP}, queue: 16, split: 2",
    "moco_v3": MLP,
    "instance_discrimination": "dim: 8",
    "byol": MLP,
    "simsiam": MLP,
    "swav": f"{MLP}, prototypes: 4",
    "deepcluster": "clusters: 4, pca: 4",
    "deepcluster_v2": f"{MLP}, prototypes: 4",
    "sela_v2": f"{MLP}, prototypes: 4",
    "barlow_twins": MLP,
    "vicreg": MLP,
    "dino": "hidden: 16, prototypes: 8",
}
MODEL = "hidden_size: 16, depth: 1, heads: 2, patch_size: 4"
MODELS = {"moco_v2": "backbone: resnet18, stem: small"}  # has batch normalisation, whose groups `split` is about
ONE_VIEW = ("instance_discrimination", "deepcluster")


@pytest.fixture
def write(image_folder, tmp_path):
    """Function: method, its options -> words of the command line for a tiny run of 32 images."""

    def build(name: str, *more: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
            f"model: {{image_size: 16, {MODELS.get(name, MODEL)}}}\n"
            f"method: {{name: {name}, {OPTIONS[name]}}}\n"
            f"views: {{crops: {'instdisc' if name in ONE_VIEW else 'moco-cifar'}}}\n"
            "train: {steps: 2, global_batch: 8, device: cpu, log_every: 1}\n"
            "watch: {samples: 20}\n"
        )
        return [str(path), f"out={tmp_path / 'run'}", *more]

    return build


BATCHES = [
    (
        "moco_v1",
        ["method.queue=4"],
        r"method\.queue: 4 rows.* 8 samples of a micro-batch.*lengthen it or lower train\.micro_batch",
    ),
    ("moco_v2", ["method.split=3"], r"method\.split: 3, must divide the 8 samples.*take one of 1, 2, 4"),
    ("moco_v2", ["method.split=8"], r"method\.split: 8, .*at least 2; take one of 1, 2, 4"),
    ("moco_v2", ["method.split=4", "train.micro_batch=4"], r"method\.split: 4, .*the 4 samples.*take one of 1, 2$"),
    ("swav", ["method.queue=4"], r"method\.queue: 4 rows"),  # which would be read in epoch 15
    ("deepcluster", ["method.clusters=33"], r"method\.clusters: 33, the data hold 32 samples; use fewer clusters"),
    ("deepcluster_v2", ["method.prototypes=33"], r"method\.prototypes: 33, the data hold 32 samples; use fewer prototypes"),
    ("sela_v2", ["method.prototypes=33"], r"method\.prototypes: 33, the data hold 32 samples; use fewer prototypes"),
    ("simclr", ["train.global_batch=64"], r"train\.global_batch: the data hold 32 samples.*at most 32"),
]
ALONE = [name for name in OPTIONS if name not in ("moco_v1", "moco_v2", "instance_discrimination", "deepcluster", "dino")]


@pytest.mark.parametrize(("name", "more", "text"), BATCHES)
def test_a_batch_that_does_not_fit_is_refused_before_there_is_a_folder(name, more, text, write, tmp_path):
    with pytest.raises(RecipeError, match=text):
        prepare(Recipe.load(*write(name, *more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("more", ["train.global_batch=1", "train.micro_batch=1"])
def test_one_sample_with_batch_statistics_is_refused(name, more, write, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.global_batch: a micro-batch of 1 sample.*take at least 2"):
        prepare(Recipe.load(*write(name, more)))
    assert not (tmp_path / "run").exists()


def test_one_sample_is_enough_without_batch_statistics(write, trained):
    run = trained(Recipe.load(*write("instance_discrimination", "train.micro_batch=1")))
    assert len([line for line in run.lines if "loss" in line]) == 2


def test_a_queue_that_is_no_multiple_of_the_batch_goes_round(write, trained):
    """Its rows are a ring; the oldest are replaced first, wherever the end lies."""
    run = trained(Recipe.load(*write("moco_v2", "method.queue=20", "train.steps=4")))
    queue = run.objective.method.queue
    assert queue.written == 32
    assert len(queue.read_ids().unique()) == 20  # of one pass, in which each sample occurs once


def test_fewer_samples_than_prototypes_are_worth_a_note(write, capsys):
    prepare(Recipe.load(*write("swav", "method.prototypes=40")))
    assert "note: method.prototypes: 40, codes are spread over the 8 samples" in capsys.readouterr().err
    prepare(Recipe.load(*write("swav", "method.prototypes=40", "method.queue=32")), overwrite=True)
    assert "note: method.prototypes" not in capsys.readouterr().err


def test_what_begins_after_the_end_of_the_run_is_worth_a_note(write, capsys):
    """32 samples in batches of 8 are passes of 4 updates."""
    prepare(Recipe.load(*write("swav", "method.queue=32", "train.steps=4")))
    found = capsys.readouterr().err
    assert "note: method.freeze_epochs: 1, the run has 1 passes; prototypes is never trained" in found
    assert "note: method.queue_from_epoch: 15, the run has 1 passes; queues are never used" in found
    prepare(Recipe.load(*write("swav", "train.steps=5")), overwrite=True)
    assert "note" not in capsys.readouterr().err


def test_that_accumulation_adds_nothing_to_compare_with_is_worth_a_note(write, capsys):
    prepare(Recipe.load(*write("simclr", "train.micro_batch=4")))
    assert "note: train.micro_batch: the loss compares the 4 samples of a micro-batch" in capsys.readouterr().err
    prepare(Recipe.load(*write("simclr")), overwrite=True)
    assert "note" not in capsys.readouterr().err


TAKEN = [
    ("simclr", "views={crops: instdisc}", "views: simclr takes 2 full-size views of a sample, these are 1"),
    ("byol", "views.crops=null", "views: byol takes 2 full-size views of a sample, these are 1"),
    ("vicreg", "views={crops: [{count: 3}]}", "views: vicreg takes 2 full-size views of a sample, these are 3"),
    ("deepcluster", "views={crops: simclr}", "views: deepcluster takes 1 full-size view of a sample, these are 2"),
    ("moco_v3", "views={crops: swav}", "views: moco_v3 takes no smaller crops, these have 6; leave them out"),
    ("simclr", "views.mask={ratio: 0.5, width: 1, copies: 2}", "views.mask: simclr sees whole views; leave it out"),
    ("simclr", "views.crops=moco-cifer", r"views\.crops: 'moco-cifer' is no known policy \(did you mean moco-cifar\?\)"),
    ("simclr", "views.crops=[{count: 2, solarise: 1}]", r"crops\.0\.solarise: unknown key \(did you mean solarize\?\)"),
    ("simclr", "views.crops=[{count: 2, order: [gray]}]", r"crops\.0\.order\.0: found 'gray'; input should be .*'grey'"),
]
NUMBERS = [
    *((name, "method.temperature=0") for name in ("simclr", "moco_v1", "moco_v2", "moco_v3", "instance_discrimination")),
    *((name, "method.temperature=-1") for name in ("swav", "deepcluster_v2", "sela_v2", "dino")),
    *((name, "method.eps=0") for name in ("swav", "sela_v2")),
    *((name, "method.iterations=0") for name in ("swav", "sela_v2", "deepcluster", "deepcluster_v2")),
    *((name, "method.dim=0") for name in OPTIONS if "dim" in OPTIONS[name]),
    *((name, "method.hidden=-1") for name in OPTIONS if "hidden" in OPTIONS[name]),
    *((name, "method.prototypes=1") for name in ("swav", "deepcluster_v2", "sela_v2", "dino")),
    *((name, "method.split=0") for name in ("moco_v1", "moco_v2")),
    ("sela_v2", "method.balancing=0"),
    ("sela_v2", "method.heads=0"),
    ("deepcluster", "method.clusters=1"),
    ("deepcluster", "method.pca=0"),
    ("barlow_twins", "method.dim=1"),
    ("barlow_twins", "method.off_diagonal=-1"),
    ("vicreg", "method.variance=-1"),
    ("dino", "method.teacher_temperature=0"),
    ("dino", "method.center_momentum=1"),
    ("byol", "method.momentum=2"),
    ("instance_discrimination", "method.memory_momentum=1"),
    ("swav", "method.queue=-1"),
]


@pytest.mark.parametrize(("name", "more", "text"), TAKEN)
def test_views_that_a_method_cannot_take_are_refused(name, more, text, write):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(*write(name, more))


@pytest.mark.parametrize("name", ["mae", "cae", "splitmask", "data2vec2"])
def test_masks_of_unequal_size_are_refused_where_hidden_tokens_are_left_out(name):
    with pytest.raises(RecipeError, match=rf"views\.mask\.kind: mixed may hide more of one .*{name} needs equally many"):
        Recipe.load(f"vision/{name}-demo", "data=images", "views.mask.kind=mixed")


@pytest.mark.parametrize(("name", "more"), NUMBERS)
def test_numbers_out_of_range_are_refused_by_their_key(name, more, write):
    with pytest.raises(RecipeError, match=re.escape(more.split("=")[0]) + r": .*(must|should) (be|lie)"):
        Recipe.load(*write(name, more))


STREAMS = [
    ("swav", [], r"method\.freeze_epochs: 1, a stream has no passes.*set it to 0"),
    ("swav", ["method.freeze_epochs=0", "method.queue=16"], r"method\.queue_from_epoch: 15, .*set it to 0"),
    ("dino", ["method.teacher_temperature=0.04"], r"method\.freeze_epochs: 1"),
    ("dino", ["method.freeze_epochs=0"], r"method\.teacher_temperature: changes by the epoch.*by: step"),
    ("simclr", ["optim.by=epoch"], r"optim\.by: epoch"),
    *((name, [], r"data\.streaming: ") for name in OPTIONS if name.startswith(("deep", "sela", "instance"))),
]


@pytest.mark.parametrize(("name", "more", "text"), STREAMS)
def test_what_needs_passes_is_refused_on_a_stream(name, more, text, write):
    recipe = Recipe.load(*write(name, *more))
    with pytest.raises(RecipeError, match=text):
        check_stream(recipe.build(), recipe)


def test_a_stream_may_do_without_passes(write):
    for name, *more in (("simclr",), ("moco_v2",), ("swav", "method.freeze_epochs=0"), ("byol",)):
        recipe = Recipe.load(*write(name, *more))
        check_stream(recipe.build(), recipe)


@pytest.mark.parametrize("verb", ["pretrain", "check"])
@pytest.mark.parametrize(
    ("name", "more"), [("moco_v2", "method.split=3"), ("simclr", "views.crops=no"), ("byol", "train.micro_batch=1")]
)
def test_the_command_line_says_so_in_a_sentence(verb, name, more, write, capsys, tmp_path):
    assert main([verb, *write(name, more)]) == 2
    told = capsys.readouterr().err
    assert more.split("=")[0].split(".")[0] in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_sinkhorn_refuses_half_precision_and_never_meets_it(write, trained, monkeypatch):
    scores = torch.randn(4, 3)
    for half in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"scores: torch\.\w+16, too coarse.*pass scores\.float\(\)"):
            losses.sinkhorn(scores.to(half))
    seen, sinkhorn = [], losses.sinkhorn
    monkeypatch.setattr(losses, "sinkhorn", lambda scores, *rest: (seen.append(scores.dtype), sinkhorn(scores, *rest))[1])
    for name in ("swav", "sela_v2"):
        run = trained(Recipe.load(*write(name, "train.precision=bf16")))
        assert all(line["loss"] > 0 for line in run.lines if "loss" in line)
    assert {*seen} == {torch.float32}
