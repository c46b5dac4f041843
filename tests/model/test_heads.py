import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmssl.model.heads import mlp

COUNTS = json.loads((Path(__file__).parents[1] / "vectors" / "joint-embedding.json").read_text())["cases"][
    "head_parameter_counts"
]["expected"]
HEADS = {
    "simclr_2_layer_2048_128_bn_everywhere_last_bn_scale_only": ((2048, 2048, 128), {"bias": False, "last_norm": "scale"}),
    "simclr_v2_3_layer": ((2048, 2048, 2048, 128), {"bias": False, "last_norm": "scale"}),
    "moco_v2_2048_128": ((2048, 2048, 128), {"norm": False}),
    "mocov3_r50_projector": ((2048, 4096, 256), {"bias": False, "last_norm": "plain"}),
    "mocov3_r50_predictor": ((256, 4096, 256), {"bias": False}),
    "mocov3_vit_s_projector": ((384, 4096, 4096, 256), {"bias": False, "last_norm": "plain"}),
    "byol_projector": ((2048, 4096, 256), {"last_bias": False}),
    "byol_predictor": ((256, 4096, 256), {"last_bias": False}),
    "simsiam_projector_without_the_frozen_last_bias": ((2048, 2048, 2048, 2048), {"bias": False, "last_norm": "plain"}),
    "simsiam_predictor": ((2048, 512, 2048), {"bias": False, "last_bias": True}),
    "swav_projector": ((2048, 2048, 128), {}),
    "barlow_8192x3": ((2048, 8192, 8192, 8192), {"bias": False}),
    "vicreg_8192x3": ((2048, 8192, 8192, 8192), {"last_bias": False}),
    "dino_vit_s_mlp": ((384, 2048, 2048, 256), {"norm": False, "activation": "gelu"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_as_many_weights_as_in_the_papers(name):
    widths, options = HEADS[name]
    with torch.device("meta"):
        head = mlp(*widths, **options)
    assert sum(p.numel() for p in head.parameters()) == COUNTS[name]


def test_every_head_of_the_table_is_tried():
    beside = {"swav_prototypes_3000", "dino_last_layer_v_65536"}  # in tests/parts/test_prototypes.py
    assert {*HEADS} | beside == {*COUNTS}


def test_layers_come_in_the_order_of_the_paper():
    def tell(head):
        return [
            type(m).__name__ + "".join(f" {n}" for n in ("weight", "bias") if getattr(m, n, None) is not None) for m in head
        ]

    simclr = ["Linear weight", "BatchNorm weight bias", "ReLU", "Linear weight", "BatchNorm weight"]
    assert tell(mlp(4, 4, 2, bias=False, last_norm="scale")) == simclr
    assert tell(mlp(4, 2)) == ["Linear weight bias"]
    assert tell(mlp(4, 3, 2, norm=False, activation="gelu")) == ["Linear weight bias", "GELU", "Linear weight bias"]
    predictor = mlp(4, 3, 2, bias=False, last_bias=True, last_norm="plain")
    assert tell(predictor) == ["Linear weight", "BatchNorm weight bias", "ReLU", "Linear weight bias", "BatchNorm"]
    assert tell(mlp(4, 2, last_norm="affine")) == ["Linear weight bias", "BatchNorm weight bias"]


def test_a_head_computes_what_its_layers_say():
    head = mlp(3, 4, 2, bias=False, last_norm="scale").double()
    first, norm, _, second, last = head
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        last.weight.copy_(torch.tensor([2.0, -1.0]))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def standard(h):
        return (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()

    hidden = (standard(x @ first.weight.T) + norm.bias).clamp(min=0)
    assert_close(head(x), standard(hidden @ second.weight.T) * last.weight, rtol=1e-9, atol=1e-12)


def test_std_sets_the_spread_of_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = mlp(200, 100, 50, std=0.01)
    for layer in (head[0], head[3]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"^layers: "):
        mlp(3)
