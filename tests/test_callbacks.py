import os

import lightning as L
import pytest
import torch
from conftest import refused, write_split

from repcodec.callbacks import CodecStart, SaveCodec, ValidateEnds
from repcodec.codec import RepCodec
from repcodec.data import ShardsDataModule
from repcodec.module import CodecModule


class Watch(L.Callback):
    """Remembers at which step each validation stood, and the codec's start."""

    def __init__(self):
        self.validated, self.started = [], None

    def on_validation_end(self, trainer, module):
        self.validated.append((trainer.global_step, float(trainer.callback_metrics["valid/normalized_error"])))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            self.started = {name: value.clone() for name, value in module.codec.state_dict().items()}


def fit(splits, *callbacks, steps=4, codec=None, **options):
    torch.manual_seed(0)
    codec = codec or RepCodec(8, codebook_size=16)
    module = CodecModule(
        codec, lambda p: torch.optim.Adam(p, 1e-4), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=4, crop=16)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[*callbacks, watch], **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return watch, module, data


def test_validation_comes_before_the_first_step_and_after_the_last(splits):
    assert [step for step, _ in fit(splits, ValidateEnds())[0].validated] == [0, 2, 4]
    assert [step for step, _ in fit(splits, ValidateEnds(), steps=5)[0].validated] == [0, 2, 4, 5]
    assert [step for step, _ in fit(splits, steps=5)[0].validated] == [2, 4]


def test_validation_before_the_first_step_changes_no_training(splits):
    one, other = (fit(splits, *callbacks)[1].state_dict() for callbacks in ([ValidateEnds()], []))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_start_scales_features_and_makes_the_stacks_the_identity(splits):
    watch, _, data = fit(splits, CodecStart(), steps=1)
    codec = RepCodec(8, codebook_size=16)
    codec.load_state_dict(watch.started)
    assert torch.equal(codec.feature_mean, data.statistics.mean)
    assert float(codec.feature_scale) == pytest.approx(data.statistics.scale)
    features = torch.from_numpy(data.train.sample(10**6))[None]
    torch.testing.assert_close(codec.vectors(features), codec.normalize(features)[0])
    error = codec(features).quantizer.loss
    assert error < 0.9 * features.var(1, correction=0).mean() / codec.feature_scale**2  # far below one code for all


def test_start_takes_no_more_frames_than_asked(splits, monkeypatch):
    from repcodec.quantizers import EMAQuantizer

    seen = []
    monkeypatch.setattr(EMAQuantizer, "start", lambda self, z, seed: seen.append(len(z)))
    fit(splits, CodecStart(max_frames=50), steps=1)
    assert seen == [50]


def test_start_of_a_codec_that_cuts_its_last_frames_off_takes_the_vectors_there_are(splits, monkeypatch):
    from repcodec.quantizers import EMAQuantizer

    seen = []
    monkeypatch.setattr(EMAQuantizer, "start", lambda self, z, seed: seen.append(len(z)))
    codec = RepCodec(8, codebook_size=16, enc_strides=(2, 1), dec_strides=(1, 2), pad_to_stride=False)
    _, _, data = fit(splits, CodecStart(), steps=1, codec=codec)
    lengths = data.train.lengths.tolist()
    assert seen == [sum(map(codec.architecture.num_codes, lengths))]
    assert any(length % 2 for length in lengths), "else nothing is cut off"


def test_histogram_counts_the_frames_of_the_validation_set(splits):
    _, module, data = fit(splits, ValidateEnds())
    assert int(module.valid_counts.sum()) == data.split("valid").lengths.sum()


def test_saved_codec_is_that_of_the_best_validation(splits, tmp_path):
    saver = SaveCodec(str(tmp_path / "codec"), "hubert_base", 9, 50)
    watch, _, _ = fit(splits, ValidateEnds(), saver, steps=8)
    best = min(error for step, error in watch.validated if step > 0)
    assert saver.best == best
    from repcodec.checkpoint import read_config

    config = read_config(tmp_path / "codec")
    assert config["figures"]["normalized_error"] == pytest.approx(best)
    assert config["step"] == next(step for step, error in watch.validated if error == best)
    other = SaveCodec(str(tmp_path), "hubert_base", 9, 50)
    other.load_state_dict(saver.state_dict())
    assert (other.best, other.at_start) == (best, watch.validated[0][1])


