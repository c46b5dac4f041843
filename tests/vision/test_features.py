import torch
from torch import nn
from torch.testing import assert_close

from modalities.vision.features import PatchFeatures
from tests.losses.cases import MASKED, drawn


def test_the_pixels_of_a_patch_are_in_the_order_of_mae():
    case, features = MASKED["mae_patchify_order"], PatchFeatures(8, image_size=4, patch_size=2)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    raw = features.raw(image)
    assert raw.shape == (1, 4, 12)
    for place in (0, 1, 3):
        assert raw[0, place].tolist() == case[f"patch{place}"]
    assert torch.equal(features.unraw(raw), image)


def test_pixels_said_by_a_head_have_mae_s_order_and_not_that_of_a_pixel_shuffle():
    case, features = MASKED["pixelshuffle_channel_order"], PatchFeatures(8, image_size=2, patch_size=2)
    each = torch.eye(12)[:, None]  # (12, 1, 12), one value of one patch at a time
    assert [pixel.nonzero()[0].tolist() for pixel in features.unraw(each)] == case["mae_k_to_cdydx"]
    shuffled = nn.PixelShuffle(case["scale"])(each.transpose(1, 2)[..., None])
    assert [pixel.nonzero()[0].tolist() for pixel in shuffled] == case["simmim_k_to_cdydx"]
    order = [case["simmim_k_to_cdydx"].index(pixel) for pixel in case["mae_k_to_cdydx"]]
    guess = drawn(2, 12, 1, 1)  # what SimMIM's head says of one patch, taken over to ours
    assert_close(features.unraw(guess[:, order].flatten(2).transpose(1, 2)), nn.PixelShuffle(2)(guess))
