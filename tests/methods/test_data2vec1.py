import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.methods.data2vec1 import Data2Vec1
from mmssl.schedules import constant
from mmssl.types import Clock, Mask, View

VISION = {"norm": "pre", "positions": "relative", "layer_scale": 0.1, "prenet_depth": 0}
SPEECH = {"alibi": False, "prenet_depth": 0}
SETTINGS = {
    "vision": (VISION, {"collect": "block", "each_norm": "layer", "final_norm": "layer", "loss_scale": 1 / 16, "beta": 2.0}),
    "speech": (SPEECH, {"teacher_features": "share", "teacher_positions": "copy", "mask_start": "uniform"}),
    "text": (
        {},
        {"each_norm": "layer", "loss_scale": 1.0, "beta": 4.0, "head_hidden": 24, "teacher_features": "copy"},
    ),
}
MODALITIES = pytest.mark.parametrize("modality", ["vision", "speech", "text"])
PADDED = pytest.mark.parametrize(
    ("modality", "valid"),
    [("vision", None), ("speech", None), ("speech", (16, 11)), ("text", None), ("text", (9, 16))],
)


@pytest.fixture
def build(tiny):
    """Function: a small Data2Vec1 with the structure of the modality's base recipe, and a batch."""

    def build(modality, samples=2, copies=1, valid=None, options={}, **config):  # noqa: B006
        shape, chosen = SETTINGS[modality]
        config = shape | config
        return tiny(samples, copies, modality=modality, valid=valid, make=Data2Vec1, options=chosen | options, **config)

    return build


def randomised(method):
    """In float64; student and teacher differ, and no weight is where it starts."""
    draw = torch.Generator().manual_seed(0)
    for parameter in method.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw).double() / parameter.shape[-1] ** 0.5
    return method


def wide(batch):
    return batch._replace(views=[v._replace(x=v.x.double() if v.x.is_floating_point() else v.x) for v in batch.views])


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "trained", "teacher"),
    [
        # the speech teacher lacks the convolutions and the projection from 512 channels
        ("speech/data2vec1-base", 93_754_880, 93_754_880 - 4_206_592 - 1_024 - 512 * 768 - 768 - 768 - 768 * 768 - 768),
        ("text/data2vec1-base", 126_415_872, 126_415_872 - 768 * 1536 * 2 - 1536 - 768),
    ],
)
def test_parameter_counts_are_those_of_the_paper(name, trained, teacher):
    with torch.device("meta"):
        method = Recipe.load(name).build()
    assert count(p for p in method.parameters() if p.requires_grad) == trained
    assert count(method.teacher.state_dict().values()) == teacher


# One step by hand ------------------------------------------------------------------------------------------------------


def standardised(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / (variance + 1e-5) ** 0.5 for v in values]


def normed(x, how):
    """(L, D) of one sample, a column or a row at a time."""
    if how == "none":
        return x
    rows = x.T.tolist() if how == "instance" else x.tolist()
    done = torch.tensor([standardised(row) for row in rows], dtype=torch.float64)
    return done.T if how == "instance" else done


def smooth_l1(error, beta):
    error = abs(error)
    if beta == 0:
        return error**2
    return error**2 / (2 * beta) if error < beta else error - beta / 2


