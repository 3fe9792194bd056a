import pytest
import torch

from repcodec.architecture import Architecture
from repcodec.stacks import DecoderStack, EncoderStack, ResidualUnit, frame_mask, start_as_identity, zeroed


def shape(strides, ratios=None, channels=6, code_dim=4):
    ratios = ratios or [1] * len(strides)
    return Architecture(
        5, encode_channels=channels, decode_channels=channels, code_dim=code_dim, enc_ratios=ratios,
        dec_ratios=ratios[::-1], enc_strides=strides, dec_strides=strides[::-1], enc_block_dilations=(1, 2),
        dec_block_dilations=(1, 2),
    )  # fmt: skip


def stacks(strides, ratios=None, channels=6):
    torch.manual_seed(0)
    encoder = EncoderStack(shape(strides, ratios, channels)).double()
    decoder = DecoderStack(shape(strides, ratios, channels)).double()
    for stack in (encoder, decoder):
        for name, parameter in stack.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 2)
    return encoder, decoder


def test_frame_mask_is_true_up_to_the_length():
    assert frame_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize("gradients", [True, False])
def test_zeroed_frames_are_those_beyond_the_length(gradients):
    with torch.set_grad_enabled(gradients):
        x = zeroed(torch.full((1, 2, 4), float("nan")), frame_mask(torch.tensor([3]), 4))
    assert x[..., 3].tolist() == [[0, 0]]
    assert x[..., :3].isnan().all()


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (3,), (2, 3), (4, 1, 5)])
@pytest.mark.parametrize("codes", [1, 2, 7])
def test_a_multiple_of_the_stride_gives_a_code_each_and_decodes_to_as_many_frames(strides, codes):
    encoder, decoder = stacks(strides)
    stride = torch.tensor(strides).prod().item()
    z, _ = encoder(torch.randn(2, codes * stride, 5).double(), None)
    assert z.shape == (2, codes, 4)
    assert decoder(z, None).shape == (2, codes * stride, 5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_padded_batch_equals_single_utterances(strides):
    encoder, decoder = stacks(strides, ratios=[1, 2])
    stride = torch.tensor(strides).prod().item()
    lengths = torch.tensor([4, 1, 3]) * stride
    x = 100 * torch.randn(3, 5 * stride, 5).double()
    for b, length in enumerate(lengths):
        x[b, length:] = 0
    z, valid = encoder(x, frame_mask(lengths, 5 * stride))
    y = decoder(z * valid[..., None], valid)
    for b, length in enumerate(lengths):
        alone, _ = encoder(x[b : b + 1, :length], None)
        torch.testing.assert_close(z[b, : length // stride], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[b, :length], decoder(alone, None)[0], rtol=1e-12, atol=1e-12)
        assert (y[b, length:] == 0).all()


def test_residual_unit_is_the_formula():
    encoder, _ = stacks((1,))
    unit = encoder.stages[0].residuals[1]
    x = torch.randn(1, 6, 9).double()
    padded = torch.nn.functional.pad(torch.nn.functional.elu(x), (2, 2))
    conv = sum(unit.conv.weight[:, :, k] @ padded[0, :, 2 * k : 2 * k + 9] for k in range(3))  # dilation 2
    expected = x[0] + unit.pointwise.weight[:, :, 0] @ torch.nn.functional.elu(conv)
    torch.testing.assert_close(unit(x, None)[0], expected)


def test_identity_start_hands_features_on_unchanged():
    torch.manual_seed(0)
    encoder = EncoderStack(shape((1, 1), None, 5, 5))
    decoder = DecoderStack(shape((1, 1), None, 5, 5))
    start_as_identity(encoder)
    start_as_identity(decoder)
    x = torch.randn(2, 11, 5)
    assert torch.equal(encoder(x, None)[0], x)
    assert torch.equal(decoder(x, None), x)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_identity_start_of_strided_stacks_averages_and_repeats(stride):
    encoder = EncoderStack(shape((stride,), None, 5, 5))
    decoder = DecoderStack(shape((stride,), None, 5, 5))
    start_as_identity(encoder)
    start_as_identity(decoder)
    x = torch.randn(2, 4 * stride, 5)
    means = x.unflatten(1, (4, stride)).mean(2)
    torch.testing.assert_close(encoder(x, None)[0], means)
    torch.testing.assert_close(decoder(means, None), means.repeat_interleave(stride, 1))


def test_a_residual_units_gradients_are_those_of_its_formula():
    torch.manual_seed(0)
    unit = ResidualUnit(6, 3, 1).double()
    start = torch.randn(2, 6, 9, dtype=torch.float64) * 3
    valid = frame_mask(torch.tensor([9, 5]), 9)
    found = []
    for formula in (True, False):
        x = start.masked_fill(~valid[:, None], 0).requires_grad_()
        if formula:
            elu = torch.nn.functional.elu
            y = x + unit.pointwise(elu(unit.conv(elu(x))))
            y = y.masked_fill(~valid[:, None], 0)
        else:
            y = unit(x, valid)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *unit.parameters()])])
    for expected, one in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