@pytest.mark.parametrize(("start", "worse"), [([], False), ([CodecStart()], True)])  # after four steps
def test_a_run_that_never_came_below_its_start_says_so(splits, tmp_path, caplog, start, worse):
    saver = SaveCodec(str(tmp_path / "codec"), "hubert_base", 9, 50)
    watch, _, _ = fit(splits, *start, ValidateEnds(), saver)
    errors = [error for _, error in watch.validated]
    assert (errors[0] <= min(errors[1:])) is worse
    assert (f"normalized error {errors[0]:.4f} at step 0, then {saver.best:.4f}" in caplog.text) is worse


def test_a_run_that_would_save_nothing_is_refused(splits, tmp_path):
    saver = SaveCodec(str(tmp_path / "codec"), "hubert_base", 9, 50)
    with refused("trainer.limit_val_batches=0"):
        fit(splits, ValidateEnds(), saver, limit_val_batches=0)


def saved_config(splits, tmp_path, *callbacks):
    from repcodec.checkpoint import read_config

    fit(splits, *callbacks, SaveCodec(str(tmp_path / "codec"), "hubert_base", 9, 50), steps=2)
    return read_config(tmp_path / "codec")


def test_saved_codec_says_what_its_features_are_and_what_was_measured(tmp_path):
    (tmp_path / "weights").mkdir()
    for split, seed in (("train", 1), ("valid", 2)):
        about = {"encoder": "hubert_base", "layer": 9, "weights_sha256": "ab" * 32}
        about |= {"model": os.path.relpath(tmp_path / "weights"), "root": "/home/me/LibriSpeech"}
        write_split(tmp_path / "known" / split, [40, 17, 25], seed=seed, **about)
    config = saved_config(tmp_path / "known", tmp_path, CodecStart())
    expected = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "waveform_norm": False, "feature_norm": True}
    expected |= {"encoder_model": str((tmp_path / "weights").resolve()), "encoder_sha256": "ab" * 32, "step": 2}
    expected |= {"measured_on": "validation split, 3 utterances, 0.0 minutes, of LibriSpeech"}
    assert expected.items() <= config.items()
    assert set(config["figures"]) == {"normalized_error", "perplexity", "used_share", "entropy_bits"}
    card = (tmp_path / "codec" / "README.md").read_text()
    assert f"| {config['figures']['perplexity']:.4g} |" in card
    assert "of LibriSpeech" in card
    assert str(tmp_path) not in card
    assert "/home/me" not in card


def test_shards_that_say_nothing_leave_the_encoders_weights_out(splits, tmp_path):
    for path in splits.glob("*/*.json"):
        path.unlink()
    config = saved_config(splits, tmp_path)
    assert not {"encoder_model", "encoder_sha256"} & config.keys()
    assert config["waveform_norm"] is False
    assert config["feature_norm"] is False
    assert config["measured_on"] == "validation split, 3 utterances, 0.0 minutes"


def test_features_straight_from_sound_know_their_encoder(tmp_path):
    from dataclasses import asdict
    from types import SimpleNamespace

    from repcodec.audio_data import AudioDataModule
    from repcodec.speech_encoders import encoder_table

    for model, expected in (("a/b", "a/b"), (os.path.relpath(tmp_path), str(tmp_path.resolve()))):
        row = asdict(encoder_table()["whisper_tiny_en"]) | {"model": model}
        data = AudioDataModule(train="t.tsv", valid="v.tsv", test=None, encoder=row, layer=3)
        data.speech_encoder = SimpleNamespace(weights_sha256="cd" * 32)
        known = {"waveform_norm": None, "encoder_model": expected, "encoder_sha256": "cd" * 32}
        assert data.about_features == known
