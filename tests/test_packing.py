"""Codes do not depend on batch size, order, packing or windows, nor on how frames arrive."""

import threading

import numpy as np
import pytest
import torch

from repcodec import packing
from repcodec.codec import RepCodec
from repcodec.conv import MIN_FRAMES
from repcodec.kmeans import KMeansTokenizer
from repcodec.packing import decode_packed, encode_packed, encode_stream

LENGTHS = [50, 1, 0, 7, 131, 64, 2, 33, 97, 18, 6, 5]

SHAPES = {
    "published": {},
    "strided": {"enc_strides": (2, 1), "dec_strides": (1, 2)},
    "strided twice": {"enc_strides": (2, 3), "dec_strides": (3, 2), "codebook_num": 3},
    "converted, strided": {"enc_strides": (2, 3), "dec_strides": (3, 2), "pad_to_stride": False},
    "wide kernels": {
        "enc_kernel_size": 7, "enc_block_kernel_size": 5, "enc_block_dilations": (1, 3, 9), "dec_kernel_size": 5,
        "dec_block_dilations": (4,), "enc_ratios": (1, 2), "dec_ratios": (2, 1), "code_dim": 6,
    },
}  # fmt: skip


def make_codec(dim, **options):
    """A float64 codec with large biases, so that a wrong zero shows, and codes where its vectors lie."""
    torch.manual_seed(0)
    codec = RepCodec(dim, codebook_size=32, **options).double().eval()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 2)
        codec.feature_mean.normal_()
        codec.feature_scale.fill_(1.7)
        residual = codec.vectors(torch.randn(1, 4000, dim).double())
        for book in codec.quantizer.codebooks:
            book.codes.copy_(residual[::5][:32])
            residual = (residual - book.quantize(residual)[0])[32 * 5 :]
    return codec


@pytest.fixture(params=[*SHAPES, "k-means"])
def tokenizer(request):
    if request.param == "k-means":
        return KMeansTokenizer(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).double())
    return make_codec(8, **SHAPES[request.param])


@pytest.fixture
def utterances():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 8, generator=generator).double() for length in LENGTHS]


def alone(tokenizer, utterances):
    """The codes (K, N) of each utterance, run as a batch of one through the stacks as in training."""
    codes = []
    for features in utterances:
        if len(features) == 0:
            codes.append(torch.empty(tokenizer.num_codebooks, 0, dtype=torch.int64))
        elif isinstance(tokenizer, RepCodec):
            codes.append(tokenizer(features[None]).quantizer.codes[0])
        else:
            codes.append(tokenizer.encode(features[None])[0])
    return [row[:, row[0] >= 0] for row in codes]


def same(found, expected):
    assert [tuple(row.shape) for row in found] == [tuple(row.shape) for row in expected]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def packed(tokenizer, utterances):
    return [codes.T for codes in encode_packed(tokenizer, utterances)]


def test_codes_are_of_many_kinds(tokenizer, utterances):
    """Otherwise the tests below would compare nothing."""
    codes = torch.cat(alone(tokenizer, utterances), 1)
    assert all(len(row.unique()) > 8 for row in codes)


@pytest.mark.parametrize("pack", [1, 12, 40, 4096])
def test_packed_utterances_get_the_codes_they_get_alone(tokenizer, utterances, pack, monkeypatch):
    monkeypatch.setattr(packing, "PACK", pack)
    same(packed(tokenizer, utterances), alone(tokenizer, utterances))


def test_order_changes_no_code(tokenizer, utterances):
    order = np.random.default_rng(0).permutation(len(utterances)).tolist()
    found = packed(tokenizer, [utterances[i] for i in order])
    same(found, [alone(tokenizer, utterances)[i] for i in order])


