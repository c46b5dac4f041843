"""Heads for tasks: their losses by hand in float64, padding, saving, and what a stranger loads."""

import math

import pytest
import torch
import transformers
from torch.testing import assert_close

from mmssl.hub.export import auto_map, modelling_code
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.model.register import auto_classes
from mmssl.model.tasks import TASKS
from tests.conftest import SHAPES
from tests.strangers import LACKING, start

MODALITY = {
    "AutoModelForImageClassification": "vision",
    "AutoModelForAudioClassification": "speech",
    "AutoModelForCTC": "speech",
    "AutoModelForSequenceClassification": "text",
    "AutoModelForTokenClassification": "text",
    "AutoModelForMaskedLM": "text",
}
CLASSES, VOCABULARY = 3, 5
auto_classes()


def made(task, **options):
    """A small model with a head, the same at each call, in float64."""
    modality = MODALITY[task]
    own = {"num_labels": CLASSES}
    if task == "AutoModelForCTC":
        own |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "ctc_loss_reduction": "mean"}
    shape = {"hidden_size": 16, "depth": 2, "heads": 2, **SHAPES[modality], "prenet_depth": 0}
    torch.manual_seed(0)
    model = getattr(transformers, task).from_config(MmsslConfig(modality=modality, **shape, **own, **options))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.double().eval()


def given(task):
    """Two inputs, of which one is padded where that can be, and labels."""
    draw = torch.Generator().manual_seed(1)
    if MODALITY[task] == "vision":
        x = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw).double()}
    elif MODALITY[task] == "speech":
        mask = (torch.arange(4000) < torch.tensor([[4000], [2500]])).long()
        x = {"input_values": torch.randn(2, 4000, generator=draw).double() * mask, "attention_mask": mask}
    else:
        ids = torch.randint(2, 49, (2, 6), generator=draw)
        mask = (torch.arange(6) < torch.tensor([[6], [4]])).long()
        x = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    labels = {
        "AutoModelForCTC": torch.tensor([[1, 2, 2], [3, -100, -100]]),
        "AutoModelForTokenClassification": torch.tensor([[0, 1, 2, -100, 0, 1], [2, 2, 0, 1, -100, -100]]),
        "AutoModelForMaskedLM": torch.tensor([[5, -100, 7, -100, -100, 9], [-100, 4, -100, -100, -100, -100]]),
    }
    return x, labels.get(task, torch.tensor([2, 0]))


def paths(labels, frames, blank=0):
    """All sequences of so many frames that collapse to the labels."""
    found = [[]]
    for _ in range(frames):
        found = [[*path, token] for path in found for token in range(VOCABULARY)]
    collapsed = lambda path: [t for i, t in enumerate(path) if t != blank and (i == 0 or path[i - 1] != t)]  # noqa: E731
    return [path for path in found if collapsed(path) == labels]


def by_hand(task, logits, labels):
    """The loss, in loops."""
    rows = logits.log_softmax(-1).tolist()
    if task == "AutoModelForCTC":
        raise AssertionError("see the test of its own")
    if labels.ndim == 1:
        return -sum(row[label] for row, label in zip(rows, labels.tolist())) / 2
    terms = [-row[label] for many, line in zip(rows, labels.tolist()) for row, label in zip(many, line) if label >= 0]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("task", [name for name in TASKS if name != "AutoModelForCTC"])
def test_losses_are_those_of_transformers(task):
    model, (inputs, labels) = made(task), given(task)
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        assert_close(out.loss.double(), torch.tensor(by_hand(task, out.logits, labels)).double(), rtol=1e-6, atol=0)
        loss, logits = model(**inputs, labels=labels, return_dict=False)[:2]
        assert_close((loss, logits), (out.loss, out.logits), rtol=0, atol=0)
        assert model(**inputs).loss is None


def test_the_loss_of_transcripts_sums_over_all_alignments():
    model, (inputs, _) = made("AutoModelForCTC"), given("AutoModelForCTC")
    inputs = {name: tensor[:, :1700] for name, tensor in inputs.items()}  # 5 frames; of the second row 3
    inputs["attention_mask"] = (torch.arange(1700) < torch.tensor([[1700], [1100]])).long()
    labels = torch.tensor([[1, 2, 2], [3, -100, -100]])
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    assert model._get_feat_extract_output_lengths(torch.tensor([1700, 1100])).tolist() == [5, 3]
    chances, wanted = out.logits.softmax(-1).tolist(), 0.0
    for row, frames, line in ((0, 5, [1, 2, 2]), (1, 3, [3])):
        total = sum(math.prod(chances[row][i][token] for i, token in enumerate(path)) for path in paths(line, frames))
        wanted -= math.log(total) / len(line) / 2  # the mean of transformers: by the length of each, then over the batch
    assert_close(out.loss, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    model.config.ctc_loss_reduction, model.config.ctc_zero_infinity = "sum", True
    assert model(**inputs, labels=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]])).loss == 0  # too long for any alignment


