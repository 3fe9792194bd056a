import sys

import av
import numpy as np
import pytest
import soundfile
from conftest import refused

from repcodec.audio import (
    SAMPLE_RATE,
    num_samples_at_16khz,
    read_audio,
    resample,
    samples_at_16khz,
)
from repcodec.errors import RepCodecError


def noise(num_samples, channels=1):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels))
    return samples[:, 0] if channels == 1 else samples


def sine(hertz, seconds, rate):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_m4a(path, samples, rate, layout="mono", **options):
    """Encode (channels, S) or (S,) samples as AAC, as phones and recorders do."""
    with av.open(str(path), "w", format="ipod", options=options) as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        block = np.atleast_2d(samples).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def test_a_float_file_at_16_khz_is_read_unchanged(tmp_path):
    samples = noise(1234).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")

    read = read_audio(tmp_path / "a.wav")

    assert read.dtype == np.float32 and read.shape == (1234,)
    np.testing.assert_array_equal(read, samples)


def test_a_string_path_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(10), 16_000)

    assert len(read_audio(str(tmp_path / "a.wav"))) == 10
    assert num_samples_at_16khz(str(tmp_path / "a.wav")) == 10


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff"])
def test_16_bit_values_are_divided_by_32768(tmp_path, ending):
    values = np.array([-32768, -16384, -1, 0, 1, 16384, 32767], dtype=np.int16)
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, values, 16_000, subtype="PCM_16")

    np.testing.assert_array_equal(read_audio(path), values.astype(np.float32) / 32768)


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_averaged(tmp_path, channels):
    samples = noise(500, channels).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")

    read = read_audio(tmp_path / "a.wav")

    assert read.shape == (500,)
    np.testing.assert_allclose(read, samples.astype(np.float64).mean(axis=1), atol=1e-7)


def test_opposite_channels_cancel(tmp_path):
    samples = noise(100)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, -samples], axis=1), 44_100, subtype="FLOAT")

    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), 0)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("hertz", [200, 1_000, 3_000])
def test_a_resampled_sine_keeps_its_frequency_length_and_amplitude(tmp_path, rate, hertz):
    soundfile.write(tmp_path / "a.wav", sine(hertz, 1, rate), rate, subtype="FLOAT")

    read = read_audio(tmp_path / "a.wav")

    assert read.dtype == np.float32 and read.shape == (16_000,)
    assert np.abs(np.fft.rfft(read)).argmax() == hertz  # one second: bins are 1 Hz apart
    middle = slice(1000, -1000)  # the filter rings at both ends
    np.testing.assert_allclose(read[middle], sine(hertz, 1, 16_000)[middle], atol=2e-3)


def test_what_16_khz_cannot_hold_is_filtered_out_instead_of_mirrored(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(12_000, 1, 44_100), 44_100, subtype="FLOAT")

    assert np.abs(read_audio(tmp_path / "a.wav")[1000:-1000]).max() < 1e-3


def test_resample_leaves_16_khz_alone():
    samples = noise(100).astype(np.float32)

    np.testing.assert_array_equal(resample(samples, SAMPLE_RATE), samples)


def test_resample_gives_contiguous_float32():
    resampled = resample(noise(4_410)[::2], 22_050)

    assert resampled.dtype == np.float32 and resampled.flags.c_contiguous and resampled.shape == (1_600,)


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg", "aiff"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("num_samples", [4_801, 16_003])
def test_the_counted_samples_are_the_read_ones(tmp_path, ending, rate, num_samples):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, noise(num_samples), rate)

    counted = num_samples_at_16khz(path)

    assert counted == len(read_audio(path))
    assert abs(counted - num_samples * 16_000 / rate) <= 1


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_stereo_file_counts_samples_not_values(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", noise(rate, 2), rate)

    assert num_samples_at_16khz(tmp_path / "a.wav") == 16_000


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "aiff"])
def test_a_cut_off_file_is_refused_or_counted_as_read(tmp_path, ending):
    soundfile.write(tmp_path / f"whole.{ending}", noise(32_000), 16_000)
    content = (tmp_path / f"whole.{ending}").read_bytes()
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(content[: len(content) * 2 // 3])

    try:
        read = read_audio(path)
    except RepCodecError as error:
        assert str(path) in str(error)
    else:
        assert num_samples_at_16khz(path) == len(read)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_empty_sound_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), rate)

    with refused(tmp_path / "a.wav", "0 samples"):
        read_audio(tmp_path / "a.wav")