def test_padded_batch_gets_the_same_codes(tokenizer, utterances):
    if isinstance(tokenizer, KMeansTokenizer):
        pytest.skip("k-means looks at single frames")
    batch = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=float("nan"))
    lengths = torch.tensor(LENGTHS)
    codes = tokenizer.encode(batch, lengths)
    same([row[:, row[0] >= 0] for row in codes], alone(tokenizer, utterances))
    # An utterance without a frame: padding alone, in training too.
    assert torch.equal(tokenizer(batch, lengths).quantizer.codes[:, :, : codes.shape[-1]], codes)


@pytest.mark.parametrize("sizes", [[1], [3], [7, 1, 20], [1000]])
def test_stream_gives_the_offline_codes(tokenizer, utterances, sizes):
    def chunks(features):
        done, turn = 0, 0
        while done < len(features):
            yield features[done : done + sizes[turn % len(sizes)]]
            done, turn = done + sizes[turn % len(sizes)], turn + 1

    for features, expected in zip(utterances, alone(tokenizer, utterances), strict=True):
        found = list(encode_stream(tokenizer, chunks(features)))
        assert all(len(codes) for codes in found)
        joined = torch.cat([*found, torch.empty(0, tokenizer.num_codebooks, dtype=torch.int64)])
        same([joined.T], [expected])


def test_stream_waits_for_the_look_ahead_and_no_longer(tokenizer):
    _, after = tokenizer.reach
    given = []
    features = torch.randn(100 * tokenizer.stride, 8).double()

    def chunks():
        for frame in features:
            given.append(frame)
            yield frame[None]

    done = 0
    for codes in encode_stream(tokenizer, chunks()):
        if len(given) == len(features):
            break
        done += len(codes)
        assert len(given) == done * tokenizer.stride + after, "the code's own frames, and what it looks ahead to"
    assert done > 30


def test_no_code_looks_further_than_the_reach_says(tokenizer):
    """Changing a frame changes codes' vectors inside the reach, and none outside."""
    if isinstance(tokenizer, KMeansTokenizer):
        pytest.skip("k-means looks at single frames")
    before, after = tokenizer.reach
    stride = tokenizer.stride
    features = torch.randn(1, 40 * stride, 8).double()
    changed = features.clone()
    frame = 20 * stride
    changed[0, frame] += 1
    difference = (tokenizer.vectors(changed) - tokenizer.vectors(features)).abs().amax(1).nonzero()[:, 0].tolist()
    # Code j depends on frames j * stride - before to j * stride + stride - 1 + after.
    expected = [j for j in range(40) if j * stride - before <= frame <= j * stride + stride - 1 + after]
    assert difference == expected


def test_decoded_frames_do_not_depend_on_packing_or_windows(tokenizer, utterances, monkeypatch):
    codes = [row.T for row in alone(tokenizer, utterances)]
    expected = [tokenizer.decode(row.T[None])[0] if len(row) else torch.empty(0, 8) for row in codes]
    for pack in (1, 40, 4096):
        monkeypatch.setattr(packing, "PACK", pack)
        for found, frames in zip(decode_packed(tokenizer, codes), expected, strict=True):
            assert len(found) == len(frames)
            torch.testing.assert_close(found, frames.to(found), rtol=1e-9, atol=1e-9)


def test_long_utterances_are_read_in_windows(monkeypatch):
    """Never more rows than a window and what it overlaps by."""
    monkeypatch.setattr(packing, "PACK", 48)
    codec = make_codec(8)

    class Rows:
        asked = []
        values = torch.randn(1000, 8).double()

        def __len__(self):
            return 1000

        def __getitem__(self, part):
            self.asked.append(min(part.stop, 1000) - part.start)
            return self.values[part]

    (codes,) = encode_packed(codec, [Rows()])
    assert max(Rows.asked) <= 48 + 2 * 12 and len(Rows.asked) == 21
    assert torch.equal(codes.T, alone(codec, [Rows.values])[0])


