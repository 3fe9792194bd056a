import json

import lightning as L
import pytest
import torch
from conftest import refused
from lightning.pytorch.callbacks import ModelCheckpoint
from test_published import TINY, complete, published_state, write_published

from repcodec import hub
from repcodec.callbacks import SaveCodec
from repcodec.codec import RepCodec
from repcodec.conversion import convert
from repcodec.data import ShardsDataModule
from repcodec.kmeans import KMeansTokenizer
from repcodec.module import CodecModule
from repcodec.quantizers import EMAQuantizer


def same(one, other):
    """Both codecs are one: what they say of themselves and every bit of their tensors."""
    ours, theirs = one.state_dict(), other.state_dict()
    return one.config() == other.config() and all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.fixture
def published(tmp_path):
    return write_published(tmp_path / "tiny.pkl", published_state(complete(8, **TINY)))


@pytest.fixture
def run(tmp_path, splits):
    """A folder as train.py leaves it: checkpoints/best.ckpt and codec/, of a strided residual codec."""
    torch.manual_seed(0)
    codec = RepCodec(
        8, enc_strides=(2, 1), dec_strides=(1, 2), code_dim=4, quantizer=EMAQuantizer(4, 16, 2, revive_below=0.1)
    )
    module = CodecModule(
        codec, lambda p: torch.optim.Adam(p, 1e-3), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    monitor = "valid/normalized_error"
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            SaveCodec(str(tmp_path / "codec"), "hubert_base", 9, 50),
            ModelCheckpoint(tmp_path / "checkpoints", "best", monitor=monitor),
        ],
    )  # fmt: skip
    trainer.fit(module, ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=4, crop=16))
    return tmp_path


def edited(path, **changes):
    """The checkpoint with other entries; None takes one out."""
    loaded = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: value for key, value in loaded.items() if value is not None}, path)
    return path


def test_published_codec_is_saved(tmp_path, published):
    codec = convert(published, tmp_path / "new" / "codec", {"model_params": TINY})
    assert not codec.training
    assert codec.about["source"] == "tiny.pkl"
    assert sorted(path.name for path in (tmp_path / "new" / "codec").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    assert same(codec, RepCodec.from_pretrained(tmp_path / "new" / "codec"))
    assert same(codec, RepCodec.from_published(published, {"model_params": TINY}))


def test_another_suffix_is_a_published_codec_too(tmp_path, published):
    path = published.rename(tmp_path / "tiny.pt")
    assert same(convert(path, tmp_path / "codec", {"model_params": TINY}), RepCodec.from_pretrained(tmp_path / "codec"))


def test_checkpoint_of_a_run_is_its_saved_codec(tmp_path, run):
    codec = convert(run / "checkpoints" / "best.ckpt", tmp_path / "converted")
    saved = RepCodec.from_pretrained(run / "codec")
    assert not codec.training
    assert {"encoder": "hubert_base", "layer": 9, "frame_rate": 50}.items() <= codec.about.items()
    saved.about = {key: saved.about[key] for key in codec.about}  # the folder has the validation's figures too
    assert same(codec, saved)
    assert same(codec, RepCodec.from_pretrained(tmp_path / "converted"))
    features = torch.randn(2, 11, 8)
    assert torch.equal(codec.encode(features), saved.encode(features))


def test_checkpoint_describes_its_codec_in_plain_values(run):
    described = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["codec"]
    assert json.loads(json.dumps(described)) == described
    assert {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "enc_strides": [2, 1]}.items() <= described.items()


def test_checkpoints_that_hold_no_codec_are_one_sentence(run):
    path = run / "checkpoints" / "best.ckpt"
    original = path.read_bytes()
    weights = torch.load(path, weights_only=True)["state_dict"]
    missing = {name: value for name, value in weights.items() if name != "codec.decoder.output.weight"}
    for changes, message in (
        ({"codec": None}, "earlier version made this checkpoint"),
        ({"codec": {}}, "describes no codec this version can build"),
        ({"codec": [1]}, "not made of plain values"),
        ({"codec": {"encoder": torch.zeros(1)}}, "not made of plain values"),
        ({"state_dict": None}, "expected a Lightning checkpoint of train.py"),
        ({"state_dict": {"model.weight": torch.zeros(1), 3: torch.zeros(1)}}, "expected a Lightning checkpoint of"),
        ({"state_dict": {"codec.weight": 3}}, "codec.weight is no tensor of weights (found int)"),
        ({"state_dict": missing}, "1 missing, such as decoder.output.weight"),
        ({"state_dict": weights | {"codec.more": torch.zeros(1)}}, "1 unexpected, such as more"),
        ({"state_dict": weights | {"codec.feature_mean": torch.zeros(9)}}, "feature_mean has shape (9,)"),
        ({"state_dict": weights | {"codec.feature_mean": torch.full((8,), float("nan"))}}, "not finite"),
    ):
        path.write_bytes(original)
        with refused(edited(path, **changes), message):
            RepCodec.from_lightning(path)
    torch.save([1], path)
    with refused(path, "expected a Lightning checkpoint of train.py"):
        RepCodec.from_lightning(path)


def test_saved_codec_is_copied_with_what_it_says(tmp_path, codec):
    codec.float().save_pretrained(tmp_path / "one", {"encoder": "hubert_base", "layer": 9, "figures": {"x": 1}})
    copy = convert(tmp_path / "one", tmp_path / "two")
    assert copy.about["figures"] == {"x": 1}
    assert same(copy, RepCodec.from_pretrained(tmp_path / "two"))
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_neither_file_nor_folder_is_a_hub_id(tmp_path, codec, monkeypatch):
    codec.float().save_pretrained(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr(
        "repcodec.codec.local_folder", lambda name, revision: asked.append(name) or tmp_path / "snapshot"
    )
    convert("user/codec", tmp_path / "mine")
    assert asked == ["user/codec"]


def test_files_that_are_missing_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "local_folder", None)
    monkeypatch.chdir(tmp_path)
    for name in ("models/hubert_base_l9.pkl", "checkpoints/best.ckpt"):
        with refused(name, "does not exist"):
            convert(name, tmp_path / "codec")
    with refused("nowhere/at/all", "does not exist"):
        convert("nowhere/at/all", tmp_path / "codec")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_converted_onto_itself(tmp_path, codec, published, monkeypatch):
    folder = tmp_path / "codec"
    codec.float().save_pretrained(folder)
    (tmp_path / "link").symlink_to(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    for target in (folder, ".", tmp_path / "link", tmp_path / "codec" / ".." / "codec"):
        with refused(target, "name another folder"):
            convert(folder, target)
    with refused(published, "name another folder"):
        convert(published, published, {"model_params": TINY})
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_config_is_for_published_files_alone(tmp_path, codec, run):
    for source in (run / "codec", run / "checkpoints" / "best.ckpt", "user/codec"):
        with refused(source, "says its own architecture"):
            convert(source, tmp_path / "new", {"model_params": TINY})


def test_baselines_and_unwritable_folders_are_one_sentence(tmp_path, published):
    KMeansTokenizer(torch.zeros(4, 8)).save_pretrained(tmp_path / "kmeans")
    with refused(tmp_path / "kmeans", "holds a kmeans"):
        convert(tmp_path / "kmeans", tmp_path / "new")
    (tmp_path / "file").write_text("in the way")
    with refused(tmp_path / "file", "could not be written"):
        convert(published, tmp_path / "file" / "codec", {"model_params": TINY})
