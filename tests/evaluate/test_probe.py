import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model

from mmssl.cli import main
from mmssl.errors import RecipeError
from mmssl.evaluate import health
from mmssl.evaluate import probe as module
from mmssl.evaluate.embedding import embed
from mmssl.evaluate.probe import inputs_of, modality_of, runner, untrained
from mmssl.model import released
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.registry import Modality, modality
from mmssl.types import Batch, View

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def embedded(model, view) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return runner(model)(Batch([view], torch.arange(len(view.x))).tensors())["embedding"]


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def padded(rows, value=0):
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return x, torch.arange(x.shape[1]) >= torch.tensor([len(row) for row in rows])[:, None]


def test_text_is_pooled_over_valid_tokens_and_does_not_depend_on_its_neighbours(seeded):
    model = RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=20, **SMALL)).eval()
    rows = [torch.randint(3, 50, (n,)) for n in (9, 4, 6)]
    x, pad = padded(rows, model.config.pad_token_id)
    together = embedded(model, View(x, "text", pad))
    for row, mean in zip(rows, together):
        with torch.no_grad():
            alone = model(input_ids=row[None])
        assert_close(mean, alone.last_hidden_state[0].mean(0), rtol=1e-4, atol=1e-5)
        assert_close(embedded(model, View(row[None], "text"))[0], alone.last_hidden_state[0].mean(0))
        assert not torch.allclose(mean, alone.pooler_output[0], atol=1e-2)


def test_speech_is_pooled_over_valid_frames_and_does_not_depend_on_its_neighbours(seeded):
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    more = {"feat_extract_norm": "layer", "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2Model(Wav2Vec2Config(**SMALL, **convolutions, **more)).eval()
    rows = [torch.randn(n) for n in (400, 170, 233)]
    rows[1][:20] = 0.0  # silence at the beginning is no padding
    x, _ = padded(rows)
    frames = torch.tensor([int(model._get_feat_extract_output_lengths(len(row))) for row in rows])
    pad = torch.arange(int(frames.max())) >= frames[:, None]
    assert inputs_of(View(x, "speech", pad), model)["attention_mask"].sum(1).tolist() == [400, 170, 233]
    together = embedded(model, View(x, "speech", pad))
    for row, mean in zip(rows, together):
        with torch.no_grad():
            alone = model(input_values=row[None]).last_hidden_state[0].mean(0)
        assert_close(mean, alone, rtol=1e-4, atol=1e-5)


def test_images_are_pooled_as_their_model_does(seeded):
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)).eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        out = model(pixel_values=x)
    assert_close(embedded(model, View(x, "vision")), out.pooler_output)
    bare = ViTModel(model.config, add_pooling_layer=False).eval()
    bare.load_state_dict(model.state_dict(), strict=False)
    assert_close(embedded(bare, View(x, "vision")), out.last_hidden_state.mean(1))


def test_our_own_models_are_told_the_padding_itself():
    class Ours(torch.nn.Module):
        config, main_input_name = SimpleNamespace(model_type="mmssl"), "input_values"

        def forward(self, **given):
            self.given = given
            return SimpleNamespace(pooler_output=given["input_values"][:, :2], last_hidden_state=None)

    model, x, pad = Ours(), torch.randn(2, 40), torch.tensor([[False, False], [False, True]])
    assert torch.equal(embedded(model, View(x, "speech", pad)), x[:, :2])
    assert model.given.keys() == {"input_values", "pad"}
    assert torch.equal(model.given["pad"], pad)
    embedded(model, View(x, "speech"))
    assert model.given.keys() == {"input_values"}


@pytest.fixture
def installed(monkeypatch):
    """Kinds of data: images, speech, two that take input_ids, and one that cannot be imported."""
    names = {"vision": "pixel_values", "speech": "input_values", "text": "input_ids", "code": "input_ids"}
    empty = Modality(**dict.fromkeys(Modality._fields))
    kinds = {n: empty._replace(name=n, features=SimpleNamespace(input_name=i)) for n, i in names.items()}

    def find(name):
        if name not in kinds:
            raise RecipeError(f"data.modality: {name}")
        return kinds[name]

    monkeypatch.setattr(released, "modality", find)
    monkeypatch.setattr(released, "modalities", lambda: [*kinds, "broken"])


def taking(name, **config):
    return SimpleNamespace(main_input_name=name, config=SimpleNamespace(**config))