def test_utterances_are_asked_for_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(packing, "PACK", 24)
    asked = []

    def many():
        for number in range(1000):
            asked.append(number)
            yield torch.randn(8, 8).double()

    next(encode_packed(make_codec(8), many()))
    assert len(asked) < 10


@pytest.mark.parametrize("stride", [1, 2])
def test_float32_with_the_fast_convolutions_gives_the_same_codes_but_for_ties(stride):
    """Wide enough for the fast ways: packs, windows, streams and plain convolutions, against float64."""
    torch.manual_seed(0)
    codec = RepCodec(
        256, codebook_size=64, enc_strides=(stride,), enc_ratios=(1,), dec_strides=(stride,), dec_ratios=(1,)
    )
    codec.quantizer.codebooks[0].codes.copy_(codec.vectors(torch.randn(1, 64 * stride, 256)))
    codec = codec.eval()
    utterances = [torch.randn(length, 256) for length in (3 * MIN_FRAMES, 40, 5 * MIN_FRAMES + 1, 333)]
    found = packed(codec, utterances)
    streamed = [torch.cat(list(encode_stream(codec, row.split(100)))).T for row in utterances]
    plain = [codec(row[None]).quantizer.codes[0] for row in utterances]  # gradients are on: no fast way
    exact = codec.double()
    ties = 0
    for row, *codes in zip(utterances, found, streamed, plain, strict=True):
        z = exact.vectors(row[None].double())
        distances = torch.cdist(z, exact.quantizer.codebooks[0].codes).square()
        best, second = distances.topk(2, largest=False).values.T
        for one in codes:
            wrong = one[0] != distances.argmin(1)
            assert ((second - best) / best)[wrong].lt(1e-5).all()
            ties += int(wrong.sum())
    assert ties <= 2


@pytest.fixture
def two_threads():
    """As many threads in this process, whatever it began with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_side_by_side_change_no_code(tokenizer, utterances, two_threads, monkeypatch):
    monkeypatch.setattr(packing, "PACK", 40)
    names, both = set(), threading.Barrier(2)

    def run(pieces, encode=tokenizer.encode_pieces):
        if threading.current_thread().name not in names:
            names.add(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                both.wait(60)  # a busy machine may let one thread do all before the other begins
        assert torch.get_num_threads() == 1 + (threading.current_thread() is threading.main_thread())
        return encode(pieces)

    monkeypatch.setattr(tokenizer, "encode_pieces", run)
    same(packed(tokenizer, utterances), alone(tokenizer, utterances))
    assert len(names) == 2 and threading.main_thread().name not in names
    names.clear()
    same(packed(tokenizer, utterances[-1:]), alone(tokenizer, utterances)[-1:])
    assert names == {threading.main_thread().name}, "a pack alone has all threads"


def test_many_cores_run_no_more_packs_than_memory_has_room_for(utterances, two_threads, monkeypatch):
    monkeypatch.setattr(packing, "PACK", 12)
    monkeypatch.setattr(packing, "SIDE_BY_SIDE", 2)
    packing._pool.cache_clear()
    torch.set_num_threads(6)
    codec, threads, both = make_codec(8), {}, threading.Barrier(2)

    def run(pieces, encode=codec.encode_pieces):
        if threading.current_thread().name not in threads:
            threads[threading.current_thread().name] = torch.get_num_threads()
            both.wait(60)
        return encode(pieces)

    monkeypatch.setattr(codec, "encode_pieces", run)
    same(packed(codec, utterances), alone(codec, utterances))
    packing._pool.cache_clear()
    assert list(threads.values()) == [3, 3]


def test_what_fails_in_a_thread_fails_here(utterances, two_threads, monkeypatch):
    monkeypatch.setattr(packing, "PACK", 40)
    codec = make_codec(8)

    def run(pieces):
        raise ValueError("a pack of its own")

    monkeypatch.setattr(codec, "encode_pieces", run)
    with pytest.raises(ValueError, match="a pack of its own"):
        packed(codec, utterances)
