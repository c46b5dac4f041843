import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from mmssl.model.attention import Attention
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.transformer import Block, DropPath, Transformer


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 with all weights drawn anew, so that no bias is zero and no norm is the identity."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / parameter.shape[-1] ** 0.5
    return module.eval()


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# By hand, one vector at a time -----------------------------------------------------------------------------------------


def linear(layer, x):
    return torch.stack([(layer.weight[o] * x).sum() + layer.bias[o] for o in range(layer.out_features)])


def norm(layer, x):
    mean = sum(float(v) for v in x) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + layer.eps) * layer.weight + layer.bias


def attention(layer, rows):
    """Explicit softmax over all tokens of one sample; rows: list of vectors."""
    dim, size = len(rows[0]), len(rows[0]) // layer.heads
    mixed = [linear(layer.qkv, row) for row in rows]
    q, k, v = ([m[i * dim : (i + 1) * dim] for m in mixed] for i in range(3))
    out = []
    for i in range(len(rows)):
        heads = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            weights = [math.exp(float(q[i][part] @ k[j][part]) / math.sqrt(size)) for j in range(len(rows))]
            heads.append(sum(w * v[j][part] for j, w in enumerate(weights)) / sum(weights))
        out.append(linear(layer.proj, torch.cat(heads)))
    return out


def mlp(layer, x):
    hidden = linear(layer.fc1, x)
    return linear(layer.fc2, torch.stack([h * 0.5 * (1 + math.erf(float(h) / math.sqrt(2))) for h in hidden]))


@torch.no_grad()
def by_hand(block, x):
    """Output and MLP output of a block for one sample (L, D)."""
    rows = list(x)
    if block.pre:
        rows = [r + a for r, a in zip(rows, attention(block.attn, [norm(block.norm1, r) for r in rows]))]
        ffn = [mlp(block.mlp, norm(block.norm2, r)) for r in rows]
        return torch.stack([r + f for r, f in zip(rows, ffn)]), torch.stack(ffn)
    rows = [norm(block.norm1, r + a) for r, a in zip(rows, attention(block.attn, rows))]
    ffn = [mlp(block.mlp, r) for r in rows]
    return torch.stack([norm(block.norm2, r + f) for r, f in zip(rows, ffn)]), torch.stack(ffn)


@torch.no_grad()
def test_attention_is_an_explicit_softmax():
    layer, x = randomised(Attention(12, 3)), tokens(2, 5, 12)
    wanted = torch.stack([torch.stack(attention(layer, list(sample))) for sample in x])
    assert_close(layer(x), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["post", "pre"])
def test_a_block_and_its_collected_mlp_output_match_a_slow_loop(kind):
    block, x = randomised(Block(8, 2, 2.0, kind)), tokens(2, 3, 8)
    for sample, out, ffn in zip(x, *block(x)):
        wanted, wanted_ffn = by_hand(block, sample)
        assert_close(out, wanted, rtol=1e-10, atol=1e-12)
        assert_close(ffn, wanted_ffn, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["post", "pre"])
def test_the_transformer_is_its_blocks_in_order_with_norms_where_they_belong(kind):
    net, x = randomised(Transformer(8, 2, 2, prenet_depth=1, mlp_ratio=2.0, norm=kind, extra_tokens=2)), tokens(1, 3, 8)
    rows = torch.cat([net.extra.tokens[0], x[0]])
    if kind == "post":
        rows = torch.stack([norm(net.input_norm, row) for row in rows])
    rows, _ = by_hand(net.prenet[0], rows)
    outs, ffns = [], []
    for block in net.blocks:
        rows, ffn = by_hand(block, rows)
        outs.append(rows)
        ffns.append(ffn)
    if kind == "pre":
        rows = torch.stack([norm(net.norm, row) for row in rows])
    assert_close(net(x)[0][0], rows, rtol=1e-10, atol=1e-12)
    assert net(x)[1] == ()
    for collect, wanted in (("ffn", ffns), ("block", outs)):
        assert_close([layer[0] for layer in net(x, collect)[1]], wanted, rtol=1e-10, atol=1e-12)


