import copy
import pickle

import pytest
import torch

from repcodec import conv
from repcodec.checkpoint import load_tensors
from repcodec.codec import RepCodec
from repcodec.conv import MIN_CHANNELS, MIN_FRAMES, TILE, FrameConv, transformed, winograd


def plain(frames, weight, bias):
    """(T, C) frames, convolved in float64."""
    weight, bias = weight.double(), None if bias is None else bias.double()
    return torch.nn.functional.conv1d(frames.double().T[None], weight, bias, padding=1)[0].T


@pytest.mark.parametrize("num_frames", [1, 2, TILE - 1, TILE, TILE + 1, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_winograd_is_a_convolution(num_frames, biased):
    torch.manual_seed(0)
    frames, weight = torch.randn(num_frames, 5), torch.randn(7, 5, 3)
    bias = torch.randn(7) if biased else None
    torch.testing.assert_close(
        winograd(frames, transformed(weight), bias).double(), plain(frames, weight, bias), rtol=1e-4, atol=1e-4
    )


def test_winograd_rounds_about_as_a_direct_convolution_does():
    torch.manual_seed(0)
    frames, weight = torch.randn(600, 768), torch.randn(768, 768, 3) / 50
    exact = plain(frames, weight, None)
    direct = torch.nn.functional.conv1d(frames.T[None], weight, padding=1)[0].T

    def error(found):
        return ((found - exact).norm() / exact.norm()).item()

    assert error(winograd(frames, transformed(weight), None)) < 2 * error(direct) < 3e-6


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_a_tile_is_computed_alike_wherever_it_lies(shift):
    torch.manual_seed(0)
    frames, weight = torch.randn(30 * TILE, 32), torch.randn(32, 32, 3)
    whole = winograd(frames, transformed(weight), None)
    part = winograd(frames[shift * TILE :], transformed(weight), None)
    assert torch.equal(part[TILE:], whole[(shift + 1) * TILE :])


@pytest.fixture
def used(monkeypatch):
    """How often the fast way was taken."""
    calls = []
    monkeypatch.setattr(conv, "winograd", lambda *args: calls.append(1) or winograd(*args))
    return calls


def test_fast_way_is_off_where_it_must_be(used):
    wide = FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    x = torch.randn(1, MIN_CHANNELS, MIN_FRAMES)
    wide(x)  # with gradients
    with torch.no_grad():
        wide(x.repeat(2, 1, 1))
        wide(x[..., 1:])
        FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=2, dilation=2)(x)
        FrameConv(MIN_CHANNELS, MIN_CHANNELS, 5, padding=2)(x)
        FrameConv(MIN_CHANNELS, MIN_CHANNELS - 1, 3, padding=1)(x)
        FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1).double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert wide(x).dtype == torch.bfloat16
    assert used == []
    with torch.no_grad():
        wide(x)
    assert used == [1]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_fast_way_is_the_same_convolution(used, kernel, biased):
    torch.manual_seed(0)
    layer = FrameConv(MIN_CHANNELS, 2 * MIN_CHANNELS, kernel, padding=kernel // 2, bias=biased)
    frames = torch.randn(1, MIN_FRAMES + 3, MIN_CHANNELS)
    expected = layer(frames.mT)  # gradients are on: the plain one
    with torch.no_grad():
        found = layer(frames.mT)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(used) == (kernel == 3)


def test_inference_mode_leaves_nothing_behind_that_others_cannot_use():
    layer = FrameConv(2 * MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    with torch.inference_mode():
        expected = layer(torch.ones(1, 2 * MIN_CHANNELS, 4 * MIN_FRAMES))
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 2 * MIN_CHANNELS, 4 * MIN_FRAMES)), expected)


def changed_in_place(layer):
    layer.weight.mul_(2)
    return layer


def moved(layer):
    layer.double().weight.data.mul_(2)
    return layer.float()


def loaded(layer):
    layer.load_state_dict({"weight": 2 * layer.weight}, assign=True)
    return layer


def trained(layer):
    layer.train()
    layer.weight.data.mul_(2)
    return layer.eval()


def copied(layer):
    return changed_in_place(copy.deepcopy(layer))


def pickled(layer):
    return changed_in_place(pickle.loads(pickle.dumps(layer)))  # noqa: S301  # its own


@pytest.mark.parametrize("change", [changed_in_place, moved, loaded, trained, copied, pickled])
def test_transformed_weights_follow_the_weights(change):
    layer = FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1, bias=False)
    frames = torch.randn(1, MIN_CHANNELS, MIN_FRAMES)
    with torch.no_grad():
        before = layer(frames)
        torch.testing.assert_close(change(layer)(frames), 2 * before)


def test_transformed_weights_are_kept_and_not_copied():
    layer = FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
    with torch.no_grad():
        first = layer.transformed()
        assert layer.transformed() is first
        assert len(pickle.dumps(layer)) < 2 * layer.weight.nbytes
        with torch.inference_mode():
            assert layer.transformed() is first
            # Without a count of changes nothing is kept.
            other = FrameConv(MIN_CHANNELS, MIN_CHANNELS, 3, padding=1)
            assert other.transformed() is not other.transformed()


def test_weights_that_memory_has_let_go_are_read_again(tmp_path):
    codec = RepCodec(MIN_CHANNELS).eval()
    codec.save_pretrained(tmp_path, {})
    expected = {name: value.clone() for name, value in codec.state_dict().items()}
    load_tensors(tmp_path, codec)
    codec.encode(torch.randn(1, 300, MIN_CHANNELS))
    assert codec.encoder.input._kept is not None and codec.encoder.input.weight.mapped
    for name, value in codec.state_dict().items():
        assert torch.equal(value, expected[name]), name
