"""Joint-embedding methods through the trainer: passes that the method orders, exact resuming, what is exported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mmssl.config import Recipe
from mmssl.data.dataset import KeyedDataset
from mmssl.errors import RecipeError
from mmssl.hub.export import load_encoder
from mmssl.methods.deepcluster import DeepCluster
from mmssl.training import checkpoint
from mmssl.training.export import export
from mmssl.training.pretrain import pretrain

PASS, STEPS = 4, 10  # updates of a pass over 32 images, and of a run
RUNS = {
    "deepcluster": ("clusters: 4, pca: 8, iterations: 3", "instdisc", "name: sgd, lr: 0.05"),
    "deepcluster_v2": ("hidden: 16, dim: 8, prototypes: 5, heads: 3, iterations: 3", "swav", "name: larc, lr: 0.5"),
    "moco_v2": ("hidden: 16, dim: 8, queue: 20, split: 2", "moco-cifar", "name: sgd, lr: 0.05, nesterov: true"),
    "swav": ("hidden: 16, dim: 8, prototypes: 5, queue: 12, queue_from_epoch: 1", "swav", "name: lars, lr: 0.5"),
    "instance_discrimination": ("dim: 8, memory_start: embedded", "instdisc", "name: sgd, lr: 0.05"),
    "dino": ("hidden: 16, bottleneck: 8, prototypes: 6, head_norm: true", "dino", "clip_each: 0.3, weight_decay_end: 0.4"),
}


def tiny(name: str, folder, images) -> Recipe:
    """Two and a half passes over 32 images, with a checkpoint after every second update."""
    options, crops, optim = RUNS[name]
    path = folder / f"{name}.yaml"
    path.write_text(
        f"data: {{path: {images}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        f"method: {{name: {name}, {options}}}\n"
        f"views: {{crops: {crops}}}\n"
        f"optim: {{{optim}, warmup: 2}}\n"
        f"train: {{steps: {STEPS}, global_batch: 8, micro_batch: 4, device: cpu, log_every: 1}}\n"
        "watch: {samples: 20, every: 0}\n"
        "save: {every: 2, keep: 9}\n"
    )
    return Recipe.load(path, f"out={folder / name}")


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """Function: method -> its recipe, and the folder of a run that nothing disturbed."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run(name: str):
        if name not in done:
            done[name] = tiny(name, folder, image_folder)
            pretrain(done[name])
        return done[name], folder / name

    return run


def last(run):
    """Tensors of the newest checkpoint, by name."""
    tensors = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]
    return {f"{part}.{name}": tensor for part, named in tensors.items() for name, tensor in named.items()}


