"""First layers for images of other channels: timm's rule, its inverse, what a gray image gives."""

from __future__ import annotations

import pytest
import torch
from timm.models import adapt_input_conv

from xcit_dino.errors import InputError
from xcit_dino.models.weights.channels import adapt_channels
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model

ARCH = "xcit_pico_6_p8"


def weight(channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(10, channels, 3, 3, generator=generator)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 13])
def test_from_three_channels_it_is_timms_rule(channels):
    given = weight()
    kept = given.clone()
    assert torch.equal(adapt_channels(given, channels), adapt_input_conv(channels, kept))
    assert torch.equal(given, kept)


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 13, 64])
def test_there_and_back_again(channels):
    back = adapt_channels(adapt_channels(weight(), channels), 3)
    torch.testing.assert_close(back, weight(), rtol=1e-6, atol=1e-6)


def test_one_channel_there_and_back_again():
    back = adapt_channels(adapt_channels(weight(1), 3), 1)
    torch.testing.assert_close(back, weight(1))


@pytest.mark.parametrize("channels", [1, 3, 6, 12])
def test_a_gray_image_gives_the_outputs_that_it_gave(channels, tmp_path):
    torch.manual_seed(0)
    model = create_model(ARCH).eval()
    path = tmp_path / "rgb.pth"
    torch.save(model.state_dict(), path)
    other = create_model(ARCH, in_chans=channels).eval()
    report = load_backbone(path, other, adapt=True)
    assert ("converted from 3" in report.converted) == (channels != 3)
    gray = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        ours, theirs = other(gray.expand(-1, channels, -1, -1)), model(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_without_being_asked_nothing_is_converted(tmp_path):
    path = tmp_path / "five.pth"
    torch.save(create_model(ARCH, in_chans=5).state_dict(), path)
    with pytest.raises(InputError, match="images of 5 channels, and these have 3; name weights"):
        load_backbone(path, create_model(ARCH))
    with pytest.raises(InputError, match="only weights of 3 channels can be converted"):
        load_backbone(path, create_model(ARCH, in_chans=13), adapt=True)
