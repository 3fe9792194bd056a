"""The command on real speech: what it reads, what it writes, and how it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import DIM, write_split
from test_audio import noise

from repcodec.cli import main
from repcodec.codec import RepCodec
from repcodec.manifest import Manifest
from repcodec.quantizers import EMAQuantizer
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import encoder_table, load_speech_encoder
from repcodec.tokens import read_tokens

COMMANDS = ["manifest", "extract", "tokenize", "decode", "info", "convert", "export"]


@pytest.fixture(scope="module")
def test_set(speech, tmp_path_factory, whisper_folder):
    """Real speech (two sentences) as manifest, sounds and features of Whisper tiny.en's layer 3."""
    root = tmp_path_factory.mktemp("features")
    command = [
        "extract",
        str(speech / "test.tsv"),
        str(root),
        "--encoder",
        "whisper_tiny_en",
        "--model",
        whisper_folder,
    ]
    assert main([str(word) for word in command]) == 0
    return root / "whisper_tiny_en" / "l3" / "test"


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory, whisper_folder, test_set):
    """A codec started on that speech, that says where its speech encoder is; two codebooks in `two`."""
    shards = FeatureShards(test_set)
    frames = torch.from_numpy(np.concatenate([shards.read(i) for i in range(len(shards))]))
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    folder = tmp_path_factory.mktemp("codecs")
    for name, num_codebooks in (("one", 1), ("two", 2)):
        torch.manual_seed(0)
        codec = RepCodec(384, quantizer=EMAQuantizer(384, 64, num_codebooks))
        codec.start_as_identity()
        codec.quantizer.start(frames, seed=0)
        about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50, "encoder_model": str(whisper_folder)}
        codec.save_pretrained(folder / name, {**about, "encoder_sha256": encoder.weights_sha256})
    return folder


@pytest.fixture(scope="module")
def expected(codec_folder, test_set):
    """Name -> codes (1, T) of each utterance, straight from the codec."""
    shards, codec = FeatureShards(test_set), RepCodec.from_pretrained(codec_folder / "one")
    return {
        name: codec.encode(torch.from_numpy(shards.read(i))[None])[0].tolist() for i, name in enumerate(shards.names)
    }


def found(path):
    return {tokens.name: tokens.codes.tolist() for tokens in read_tokens(path)}


def run(*words):
    return main([str(word) for word in words])


def test_features_manifest_folder_and_files_give_the_same_codes(codec_folder, test_set, speech, expected, tmp_path):
    codec, manifest = codec_folder / "one", Manifest.read(speech / "test.tsv")
    assert run("tokenize", codec, test_set, "-o", tmp_path / "features") == 0
    assert run("tokenize", codec, speech / "test.tsv", "-o", tmp_path / "manifest") == 0
    assert found(tmp_path / "features") == found(tmp_path / "manifest") == expected
    assert (tmp_path / "features").read_bytes() == (tmp_path / "manifest").read_bytes()

    files = [manifest.root / path for path in manifest.paths]
    assert run("tokenize", codec, *files, "-o", tmp_path / "files") == 0
    assert list(found(tmp_path / "files").values()) == list(expected.values())
    (tmp_path / "sounds").mkdir()
    for number, file in enumerate(files):
        (tmp_path / "sounds" / f"{number}.flac").write_bytes(file.read_bytes())
    assert run("tokenize", codec, tmp_path / "sounds", "-o", tmp_path / "folder") == 0
    assert list(found(tmp_path / "folder").values()) == list(expected.values())
    assert (tmp_path / "folder").read_text().splitlines()[0] == str(tmp_path / "sounds")