def test_the_kind_of_data_of_a_model(installed):
    assert modality_of(taking("input_values", model_type="mmssl", modality="text")).name == "text"
    assert modality_of(taking("input_values", model_type="hubert")).name == "speech"
    assert modality_of(taking("input_ids", model_type="bert"), "code").name == "code"
    with pytest.raises(RecipeError, match=r"modality: .* takes input_ids, which belongs to text and code; .*modality=NAME"):
        modality_of(taking("input_ids", model_type="bert"))
    with pytest.raises(RecipeError, match=r"takes points, which belongs to no installed kind of data"):
        modality_of(taking("points"))
    with pytest.raises(RecipeError, match=r"data\.modality: smell"):
        modality_of(taking("input_ids", model_type="bert"), "smell")


def test_a_group_is_left_out_at_a_time_and_those_without_one_are_not_counted(seeded):
    from mmssl.evaluate.linear import linear_accuracy

    labels, groups = torch.arange(60) % 3, torch.arange(60) // 20 - 1  # groups -1, 0, 1
    features = torch.nn.functional.one_hot(labels, 3) + 0.8 * torch.randn(60, 3)
    wanted = []
    for g in (0, 1):
        seen = groups != g
        wanted.append(linear_accuracy(features[seen], labels[seen], features[~seen], labels[~seen]))
    found = module._left_out(features, labels, groups)
    assert found == {"left_out": pytest.approx(sum(wanted) / 2), "left_out_worst": pytest.approx(min(wanted))}
    assert wanted[0] != wanted[1]
    assert 0.4 < sum(wanted) / 2 < 1


def test_groups_are_numbered_alike_in_both_splits(tmp_path):
    for split, speakers in {"train": "zoe ann zoe", "test": "ann bob"}.items():
        rows = "".join(f"some words,{i % 2},{speaker}\n" for i, speaker in enumerate(speakers.split()))
        (tmp_path / f"{split}.csv").write_text("text,label,speaker\n" + rows)
    where = module.DataOptions(path=str(tmp_path), modality="text")

    def part(split):
        source = SimpleNamespace(facts={"split": split})
        return SimpleNamespace(data=SimpleNamespace(kind=modality("text"), source=source))

    assert module._groups(part("train"), where, "speaker").tolist() == [2, 0, 2]
    assert module._groups(part("test"), where, "speaker").tolist() == [0, 1]
    with pytest.raises(RecipeError, match="has no column 'voice'"):
        module._groups(part("train"), where, "voice")


@pytest.fixture
def tiny_model(seeded):
    shape = {"hidden_size": 8, "depth": 3, "heads": 2, "image_size": 8, "patch_size": 4, "norm": "pre", "dropout": 0.1}
    return MmsslModel(MmsslConfig(**shape, extra_tokens=2))


@pytest.mark.parametrize(("asked", "layers"), [(1, 1), (2, 2), (4, 3)])
def test_cls_tokens_are_those_of_the_last_blocks_after_the_norm(asked, layers, tiny_model):
    outputs, transformer = [], tiny_model.encoder.transformer
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out[0])) for block in transformer.blocks]
    torch.nn.init.normal_(transformer.norm.weight)
    view = View(torch.randn(2, 3, 8, 8), "vision")
    with torch.no_grad():
        found = runner(tiny_model, asked)(Batch([view], torch.arange(2)).tensors())["cls"]
        by_hand = [torch.nn.functional.layer_norm(x[:, 0], (8,), eps=1e-6) for x in outputs[3 - layers :]]
        scaled = [x * transformer.norm.weight + transformer.norm.bias for x in by_hand]
    assert_close(found.flatten(1), torch.cat(scaled, 1))
    for hook in hooks:
        hook.remove()


def test_a_model_without_cls_tokens_cannot_show_them(seeded):
    chosen = module.choose("dino,moco")
    for model in (ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)), torch.nn.Linear(1, 1)):
        model.config = getattr(model, "config", SimpleNamespace())
        with pytest.raises(RecipeError, match=r"^protocol: dino concatenates cls tokens.*dino-resnet"):
            module._cls_layers(chosen, model)
    assert module._cls_layers(module.choose("moco"), model) == 0


