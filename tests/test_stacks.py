import pytest
import torch

from repcodec.stacks import DecoderStack, EncoderStack, frame_mask, masked, start_as_identity

SHAPE = {"kernel_size": 3, "dilations": (1, 2), "block_kernel_size": 3, "bias": True}


def stacks(strides, ratios=None, channels=6):
    torch.manual_seed(0)
    ratios = ratios or [1] * len(strides)
    encoder = EncoderStack(5, channels, 4, ratios=ratios, strides=strides, **SHAPE).double()
    decoder = DecoderStack(4, channels, 5, ratios=ratios[::-1], strides=strides[::-1], **SHAPE).double()
    for stack in (encoder, decoder):
        for name, parameter in stack.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 2)
    return encoder, decoder


def test_frame_mask_is_true_up_to_the_length():
    assert frame_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_masked_zeroes_frames_beyond_the_length():
    x = masked(torch.ones(1, 2, 4), torch.tensor([3]))
    assert x.tolist() == [[[1, 1, 1, 0]] * 2]


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
        x[b, length:] = float("nan")  # garbage where it is padding
    z, counts = encoder(x, lengths)
    y = decoder(z, counts)
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
    encoder = EncoderStack(5, 5, 5, ratios=(1, 1), strides=(1, 1), **SHAPE)
    decoder = DecoderStack(5, 5, 5, ratios=(1, 1), strides=(1, 1), **SHAPE)
    start_as_identity(encoder)
    start_as_identity(decoder)
    x = torch.randn(2, 11, 5)
    assert torch.equal(encoder(x, None)[0], x)
    assert torch.equal(decoder(x, None), x)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_identity_start_of_strided_stacks_averages_and_repeats(stride):
    encoder = EncoderStack(5, 5, 5, ratios=(1,), strides=(stride,), **SHAPE)
    decoder = DecoderStack(5, 5, 5, ratios=(1,), strides=(stride,), **SHAPE)
    start_as_identity(encoder)
    start_as_identity(decoder)
    x = torch.randn(2, 4 * stride, 5)
    means = x.unflatten(1, (4, stride)).mean(2)
    torch.testing.assert_close(encoder(x, None)[0], means)
    torch.testing.assert_close(decoder(means, None), means.repeat_interleave(stride, 1))


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel size 4"):
        EncoderStack(5, 5, 5, ratios=(1,), strides=(1,), kernel_size=4, dilations=(1,), block_kernel_size=3, bias=True)
