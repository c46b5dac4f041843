import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from mmssl.model.attention import Attention
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.positions import Alibi
from mmssl.model.transformer import ACTIVATIONS, Block, DropPath, Transformer
from tests.losses.cases import MASKED, tensor


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


def attention(layer, rows, bias=None):
    """Explicit softmax over all tokens of one sample; rows: list of vectors; bias: (H, L, L) of numbers."""
    dim, size = len(rows[0]), len(rows[0]) // layer.heads
    mixed = [linear(layer.qkv, row) for row in rows]
    q, k, v = ([m[i * dim : (i + 1) * dim] for m in mixed] for i in range(3))
    out = []
    for i in range(len(rows)):
        heads = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            logits = [float(q[i][part] @ k[j][part]) / math.sqrt(size) for j in range(len(rows))]
            weights = [math.exp(x + (0.0 if bias is None else float(bias[h, i, j]))) for j, x in enumerate(logits)]
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


@torch.no_grad()
def test_a_bias_is_added_to_the_logits_of_its_head_and_false_hides():
    layer, x, bias = randomised(Attention(12, 3)), tokens(2, 5, 12), tokens(2, 3, 5, 5)
    wanted = torch.stack([torch.stack(attention(layer, list(sample), own)) for sample, own in zip(x, bias)])
    assert_close(layer(x, bias), wanted, rtol=1e-10, atol=1e-12)
    attend = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    attend[1, ..., 3:] = False
    found = layer(x, attend)
    assert_close(found[0], layer(x)[0], rtol=1e-10, atol=1e-12)
    assert_close(found[1, :3], layer(x[1:, :3])[0], rtol=1e-10, atol=1e-12)
    added = torch.zeros(2, 1, 1, 5, dtype=torch.float64).masked_fill(~attend, -math.inf)
    assert_close(layer(x, added), found, rtol=1e-10, atol=1e-12)


def test_under_autocast_attention_with_distances_is_computed_in_fp32(monkeypatch):
    torch.manual_seed(0)
    layer, x, seen = Attention(64, 4), torch.randn(1, 600, 64), []
    bias = Alibi(4)(600).detach()
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append((a, attend(*a, **k))) or seen[-1][1])
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, bias)
    (arguments, found) = seen[0]
    q, k, v, given = (t.detach().double() for t in arguments[:4])
    assert out.dtype == torch.bfloat16
    assert_close(given, bias.double(), rtol=0, atol=0)  # bf16 has no 511
    logits = q @ k.transpose(-1, -2) / 4 + bias.double()
    error = float((found.detach().double() - logits.softmax(-1) @ v).abs().max())
    low = (q @ k.transpose(-1, -2) / 4 + bias.bfloat16().double()).bfloat16().double().softmax(-1) @ v
    assert error < 1e-5
    assert float((low - logits.softmax(-1) @ v).abs().max()) > 100 * error  # where bf16 logits would lead
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert seen[1][0][0].dtype == torch.bfloat16  # without distances it stays fast


@pytest.mark.parametrize("kind", ["post", "pre"])
def test_layer_scale_multiplies_both_branches(kind):
    block, x = randomised(Block(8, 2, 2.0, kind, layer_scale=0.1)), tokens(1, 3, 8)
    twin = Block(8, 2, 2.0, kind).double()
    twin.load_state_dict({n: t for n, t in block.state_dict().items() if not n.startswith("scale")})
    for part, scale in ((twin.attn.proj, block.scale1.scale), (twin.mlp.fc2, block.scale2.scale)):
        part.weight.data *= scale[:, None]
        part.bias.data *= scale
    assert_close(block(x)[0], twin(x)[0], rtol=1e-10, atol=1e-12)
    assert_close(block(x)[1] * block.scale2.scale, twin(x)[1], rtol=1e-10, atol=1e-12)  # collected before it
    fresh = Block(8, 2, layer_scale=0.1)
    assert_close(fresh.scale1.scale.detach(), torch.full((8,), 0.1))


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


def dropping(share, depth=3):
    """A transformer in training whose blocks are left out."""
    return randomised(Transformer(8, depth, 2, prenet_depth=1, extra_tokens=0, layer_drop=share)).train()


def test_a_block_is_left_out_in_training_with_its_probability():
    torch.manual_seed(0)
    net, x = dropping(0.25), tokens(1, 3, 8)
    prenet = net.prenet[0](net.input_norm(x))[0]
    left_out = 0
    for _ in range(1000):
        before = prenet
        for layer in net(x, "block")[1]:
            left_out += bool(torch.equal(layer, before))
            before = layer
    assert abs(left_out / 3000 - 0.25) < 0.032  # 4 standard errors
    outs = {float(net(x)[0].detach()[0, 0, 0]) for _ in range(200)}
    assert len(outs) == 8  # each subset of three blocks


def test_a_block_that_is_left_out_has_zero_gradients_and_the_others_have_their_own():
    net, x = dropping(0.5, depth=8), tokens(1, 3, 8)
    torch.manual_seed(1)
    out, layers = net(x, "block")
    before, kept = net.prenet[0](net.input_norm(x))[0], []
    for layer in layers:
        kept.append(not torch.equal(layer, before))
        before = layer
    assert 0 < sum(kept) < 8
    (out * tokens(1, 3, 8)).sum().backward()
    for block, used in zip(net.blocks, kept):
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None
            assert (float(parameter.grad.abs().sum()) > 0) == used, name
    shallow = randomised(Transformer(8, sum(kept), 2, prenet_depth=1, extra_tokens=0))
    own = {n: t for n, t in net.state_dict().items() if not n.startswith("blocks.")}
    used = [block for block, flag in zip(net.blocks, kept) if flag]
    own |= {f"blocks.{i}.{n}": t for i, block in enumerate(used) for n, t in block.state_dict().items()}
    shallow.load_state_dict(own)
    assert_close(out, shallow(x)[0], rtol=1e-12, atol=1e-12)