@pytest.mark.parametrize("task", [task for task in TASKS if MODALITY[task] != "vision"])
@torch.no_grad()
def test_padding_changes_nothing(task):
    model, (inputs, _) = made(task), given(task)
    name = next(iter(inputs))
    length = int(inputs["attention_mask"][1].sum())
    alone = model(**{name: inputs[name][1:, :length]}).logits
    both = model(**inputs).logits[1:]
    assert_close(both[:, : alone.shape[1]], alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_classes_are_told_from_what_the_encoder_pools(pooling):
    model = made("AutoModelForImageClassification", pooling=pooling)
    (inputs, _) = given("AutoModelForImageClassification")
    pooled = model.mmssl(**inputs).pooler_output
    assert_close(model(**inputs).logits, pooled @ model.classifier.weight.T + model.classifier.bias)
    tokens = model.mmssl(**inputs).last_hidden_state
    assert_close(pooled, tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1))


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_an_encoder_gets_a_head_and_is_saved_with_it(task, tmp_path):
    model, (inputs, labels) = made(task).float(), given(task)
    inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    model.mmssl.save_pretrained(tmp_path / "bare")
    more = {"vocab_size": VOCABULARY, "pad_token_id": 0} if task == "AutoModelForCTC" else {"num_labels": CLASSES}
    fresh, told = getattr(transformers, task).from_pretrained(tmp_path / "bare", output_loading_info=True, **more)
    assert told["missing_keys"]
    assert not [name for name in told["missing_keys"] if name.startswith("mmssl.")]
    assert not told["unexpected_keys"]
    wanted = model.mmssl(**inputs).last_hidden_state
    assert_close(fresh.mmssl(**inputs).last_hidden_state, wanted, rtol=0, atol=0)
    head = [p for name, p in fresh.named_parameters() if not name.startswith("mmssl.") and p.ndim == 2]
    assert all(0.01 < p.std() < 0.03 for p in head)  # drawn, not what was in memory
    model.save_pretrained(tmp_path / "whole")
    again = getattr(transformers, task).from_pretrained(tmp_path / "whole").eval()
    assert_close(again(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss, rtol=0, atol=0)
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(encoder) is MmsslModel
    assert_close(encoder(**inputs).last_hidden_state, wanted, rtol=0, atol=0)


def test_words_are_told_by_the_embedding_table(tmp_path):
    model = made("AutoModelForMaskedLM")
    assert model.decoder.weight is model.mmssl.encoder.features.tokens.weight
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.decoder.weight is again.mmssl.encoder.features.tokens.weight


def test_the_feature_encoder_can_be_frozen():
    model = made("AutoModelForCTC")
    model.freeze_feature_encoder()
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert still
    assert all(".features." in name for name in still)


def test_a_head_for_another_kind_of_data_is_refused():
    shape = {"hidden_size": 16, "depth": 1, "heads": 2}
    with pytest.raises(ValueError, match="MmsslForCTC needs a model of input_values or input_features, not of pixel_values"):
        TASKS["AutoModelForCTC"](MmsslConfig(image_size=16, vocab_size=4, pad_token_id=0, **shape))
    with pytest.raises(ValueError, match=r"config\.vocab_size and config\.pad_token_id: missing"):
        TASKS["AutoModelForCTC"](MmsslConfig(modality="speech", alibi=False, extra_tokens=0, **shape))
    several = MmsslConfig(members={"a": {"modality": "vision"}, "b": {"modality": "vision"}}, **shape)
    with pytest.raises(ValueError, match=r"several kinds of data \(a, b\); load the folder of one"):
        TASKS["AutoModelForImageClassification"](several)


STRANGER = (
    LACKING
    + """
import transformers
torch.set_num_threads(1)
for folder, task in zip(*[iter(sys.argv[1:])] * 2):
    model = getattr(transformers, task).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(f"{folder}/{task}.pt", weights_only=True)
    torch.save(model(**inputs).loss.detach(), f"{folder}/{task}.loss")
assert not LACKS & {name.split(".")[0] for name in sys.modules}
"""
)


def test_strangers_load_all_heads(tiny_recipe, tmp_path):
    words, wanted = [], {}
    for task in TASKS:
        folder, model, (inputs, labels) = tmp_path / task, made(task).float(), given(task)
        inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        model.config.auto_map = auto_map(model.config)
        model.save_pretrained(folder)
        recipe = tiny_recipe()
        recipe.data.modality = MODALITY[task]
        (folder / "modeling_mmssl.py").write_text(modelling_code([recipe]))
        torch.save(inputs | {"labels": labels}, folder / f"{task}.pt")
        wanted[task] = model(**inputs, labels=labels).loss.detach()
        words += [folder, task]
    process = start(tmp_path, STRANGER, *words)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    for task, loss in wanted.items():
        assert_close(torch.load(tmp_path / task / f"{task}.loss", weights_only=True), loss, rtol=1e-6, atol=0)
