from conftest import refused
from test_demo_corpus import digests, recordings

from repcodec.demo import DemoDataModule


def data_module(tmp_path, **options):
    return DemoDataModule(
        **{"cache": str(tmp_path / "cache"), "name": "mine", "audio": str(tmp_path / "audio"), "labels": None,
           "encoder": "whisper_tiny_en", "layer": 3, "model": "openai/whisper-tiny.en", "dim": 384,
           "corpus_seed": 0} | options
    )  # fmt: skip


def test_own_recordings_become_three_splits_of_features(tmp_path):
    recordings(tmp_path / "audio")
    data = data_module(tmp_path)
    data.prepare_data()
    names = [name for split in ("train", "valid", "test") for name in data.split(split).names]
    assert sorted(names) == sorted(f"s{i % 3}/{i}.wav" for i in range(12))
    assert len(data.split("train")) == 10
    assert data.phone_labels is None
    before = digests(tmp_path / "cache")
    data_module(tmp_path).prepare_data()
    assert digests(tmp_path / "cache") == before


def test_another_encoder_comes_from_where_its_model_says(tmp_path):
    recordings(tmp_path / "audio")
    with refused(tmp_path / "nowhere", "no such folder"):
        data_module(tmp_path, encoder="hubert_base", layer=9, dim=768, model=str(tmp_path / "nowhere")).prepare_data()