def curve(run):
    """Lines of the metrics without times, exactly as written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("speed/")} for line in lines]


@pytest.mark.parametrize("name", [*RUNS])
def test_resuming_repeats_the_run_to_the_bit(name, whole, tmp_path):
    """In the middle of a pass and where one ends: curve, weights, momentum, codes, memories, queues."""
    recipe, run = whole(name)
    expected = last(run)
    for step in (PASS + 2, 2 * PASS):
        again = tmp_path / f"from-{step}"
        shutil.copytree(run, again)
        for folder in (again / "checkpoints").glob("step-*"):
            if checkpoint.step_of(folder) > step:
                shutil.rmtree(folder)
        pretrain(recipe.model_copy(update={"out": str(again)}), resume=True)
        found = last(again)
        assert found.keys() == expected.keys()
        assert not [key for key in expected if not torch.equal(found[key], expected[key])]
        assert curve(again) == curve(run)


STATE = {
    "deepcluster": ["model.method.ids", "model.method.agreement", "model.method.classifier.weight"],
    "deepcluster_v2": ["model.method.ids", "model.method.memories.1.rows", "model.method.memories.0.seen"],
    "instance_discrimination": ["model.method.memory.rows", "model.method.memory.seen"],
    "moco_v2": ["model.method.queue.rows", "model.method.queue.ids", "model.method.queue._extra_state"],
    "swav": ["model.method.queues.0.rows", "model.method.queues.1._extra_state", "model.method.prototypes.weight"],
    "dino": ["model.method.center.value", "model.method.teacher.network.projector.mlp.0.weight"],
}


@pytest.mark.parametrize("name", [*RUNS])
def test_a_checkpoint_holds_all_that_a_method_remembers(name, whole):
    """And a momentum or two moments for each trained weight, none of them still where it began."""
    recipe, run = whole(name)
    saved, method = last(run), recipe.build()
    assert {*STATE[name]} <= {*saved}
    moments = ["exp_avg", "exp_avg_sq"] if recipe.optim.name == "adamw" else ["momentum_buffer"]
    trained = [key for key, parameter in method.named_parameters() if parameter.requires_grad]
    assert {f"optimizer.method.{key}.{moment}" for key in trained for moment in moments} <= {*saved}
    weights = [key for key in trained if key.endswith("weight")]
    assert all(saved[f"optimizer.method.{key}.{moment}"].abs().sum() > 0 for key in weights for moment in moments)


def test_a_pass_of_deepcluster_follows_its_own_order(image_folder, tmp_path, monkeypatch):
    """Clusters are found before the first batch of a pass is fetched, and each cluster is seen as often."""
    events, orders, seen = [], {}, []
    cluster, order, forward, collate = DeepCluster.on_epoch, DeepCluster.order, DeepCluster.forward, KeyedDataset.collate

    def clustered(self, clock, described=None):
        assert described.shape == (32, 16)
        cluster(self, clock, described)
        events.append(("cluster", clock.epoch, self.ids.clone()))

    def ordered(self, clock):
        orders[clock.epoch] = order(self, clock)
        return orders[clock.epoch]

    def trained(self, batch, clock):
        seen.append((clock.epoch, batch.index))
        assert torch.equal(self.ids, events[-1][2]) if events[-1][0] == "cluster" else True
        return forward(self, batch, clock)

    monkeypatch.setattr(DeepCluster, "on_epoch", clustered)
    monkeypatch.setattr(DeepCluster, "order", ordered)
    monkeypatch.setattr(DeepCluster, "forward", trained)
    monkeypatch.setattr(KeyedDataset, "collate", lambda self, rows: (events.append(("fetch",)), collate(self, rows))[1])
    pretrain(tiny("deepcluster", tmp_path, image_folder))
    micro = 2 * PASS  # micro-batches of a pass
    kinds = [event[0] for event in events]
    assert kinds == (["cluster"] + ["fetch"] * micro) * 2 + ["cluster"] + ["fetch"] * (micro // 2)
    for epoch in range(3):
        drawn = torch.cat([index for number, index in seen if number == epoch])
        assert torch.equal(drawn, orders[epoch][: len(drawn)])
    ids = next(event[2] for event in events if event[:2] == ("cluster", 1))
    sizes = ids[orders[1]].bincount(minlength=4)
    assert int(sizes.max()) - int(sizes[sizes > 0].min()) <= int((ids.bincount() > 0).sum())  # what is cut at the end


def test_export_writes_the_network_that_is_asked_for(whole, tmp_path):
    _, run = whole("dino")
    saved = last(run)
    for which, stem in (("student", "student."), ("teacher", "teacher.network.")):
        exported = load_encoder(export(run, tmp_path / which, which)).encoder.state_dict()
        assert len(exported) > 10
        for name, tensor in exported.items():
            assert torch.equal(tensor, saved[f"model.method.{stem}encoder.{name}"])
    recommended, teacher = (load_encoder(folder).encoder.state_dict() for folder in (run / "model", tmp_path / "teacher"))
    assert all(torch.equal(recommended[name], teacher[name]) for name in teacher)  # what the paper uses
    _, other = whole("swav")
    with pytest.raises(RecipeError, match="which=teacher: this run has no teacher"):
        export(other, tmp_path / "none", "teacher")


@pytest.mark.parametrize("name", [*RUNS])
def test_heads_hold_the_projector_and_the_rest(name, whole):
    _, run = whole(name)
    heads, saved = load_file(run / "heads" / "heads.safetensors"), last(run)
    rest = {key.removeprefix("model.method.") for key in saved if key.startswith("model.method.")}
    rest = {key for key in rest if not key.startswith("student.encoder.")}
    assert {key for key in heads if not key.startswith(("probe.", "standardise."))} == rest
    assert all(torch.equal(heads[key], saved[f"model.method.{key}"]) for key in rest)
    expected = {"deepcluster": "classifier.linear.weight"}.get(name, "student.projector.")
    assert any(key.startswith(expected) for key in heads)