def test_json_lines_and_run_lengths_lose_nothing(codec_folder, test_set, expected, tmp_path):
    for name, more in (("a.jsonl", []), ("b.jsonl", ["--deduplicate"]), ("c", ["--deduplicate"])):
        assert run("tokenize", codec_folder / "one", test_set, "-o", tmp_path / name, *more) == 0
        assert found(tmp_path / name) == expected
    assert (tmp_path / "b.jsonl").stat().st_size < (tmp_path / "a.jsonl").stat().st_size
    assert '"repeats"' in (tmp_path / "b.jsonl").read_text() and ":" in (tmp_path / "c").read_text()
    assert run("tokenize", codec_folder / "two", test_set, "-o", tmp_path / "two.jsonl") == 0
    two = found(tmp_path / "two.jsonl")
    assert [codes[0] for codes in two.values()] == [codes[0] for codes in expected.values()]
    assert all(len(codes) == 2 for codes in two.values())


def test_without_an_output_lines_go_to_standard_output(codec_folder, test_set, expected, tmp_path, capsys):
    capsys.readouterr()
    assert run("tokenize", codec_folder / "one", test_set) == 0
    (tmp_path / "out").write_text(capsys.readouterr().out)
    assert found(tmp_path / "out") == expected
    assert run("tokenize", codec_folder / "two", test_set) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["codes"]) for line in lines] == [2, 2]


def installed(*words, **options):
    """Run the installed command in a process of its own."""
    command = [f"{sys.prefix}/bin/repcodec", *map(str, words)]
    return subprocess.run(command, capture_output=True, timeout=300, **options)


