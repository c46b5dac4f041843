"""Whole runs: images, sound and text, our model and those of transformers, and what is refused before the first step."""

import builtins
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmssl.errors import NonFiniteError, RecipeError
from mmssl.finetune import run as running
from mmssl.finetune.run import finetune
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.model.register import auto_classes
from mmssl.training.run_folder import RunFolder
from modalities.text.tokenizer import train
from tests.finetune.words import checked
from tests.ranks import on_two_ranks

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NEW = {"depth": 2, "heads": 2, "hidden_size": 16}
CONVOLUTIONS = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def extractor(mask=True):
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of small pretrained encoders by name."""
    auto_classes()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    images, sounds = transformers.BitImageProcessor(**size), extractor()
    train(["a dark day and a light night"] * 20, "bpe", 40, folder / "tokenizer")
    words = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    words.model_max_length = 16
    made = {
        "ours": (MmsslModel(MmsslConfig(**NEW, image_size=16, patch_size=4)), images),
        "vit": (transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)), images),
        "wav2vec2": (transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SMALL, **CONVOLUTIONS)), extractor(False)),
        "voice": (
            MmsslModel(MmsslConfig(modality="speech", **NEW, extra_tokens=0, conv_channels=8, position_groups=4)),
            sounds,
        ),
        "roberta": (
            transformers.RobertaModel(
                transformers.RobertaConfig(**SMALL, vocab_size=len(words), max_position_embeddings=20), add_pooling_layer=False
            ),
            words,
        ),
    }
    for name, (model, processor) in made.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A folder with tables `train` and `test` of tones and what they say."""
    folder, draw = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        rows = {"file_name": [], "text": [], "label": []}
        for i in range(count):
            tones = draw.integers(0, 2, 1 + i % 3)
            wave = np.concatenate([np.sin(np.arange(3200) * (0.1, 0.4)[tone]) for tone in tones])
            soundfile.write(folder / f"{split}-{i}.wav", wave, 16_000)
            rows["file_name"].append(f"{split}-{i}.wav")
            rows["text"].append(" ".join("Ab"[tone] for tone in tones))
            rows["label"].append(("low", "high")[tones[0]])
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def told(tmp_path):
    """A table of texts with classes."""
    rows = [{"text": f"a {'dark night' if i % 2 else 'light day'} {i}", "label": i % 2} for i in range(16)]
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", ["ours", "vit"])
def test_images_end_in_a_plain_model(encoders, image_folder, tmp_path, name):
    words = ("views={scale: [0.5, 1.0], randaugment: 1, mixup: 0.5, cutmix: 0.5, erase: 0.5}", "optim.layer_decay=0.7")
    words += ("optim.label_smoothing=0.1", f"out={tmp_path / 'run'}", "watch.every=2", "train.micro_batch=4")
    folder = finetune(checked(*words, model=str(encoders / name), data=str(image_folder)))
    status = RunFolder.open(folder).read_status()
    assert (status["state"], status["step"]) == ("finished", 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [2, 4, 4]  # the last at the end
    model = transformers.AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    assert type(model).__name__ == {"ours": "MmsslForImageClassification", "vit": "ViTForImageClassification"}[name]
    assert model.config.id2label == {0: "dark", 1: "light"}
    assert (folder / "model" / "modeling_mmssl.py").is_file() == (name == "ours")
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "model")
    pixels = processor([one.convert("RGB") for one in opened(image_folder)], return_tensors="pt")
    with torch.no_grad():
        found = model(**pixels).logits.argmax(1)
    accuracy = float((found == torch.tensor([0] * 12 + [1] * 12)).double().mean())
    scores = json.loads((folder / "results.json").read_text())
    assert scores["accuracy"] == pytest.approx(accuracy)
    assert {*scores} == {"loss", "accuracy", "macro_f1"}
    before = load_file(encoders / name / "model.safetensors")
    after = weights(folder)
    moved = {
        n for n in before if not torch.equal(before[n], after.get(n, after.get(f"mmssl.{n}", after.get(f"vit.{n}", before[n]))))
    }
    assert len(moved) > 0.8 * len(before) - 3  # all but fixed tables and a pooler


def opened(folder):
    from PIL import Image

    return [Image.open(file) for file in sorted((folder / "test").glob("*/*.png"))]


def test_the_lines_without_mmssl_finetune_work(encoders):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "finetuning.md").read_text(), re.DOTALL)
    known = {"images": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 9])}
    exec(code.replace("runs/scans/model", str(encoders / "ours")), known)
    assert 0 < known["loss"].item() < 5


