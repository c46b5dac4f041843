"""Features of a sample do not depend on what it is batched with."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.types import View

SHORT, LONG = 16_000, 20_000  # 1 s and 1.25 s: 49 and 62 frames


@pytest.fixture(scope="module", params=[True, False], ids=["alibi", "no alibi"])
def hearing(request):
    """A small speech model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"conv_channels": 8, "position_groups": 4, "alibi": request.param}
        return MmsslModel(MmsslConfig("speech", 32, 3, 4, 1, extra_tokens=0, norm_eps=1e-5, **options)).eval()


@pytest.fixture(scope="module")
def reading():
    """A small text model with a cls token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MmsslModel(MmsslConfig("text", 32, 3, 4, extra_tokens=1, vocab_size=50, max_tokens=20)).eval()


@pytest.fixture(scope="module")
def waves():
    """A short wave and a long one; the short one alone, and both in a batch."""
    draw = torch.Generator().manual_seed(1)
    short, long = torch.randn(1, SHORT, generator=draw), torch.randn(1, LONG, generator=draw)
    return short, torch.cat([F.pad(short, (0, LONG - SHORT)), long])


@torch.no_grad()
def test_speech_alone_and_padded_agree(hearing, waves):
    short, both = waves
    encoder, pad = hearing.encoder, torch.arange(62) >= torch.tensor([[49], [62]])
    alone, padded = encoder(View(short, "speech")), encoder(View(both, "speech", pad))
    assert alone.tokens.shape == (1, 49, 32)
    assert_close(padded.tokens[:1, :49], alone.tokens, rtol=0, atol=1e-4)
    assert_close(encoder.pool(padded)[:1], encoder.pool(alone), rtol=0, atol=1e-4)
    assert_close(padded.tokens[1:], encoder(View(both[1:], "speech")).tokens, rtol=0, atol=1e-4)
    noisy = both.clone()
    noisy[0, SHORT:] = 7.0  # what stands in the padding has no influence either
    assert_close(encoder(View(noisy, "speech", pad)).tokens[0, :49], padded.tokens[0, :49], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_speech_model_finds_its_padding_from_an_attention_mask_of_samples(hearing, waves):
    short, both = waves
    mask = (torch.arange(LONG) < torch.tensor([[SHORT], [LONG]])).long()
    alone, padded = hearing(input_values=short), hearing(input_values=both, attention_mask=mask)
    assert_close(padded.last_hidden_state[:1, :49], alone.last_hidden_state, rtol=0, atol=1e-4)
    assert_close(padded.pooler_output[:1], alone.pooler_output, rtol=0, atol=1e-4)
    same = hearing(input_values=short, attention_mask=torch.ones(1, SHORT, dtype=torch.long))
    assert_close(same.last_hidden_state, alone.last_hidden_state, rtol=0, atol=0)
    without = hearing(input_values=both)
    assert float((without.pooler_output[:1] - alone.pooler_output).abs().max()) > 1e-2


@torch.no_grad()
def test_positions_that_let_padding_refill_between_layers_would_differ(hearing, waves):
    """As the authors' do, who zero padded frames before the first layer only."""
    short, both = waves
    encoder = hearing.encoder
    pad = torch.arange(62) >= torch.tensor([[49], [62]])

    def authors(features):
        x = features.transpose(1, 2)
        for conv in encoder.positions.convs:
            x = F.gelu(F.layer_norm(conv(x).transpose(1, 2), (32,))).transpose(1, 2)
        return features + x.transpose(1, 2)

    alone, batch = encoder.features(short), encoder.features(both).masked_fill(pad[..., None], 0.0)
    assert_close(encoder.positions(alone)[0], authors(alone))  # the same without padding
    apart = (authors(batch)[0, :49] - authors(alone)[0]).abs().amax(1)
    assert float(apart[-9:].min()) > 1e-3  # a frame sees nine to each side
    ours = encoder.positions(encoder.features(both), None, pad)[0][0, :49]
    assert_close(ours, authors(alone)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16_000, 49), (20_000, 62)])
def test_frames_that_padding_reaches_into_are_padding(hearing, samples, frames):
    mask = (torch.arange(LONG) < samples).long()[None]
    for given in (mask, mask.bool(), mask.int()):
        assert hearing.encoder.features.pad(given)[0].tolist() == [i >= frames for i in range(62)]


@torch.no_grad()
def test_a_row_of_nothing_but_padding_is_finite(hearing):
    mask = torch.stack([torch.ones(4000), torch.zeros(4000)]).long()
    out = hearing(input_values=torch.zeros(2, 4000), attention_mask=mask)
    assert bool(out.pooler_output.isfinite().all())


@torch.no_grad()
def test_text_alone_and_padded_agree(reading):
    ids = torch.randint(2, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[0, 12:] = 1
    pad, mask = ids == 1, (ids != 1).long()
    encoder = reading.encoder
    alone, padded = encoder(View(ids[:1, :12], "text")), encoder(View(ids, "text", pad))
    assert_close(padded.tokens[:1, :12], alone.tokens, rtol=0, atol=1e-5)
    assert_close(padded.cls[:1], alone.cls, rtol=0, atol=1e-5)
    assert_close(encoder.pool(padded)[:1], encoder.pool(alone), rtol=0, atol=1e-5)
    for given in ({"attention_mask": mask}, {"attention_mask": mask.bool()}, {"pad": pad}):
        out = reading(input_ids=ids, **given)
        assert_close(out.last_hidden_state[:1, 1:13], alone.tokens, rtol=0, atol=1e-5)
        assert_close(out.last_hidden_state[:1, 0], alone.cls, rtol=0, atol=1e-5)
        assert_close(out.pooler_output[:1], encoder.pool(alone), rtol=0, atol=1e-5)
    assert float((reading(input_ids=ids).pooler_output[:1] - encoder.pool(alone)).abs().max()) > 1e-2


def test_places_of_text_count_from_behind_the_id_of_padding(reading):
    features, seen = reading.encoder.features, []
    handle = features.places.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    features(torch.tensor([[5, 6, 7, 1, 1], [5, 1, 7, 8, 9]]))
    handle.remove()
    assert seen == [[[2, 3, 4, 1, 1], [2, 1, 3, 4, 5]]]
    assert features.tokens.weight[1].abs().max() == features.places.weight[1].abs().max() == 0
    assert features.places.num_embeddings == 22
    with pytest.raises(ValueError, match=r"^21 tokens; the longest input has 20"):
        features(torch.full((1, 21), 5))


def test_a_model_without_padding_takes_an_attention_mask_of_ones():
    model = MmsslModel(MmsslConfig(hidden_size=16, depth=1, heads=2, image_size=16, patch_size=8)).eval()
    x = torch.zeros(2, 3, 16, 16)
    assert_close(model(x, attention_mask=torch.ones(2, 4)).last_hidden_state, model(x).last_hidden_state)