def test_protocols_measure_a_model_and_leave_it_as_it_is(tiny_model, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda path: tiny_model)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    names = ["knn", "moco", "dino", "simclr-lbfgs"]
    found = module.probe(tmp_path / "model", str(image_folder), protocol=names, labels=10, epochs=2, random=True)
    assert {*found} == {"raw", "labels", "random", "model"}
    assert found["labels"] == {"samples": 20, "least": 10, "most": 10}
    for name in ("random", "model"):
        assert [*found[name]] == ["knn", "protocols"]
        assert [*found[name]["protocols"]] == names
        assert found[name]["protocols"]["knn"]["accuracy"] == found[name]["knn"]
        assert all(0 <= result["accuracy"] <= 1 for result in found[name]["protocols"].values())
    assert found["model"]["protocols"]["moco"]["augment"] is True
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    assert all(p.grad is None for p in tiny_model.parameters())
    again = module.probe(tmp_path / "model", str(image_folder), protocol=names, labels=10, epochs=2)
    assert again["model"] == found["model"]


def test_few_labels_serve_the_usual_probe_too(tiny_model, image_folder, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    found = module.probe(tmp_path / "model", str(image_folder), labels=0.25)
    assert found["labels"] == {"samples": 8, "least": 4, "most": 4}
    assert {*found["model"]} == {"knn", "linear"}
    with pytest.raises(RecipeError, match=r"^epochs: belongs to a protocol"):
        module.probe(tmp_path / "model", str(image_folder), epochs=3)


def test_the_command_line_has_a_row_for_each_protocol(tiny_model, image_folder, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    words = ["probe", str(tmp_path / "model"), f"data={image_folder}", "protocol=knn-dino,simsiam,grid"]
    more = ["epochs=2", "augment=false", "labels=5", "random=true"]
    assert main([*words, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if line.startswith("protocol"))
    assert head.split() == ["protocol", "random", "model"]
    table = {line.split()[0]: line for line in lines if line.startswith(("knn-dino", "simsiam", "grid"))}
    assert [*table] == ["knn-dino", "simsiam", "grid"]
    assert "best of 1" not in table["simsiam"]
    assert table["simsiam"].endswith("epochs 2, batch 4096, augment false; NOT the protocol's epochs 90, augment true")
    assert "best of 24 on held-out training data; NOT the protocol's epochs 100" in table["grid"]
    assert lines[-1] == "learned from 10 labels, 5 of each class"
    assert main([*words, *more, "json=true"]) == 0
    results = json.loads(capsys.readouterr().out)
    for name, line in table.items():
        both = [f"{results[model]['protocols'][name]['accuracy']:.1%}" for model in ("random", "model")]
        assert line.split()[1:3] == both
    assert main([*words[:-1], "protocol=symclr"]) == 2
    assert "did you mean simclr?" in capsys.readouterr().err


def test_metrics_without_a_classifier_are_told_of_each_network(tiny_model, image_folder, tmp_path, capsys):
    """Those of the training split are what the functions say of its embeddings."""
    tiny_model.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), f"data={image_folder}", "metrics=true", "random=true", "samples=24"]
    assert main(["probe", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = embed(tmp_path / "model", str(image_folder), samples=24)
    expected = health.of_set(rows["embedding"]) | health.of_classes(rows["embedding"], rows["label"])
    mine = found["model"]["metrics"]
    assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert mine["alignment"] > 0
    assert 1 <= mine["lidar"] <= 24
    assert {"rotation", "order", "invariance"} <= {*mine}
    assert found["random"]["metrics"].keys() == mine.keys()
    assert main(["probe", *words]) == 0
    assert "effective rank" in capsys.readouterr().out


def test_the_help_names_every_protocol():
    from mmssl.cli import probe
    from mmssl.evaluate.protocols import PROTOCOLS

    named = probe.__doc__.split("regression: ")[1].split(". ")[0].replace("\n", " ")
    assert named.split(", ") == [*PROTOCOLS]


def test_an_untrained_network_keeps_what_was_measured_of_data(seeded):
    shape = {"image_size": 4, "patch_size": 1, "palette": 5, "hidden_size": 16, "depth": 1, "heads": 2}
    network = MmsslModel(MmsslConfig(modality="vision", **shape))
    own = network.encoder.features.palette
    own.colours.copy_(torch.randn(5, 3))
    fresh = [untrained(network, seed).encoder for seed in (1, 1, 2)]
    assert all(torch.equal(one.features.palette.colours, own.colours) for one in fresh)
    weights = [one.features.palette.embed.weight for one in (network.encoder, *fresh)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[3])


def test_running_statistics_of_a_trained_network_are_not_kept(seeded):
    network = torch.nn.BatchNorm1d(3)
    network.config = 3
    network.running_mean += 1.0
    assert not bool(untrained(network, 0).running_mean.any())