@pytest.mark.slow
def test_sound_and_features_come_in_on_standard_input(codec_folder, test_set, speech, expected, tmp_path):
    manifest = Manifest.read(speech / "test.tsv")
    name = manifest.paths[0]
    done = installed("tokenize", codec_folder / "one", "-", input=(manifest.root / name).read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[1] == "stdin\t" + " ".join(map(str, expected[name][0]))
    features = FeatureShards(test_set).read(0).astype("<f4")
    done = installed("tokenize", codec_folder / "one", "-", "--stream", input=features.tobytes())
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [code for line in lines for code in line["codes"][0]] == expected[name][0]
    done = installed("tokenize", codec_folder / "one", "-", "--stream", input=features.tobytes()[:-1])
    assert done.returncode == 1 and b"ends with 1535 bytes of a frame" in done.stderr
    done = installed("tokenize", codec_folder / "one", "-", input=b"no sound")
    assert done.returncode == 1 and b"stdin: not a readable sound file" in done.stderr


def test_a_reader_that_wants_no_more_is_no_error(codec_folder, test_set):
    command = f"{sys.prefix}/bin/repcodec tokenize {codec_folder / 'one'} {test_set} --stream | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


def test_stream_of_shards_equals_the_offline_codes(codec_folder, test_set, expected, tmp_path):
    assert run("tokenize", codec_folder / "one", test_set, "--stream", "-o", tmp_path / "out") == 0
    codes = {name: [] for name in expected}
    for line in map(json.loads, (tmp_path / "out").read_text().splitlines()):
        codes[line["id"]] += line["codes"][0]
    assert {name: [row] for name, row in codes.items()} == expected


def test_processes_share_the_work_and_one_of_them_joins_it(codec_folder, test_set, tmp_path):
    words = ["tokenize", str(codec_folder / "one"), str(test_set), "-o"]
    assert run(*words, tmp_path / "whole") == 0
    command = [f"{sys.prefix}/bin/repcodec", *words, str(tmp_path / "out"), "--shard"]
    running = [subprocess.Popen([*command, f"{i}/2"], stderr=subprocess.DEVNULL) for i in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json", "whole", "whole.json"]


def test_decode_gives_features_back(codec_folder, test_set, tmp_path):
    codec = codec_folder / "one"
    assert run("tokenize", codec, test_set, "-o", tmp_path / "a.tokens") == 0
    assert run("decode", codec, tmp_path / "a.tokens", tmp_path / "decoded") == 0
    decoded, original = FeatureShards(tmp_path / "decoded", 384), FeatureShards(test_set)
    assert decoded.names == original.names and decoded.lengths.tolist() == original.lengths.tolist()
    error = (
        np.square(decoded.read(0) - original.read(0)).sum()
        / np.square(original.read(0) - original.read(0).mean(0)).sum()
    )
    assert error < 1, "better than always the mean"
    assert run("tokenize", codec, tmp_path / "decoded", "-o", tmp_path / "b.tokens") == 0


def test_info_describes_codec_features_and_tokens(codec_folder, test_set, tmp_path, capsys):
    run("tokenize", codec_folder / "two", test_set, "-o", tmp_path / "a.jsonl")
    capsys.readouterr()
    assert run("info", codec_folder / "two") == 0
    said = capsys.readouterr().out
    assert "whisper_tiny_en, layer 3, width 384, 50 frames per second" in said
    assert "2 codebooks of 64, 50 codes per second each, 600 bits per second" in said
    assert "160 ms after the code's own 20 ms" in said
    assert run("info", test_set) == 0
    said = capsys.readouterr().out
    assert "feature shards, 1 in number, float32" in said and "whisper_tiny_en, layer 3, width 384" in said
    assert run("info", tmp_path / "a.jsonl") == 0
    said = capsys.readouterr().out
    assert "RepCodec 2 x 64" in said and "codebook 1" in said and "of 64 codes used" in said


def test_convert_and_export(codec_folder, test_set, tmp_path, capsys):
    assert run("convert", codec_folder / "one", tmp_path / "copy") == 0
    one, copy = (RepCodec.from_pretrained(folder) for folder in (codec_folder / "one", tmp_path / "copy"))
    assert copy.about == one.about
    assert all(torch.equal(one.state_dict()[name], value) for name, value in copy.state_dict().items())
    capsys.readouterr()
    assert run("export", codec_folder / "one", tmp_path / "onnx", "--format", "onnx", "--check", test_set) == 0
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"encode.onnx", "decode.onnx"}
    assert "0.0000% of 338 codes differ" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenize", "CODEC", "nowhere"], "nowhere: no such file or folder"),
        (["tokenize", "nowhere", "FEATURES"], "nowhere"),
        (["tokenize", "CODEC", "empty"], "empty holds no sound file"),
        (["tokenize", "CODEC", "bad.wav"], "bad.wav: not a readable sound file"),
        (["tokenize", "CODEC", "FEATURES", "empty"], "is a folder: give one folder alone"),
        (["tokenize", "CODEC", "short.wav"], "short.wav: 100 samples are too short"),
        (["tokenize", "CODEC", "narrow"], "the features have width 8, but"),
        (["tokenize", "CODEC", "bad.wav", "--model", "nowhere/at/all"], "bad.wav"),
        (["tokenize", "CODEC", "FEATURES", "-o", "bad.wav/x"], "could not be written"),
        (["tokenize", "CODEC", "FEATURES", "--device", "cuda:9"], "device cuda:9: not usable here"),
        (["tokenize", "TWO", "FEATURES", "-o", "x.tokens"], "2 codebooks, but the published format holds one"),
        (["tokenize", "CODEC", "FEATURES", "-o", "x", "--shard", "0/9"], "shard 0 of 9"),
        (["tokenize", "CODEC", "FEATURES", "-o", "empty"], "empty is a folder"),
        (["tokenize", "CODEC", "bad.wav", "-o", "bad.wav"], "bad.wav is the input"),
        (["tokenize", "CODEC", "narrow", "-o", "narrow/0_1.len"], "would lie among the files of the input"),
        (["tokenize", "CODEC", ""], "no such file or folder"),
        (["tokenize", "CODEC", "FEATURES", "--device", "meta"], "device meta: not usable here"),
        (["tokenize", "CODEC", "FEATURES", "--stream", "-o", "empty"], "empty"),
        (["info", "x" * 300], "File name too long"),
        (["decode", "CODEC", "nowhere", "x"], "nowhere: not a readable tokens file"),
        (["decode", "TWO", "one.tokens", "x"], "1 codebooks, but the tokenizer has 2"),
        (["info", "nowhere"], "nowhere: no such file or folder"),
        (["info", "empty"], "neither a saved codec (config.json) nor feature shards"),
        (["info", "bad.wav"], "bad.wav"),
        (["info", "last.ckpt"], "last.ckpt: a checkpoint; repcodec convert makes a codec of it"),
        (["convert", "nowhere", "x"], "nowhere"),
        (["convert", "bad.wav", "x"], "bad.wav"),
        (["export", "nowhere", "x"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    words, message, codec_folder, test_set, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.wav").write_bytes(b"no sound at all")
    (tmp_path / "last.ckpt").write_bytes(b"PK")
    (tmp_path / "one.tokens").write_text("/audio\na.wav\t1 2 3\n")
    soundfile.write(tmp_path / "short.wav", noise(100), 16_000)
    write_split(tmp_path / "narrow", [5], dim=DIM)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    places = {"CODEC": codec_folder / "one", "TWO": codec_folder / "two", "FEATURES": test_set}

    assert run(*(places.get(word, word) for word in words)) == 1

    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "x" or path.is_file()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["tokenize", "codec"],
        ["tokenize", "c", "f", "--format", "text"],
        ["tokenize", "c", "f", "--shard", "0/2"],
        ["tokenize", "c", "f", "--stream", "--deduplicate"],
        ["tokenize", "c", "f", "g", "--stream"],
        ["tokenize", "c", "f", "-o", "x", "--shard", "2/2"],
        ["decode", "c"],
        ["info"],
        ["convert", "a"],
        ["export", "c", "f", "--format", "torchscript"],
    ],
)
def test_usage_errors_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: repcodec" in capsys.readouterr().err


def test_sound_cannot_be_streamed(codec_folder, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(9000), 16_000)
    with pytest.raises(SystemExit) as stop:
        run("tokenize", codec_folder / "one", tmp_path / "a.wav", "--stream")
    assert stop.value.code == 2
    assert "--stream takes features" in capsys.readouterr().err


def test_bad_sounds_can_be_left_out(codec_folder, tmp_path, capsys):
    for name in ("a", "c"):
        soundfile.write(tmp_path / f"{name}.wav", noise(9000), 16_000)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "d.wav", noise(100), 16_000)
    assert run("tokenize", codec_folder / "one", tmp_path, "-o", tmp_path / "out", "--skip-bad") == 0
    assert list(found(tmp_path / "out")) == ["a.wav", "c.wav"]
    said = capsys.readouterr()
    assert "2 utterances; 2 sounds were skipped" in said.out
    assert "b.wav: not a readable" in said.err and "d.wav: 100 samples" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  repcodec {command} " in capsys.readouterr().out.partition("example")[2]


def test_what_needs_no_model_starts_without_torch(codec_folder, test_set, tmp_path):
    (tmp_path / "one.tokens").write_text("/audio\na.wav\t1 2 3\n")
    soundfile.write(tmp_path / "a.wav", noise(9000), 16_000)
    words = [["info", codec_folder / "one"], ["info", test_set], ["info", tmp_path / "one.tokens"]]
    words += [["manifest", tmp_path, "-o", tmp_path / "m.tsv"], ["info", "nowhere"], ["tokenize", "c", "nowhere"]]
    code = (
        "import sys\nfrom repcodec.cli import main\n"
        "assert main(sys.argv[2:]) == int(sys.argv[1])\n"
        "heavy = {'torch', 'lightning', 'hydra', 'transformers', 'sklearn', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for line in words:
        status = "1" if "nowhere" in line else "0"
        subprocess.run([sys.executable, "-c", code, status, *map(str, line)], check=True, capture_output=True)
