"""Masked and causal language models, ELECTRA, and MAE on ids."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.distributed import all_sum, world
from mmssl.errors import RecipeError
from mmssl.masks import uniform
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.mask_token import Corruption, corrupt
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.random import generator
from mmssl.types import Batch, Clock, Mask, View
from modalities.text.convert import from_native
from modalities.text.masks import replacing, single
from tests.ranks import on_two_ranks

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
OPTIONS = {
    "mlm": {},
    "electra": {"generator": 0.5},
    "causal_lm": {},
    "mae": {"decoder": TokenDecoderOptions(16, 1, 2)},
}
NAMES = list(OPTIONS)
LENGTHS = (16, 9, 12, 5, 16, 14, 7, 11)
CLOCK = Clock(0, 1, 0)
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "mask_token_id": 49}


def build(name, **options):
    torch.manual_seed(0)
    causal = name == "causal_lm"
    shape = {"vocab_size": 50, "max_tokens": 24, "hidden_size": 16, "depth": 2, "heads": 2, "extra_tokens": 0} | IDS
    config = MmsslConfig(modality="text", **shape, causal=causal, norm="pre" if causal else "post", norm_eps=1e-5)
    return METHODS[name](Encoder.from_config(config), **OPTIONS[name] | options).double().train()


def batch_of(name, rows=range(8), padded=True):
    """Texts of the samples `rows`, whose masks hide unequal shares; without padding they are 16 tokens long."""
    lengths = [LENGTHS[i] if padded else 16 for i in rows]
    longest, texts, hidden = max(lengths), [], []
    for i, n in zip(rows, lengths):
        draw = generator("text", i)
        ids = torch.cat([torch.tensor([0]), torch.randint(3, 49, (n - 2,), generator=draw), torch.tensor([2])])
        own = uniform(n, 1, 0.4, draw)[0] if name == "mae" else single(ids > 2, 1 + i % 3, draw)
        texts.append(F.pad(ids, (0, longest - n), value=1))
        hidden.append(F.pad(own, (0, longest - n)))
    pad = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    pad, rows = pad if bool(pad.any()) else None, torch.tensor([*rows])
    mask = (
        None if name == "causal_lm" else Mask.of(torch.stack(hidden), pad) if name == "mae" else replacing(torch.stack(hidden))
    )
    return Batch([View(torch.stack(texts), "text", pad, mask)], rows, tuple(rows.tolist()))


def total(out):
    return torch.stack(list(out.losses.values())).sum()


def shuffled(method, scale=0.3):
    """No weight is where it starts."""
    draw = torch.Generator().manual_seed(1)
    for parameter in method.parameters():
        parameter.data = parameter.data + scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return method


# transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_losses_and_states_are_those_of_transformers(kind):
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    if kind == "bert":
        native = BertForMaskedLM(BertConfig(**shape, max_position_embeddings=20)).double().eval()
        base, head = native.bert, native.cls.predictions
        parts = (head.transform.dense, head.transform.LayerNorm, head)
    else:
        config = RobertaConfig(**shape, max_position_embeddings=22, type_vocab_size=1, layer_norm_eps=1e-5)
        native = RobertaForMaskedLM(config).double().eval()
        base, parts = native.roberta, (native.lm_head.dense, native.lm_head.layer_norm, native.lm_head)
    for parameter in native.parameters():  # as they are drawn, layers hardly differ
        parameter.data += 0.2 * torch.randn_like(parameter)
    config, weights = from_native(base.config, base.state_dict())
    config.mask_token_id = 59
    method = METHODS["mlm"](Encoder.from_config(config)).double().eval()
    method.student.encoder.load_state_dict(weights)
    dense, norm, last = parts
    method.head[0].load_state_dict(dense.state_dict())
    method.head[2].load_state_dict(norm.state_dict())
    method.head[3].bias.data.copy_(last.bias)

    begin = config.pad_token_id
    ids = torch.randint(3, 59, (3, 18), generator=generator("ids"))
    pad = torch.arange(18) >= torch.tensor([18, 11, 15])[:, None]
    ids = ids.masked_fill(pad, begin)
    hidden = torch.stack([single(~row, 4, generator(i)) for i, row in enumerate(pad)])
    view = View(ids, "text", pad, replacing(hidden))
    seen = corrupt(view, method.student.encoder.features, (5, 6, 7), method.corruption)
    theirs = native(
        input_ids=seen.x,
        attention_mask=(~pad).long(),
        labels=ids.masked_fill(~hidden, -100),
        output_hidden_states=True,
    )
    ours = method(Batch([view], torch.arange(3), (5, 6, 7)), CLOCK).losses["tokens"]
    assert_close(ours, theirs.loss, rtol=0, atol=1e-10)
    states = method.student.encoder(seen, collect="block")
    for own, other in zip(states.layers, theirs.hidden_states[1:], strict=True):
        assert_close(own[~pad], other[~pad], rtol=0, atol=1e-10)
    assert_close(method.head(states.tokens)[~pad], theirs.logits[~pad], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "key"), [("mlm-bert-base", "bert_base_mlm"), ("mlm-base", "roberta_base_mlm")])
def test_recipes_have_the_published_number_of_weights(name, key):
    with torch.device("meta"):
        method = Recipe.load(f"text/{name}").build()
    known = VECTORS["hf_param_counts"]
    one_type = 768 * (name == "mlm-base")  # added to every token alike
    assert sum(parameter.numel() for parameter in method.parameters()) == known[key] - one_type


# what hidden tokens become ------------------------------------------------------------------------------------------


def corrupted(corruption, rows=400, length=512, hidden=None, copies=1):
    """Originals 3, hidden throughout unless told, of a vocabulary of 50."""
    features = build("mlm").student.encoder.features
    features.length = 512
    hidden = torch.ones(rows * copies, length, dtype=torch.bool) if hidden is None else hidden
    view = View(torch.full((rows, length), 3), "text", None, replacing(hidden))
    return corrupt(view, features, range(rows), corruption).x


def test_eight_in_ten_are_masked_one_is_random_one_stays():
    ids = corrupted(Corruption())
    share = torch.bincount(ids.flatten(), minlength=50) / ids.numel()
    others = [i for i in range(50) if i not in (0, 1, 2, 3, 49)]
    assert float(share[49]) == pytest.approx(0.8, abs=0.004)
    assert float(share[3]) == pytest.approx(0.1 + 0.1 / 46, abs=0.004)  # a random one may be the original
    assert_close(share[others], torch.full((45,), 0.1 / 46), rtol=0, atol=0.0006)
    assert not share[[0, 1, 2]].any()
    every = corrupted(Corruption(special=True))
    share = torch.bincount(every.flatten(), minlength=50) / every.numel()
    assert_close(share[[0, 1, 2, 4, 48]], torch.full((5,), 0.1 / 50), rtol=0, atol=0.0006)
    assert float(share[49]) == pytest.approx(0.8 + 0.1 / 50, abs=0.004)


def test_shares_of_electra_and_of_spans():
    ids = corrupted(Corruption(mask=0.85, random=0.0), 100)
    assert set(ids.unique().tolist()) == {3, 49}
    assert float((ids == 49).float().mean()) == pytest.approx(0.85, abs=0.01)
    hidden = (torch.arange(512) % 4 < 3).expand(400, -1)  # spans of three
    ids = corrupted(Corruption(by="span"), hidden=hidden)
    spans = ids.unflatten(1, (-1, 4))
    assert (spans[..., 3] == 3).all()
    masked = (spans[..., :3] == 49).sum(-1)
    assert set(masked.unique().tolist()) == {0, 3}
    assert float((masked == 3).float().mean()) == pytest.approx(0.8, abs=0.01)
    kept = (spans[..., :3] == 3).all(-1)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.01)
    random = spans[(masked == 0) & ~kept]
    assert float((random[:, 0] == random[:, 1]).float().mean()) < 0.1  # each token of its own


def test_what_a_token_becomes_depends_on_its_sample_alone():
    method, batch = build("mlm"), batch_of("mlm")
    features = method.student.encoder.features
    whole = corrupt(batch.views[0], features, batch.keys, Corruption(0.4, 0.4))
    for row in range(8):
        alone = batch_of("mlm", [row])
        own = corrupt(alone.views[0], features, alone.keys, Corruption(0.4, 0.4))
        assert own.x.equal(whole.x[row : row + 1, : own.x.shape[1]])
    assert not whole.x.equal(corrupt(batch.views[0], features, range(9, 17), Corruption(0.4, 0.4)).x)
    two = batch.views[0]._replace(mask=replacing(batch.views[0].mask.hidden.repeat_interleave(2, 0)))
    twice = corrupt(two, features, batch.keys, Corruption(0.4, 0.4))
    assert twice.x.shape == (16, 16)
    assert twice.pad.equal(two.pad.repeat_interleave(2, 0))
    assert not twice.x[::2].equal(twice.x[1::2])


# methods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_finite_and_reach_every_weight(name, padded):
    method = shuffled(build(name))
    out = method(batch_of(name, padded=padded), CLOCK)
    total(out).backward()
    for value in (*out.losses.values(), *out.health.values()):
        assert value.shape == ()
        assert bool(value.isfinite())
    assert not any(value.requires_grad for value in out.health.values())
    assert out.embedding.shape == (8, 16)
    assert not out.embedding.requires_grad
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_batch_by_heart(name):
    method, batch = build(name), batch_of(name)
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    found = []
    for _ in range(20):
        loss = total(method(batch, CLOCK))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0], found


@pytest.mark.parametrize("name", ["mlm", "causal_lm", "electra"])
def test_the_table_is_one_parameter_that_is_saved_once(name):
    method = shuffled(build(name))
    head = {"mlm": lambda m: m.head[3], "causal_lm": lambda m: m.head, "electra": lambda m: m.generator_head[3]}[name]
    assert head(method).weight is method.student.encoder.features.tokens.weight
    state = method.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # which safetensors asks for
    assert len([*method.parameters()]) == len({key for key, _ in method.named_parameters()})
    other = build(name)
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    assert head(other).weight is other.student.encoder.features.tokens.weight
    batch = batch_of(name)
    assert_close(total(other(batch, CLOCK)), total(method(batch, CLOCK)), rtol=0, atol=0)
    del state["student.encoder.features.tokens.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_an_untrained_model_is_as_good_as_a_guess():
    """Logits of zero would score log V (BERT's 10.326)."""
    torch.manual_seed(0)
    config = MmsslConfig(modality="text", vocab_size=30522, hidden_size=32, depth=2, heads=2, extra_tokens=0, **IDS)
    method = METHODS["mlm"](Encoder.from_config(config))
    loss = method(batch_of("mlm"), CLOCK).losses["tokens"].item()
    assert loss == pytest.approx(VECTORS["initial_losses"]["values"]["bert_30522"], rel=0.02)


def test_mlm_makes_logits_of_hidden_tokens_only():
    method, batch = build("mlm"), batch_of("mlm", padded=False)
    shapes = []
    method.head.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    (view,) = batch.views
    loss = total(method(batch, CLOCK))
    hidden = view.mask.hidden
    every = batch._replace(views=[view._replace(mask=Mask.replacing(hidden))])  # says nothing about what is wanted
    assert_close(total(method(every, CLOCK)), loss)
    assert shapes == [(8, 3, 50), (8, 16, 50)]
    rows = batch._replace(views=[view._replace(mask=Mask.of(hidden[[1] * 8]))])  # as many in each row
    method(rows, CLOCK)
    assert shapes[2] == (8, 2, 50)


def test_mlm_shows_what_it_finds_most_likely():
    method, batch = shuffled(build("mlm")).eval(), batch_of("mlm")
    (view,) = batch.views
    rebuilt = method.rebuild(batch, CLOCK)
    hidden = view.mask.hidden
    seen = method.student.encoder(corrupt(view, method.student.encoder.features, batch.keys, method.corruption))
    best = method.head(seen.tokens).argmax(-1)
    assert rebuilt.truth.equal(view.x)
    assert rebuilt.hidden.equal(hidden)
    assert rebuilt.guess[hidden].equal(best[hidden])
    accuracy = float((best == view.x)[hidden].float().mean())
    assert float(method(batch, CLOCK).health["accuracy"]) == pytest.approx(accuracy)


def test_nothing_before_a_token_depends_on_it():
    method = shuffled(build("causal_lm")).eval()
    batch = batch_of("causal_lm", padded=False)
    (view,) = batch.views

    def logits(x):
        return method.head(method.student.encoder(view._replace(x=x)).tokens)

    whole = logits(view.x)
    for t in (1, 7, 15):
        other = view.x.clone()
        other[:, t] = 3 + (other[:, t] - 2) % 40
        changed = logits(other)
        assert changed[:, :t].equal(whole[:, :t])
        assert bool((changed[:, t:] != whole[:, t:]).any(-1).all())


def test_causal_loss_is_that_of_a_loop_over_real_tokens():
    method, batch = shuffled(build("causal_lm")).eval(), batch_of("causal_lm")
    (view,), found = batch.views, []
    for row, length in zip(view.x, LENGTHS):
        alone = method.student.encoder(View(row[None, :length], "text"))
        chance = method.head(alone.tokens)[0].log_softmax(-1)
        found += [-chance[t, row[t + 1]] for t in range(length - 1)]
    out = method(batch, CLOCK)
    assert_close(out.losses["next"], torch.stack(found).mean())
    assert int(method.terms(batch)) == len(found) == sum(LENGTHS) - 8
    ends = [block.attn.proj.weight for block in build("causal_lm").student.encoder.transformer.blocks]
    assert float(torch.cat(ends).detach().std()) == pytest.approx(0.02 / 2, rel=0.1)  # four branches


def test_electra_judges_tokens_that_the_generator_drew():
    method, batch = shuffled(build("electra")), batch_of("electra")
    (view,), seen = batch.views, []
    encoder = method.student.encoder
    encoder.features.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    out = method(batch, CLOCK)
    gaps, filled = seen
    hidden, real = view.mask.hidden, ~view.pad
    assert gaps.equal(corrupt(view, encoder.features, batch.keys, method.corruption).x)
    assert set(gaps[hidden & (gaps != view.x)].tolist()) == {49}
    assert filled[~hidden].equal(view.x[~hidden])
    tokens = method.generator(encoder.features(gaps), view.pad)
    logits = method.generator_head(tokens)
    assert tokens.shape == (8, 16, 8)
    score = method.head(encoder(View(filled, "text", view.pad)).tokens).squeeze(-1)
    replaced = (filled != view.x).double()
    error = F.binary_cross_entropy_with_logits(score, replaced, reduction="none")
    assert_close(out.losses["tokens"], F.cross_entropy(logits[hidden], view.x[hidden]))
    assert_close(out.losses["replaced"], 50 * error[real].mean())
    assert_close(out.health["replaced_share"].double(), replaced[real].mean())
    assert_close(out.health["found"].double(), (score > 0)[replaced.bool()].double().mean())


def test_electra_samples_by_probability():
    method, rows = build("electra"), 4000
    logits = torch.tensor([2.0, -1.0, 0.0, -math.inf, 1.0], dtype=torch.float64).expand(rows, 3, 5)
    view = View(torch.zeros(rows, 3, dtype=torch.int64), "text", None, Mask.replacing(torch.ones(rows, 3, dtype=torch.bool)))
    drawn = method._sample(logits, torch.arange(3).expand(rows, 3), Batch([view], torch.arange(rows), tuple(range(rows))))
    share = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    assert_close(share.double(), logits[0, 0].softmax(-1), rtol=0, atol=0.015)
    assert share[3] == 0


# ranks --------------------------------------------------------------------------------------------------------------


def train(rank, name, steps=2, rate=0.05):
    """Losses, last gradients and state of plain descent; micro-batches weigh as the trainer does it."""
    method, losses, gradients = shuffled(build(name), 0.1), [], {}
    for step in range(steps):
        rows = [(i + 3 * step) % 8 for i in range(8)][rank :: world()]
        batch = batch_of(name, rows)
        terms = method.terms(batch).double()
        loss = total(method(batch, CLOCK)) * terms * world() / all_sum(terms)
        method.zero_grad()
        loss.backward()
        losses.append(all_sum(loss.detach()) / world())
        for key, parameter in method.named_parameters():
            gradients[key] = all_sum(parameter.grad) / world()
            parameter.data -= rate * gradients[key]
    return torch.stack(losses), gradients, {key: value.detach().clone() for key, value in method.state_dict().items()}


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(train_all, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name, ranks):
    """Although they pad, hide and predict unequal numbers of tokens."""
    losses, gradients, state = train(0, name)
    for one in ranks:
        other_losses, other_gradients, other_state = one[name]
        assert_close(other_losses, losses, rtol=1e-9, atol=1e-12)
        for key, value in gradients.items():
            assert_close(other_gradients[key], value, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        for key, value in state.items():
            assert_close(other_state[key], value, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


# bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "text"),
    [
        ("mlm", ["model.mask_token_id=null"], r"model\.mask_token_id: missing; mlm puts that token"),
        ("mlm", ["method.corruption={mask: 0.9, random: 0.2}"], r"method\.corruption: mask 0\.9 and random 0\.2, must be"),
        ("mlm", ["method.corruption={mask: -1}"], r"method\.corruption: mask -1"),
        ("mlm", ["views.mask=null"], r"views\.mask: mlm learns from hidden tokens"),
        ("mlm", ["views.mask.kind=words"], r"views\.mask\.kind: found 'words'"),
        ("electra", ["method.generator=1.5"], r"method\.generator: 1\.5, must be a share"),
        ("electra", ["method.generator=0"], r"method\.generator: found 0"),
        ("electra", ["method.discriminator_weight=-1"], r"method\.discriminator_weight: found -1"),
        ("causal_lm", ["model.causal=false"], r"model\.causal: false, and causal_lm would see"),
        ("causal_lm", ["model.extra_tokens=1"], r"model\.extra_tokens: 1, but a text begins"),
        ("causal_lm", ["views.mask={}"], r"views\.mask: causal_lm sees whole views; leave it out"),
    ],
)
def test_what_cannot_work_is_refused_in_words(name, more, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"text/{name}-demo", *more)


def test_pixels_have_no_ids():
    encoder = Encoder.from_config(MmsslConfig(image_size=8, patch_size=4, hidden_size=16, depth=1, heads=2, modality="vision"))
    for name in ("mlm", "electra", "causal_lm"):
        with pytest.raises(ValueError, match=rf"data\.modality: {name} .* take text"):
            METHODS[name](encoder)