def test_a_pre_norm_block_is_the_layer_of_a_vit():
    theirs = ViTLayer(ViTConfig(hidden_size=24, num_attention_heads=4, intermediate_size=48, attn_implementation="sdpa"))
    theirs, ours = randomised(theirs, 2), randomised(Block(24, 4, 2.0, "pre", eps=1e-12))
    a = theirs.attention
    ours.attn.qkv.weight.data = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
    ours.attn.qkv.bias.data = torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])
    pairs = [(ours.attn.proj, a.o_proj), (ours.norm1, theirs.layernorm_before), (ours.norm2, theirs.layernorm_after)]
    for mine, yours in [*pairs, (ours.mlp.fc1, theirs.mlp.fc1), (ours.mlp.fc2, theirs.mlp.fc2)]:
        mine.load_state_dict(yours.state_dict())
    x = tokens(2, 5, 24)
    assert_close(ours(x)[0], theirs(x), rtol=1e-9, atol=1e-10)


# Dropping and refusing -------------------------------------------------------------------------------------------------


def test_drop_path_leaves_out_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20_000, 2, 3))
    kept = out[:, 0, 0] > 0
    assert_close(out[kept], torch.full_like(out[kept], 4 / 3))
    assert bool((out[~kept] == 0).all())
    assert abs(float(kept.float().mean()) - 0.75) < 0.0125  # 4 standard errors
    assert drop.eval()(out) is out


def test_drop_path_grows_linearly_over_prenet_and_trunk():
    net = Transformer(8, 3, 2, prenet_depth=2, drop_path=0.4)
    rates = [block.drop_path.rate for block in [*net.prenet, *net.blocks]]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_dropout_acts_in_training_and_spares_the_collected_output():
    torch.manual_seed(0)
    block = randomised(Block(8, 2, dropout=0.5))
    block.attn.dropout.p = 0.0
    still, ffn = block(tokens(2, 3, 8))
    moved, same = block.train()(tokens(2, 3, 8))
    assert_close(same, ffn, rtol=0, atol=0)
    assert not torch.allclose(moved, still)


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x = randomised(Attention(8, 2, attention_dropout=0.5)), tokens(2, 5, 8)
    assert torch.equal(layer(x), layer(x))
    assert not torch.allclose(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "^heads: hidden_size 16 is not a multiple of 3"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"extra_tokens": -1}, "extra_tokens"),
        ({"pooling": "cls", "extra_tokens": 0}, "^pooling: "),
        ({"modality": "smell"}, "^modality: 'smell'"),
        ({"hidden_size": 18, "heads": 2}, "^hidden_size: 18"),
        ({"image_size": 30}, "^image_size: 30 .* try model.image_size=16"),
        ({"channels": 4}, "^channels: 4"),
    ],
)
def test_an_impossible_encoder_is_refused_by_the_name_of_the_option(options, words):
    shape = {"hidden_size": 16, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 16} | options
    with pytest.raises(ValueError, match=words):
        Encoder.from_config(MmsslConfig(**shape))


def test_fresh_weights_are_drawn_as_data2vec_draws_them():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder.from_config(
            MmsslConfig(hidden_size=64, depth=2, heads=2, image_size=32, patch_size=8, extra_tokens=99)
        )
    for module in encoder.transformer.modules():
        if isinstance(module, nn.Linear):
            assert abs(float(module.weight.detach().std()) / 0.02 - 1) < 0.05
            assert module.bias.abs().max() == 0
    assert abs(float(encoder.transformer.extra.tokens.detach().std()) - 1) < 0.05
    bound = math.sqrt(6 / (64 + 3 * 8 * 8))  # Xavier-uniform of the weight as a (D, 3*p*p) matrix
    weight = encoder.features.proj.weight
    assert weight.abs().max() <= bound
    assert abs(float(weight.detach().std()) * math.sqrt(3) / bound - 1) < 0.05