def test_a_run_goes_on_as_if_nothing_had_happened(encoders, image_folder, tmp_path, monkeypatch):
    words = ("views={mixup: 0.5, randaugment: 1}", "train.steps=6", "save.every=3", "model.options={dropout: 0.1}")
    given = {"model": str(encoders / "ours"), "data": str(image_folder)}  # 4 updates are an epoch
    whole = finetune(checked(*words, f"out={tmp_path / 'whole'}", **given))
    recipe = checked(*words, f"out={tmp_path / 'parts'}", **given)
    heard = running.Follow.on_step_end

    def told(self, args, state, control, **more):
        if state.global_step == 5:
            self.hear(15)
        heard(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(running.Follow, "on_step_end", told)
        finetune(recipe)
    folder = RunFolder.open(recipe.out)
    assert (folder.read_status()["state"], folder.read_status()["step"]) == ("preempted", 5)
    assert not folder.model.exists()
    with pytest.raises(RecipeError, match="another optim; start one with out=FOLDER"):
        finetune(recipe.model_copy(update={"optim": checked("optim.lr=0.5").optim}), resume=True)
    finetune(recipe, resume=True)
    assert_close(weights(folder.path), weights(whole), rtol=0, atol=0)
    assert (folder.path / "results.json").read_text() == (whole / "results.json").read_text()
    with pytest.raises(RecipeError, match="holds a run"):
        finetune(recipe)


def test_a_head_alone_leaves_the_encoder_as_it_was(encoders, image_folder, tmp_path):
    words = ("model.tune=head", "model.pooling=mean", f"out={tmp_path / 'run'}", "data.labels=4")
    folder = finetune(checked(*words, model=str(encoders / "vit"), data=str(image_folder)))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder / "model")
    assert (type(model).__name__, model.config.pooling) == ("MmsslForImageClassification", "mean")
    vit, x = transformers.ViTModel.from_pretrained(encoders / "vit").eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens, pooled = vit(x).last_hidden_state, model.eval().mmssl(pixel_values=x).pooler_output
    assert_close(pooled, tokens[:, 1:].mean(1), rtol=0, atol=1e-5)
    assert json.loads((folder / "data.json").read_text())["train"]["learned"] == 8


def test_fixed_positions_grow_with_the_input(encoders, image_folder):
    words = ("views.side=32", "model.options.image_size=32")
    _, model, *_ = running.prepared(checked(*words, model=str(encoders / "ours"), data=str(image_folder)))
    (table,) = [buffer for name, buffer in model.named_buffers() if name.endswith("positions.table")]
    assert_close(table, MmsslModel(MmsslConfig(**NEW, image_size=32, patch_size=4)).encoder.positions.table, rtol=0, atol=0)


def test_updates_of_low_rank_are_merged_at_the_end(encoders, image_folder, tmp_path):
    pytest.importorskip("peft")
    words = ("model.tune=lora", f"out={tmp_path / 'run'}")
    folder = finetune(checked(*words, model=str(encoders / "vit"), data=str(image_folder)))
    before, after = load_file(encoders / "vit" / "model.safetensors"), weights(folder)
    assert not [name for name in after if "lora" in name]
    moved = {name for name in before if f"vit.{name}" in after and not torch.equal(before[name], after[f"vit.{name}"])}
    assert moved
    assert all(name.endswith("weight") and "norm" not in name for name in moved)


def test_a_random_start_has_the_shape_and_nothing_else(encoders, image_folder, tmp_path):
    given = {"model": str(encoders / "vit"), "data": str(image_folder)}
    words = ("train.steps=1", "optim.lr=1e-9", "optim.weight_decay=0")
    kept, drawn = (
        weights(finetune(checked(*words, *more, f"out={tmp_path / name}", **given)))
        for name, more in (("kept", ()), ("drawn", ("model.random=true",)))
    )
    before = load_file(encoders / "vit" / "model.safetensors")
    name = next(n for n in before if n.endswith("dense.weight") and "layer" in n)
    assert_close(kept[f"vit.{name}"], before[name], rtol=0, atol=1e-6)
    assert not torch.allclose(drawn[f"vit.{name}"], before[name], atol=1e-3)
    assert drawn.keys() == kept.keys()


