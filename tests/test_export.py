import json
import sys
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from conftest import refused

from repcodec import export
from repcodec.codec import RepCodec
from repcodec.export import check_onnx, export_onnx
from repcodec.kmeans import KMeansTokenizer
from repcodec.manifest import Manifest
from repcodec.quantizers import NO_CODE, Quantizer
from repcodec.speech_encoders import encoder_table, load_speech_encoder

onnx = pytest.importorskip("onnx", reason="pip install 'repcodec[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'repcodec[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'repcodec[onnx]'")

DIM = 8
LENGTHS = [1, 2, 7, 97, 300]
# Tracing takes seconds: one residual unit a stage. The published shape is that of the codec of real speech, below.
STRIDES = {
    2: {"enc_strides": (2, 1), "dec_strides": (1, 2), "codebook_num": 3},
    6: {
        "enc_strides": (2, 3), "dec_strides": (3, 2), "code_dim": 5, "encode_channels": 6, "decode_channels": 4,
        "enc_ratios": (1, 2), "dec_ratios": (2, 1), "enc_kernel_size": 5, "dec_block_kernel_size": 5,
    },
}  # fmt: skip


def opened(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A function: a total stride, and whether utterances are filled up to it -> a codec, the folder of its graphs."""
    traced, decoders = export._traced, {}

    def trace_decoders_once(part, *more):
        """Whether utterances are filled up or cut, they are decoded alike."""
        stride = part.codec.stride
        if isinstance(part, export._Encode):
            return traced(part, *more)
        if stride not in decoders:
            decoders[stride] = traced(part, *more)
        return decoders[stride]

    @cache
    def make(stride, pad_to_stride):
        torch.manual_seed(stride)
        options = {"codebook_size": 32, "enc_block_dilations": (2,), "dec_block_dilations": (3,), **STRIDES[stride]}
        codec = RepCodec(DIM, pad_to_stride=pad_to_stride, **options).eval()
        with torch.no_grad():  # biases and normalization that would show where they do not belong
            for name, parameter in codec.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
            codec.feature_mean.normal_()
            codec.feature_scale.fill_(2.0)
        codec.about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50}
        folder = tmp_path_factory.mktemp("export") / "new"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "_traced", trace_decoders_once)
            assert export_onnx(codec, folder) == (folder / "encode.onnx", folder / "decode.onnx")
        return codec, folder

    return make


@pytest.fixture(
    params=[
        pytest.param((2, True), id="2"),
        pytest.param((2, False), id="2 cut", marks=pytest.mark.slow),
        pytest.param((6, True), id="6", marks=pytest.mark.slow),
        pytest.param((6, False), id="6 cut"),
    ]
)
def exported(request, exports):
    """A codec of each shape and the folder of its graphs."""
    return exports(*request.param)


@pytest.fixture
def one(exports):
    """One of them, where any will do."""
    return exports(2, True)


@pytest.fixture
def no_tracing(monkeypatch, one):
    """Let exporting write the graphs of `one` again."""
    graphs = {part: onnx.load(one[1] / name) for part, name in zip(("_Encode", "_Decode"), export.FILES, strict=True)}
    monkeypatch.setattr(export, "_traced", lambda part, *more: graphs[type(part).__name__])


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_of_any_length_and_batch_are_the_codec(exported, batch):
    codec, folder = exported
    encode, decode = (opened(folder / name) for name in export.FILES)
    generator = torch.Generator().manual_seed(batch)
    for length in LENGTHS:
        features = torch.randn(batch, length, DIM, generator=generator)
        expected = codec.encode(features)
        (codes,) = encode.run(["codes"], {"features": features.numpy()})
        assert codes.dtype == np.int64
        assert codes.shape == (batch, codec.num_codebooks, codec.architecture.num_codes(length))
        assert np.array_equal(codes, expected)  # no ties in these
        if codes.size:
            (decoded,) = decode.run(["features"], {"codes": codes})
            assert decoded.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(decoded), codec.decode(expected), rtol=1e-5, atol=1e-5)


def test_the_check_compares_all_of_it(exported):
    codec, folder = exported
    features = [np.random.default_rng(i).normal(size=(n, DIM)).astype(np.float32) for i, n in enumerate(LENGTHS)]
    checked = check_onnx(codec, folder, iter(features))
    counts = [codec.architecture.num_codes(n) for n in LENGTHS]
    assert checked.frames == sum(n for n, count in zip(LENGTHS, counts, strict=True) if count)
    assert checked.codes == sum(counts) * codec.num_codebooks
    assert (checked.share, checked.not_ties) == (0, 0)
    assert 0 < checked.relative_error < 1e-5


def test_codes_of_padded_utterances_decode_as_each_alone(exported):
    codec, folder = exported
    decode = opened(folder / "decode.onnx")
    codes = torch.randint(32, (2, codec.num_codebooks, 9))
    codes[1, :, 4:] = NO_CODE
    (decoded,) = decode.run(None, {"codes": codes.numpy()})
    torch.testing.assert_close(torch.from_numpy(decoded), codec.decode(codes), rtol=1e-5, atol=1e-5)
    (alone,) = decode.run(None, {"codes": codes[1:, :, :4].numpy()})
    np.testing.assert_allclose(decoded[1, : 4 * codec.stride], alone[0], rtol=1e-5, atol=1e-5)
    assert (decoded[1, 4 * codec.stride :] == 0).all()


def test_graphs_are_valid_plain_and_say_what_they_are(exported):
    codec, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted(export.FILES)
    for path, stack in zip((folder / name for name in export.FILES), (codec.encoder, codec.decoder), strict=True):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        convolutions = [m for m in stack.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d)]
        assert len([n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]) == len(convolutions)
        about = {item.key: item.value for item in model.metadata_props}
        assert len(about.pop("weights_sha256")) == 64
        assert about == {
            "kind": "repcodec", "encoder": "whisper_tiny_en", "layer": "3", "frame_rate": "50",
            "stride": str(codec.stride), "pad_to_stride": str(codec.architecture.pad_to_stride),
        }  # fmt: skip
        for name in ("repcodec/", "site-packages"):  # where it was made is nobody's business
            assert name.encode() not in path.read_bytes()
    axes = [d.dim_param or d.dim_value for v in model.graph.output for d in v.type.tensor_type.shape.dim]
    assert axes == ["B", "T", DIM]


@pytest.mark.slow  # random features are compared in every run
@torch.no_grad()
def test_codes_of_real_speech_are_the_same(tmp_path, speech, whisper_folder, capfd, recwarn):
    manifest = Manifest.read(speech / "train.tsv")
    sounds = [torch.from_numpy(manifest.waveform(i)) for i in range(4)]
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    features = encoder([*sounds, torch.cat(sounds)])
    every = torch.cat(features[:-1])
    torch.manual_seed(0)
    codec = RepCodec(384, codebook_size=64).eval()
    codec.feature_mean.copy_(every.mean(0))
    codec.feature_scale.copy_((every - codec.feature_mean).square().mean().sqrt())
    codec.start_as_identity()
    for parameter in codec.parameters():  # a little further, so that every convolution counts
        parameter.add_(torch.randn_like(parameter) * 0.01)
    codec.quantizer.start(codec.vectors(every[None]), seed=0)
    capfd.readouterr()
    recwarn.clear()
    export_onnx(codec, tmp_path)
    assert (*capfd.readouterr(), list(recwarn)) == ("", "", [])  # the exporter keeps to itself
    cut = [features[0][:length] for length in LENGTHS]
    checked = check_onnx(codec, tmp_path, [row.numpy() for row in (*features, *cut)])
    assert checked.frames == checked.codes > 1000
    assert checked.not_ties == 0
    assert checked.share < 1e-3
    assert checked.relative_error < 1e-5
    assert str(checked).startswith(f"onnxruntime and the codec, over {checked.frames} frames: {checked.share:.4%} of")


def test_the_hash_is_that_of_the_saved_codec(tmp_path, one):
    codec, folder = one
    codec.save_pretrained(tmp_path)
    about = opened(folder / "encode.onnx").get_modelmeta().custom_metadata_map
    assert about["weights_sha256"] == json.loads((tmp_path / "config.json").read_text())["weights_sha256"]


def test_exporting_leaves_the_codec_as_it_is(tmp_path, one, no_tracing):
    codec = deepcopy(one[0]).double().train()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    export_onnx(codec, str(tmp_path))
    assert codec.training
    for name, value in codec.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_codes_that_differ_are_told_from_ties():
    codec = RepCodec(2, codebook_size=3, codebook_num=2)
    first, second = (book.codes for book in codec.quantizer.codebooks)
    first.copy_(torch.tensor([[0, 0], [2, 0], [2 + 1e-6, 0]]))
    second.copy_(torch.tensor([[1, 0], [-1, 0], [9, 9]]))
    vectors = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    expected = torch.tensor([[0, 0], [0, 0], [1, 1], [0, 0]])
    # The same; as near, whatever then follows; a millionth further; as near in the second codebook.
    ties = torch.tensor([[0, 0], [1, 1], [2, 0], [0, 1]])
    assert export._count_not_ties(codec, vectors, expected, ties) == 0
    others = torch.tensor([[0, 1], [0, 2], [1, 1], [1, 0]])
    assert export._count_not_ties(codec, vectors, expected, others) == 3


def test_the_check_counts_codes_that_differ(one, monkeypatch):
    codec, folder = one
    about = export._about(codec)
    monkeypatch.setattr(export, "_about", lambda codec: about)
    other = deepcopy(codec)
    book = other.quantizer.codebooks[2].codes
    book.copy_(book.roll(1, 0))
    checked = check_onnx(other, folder, [np.random.default_rng(0).normal(size=(50, DIM))])
    assert checked.share == 1 / 3  # all codes of one codebook of three
    assert (checked.codes, checked.not_ties) == (75, 25)
    assert checked.relative_error > 0.01


def test_graphs_of_another_codec_are_refused(one):
    codec, folder = one
    other = deepcopy(codec)
    other.quantizer.codebooks[0].codes[0, 0] += 1
    with refused(folder / "encode.onnx", "another codec", "export that one again"):
        check_onnx(other, folder, [np.zeros((5, DIM))])


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_missing_and_damaged_graphs_are_one_sentence(tmp_path, one, damage):
    codec, folder = one
    content = (folder / "encode.onnx").read_bytes()
    if damage == "half":
        (tmp_path / "encode.onnx").write_bytes(content[: len(content) // 2])
    with refused(tmp_path / "encode.onnx", "no graph that onnxruntime can run", "export again"):
        check_onnx(codec, tmp_path, [np.zeros((5, DIM))])


@pytest.mark.parametrize("utterances", [[], [np.zeros((0, DIM))]])
def test_nothing_to_check_with_is_one_sentence(one, utterances):
    with refused("no utterance is as long as a code"):
        check_onnx(*one, utterances)


def test_wrong_width_is_refused(one):
    codec, folder = one
    with refused(f"width {DIM}", "(1, 5, 3)"):
        check_onnx(codec, folder, [np.zeros((5, 3))])
    with pytest.raises(Exception, match="index: 2 Got: 3 Expected: 8"):
        opened(folder / "encode.onnx").run(None, {"features": np.zeros((1, 5, 3), np.float32)})


def test_codes_that_the_codebook_does_not_have_are_refused(one):
    with pytest.raises(Exception, match=r"invalid index.*32"):
        opened(one[1] / "decode.onnx").run(None, {"codes": np.full((1, 3, 5), 32)})


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_one_sentence(monkeypatch, tmp_path, one, package):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(f"the package {package}", "pip install 'repcodec[onnx]'"):
        if package == "onnxruntime":
            check_onnx(*one, [np.zeros((5, DIM))])
        else:
            export_onnx(one[0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_kmeans_and_other_quantizers_say_what_can_be_exported(tmp_path):
    with refused("KMeansTokenizer cannot be exported", "made of codecs"):
        export_onnx(KMeansTokenizer(torch.zeros(4, 2)), tmp_path)

    class Other(Quantizer):
        kind, dim = "other", 2

    with refused('"other" cannot be exported', '"ema"'):
        export_onnx(RepCodec(2, quantizer=Other()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_weights_than_a_file_holds_are_refused(tmp_path):
    with torch.device("meta"):
        codec = RepCodec(8192)
    with refused("the encoder has 7.0 GiB of weights", "2.0 GiB"):
        export_onnx(codec, tmp_path)


def test_unwritable_folder_is_one_sentence(tmp_path, one, no_tracing):
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file" / "encode.onnx", "could not be written"):
        export_onnx(one[0], tmp_path / "file")


def test_full_disk_leaves_what_was_there(tiny_disk, one, no_tracing):
    (tiny_disk / "encode.onnx").write_text("old")
    (tiny_disk / "ballast").write_bytes(bytes(40_000))  # room for one graph and not for two
    with refused(tiny_disk, "could not be written", "No space left"):
        export_onnx(one[0], tiny_disk)
    assert sorted(path.name for path in tiny_disk.iterdir()) == ["ballast", "encode.onnx"]
    assert (tiny_disk / "encode.onnx").read_text() == "old"