def test_a_sound_too_short_for_one_sample_at_16_khz_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1), 48_000)

    with refused(tmp_path / "a.wav", "0 samples"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_value_that_is_not_finite_is_refused(tmp_path, value, channels):
    samples = noise(50, channels)
    samples[7] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")

    with refused(tmp_path / "a.wav", "not finite"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a", "a.raw"])
@pytest.mark.parametrize("content", [b"", b"this is no sound", bytes(1000)])
def test_garbage_is_refused(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)

    with refused(tmp_path / name, "not a readable sound file"):
        read(tmp_path / name)


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
def test_a_missing_file_is_refused(tmp_path, read):
    with refused(tmp_path / "a.wav"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
def test_a_folder_is_refused(tmp_path, read):
    with refused(tmp_path):
        read(tmp_path)


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_000, 15_999, 16_000, 22_050, 24_000, 32_000, 37_800, 44_056,
                                  44_100, 48_000, 88_200, 96_000, 192_000])  # fmt: skip
def test_samples_at_16_khz_are_as_many_as_resampling_gives(rate):
    lengths = [*range(150), *np.random.default_rng(rate).integers(150, 200_000, 30).tolist()]

    counted = [samples_at_16khz(length, rate) for length in lengths]

    assert counted == [len(resample(np.zeros(length, np.float32), rate)) for length in lengths]


# MP3s of unknown length


def write_bare_mp3(path, samples):
    """Encode an MP3 of varying bit rate without the header that says how long it is, as recorders of streams do."""
    with av.open(str(path), "w", format="mp3", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=16_000, layout="mono", options={"abr": "1"})
        stream.bit_rate = 48_000
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize("noise_first", [True, False])  # libsndfile's guess is half of it, or three times as much
def test_an_mp3_that_leaves_its_length_open_is_read_whole(tmp_path, noise_first):
    halves = [noise(128_000), np.zeros(128_000)]
    write_bare_mp3(tmp_path / "a.mp3", np.concatenate(halves if noise_first else halves[::-1]))

    read = read_audio(tmp_path / "a.mp3")

    assert len(read) == pytest.approx(256_000, abs=3 * 1152)  # whole frames, and the encoder's delay
    assert num_samples_at_16khz(tmp_path / "a.mp3") == len(read)
    loud, quiet = (read[:120_000], read[-120_000:]) if noise_first else (read[-120_000:], read[:120_000])
    assert np.std(loud) > 0.2 > 0.01 > np.std(quiet)


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
def test_an_mp3_that_leaves_its_length_open_needs_pyav(tmp_path, monkeypatch, read):
    write_bare_mp3(tmp_path / "a.mp3", noise(16_000))
    monkeypatch.setitem(sys.modules, "av", None)

    with refused(tmp_path / "a.mp3", "does not say how long it is", "pip install 'repcodec[audio]'"):
        read(tmp_path / "a.mp3")


# .m4a


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_an_m4a_gives_its_tone_back(tmp_path, rate, layout):
    tone = sine(440, 3, rate)
    write_m4a(tmp_path / "a.M4A", tone if layout == "mono" else np.stack([tone, tone]), rate, layout)

    read = read_audio(tmp_path / "a.M4A")

    assert read.dtype == np.float32 and read.ndim == 1
    assert len(read) == 48_000
    assert num_samples_at_16khz(str(tmp_path / "a.M4A")) == len(read)
    middle = read[8_000:24_000]  # one second: bins are 1 Hz apart
    assert np.abs(np.fft.rfft(middle)).argmax() == 440
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
@pytest.mark.parametrize("content", [b"", b"this is no sound\n" * 50, b"#EXTM3U\nfile:///etc/hostname\n", bytes(5000)])
def test_what_is_no_m4a_is_refused(tmp_path, read, content):
    (tmp_path / "a.m4a").write_bytes(content)

    with refused(tmp_path / "a.m4a", "not a readable sound file"):
        read(tmp_path / "a.m4a")


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])  # the table of contents at the end, or in front
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.5, 0.9])
def test_a_cut_off_m4a_is_refused(tmp_path, read, options, kept):
    write_m4a(tmp_path / "whole.m4a", noise(64_000), 16_000, **options)
    content = (tmp_path / "whole.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(content[: int(len(content) * kept)])

    with refused(tmp_path / "a.m4a", "not a readable sound file"):
        read(tmp_path / "a.m4a")


def test_an_m4a_that_ends_between_two_packets_is_refused(tmp_path):
    write_m4a(tmp_path / "whole.m4a", noise(64_000), 16_000, movflags="faststart")
    with av.open(str(tmp_path / "whole.m4a")) as container:
        *_, packet = [packet for packet in container.demux() if packet.size and packet.pts < 32_000]
        end = packet.pos + packet.size
    (tmp_path / "a.m4a").write_bytes((tmp_path / "whole.m4a").read_bytes()[:end])

    with refused(tmp_path / "a.m4a", "cut off", "its header says 64000"):
        read_audio(tmp_path / "a.m4a")


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
def test_a_playlist_in_disguise_opens_no_other_file(tmp_path, monkeypatch, read):
    soundfile.write(tmp_path / "secret.wav", noise(16_000), 16_000)
    (tmp_path / "a.m4a").write_text("ffconcat version 1.0\nfile secret.wav\n")
    monkeypatch.chdir(tmp_path)

    with refused("a.m4a", "not a readable sound file"):
        read("a.m4a")


def test_an_m4a_of_a_picture_only_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)

    with refused(tmp_path / "a.m4a", "not a readable sound file"):
        read_audio(tmp_path / "a.m4a")


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
def test_an_m4a_without_pyav_says_what_to_install(tmp_path, monkeypatch, read):
    write_m4a(tmp_path / "a.m4a", noise(16_000), 16_000)
    monkeypatch.setitem(sys.modules, "av", None)

    with refused(tmp_path / "a.m4a", "pip install 'repcodec[audio]'"):
        read(tmp_path / "a.m4a")
