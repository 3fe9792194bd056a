import pytest
import torch

from repcodec.checkpoint import fill, load_tensors, read_config, save_folder
from repcodec.errors import RepCodecError


def test_round_trip(tmp_path):
    module = torch.nn.Linear(3, 2)
    save_folder(tmp_path / "new", {"kind": "x", "layer": 9}, module.state_dict())
    assert {"kind": "x", "layer": 9}.items() <= read_config(tmp_path / "new").items()
    other = torch.nn.Linear(3, 2)
    load_tensors(tmp_path / "new", other)
    assert torch.equal(other.weight, module.weight)


def test_weights_that_are_not_those_described_are_refused(tmp_path):
    for folder in ("one", "two"):
        save_folder(tmp_path / folder, {"kind": "x"}, torch.nn.Linear(3, 2).state_dict())
    (tmp_path / "two" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    with pytest.raises(RepCodecError, match=r"one/model\.safetensors: these are not the weights"):
        load_tensors(tmp_path / "one", torch.nn.Linear(3, 2))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": 3}', "\xff"])
def test_unreadable_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RepCodecError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("rate", ["0", "-1", "NaN", "Infinity", '"50"', "[]", "null"])
def test_a_frame_rate_that_is_none_is_one_sentence(tmp_path, rate):
    (tmp_path / "config.json").write_text(f'{{"kind": "x", "frame_rate": {rate}}}')
    with pytest.raises(RepCodecError, match=r'"frame_rate" is .*, expected frames per second'):
        read_config(tmp_path)


def test_missing_tensor_is_named(tmp_path):
    save_folder(tmp_path, {"kind": "x"}, {"weight": torch.zeros(2, 3)})
    with pytest.raises(RepCodecError, match="bias"):
        load_tensors(tmp_path, torch.nn.Linear(3, 2))


def test_unwritable_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RepCodecError, match="could not be written"):
        save_folder(tmp_path / "file" / "codec", {"kind": "x"}, {"w": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("rate", ["1e-300", "9" * 400, "20000"])
def test_a_frame_rate_beyond_all_sounds_is_one_sentence(tmp_path, rate):
    (tmp_path / "config.json").write_text(f'{{"kind": "x", "frame_rate": {rate}}}')
    with pytest.raises(RepCodecError, match=r'"frame_rate" is .*, expected frames per second'):
        read_config(tmp_path)


def test_tensors_that_repeat_one_value_are_refused_before_they_are_written_out(tmp_path):
    torch.save({"weight": torch.zeros(1).expand(500, 500), "bias": torch.zeros(500)}, tmp_path / "small.pkl")
    tensors = torch.load(tmp_path / "small.pkl", weights_only=True)
    assert (tmp_path / "small.pkl").stat().st_size < 10_000
    with pytest.raises(RepCodecError, match=r"small\.pkl: its tensors have more bytes than the file"):
        fill(torch.nn.Linear(500, 500), tensors, tmp_path / "small.pkl")
