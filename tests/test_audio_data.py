"""Training straight from sound: the same batches as from shards of the same sounds, with real speech and weights."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from hydra import compose, initialize_config_dir
from test_comparison import evaluated
from test_train import equal_checkpoints, metrics

from repcodec.audio_data import AudioDataModule, SharDataset
from repcodec.cuts import open_sounds
from repcodec.data import ShardsDataModule
from repcodec.errors import user_message
from repcodec.extraction import extract, feature_folder
from repcodec.manifest import Manifest
from repcodec.speech_encoders import encoder_table, load_speech_encoder

ROOT = Path(__file__).parent.parent
LAYER = 2


def extracted(speech, whisper_folder, root, dtype):
    """Feature shards of the speech, as `repcodec extract` makes them."""
    spec = encoder_table()["whisper_tiny_en"]
    encoder = load_speech_encoder(spec, LAYER, whisper_folder)
    for split in ("train", "valid", "test"):
        manifest = Manifest.read(speech / f"{split}.tsv")
        extract(manifest, feature_folder(root, "whisper_tiny_en", LAYER, split), spec, encoder, dtype=dtype)
    return root


@pytest.fixture(scope="session")
def features(speech, whisper_folder, tmp_path_factory):
    """Feature shards of the speech in float32."""
    return extracted(speech, whisper_folder, tmp_path_factory.mktemp("features"), "float32")


@pytest.fixture
def from_sound(speech, whisper_folder):
    def module(train=None, **options):
        spec = replace(encoder_table()["whisper_tiny_en"], model=str(whisper_folder))
        sources = {"train": train or str(speech / "train.tsv"), "valid": str(speech / "valid.tsv"), "test": None}
        return AudioDataModule(
            **sources, encoder=asdict(spec), layer=LAYER, **{"batch_size": 3, "crop": 64, "seed": 1, **options}
        )

    return module


@pytest.fixture
def from_shards(features):
    return ShardsDataModule(
        dim=384, encoder="whisper_tiny_en", layer=LAYER, root=str(features), batch_size=3, crop=64, seed=1
    )


def equal(one, other):
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(one.utterances, other.utterances)
    assert one.features.dtype == other.features.dtype == torch.float32
    assert (one.features - other.features).norm() / other.features.norm() < 1e-5


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_shards_of_the_same_sounds(from_sound, from_shards, workers):
    module = from_sound(num_workers=workers, batch_seconds=5)
    for loader, reference in (
        (islice(module.train_dataloader(), 3), islice(from_shards.train_dataloader(), 3)),
        (module.val_dataloader(), from_shards.val_dataloader()),
    ):
        batches = [module.on_after_batch_transfer(batch, 0) for batch in loader]
        references = list(reference)
        assert len(batches) == len(references)
        for one, other in zip(batches, references, strict=True):
            equal(one, other)
    for one, other in zip(module.start_batches(), from_shards.start_batches(), strict=True):
        equal(one, other)


def test_statistics_are_those_of_shards_of_the_same_sounds(from_sound, from_shards):
    torch.testing.assert_close(from_sound().statistics.mean, from_shards.statistics.mean, rtol=1e-5, atol=1e-5)
    assert from_sound().statistics.scale == pytest.approx(from_shards.statistics.scale, rel=1e-5)


def test_a_sample_takes_whole_utterances_evenly(from_sound):
    train = from_sound().train
    half = train.sample(int(train.lengths.sum()) // 2)
    assert 0 < len(half) < train.lengths.sum()
    assert np.array_equal(half[: train.lengths[0]], train.read(0))


def test_a_sample_of_long_recordings_takes_a_stretch_of_each(tmp_path, speech, whisper_folder):
    manifest = Manifest.read(speech / "train.tsv")
    whole = np.concatenate([manifest.waveform(i) for i in range(len(manifest))] * 6)
    assert len(whole) > 90 * 16_000
    names = ["0short.wav", *(f"{i}.wav" for i in range(1, 6))]
    for name in names:
        soundfile.write(tmp_path / name, whole[:100] if name == "0short.wav" else whole, 16_000)
    Manifest(tmp_path, names, [100, *[len(whole)] * 5]).write(tmp_path / "train.tsv")
    spec = replace(encoder_table()["whisper_tiny_en"], model=str(whisper_folder))
    module = AudioDataModule(
        train=str(tmp_path / "train.tsv"), valid=None, test=None, encoder=asdict(spec), layer=1, batch_seconds=60
    )
    sample = module.train.sample(7_000)
    assert sample.shape == (7_000, 384)
    assert np.isfinite(sample).all()
    ran = []
    module.train._encode = lambda waveforms: ran.extend(waveforms) or module.encode(waveforms)
    module.train.sample(7_000)
    assert [len(one) for one in ran] == [60 * 16_000] * 3


def test_sound_that_a_precision_rounded_is_refused(from_sound):
    module = from_sound()
    batch = next(iter(module.val_dataloader()))
    with refused("16-mixed or bf16-mixed"):
        module.on_after_batch_transfer(batch._replace(waveform=batch.waveform.bfloat16()), 0)


def test_an_empty_share_of_the_validation_is_an_empty_batch(from_sound):
    module = from_sound()
    (batch,) = [module.features_of(batch) for batch in module.whole_utterances(module.valid, rank=5, world_size=6)]
    assert batch.lengths.tolist() == [0]
    assert batch.features.shape == (1, 1, 384)


def run_here(speech, whisper_folder, run_dir, *overrides, data="audio"):
    from train import train

    run_dir.mkdir(exist_ok=True)
    sounds = [f"data.train='{speech}/train.tsv'", f"data.valid='{speech}/valid.tsv'", "data.num_workers=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*options(whisper_folder), f"data={data}", *(sounds if data == "audio" else []),
                                   f"run_dir='{run_dir}'", "run=test", *overrides])  # fmt: skip
    return train(config)


def options(whisper_folder):
    return [
        "encoder=whisper_tiny_en", f"encoder.model='{whisper_folder}'", f"layer={LAYER}", "codec=small",
        "quantizer.codebook_size=16", "data.batch_size=3", "data.crop=64", "trainer.max_steps=6",
        "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "logger=csv",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(speech, whisper_folder, features, tmp_path_factory):
    """The same six steps from sound and from shards."""
    folder = tmp_path_factory.mktemp("runs")
    run_here(speech, whisper_folder, folder / "sound")
    run_here(speech, whisper_folder, folder / "shards", f"data.root='{features}'", data="shards")
    return folder


def test_training_does_not_notice_where_features_come_from(trained):
    sound, shards = (metrics(trained / name) for name in ("sound", "shards"))
    assert len(sound) == len(shards) > 6
    for one, other in zip(sound, shards, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name in ("train/frames_per_second", "train/data_wait_share"):  # the clock's
                continue
            assert (value == "") == (other[name] == "")
            if value:
                assert float(value) == pytest.approx(float(other[name]), rel=1e-3), name


@pytest.mark.slow
def test_float16_shards_train_to_the_same_result_and_halve_the_disk(
    trained, speech, whisper_folder, features, tmp_path
):
    extracted(speech, whisper_folder, tmp_path / "half", "float16")
    sizes = [sum(path.stat().st_size for path in root.rglob("*.npy")) for root in (tmp_path / "half", features)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=1e-2)
    run_here(speech, whisper_folder, tmp_path / "run", f"data.root='{tmp_path}/half'", data="shards")
    half, full = metrics(tmp_path / "run"), metrics(trained / "shards")
    for one, other in zip(half, full, strict=True):
        for name in ("train/loss", "valid/normalized_error"):
            if other[name]:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=2e-3)
    assert [row["train/loss"] for row in half] != [row["train/loss"] for row in full]


def test_a_checkpoint_holds_the_speech_encoders_identity_but_not_its_weights(trained, whisper_folder):
    sound, shards = (
        torch.load(trained / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("sound", "shards")
    )
    assert sound["state_dict"].keys() == shards["state_dict"].keys()
    identity = sound["AudioDataModule"]
    assert (identity["encoder"], identity["layer"]) == ("whisper_tiny_en", LAYER)
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], LAYER, whisper_folder)
    assert identity["weights_sha256"] == encoder.weights_sha256
    saved = json.loads((trained / "sound" / "codec" / "config.json").read_text())
    assert (saved["encoder"], saved["layer"]) == ("whisper_tiny_en", LAYER)


def test_a_resumed_run_equals_one_never_stopped(trained, speech, whisper_folder, tmp_path):
    run_here(speech, whisper_folder, tmp_path / "run", "trainer.max_steps=4")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    run_here(speech, whisper_folder, tmp_path / "run", f"ckpt_path='{last}'")
    equal_checkpoints(last, trained / "sound" / "checkpoints" / "last.ckpt")


def test_a_checkpoint_of_another_layer_is_refused(trained, speech, whisper_folder, tmp_path):
    last = trained / "sound" / "checkpoints" / "last.ckpt"
    with refused("last.ckpt", "layer is 2 in the checkpoint, but 1 in the configuration"):
        run_here(speech, whisper_folder, tmp_path / "run", "layer=1", f"ckpt_path='{last}'")


@pytest.mark.slow
def test_mixed_precision_training_sees_float32_features(speech, whisper_folder, tmp_path, trained):
    run_here(speech, whisper_folder, tmp_path / "run", "+trainer.precision=bf16-mixed", "trainer.max_steps=1")
    mixed, full = (
        [float(row["valid/normalized_error"]) for row in metrics(folder) if row["valid/normalized_error"]]
        for folder in (tmp_path / "run", trained / "sound")
    )
    assert mixed[0] == pytest.approx(full[0], rel=0.02)


def process(speech, whisper_folder, run_dir, *overrides, script="train.py"):
    """Run a script on sound, as a process with one thread."""
    sounds = [f"data.{split}='{speech}/{split}.tsv'" for split in ("train", "valid")]
    command = [sys.executable, str(ROOT / script), *options(whisper_folder), "data=audio", *sounds, *overrides]
    return subprocess.run(
        [*command, "logger=none", f"hydra.run.dir='{run_dir}'"], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow  # test_ddp.py does as much with shards
def test_two_processes_equal_one_with_both_halves_of_the_batch(speech, whisper_folder, tmp_path):
    more = ["+trainer.precision=64-true", "callbacks=kmeans_start", "trainer.max_steps=3"]
    ranks = ["trainer=ddp_cpu", "trainer.strategy.timeout.seconds=60", "data.batch_size=2", "data.num_workers=0"]
    for name, extra in (("two", ranks), ("one", ["data.batch_size=4", "data.num_workers=1"])):
        result = process(speech, whisper_folder, tmp_path / name, *more, *extra)
        assert result.returncode == 0, result.stderr
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    )
    for name, value in one.items():
        # The features are float32, and packed with other utterances: their rounding is in it.
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_evaluation_from_sound_gives_the_figures_of_shards(trained, speech, whisper_folder, features, tmp_path):
    common = [f"tokenizers=['{trained}/sound/codec']", "kmeans=[]", f"data.labels='{speech}/phones.tsv'",
              "robustness=true", "encoder=whisper_tiny_en", f"encoder.model='{whisper_folder}'",
              f"layer={LAYER}"]  # fmt: skip
    sounds = [f"data.{split}='{speech}/{split}.tsv'" for split in ("train", "valid", "test")]
    figures = []
    for name, source in (("sound", ["data=audio", *sounds]), ("shards", [f"data.root='{features}'"])):
        figures.append(evaluated(tmp_path / name, *common, *source)[0])
    one, two = figures
    assert one.keys() == two.keys()
    assert "RepCodec" in one["name"] and one["unit_edit_distance"]
    for key, value in one.items():
        assert value == (pytest.approx(two[key], rel=1e-3) if isinstance(value, float) else two[key]), key


# Shar


@pytest.fixture(scope="module")
def shar(speech, tmp_path_factory):
    """The training sounds as Shar archives of two cuts."""
    return write_shar(Manifest.read(speech / "train.tsv"), tmp_path_factory.mktemp("shar"))


def write_shar(manifest, folder):
    from lhotse import CutSet, Recording

    recordings = [Recording.from_file(manifest.root / path, recording_id=Path(path).stem) for path in manifest.paths]
    CutSet.from_cuts(recording.to_cut() for recording in recordings).to_shar(
        folder, fields={"recording": "flac"}, shard_size=2
    )
    return folder


def shar_batches(module, numbers, rank=0, world_size=1):
    dataset = SharDataset(
        open_sounds(module.sources["train"]), module.speech_encoder.num_frames, 64, 3, 1, rank, world_size
    )
    return [dataset[number] for number in numbers]


def test_a_streamed_batch_is_cropped_from_the_features_of_the_same_sound(from_sound, from_shards, shar):
    module = from_sound(train=str(shar), num_workers=0)
    names = {Path(name).stem: number for number, name in enumerate(from_shards.train.names)}
    order = [cut.id for _, cut in zip(range(9), (cut for _, cut in open_sounds(str(shar)).stream(1)), strict=False)]
    for batch, _ in zip(module.train_dataloader(), range(3), strict=False):
        found = module.features_of(batch)
        for row, length, start, place in zip(*found[:2], batch.starts, batch.utterances, strict=True):
            whole = from_shards.train.features(names[order[int(place)]])
            expected = torch.tensor(np.array(whole[int(start) : int(start) + 64]))
            assert len(expected) == length == 64
            assert (row[:length] - expected).norm() / expected.norm() < 1e-5


def test_stream_is_the_same_for_any_ranks_workers_and_starting_point(from_sound, shar):
    module = from_sound(train=str(shar))
    whole = [batch.waveform for batch in shar_batches(module, range(8))]
    two = [shar_batches(module, range(4), rank, 2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch, two[number % 2][number // 2].waveform)
    assert torch.equal(shar_batches(module, [6])[0].waveform, whole[6])
    loader = from_sound(train=str(shar), num_workers=2).train_dataloader()
    loader.load_state_dict({"position": 3})
    for number, batch in zip(range(3, 8), loader, strict=False):
        assert torch.equal(batch.waveform, whole[number])
    assert loader.state_dict() == {"position": 8}


@pytest.mark.slow
def test_training_from_shar_runs_and_resumes(speech, whisper_folder, shar, tmp_path):
    more = [f"data.train='{shar}'", "callbacks=kmeans_start"]
    run_here(speech, whisper_folder, tmp_path / "whole", *more, "trainer.max_steps=5")
    run_here(speech, whisper_folder, tmp_path / "run", *more, "trainer.max_steps=2")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run_here(speech, whisper_folder, tmp_path / "run", *more, "trainer.max_steps=5", f"ckpt_path='{last}'")
    equal_checkpoints(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")


# Bad input


def test_a_run_on_shar_that_diverges_names_places_in_the_stream(speech, whisper_folder, shar, tmp_path):
    with refused("the run has diverged", "number "):
        run_here(speech, whisper_folder, tmp_path / "run", f"data.train='{shar}'", "optimizer.lr=1e30",
                 "trainer.max_steps=9", "logger=none")  # fmt: skip


def test_a_corrupt_sound_in_a_worker_is_one_sentence(speech, whisper_folder, tmp_path):
    shutil.copytree(speech, tmp_path / "speech")
    manifest = Manifest.read(speech / "train.tsv")
    Manifest(tmp_path / "speech" / "audio", manifest.paths, manifest.num_samples).write(
        tmp_path / "speech" / "train.tsv"
    )
    for path in manifest.paths:
        soundfile.write(tmp_path / "speech" / "audio" / path, np.zeros(500), 16_000)
    with pytest.raises(Exception) as caught:
        run_here(tmp_path / "speech", whisper_folder, tmp_path / "run", "data.num_workers=1", "logger=none")
    assert "500 samples at 16 kHz, but the list of sounds says" in user_message(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layer=0"], "layer=0: whisper_tiny_en has layers 1 to 4"),
        (["layer=5"], "layer=5: whisper_tiny_en has layers 1 to 4"),
        (["data.train=nowhere.tsv"], "nowhere.tsv: not a readable manifest"),
        (["data.train=sound.mp3"], "sound.mp3: not a list of sounds"),
        (["data.train=null"], "data.train is not set"),
        (["data.train=???"], "Missing mandatory value: data.train"),
        (["data.train=123"], "123: not a list of sounds"),
        (["data.batch_seconds=0"], "data.batch_seconds=0"),
        (["encoder.model=./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_sentence(speech, whisper_folder, tmp_path, overrides, message):
    with pytest.raises(Exception) as caught:
        run_here(speech, whisper_folder, tmp_path / "run", *overrides)
    assert message in user_message(caught.value)
