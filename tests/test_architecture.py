import pytest

from repcodec.architecture import Architecture


def test_widths_follow_from_one():
    shape = Architecture(768)
    assert {shape.input_channels, shape.output_channels, shape.encode_channels, shape.code_dim} == {768}
    assert shape.reach == (8, 8) and shape.stride == 1 and shape.gap == 1
    assert Architecture(**shape.options()) == shape


def test_options_are_plain_values():
    options = Architecture(8, enc_strides=[1, 2], dec_strides=(2, 1)).options()
    assert options["enc_strides"] == [1, 2] and options["dec_strides"] == [2, 1]


@pytest.mark.parametrize(
    ("strides", "pad", "counts"),
    [
        ((1, 1), True, {0: 0, 1: 1, 97: 97}),
        ((2, 1), True, {0: 0, 1: 1, 96: 48, 97: 49}),
        ((2, 1), False, {0: 0, 1: 0, 2: 1, 96: 48, 97: 48}),
        ((3,), False, {1: 0, 2: 1, 97: 32, 98: 33, 99: 33}),
        ((2, 3), False, {5: 1, 11: 2, 12: 2}),
    ],
)
def test_number_of_codes(strides, pad, counts):
    shape = Architecture(
        8, enc_strides=strides, dec_strides=strides[::-1], enc_ratios=[1] * len(strides), dec_ratios=[1] * len(strides),
        pad_to_stride=pad,
    )  # fmt: skip
    assert {frames: shape.num_codes(frames) for frames in counts} == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_ratios": (1,)}, "as many ratios as strides"),
        ({"enc_block_dilations": (10**6,)}, "frames away"),
        ({"dec_block_kernel_size": 10**6 + 1}, "frames away"),
        ({"enc_block_dilations": (10**400,)}, "expected whole numbers from 1 to"),
        ({"code_dim": 2**20 + 1}, "code_dim=1048577"),
        ({"enc_ratios": [1] * 10**6}, "enc_ratios: a list of 1000000"),
        ({"enc_block_dilations": [1] * 501, "enc_block_kernel_size": 1}, "more than 1000 residual units"),
        ({"enc_strides": (2, 1)}, "same product"),
        ({"enc_kernel_size": 4}, "kernel size 4"),
        ({"enc_block_kernel_size": 2}, "kernel size 2"),
        ({"encode_channels": -3}, "encode_channels=-3"),
        ({"enc_block_dilations": (0,)}, "enc_block_dilations"),
        ({"enc_ratios": (1, 1.5)}, "enc_ratios"),
        ({"code_dim": "8"}, "code_dim"),
    ],
)
def test_options_that_fit_no_codec_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Architecture(8, **options)


def test_importing_it_is_light():
    import subprocess
    import sys

    code = "import sys, repcodec.architecture; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
