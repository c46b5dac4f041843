from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import RobertaConfig, RobertaModel, ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model

from mmssl.errors import RecipeError
from mmssl.evaluate import probe as module
from mmssl.evaluate.probe import _runner, inputs_of, modality_of
from mmssl.registry import Modality
from mmssl.types import Batch, View

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def embedded(model, view) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return _runner(model)(Batch([view], torch.arange(len(view.x))).tensors())["embedding"]


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

    monkeypatch.setattr(module, "modality", find)
    monkeypatch.setattr(module, "modalities", lambda: [*kinds, "broken"])


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
    assert module._left_out(features, labels, groups) == pytest.approx(sum(wanted) / 2)
    assert 0.4 < sum(wanted) / 2 < 1


def test_groups_are_numbered_alike_in_both_splits(tmp_path):
    for split, speakers in {"train": "zoe ann zoe", "test": "ann bob"}.items():
        rows = "".join(f"some words,{i % 2},{speaker}\n" for i, speaker in enumerate(speakers.split()))
        (tmp_path / f"{split}.csv").write_text("text,label,speaker\n" + rows)
    where = module.DataOptions(path=str(tmp_path), modality="text")

    def part(split):
        source = SimpleNamespace(facts={"split": split})
        return SimpleNamespace(data=SimpleNamespace(kind=module.modality("text"), source=source))

    assert module._groups(part("train"), where, "speaker").tolist() == [2, 0, 2]
    assert module._groups(part("test"), where, "speaker").tolist() == [0, 1]
    with pytest.raises(RecipeError, match="has no column 'voice'"):
        module._groups(part("train"), where, "voice")