@pytest.mark.parametrize(
    ("name", "options"), [("wav2vec2", "mask_time_prob: 0.2, mask_time_length: 2"), ("voice", "dropout: 0.1")]
)
def test_transcripts_end_in_a_model_and_a_processor(encoders, spoken, tmp_path, name, options):
    words = ("model.freeze_features=true", f"model.options={{{options}}}", "views={speed: [0.9, 1.1], noise: 20}")
    recipe = checked(*words, f"out={tmp_path / 'run'}", task="ctc", model=str(encoders / name), data=str(spoken))
    folder = finetune(recipe)
    scores = json.loads((folder / "results.json").read_text())
    assert {*scores} == {"loss", "wer", "cer"}
    model = transformers.AutoModelForCTC.from_pretrained(folder / "model").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    assert type(processor).__name__ == "Wav2Vec2Processor"
    assert processor.tokenizer.get_vocab() == {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}
    wrong = wanted = 0
    for i, text in enumerate(datasets.Dataset.from_parquet(str(spoken / "test.parquet"))["text"]):
        wave, rate = soundfile.read(spoken / f"test-{i}.wav")
        with torch.no_grad():
            read = processor.batch_decode(model(**processor(wave, sampling_rate=rate, return_tensors="pt")).logits.argmax(-1))[
                0
            ]
        wrong, wanted = wrong + distance([*text.lower()], [*read]), wanted + len(text)
    if name == "voice":  # of the other one padding is heard
        assert scores["cer"] == pytest.approx(wrong / wanted)
        before, after = load_file(encoders / name / "model.safetensors"), weights(folder)
        same = {n for n in before if torch.equal(before[n], after[f"mmssl.{n}"])}
        assert same >= {n for n in before if ".features." in n}
        assert not {n for n in same if "transformer.blocks" in n and n.endswith("weight")}