@PADDED
@pytest.mark.parametrize("options", [{}, {"beta": 0.05, "each_norm": "instance", "final_norm": "none", "collect": "ffn"}])
@torch.no_grad()
def test_the_loss_is_that_of_the_algorithm_done_row_by_row(build, modality, valid, options):
    method, batch = build(modality, copies=2, valid=valid, options=options)
    randomised(method)
    batch = wide(batch)
    chosen = {"collect": "ffn", "each_norm": "instance", "final_norm": "none", "beta": 0.0, "loss_scale": 0.25}
    chosen |= SETTINGS[modality][1] | options
    encoder, view, total = method.student.encoder, batch.views[0], []
    for row in range(4):
        x, hidden = view.x[row // 2 : row // 2 + 1], view.mask.hidden[row]
        if valid:  # the sample alone has no padding
            length = valid[row // 2]
            x, hidden = x[:, : length if modality == "text" else 400 + 320 * (length - 1)], hidden[:length]
        alone = View(x, modality)
        features = encoder.features(x)
        layers = method.teacher.encode(alone, features, chosen["collect"]).layers[-2:]
        target = normed(sum(normed(layer[0], chosen["each_norm"]) for layer in layers) / 2, chosen["final_norm"])
        if modality == "text":
            seen = encoder.features(torch.where(hidden, 49, x))
        else:
            seen = features.clone()
            seen[0, hidden] = method.mask_token.vector
        rebuilt = method.head(encoder.contextualize(seen).tokens)[0]
        assert rebuilt.shape == target.shape
        for token in hidden.nonzero().flatten().tolist():
            errors = (rebuilt[token] - target[token]).tolist()
            total.append(chosen["loss_scale"] * sum(smooth_l1(e, chosen["beta"]) for e in errors))
    found = method(batch, Clock()).losses
    assert len(total) == int(view.mask.hidden.sum())
    assert list(found) == ["tokens"]
    assert float(found["tokens"]) == pytest.approx(sum(total) / len(total), rel=1e-9)


@MODALITIES
def test_what_is_hidden_does_not_reach_the_student_and_reaches_the_teacher(build, modality):
    method, batch = build(modality)
    randomised(method)
    (view,) = wide(batch).views
    encoder, hidden = method.student.encoder, view.mask.hidden
    features = encoder.features(view.x)
    before = encoder.contextualize(method.mask_token(encoder, view, features)).tokens
    targets = method.teacher.encode(view, features).tokens
    if modality == "text":
        other = view._replace(x=torch.where(hidden, view.x.flip(0) + 1, view.x))
        spoilt = encoder.features(other.x)
    elif modality == "speech":
        spoilt, other = torch.where(hidden[..., None], features + 5.0, features), view
    else:
        patches = hidden.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        other = view._replace(x=torch.where(patches, view.x.flip(0), view.x))
        spoilt = encoder.features(other.x)
    assert not torch.equal(spoilt, features)
    after = encoder.contextualize(method.mask_token(encoder, other, spoilt)).tokens
    assert_close(after, before, rtol=0, atol=0)
    moved = (method.teacher.encode(other, spoilt).tokens - targets).abs().amax(2)
    assert bool((moved > 1e-6).all())  # every token of the teacher looks at what is hidden


def test_the_mask_token_stands_in_the_ids_of_text_and_the_teacher_sees_the_ids_as_they_are(build):
    method, batch = build("text", copies=2)
    seen, whole = [], []
    method.student.encoder.features.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method.teacher.encoder.features.register_forward_pre_hook(lambda _, args: whole.append(args[0]))
    method(batch, Clock())
    (view,) = batch.views
    assert_close(seen[-1], view.x.repeat_interleave(2, 0).masked_fill(view.mask.hidden, 49), rtol=0, atol=0)
    assert_close(whole, [view.x], rtol=0, atol=0)


@pytest.mark.parametrize(("start", "least", "spread"), [("uniform", 0.0, 12**-0.5), ("normal", -0.2, 0.02)])
def test_the_learned_vector_starts_as_asked(build, start, least, spread):
    vector = build("speech", dim=256, options={"mask_start": start}, position_groups=16)[0].mask_token.vector.detach()
    assert float(vector.min()) >= least
    assert abs(float(vector.std()) / spread - 1) < 0.15


@pytest.mark.parametrize("copies", [1, 3])
@MODALITIES
def test_one_step_runs_the_teacher_once_per_sample_and_the_student_on_all_tokens(build, modality, copies):
    method, batch = build(modality, copies=copies)
    teacher, student, local = [], [], []
    for encoder, calls in ((method.teacher.encoder, teacher), (method.student.encoder, student)):
        encoder.transformer.register_forward_hook(lambda _, args, out, calls=calls: calls.append(args[0].shape[:2]))
        if not isinstance(encoder.features, nn.Identity):
            encoder.features.register_forward_hook(lambda _, args, out: local.append(len(args[0])))
    method(batch, Clock())
    assert teacher == [(2, 16)]
    assert student == [(2 * copies, 16)]
    # speech shares its features; the ids of text are embedded with and without the mask token
    assert local == {"vision": [2, 2], "speech": [2], "text": [2, 2 * copies]}[modality]


# Teacher and gradients -------------------------------------------------------------------------------------------------


@MODALITIES
def test_every_trained_weight_gets_a_gradient_and_the_teacher_none(build, modality):
    method, batch = build(modality)
    randomised(method)
    method(wide(batch), Clock()).losses["tokens"].backward()
    for name, parameter in method.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name
    assert all(p.grad is None for p in method.teacher.network.parameters())
    assert not {id(p) for p in method.teacher.network.parameters()} & {id(p) for p in method.parameters()}


def test_after_a_step_text_embeddings_and_speech_positions_are_the_students_and_the_rest_an_average(build):
    for modality, copied in (("text", "encoder.features."), ("speech", "encoder.positions."), ("vision", "-")):
        method, _ = build(modality)
        method.teacher.momentum = constant(0.5)
        old = {name: t.clone() for name, t in method.teacher.network.named_parameters()}
        draw = torch.Generator().manual_seed(0)
        for parameter in method.student.parameters():
            parameter.data += torch.randn(parameter.shape, generator=draw)
        method.after_step(Clock(1))
        new = dict(method.student.named_parameters())
        for name, tensor in method.teacher.network.named_parameters():
            wanted = new[name] if name.startswith(copied) else (old[name] + new[name]) / 2
            assert_close(tensor, wanted, rtol=0, atol=1e-6, check_stride=False)
        assert {n for n in new if n not in old} == ({n for n in new if ".features." in n} if modality == "speech" else set())


@MODALITIES
def test_the_teacher_is_deterministic_in_training(build, modality):
    torch.manual_seed(0)
    method, batch = build(modality, dropout=0.1, attention_dropout=0.1, input_dropout=0.1, layer_drop=0.05)
    method.train()
    features = method.student.encoder.features(batch.views[0].x)
    first, second = (method.teacher.encode(batch.views[0], features).tokens for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    losses = [float(method(batch, Clock()).losses["tokens"].detach()) for _ in range(2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("modality", "valid"), [("speech", (16, 9, 12, 16)), ("text", (7, 16, 12, 11)), ("vision", None)])
def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradients(build, modality, valid):
    method, batch = build(modality, samples=4, copies=2, valid=valid)
    randomised(method)
    batch = wide(batch)
    (view,), terms = batch.views, float(method.terms(batch))

    def step(size):
        method.zero_grad()
        total = 0.0
        for first in range(0, 4, size):
            rows, masks = slice(first, first + size), slice(2 * first, 2 * (first + size))
            x, hidden, pad = view.x[rows], view.mask.hidden[masks], None
            if view.pad is not None:
                longest = max(valid[rows])
                x = x[:, : longest if modality == "text" else 400 + 320 * (longest - 1)]
                hidden, pad = hidden[:, :longest], view.pad[rows, :longest]
            micro = View(x, modality, pad if size > 1 else None, Mask.of(hidden, pad))
            micro = batch._replace(views=[micro], index=batch.index[rows], keys=batch.keys[rows])
            loss = method(micro, Clock()).losses["tokens"] * method.terms(micro) / terms
            loss.backward()
            total += float(loss.detach())
        return torch.tensor(total), [p.grad.clone() for p in method.parameters()]

    whole = step(4)
    for size in (1, 2):
        assert_close(step(size), whole, rtol=1e-9, atol=1e-11)


@PADDED
def test_health_is_measured_and_detached(build, modality, valid):
    method, batch = build(modality, copies=2, valid=valid)
    rebuilt, tokens = [], []
    method.head.register_forward_hook(lambda _, args, out: (tokens.append(args[0]), rebuilt.append(out))[0] and None)
    out = method(batch, Clock())
    (view,) = batch.views
    hidden, pad = view.mask.hidden, torch.zeros(2, 16, dtype=torch.bool) if view.pad is None else view.pad
    kept = ~pad.repeat_interleave(2, 0)
    local = method.student.encoder.features(view.x)[~pad]
    if modality == "text":  # of the input that the student reads
        local = method.mask_token(method.student.encoder, view)[kept]
    for name, rows in (
        ("prediction_std", rebuilt[0][hidden]),
        ("encoder_std", tokens[0][kept]),
        ("feature_std", local),
    ):
        assert_close(out.health[name], (rows.var(0) + 1e-6).sqrt().mean(), rtol=1e-5, atol=1e-6)
    assert float(out.health["masked_share"]) == pytest.approx(float(hidden.sum() / kept.sum()))
    assert set(out.health) == {"target_std", "prediction_std", "feature_std", "encoder_std", "masked_share"}
    assert not any(value.requires_grad for value in [*out.health.values(), out.embedding])
    means = torch.stack([row[own].mean(0) for row, own in zip(tokens[0], kept)])
    assert_close(out.embedding, means.view(2, 2, 16).mean(1).detach())


def test_impossible_options_are_refused_by_name(build):
    with pytest.raises(ValueError, match=r"^top_k: 4 layers"):
        build("speech", top_k=4)
    with pytest.raises(ValueError, match=r"^head_hidden: -1"):
        build("speech", options={"head_hidden": -1})
    method, batch = build("vision")
    with pytest.raises(ValueError, match=r"^views\.mask: "):
        method(batch._replace(views=[batch.views[0]._replace(mask=None)]), Clock())


def test_text_without_a_mask_token_is_refused():
    from mmssl.methods.data2vec1 import Data2Vec1
    from mmssl.model.configuration import MmsslConfig
    from mmssl.model.encoder import Encoder

    encoder = Encoder.from_config(MmsslConfig("text", 16, depth=2, heads=2, extra_tokens=0, vocab_size=20))
    with pytest.raises(ValueError, match=r"^model\.mask_token_id: missing"):
        Data2Vec1(encoder, top_k=1)