def test_no_block_is_left_out_in_evaluation():
    net, x = dropping(0.9).eval(), tokens(1, 3, 8)
    assert all(torch.equal(net(x)[0], net(x)[0]) for _ in range(5))
    plain = randomised(Transformer(8, 3, 2, prenet_depth=1, extra_tokens=0))
    plain.load_state_dict(net.state_dict())
    assert_close(net(x)[0], plain(x)[0], rtol=0, atol=0)


def test_dropout_of_the_input_acts_in_training_only():
    torch.manual_seed(0)
    net, x = randomised(Transformer(8, 1, 2, extra_tokens=0, input_dropout=0.5)), tokens(1, 400, 8)
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x)
    net.train()(x)
    dropped = seen[1] == 0
    assert abs(float(dropped.double().mean()) - 0.5) < 0.04
    assert_close(seen[1][~dropped], 2 * seen[0][~dropped], rtol=1e-12, atol=0)


def test_features_that_come_normed_get_no_second_norm_unless_blocks_precede_the_trunk():
    normed, prenet = Transformer(8, 1, 2, normed=True, input_dropout=0.5), Transformer(8, 1, 2, 1, normed=True)
    assert isinstance(normed.input_norm, nn.Identity)
    assert normed.input_dropout.p == 0
    assert isinstance(prenet.input_norm, nn.LayerNorm)


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
        ({"layer_drop": 1.0}, r"^layer_drop: 1\.0"),
        ({"input_dropout": -0.1}, r"^input_dropout: -0\.1"),
        ({"modality": "speech", "conv_channels": 0}, "^conv_channels: 0"),
        ({"modality": "speech", "position_layers": 0}, "^position_layers: 0"),
        ({"modality": "speech", "position_groups": 3}, "^position_groups: 3 groups must divide hidden_size 16"),
        ({"modality": "text"}, "^vocab_size: missing"),
        ({"modality": "text", "vocab_size": 2}, "^vocab_size: 2"),
        ({"modality": "text", "vocab_size": 9, "max_tokens": 2}, "^max_tokens: 2"),
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


def test_activations_have_the_reference_values():
    case = MASKED["gelu"]
    exact, nearly = ACTIVATIONS["gelu"](), ACTIVATIONS["gelu_tanh"]()
    assert_close(exact(tensor(case["x"])), tensor(case["exact_erf"]), rtol=1e-9, atol=1e-15)
    assert_close(nearly(tensor(case["x"])), tensor(case["tanh"]), rtol=1e-9, atol=1e-15)
    x = torch.arange(-6, 6, 1e-4, dtype=torch.float64)
    apart = (exact(x) - nearly(x)).abs()
    assert float(apart.max()) == pytest.approx(case["max_abs_difference"], rel=1e-6)
    assert float(x[apart.argmax()].abs()) == pytest.approx(case["at_abs_x"], abs=2e-4)
    case = MASKED["quick_gelu"]
    assert_close(ACTIVATIONS["gelu_quick"]()(tensor(case["x"])), tensor(case["x_sigmoid_1_702x"]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280])
@pytest.mark.parametrize("kind", ["post", "pre"])
def test_a_block_has_as_many_parameters_as_told(width, kind):
    with torch.device("meta"):
        block = Block(width, width // 64, norm=kind)
    assert sum(p.numel() for p in block.parameters()) == MASKED["block_params"][f"D{width}"]


STARTED = {"hidden_size": 64, "depth": 3, "heads": 2, "image_size": 32, "patch_size": 8, "norm": "pre"}


@pytest.mark.parametrize("start", ["xavier", "beit"])
def test_linear_layers_start_as_the_authors_do_if_asked_to(start):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder.from_config(MmsslConfig(**STARTED, start=start))
    cut = MASKED["trunc_normal_cut_at_one_std"]
    for number, block in enumerate(encoder.transformer.blocks, 1):
        assert {float(p.detach().abs().max()) for name, p in block.named_parameters() if name.endswith("bias")} == {0.0}
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            found = layer.weight.detach()
            if start == "xavier":  # the fused projection as one matrix, as there
                bound = math.sqrt(6 / sum(found.shape))
                wanted = bound / math.sqrt(3)
            else:
                scale = 1 / math.sqrt(2 * number) if layer in (block.attn.proj, block.mlp.fc2) else 1.0
                bound, wanted = 0.02 * scale, cut["for_std_0_02"] * scale
                assert wanted == pytest.approx(cut["ratio_of_effective_to_nominal_std"] * bound)
            assert 0.98 * bound < float(found.abs().max()) <= bound * (1 + 1e-6)
            assert float(found.std()) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("biased", [None, "columns", "rows"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_is_wanted_of_the_last_tokens_is_what_a_block_gives_for_all(norm, biased):
    torch.manual_seed(0)
    block, x = Block(16, 2, norm=norm, layer_scale=0.5).double(), torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    bias = None if biased is None else torch.randn(3, 2, 7 if biased == "rows" else 1, 7, dtype=torch.float64)
    found = []
    for last in (None, 3):
        block.zero_grad()
        x.grad = None
        out, ffn = block(x, bias, last)
        out, ffn = out[:, -3:], ffn[:, -3:]
        (out.sin().sum() + ffn.cos().sum()).backward()
        found.append([out, ffn, x.grad, *(p.grad for p in block.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)
    with pytest.raises(ValueError, match="causal attention is computed for all tokens"):
        Block(16, 2, causal=True)(x.float(), None, 3)