def distance(a, b):
    """Levenshtein's, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_classes_of_sound_and_of_text(encoders, spoken, told, tmp_path):
    heard = checked(f"out={tmp_path / 'heard'}", task="audio-classification", model=str(encoders / "voice"), data=str(spoken))
    model = transformers.AutoModelForAudioClassification.from_pretrained(finetune(heard) / "model")
    assert model.config.id2label == {0: "high", 1: "low"}
    read = checked(f"out={tmp_path / 'read'}", task="sequence-classification", model=str(encoders / "roberta"), data=str(told))
    folder = finetune(read)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows = datasets.Dataset.from_parquet(str(told / "test.parquet"))
    with torch.no_grad():
        logits = model(**tokenizer([*rows["text"]], padding=True, return_tensors="pt")).logits
    accuracy = float((logits.argmax(1) == torch.tensor(rows["label"])).double().mean())
    assert json.loads((folder / "results.json").read_text())["accuracy"] == pytest.approx(accuracy)


def ranked(rank, words, given):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody meets there: they have met
    torch.set_num_threads(1)
    finetune(checked(*words, **given))


@pytest.mark.distributed
def test_two_ranks_learn_what_one_does(encoders, image_folder, tmp_path):
    given = {"model": str(encoders / "ours"), "data": str(image_folder)}
    words = ("optim.label_smoothing=0.1", "views={scale: [1.0, 1.0], flip: 0}", "optim.lr=1e-2", "data.limit=24")
    alone = finetune(checked(*words, f"out={tmp_path / 'one'}", "train.micro_batch=4", **given))
    on_two_ranks(ranked, (*words, f"out={tmp_path / 'two'}"), given, folder=tmp_path)
    assert_close(weights(tmp_path / "two"), weights(alone), rtol=1e-4, atol=1e-5)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3)


# What is refused -------------------------------------------------------------------------------------------------------


def refused(*words, match, **given):
    with pytest.raises(RecipeError, match=match) as told:
        finetune(checked(*words, **given))
    assert "\n\n" not in str(told.value)


def copied(folder, tmp_path, name, change=lambda weights: weights, **config):
    """A model folder with something else in it."""
    place = tmp_path / "changed"
    shutil.copytree(folder / name, place)
    told = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(told))
    save_file(change(load_file(place / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
    return str(place)


def test_an_encoder_that_is_not_whole_is_refused(encoders, image_folder, tmp_path):
    data = str(image_folder)
    unknown = copied(encoders, tmp_path / "a", "vit", model_type="nonsense")
    refused(match="^model.init: .*changed cannot be loaded as a model", model=unknown, data=data)
    refused(match="^model.init: .*nowhere cannot be loaded", model=str(tmp_path / "nowhere"), data=data)
    more = copied(encoders, tmp_path / "b", "vit", num_hidden_layers=3)
    refused(match=r"lacks vit\.\S+2\.\S+ and \d+ more, so that the encoder is not the one", model=more, data=data)
    fewer = copied(encoders, tmp_path / "c", "ours", depth=1)
    refused(match=r"has too many: .*blocks\.1\.", model=fewer, data=data)
    shape = copied(encoders, tmp_path / "d", "vit", intermediate_size=64)
    refused(match=r"has other shapes than its config says: vit\.\S+ \(32", model=shape, data=data)


def test_what_does_not_fit_the_model_is_refused(encoders, image_folder, spoken, tmp_path):
    data, vit, ours = str(image_folder), str(encoders / "vit"), str(encoders / "ours")
    refused(
        "views.side=32", match=r"pixel_values \(2, 3, 32, 32\).*images of 16 pixels: set views\.side=16", model=vit, data=data
    )
    refused(match="^task: image-classification needs a model of pixel_values.* it is one for audio-classification or ctc",
            model=str(encoders / "voice"), data=data)  # fmt: skip
    refused("views.mixupp=1", match=r"views\.mixupp: unknown key \(did you mean mixup\?\)", model=vit, data=data)
    refused("views.flip=2", match=r"^views\.flip: 2", model=vit, data=data)
    refused("model.drop_path=0.1", match=r"^model\.drop_path: models of type vit have none", model=vit, data=data)
    refused("model.options={mask_time_prob: 0.1}", match=r"^model\.options\.mask_time_prob: ", model=ours, data=data)
    refused("model.freeze_features=true", match=r"^model\.freeze_features: ViT", model=vit, data=data)
    voice = {"task": "ctc", "model": str(encoders / "voice")}
    refused(
        match=r"^data\.path: .* is a folder of recordings without transcripts; give a table",
        data=flat(spoken, tmp_path),
        **voice,
    )


def flat(spoken, tmp_path):
    place = tmp_path / "waves"
    place.mkdir()
    for file in spoken.glob("*.wav"):
        shutil.copy(file, place)
    return str(place)


def test_data_that_cannot_be_learned_from_are_refused(encoders, image_folder, spoken, told, tmp_path):
    model = str(encoders / "vit")
    (flat_images := tmp_path / "flat").mkdir()
    for file in (image_folder / "train" / "dark").iterdir():
        shutil.copy(file, flat_images)
    refused(match=r"^data\.label: .* has no labels; name their column", model=model, data=str(flat_images))
    (other := tmp_path / "other").mkdir()
    shutil.copytree(image_folder / "train", other / "train")
    shutil.copytree(image_folder / "test", other / "test")
    shutil.copytree(image_folder / "test" / "dark", other / "test" / "grey")
    refused(match=r"^data\.test: 1 of its classes \(grey\) have no sample in the split 'train'", model=model, data=str(other))
    silent = {"task": "ctc", "model": str(encoders / "voice"), "data": str(spoken)}
    (empty := tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_parquet(str(spoken / f"{split}.parquet")).remove_columns("text")
        rows = rows.add_column("text", [" " for _ in rows])
        rows.to_parquet(empty / f"{split}.parquet")
    root = f"data.root={spoken}"
    refused(root, match=r"^data\.text: no recording to learn from has a transcript", **{**silent, "data": str(empty)})
    refused("data.text=words", match=r"^data\.text: .* has no column of transcripts named words", **silent)


def test_peft_and_a_beam_search_are_asked_for_if_they_are_missing(encoders, image_folder, spoken, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "peft" or name.startswith("flashlight"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    given = {"model": str(encoders / "vit"), "data": str(image_folder)}
    refused("model.tune=lora", f"out={tmp_path / 'run'}", match=r"^model\.tune: lora needs peft.*mmssl\[lora\]", **given)
    assert not (tmp_path / "run").exists()
    voice = {"task": "ctc", "model": str(encoders / "voice"), "data": str(spoken)}
    refused("ctc.decoder=beam", match=r"^ctc\.decoder: beam needs flashlight-text", **voice)


def test_a_run_that_diverges_says_so(encoders, image_folder, tmp_path):
    words = ("optim.lr=1e30", "optim.warmup=0", "optim.clip=0", f"out={tmp_path / 'run'}")
    with pytest.raises(NonFiniteError, match=r"Lower optim\.lr"):
        finetune(checked(*words, model=str(encoders / "ours"), data=str(image_folder)))
    status = RunFolder.open(tmp_path / "run").read_status()
    assert (status["state"], status["code"]) == ("failed", 4)


def test_contradictions_are_told_at_once():
    with pytest.raises(RecipeError) as told:
        checked(
            "model.tune=head",
            "optim.layer_decay=0.5",
            "model.random=true",
            "optim.label_smoothing=0.1",
            "data.path=",
            task="ctc",
        )
    text = str(told.value)
    assert text.startswith("recipe has 4 errors:")
    for key in (
        "data.path: missing",
        "optim.layer_decay: 0.5, but with model.tune=head",
        "model.random: ",
        "optim.label_smoothing",
    ):
        assert key in text
