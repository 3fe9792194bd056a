import re

import pytest
import yaml

from repcodec.architecture import Architecture
from repcodec.kmeans import KMeansTokenizer
from repcodec.model_card import is_hub_id, model_card, plain, public

HOSTILE = [
    "a\n---\nlicense: mine\n---\n# b",
    "a | b |\n| c | d",
    "``` \n<script>alert(1)</script>",
    "[here](http://x) ![](y) *b* _c_ `d` \\| $e$ &lt;",
    "\ud800\x00\u2028\x85\x1b[2J",
    "x" * 5000,
    ["a", {"b|": "\n"}],
    {"|": "|"},
    None,
    True,
    10**400,
    float("nan"),
    -(2**70),
]


def config(**more):
    options = Architecture(768, enc_strides=(2, 1), dec_strides=(1, 2)).options()
    about = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "repcodec_version": "1.2"}
    return {"kind": "repcodec", **options, "codebook_num": 2, "codebook_size": 1024, **about, **more}


def front_matter(card):
    start, matter, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), body


def rows(card):
    """Every row of the card's tables: two cells."""
    found = {}
    for line in card.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            assert len(cells) == 4, line
            found[cells[1]] = cells[2]
    return found


def test_facts_are_worked_out():
    card = model_card(config(encoder_model="facebook/hubert-base-ls960", waveform_norm=False, feature_norm=True))
    found = rows(card)
    assert found["speech encoder"] == "hubert_base (facebook/hubert-base-ls960)"
    assert found["layer, counted from 1"] == "9"
    assert found["width of the features"] == "768"
    assert found["codebooks x codes"] == "2 x 1024"
    assert found["features a second"] == "50"
    assert found["codes a second"] == "50, one of each codebook every 40 ms"
    assert found["bits a second"] == "500"
    after = Architecture(768, enc_strides=(2, 1), dec_strides=(1, 2)).reach[1]
    assert found["look-ahead"].startswith(f"{after} frames of features, {after * 20} ms")
    assert found["waveform normalized"] == "no"
    assert found["made with"] == "repcodec 1.2"
    assert "\n# RepCodec 2 x 1024, features of hubert_base, layer 9\n" in card
    assert "--encoder hubert_base --layer 9 " in card
    assert "2309.00169" in card


def test_figures_appear():
    figures = {"normalized_error": 0.39123, "used_share": 0.5, "my_own": 1234567.0}
    card = model_card(config(figures=figures, measured_on="validation split, 30 utterances"))
    found = rows(card)
    assert "Measured on the validation split, 30 utterances:" in card
    assert next(value for name, value in found.items() if name.startswith("normalized error")) == "0.3912"
    assert found["share of codes used"] == "0.5"
    assert found["my_own"] == "1.235e+06"
    assert "Figures" not in model_card(config())


def test_front_matter_is_the_hubs():
    matter, _ = front_matter(model_card(config()))
    assert matter["library_name"] == "repcodec"
    assert {"speech", "audio", "tokenizer", "codec"} <= set(matter["tags"])
    assert "license" not in matter


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_hostile_values_change_nothing_but_their_own_cell(value):
    keys = [key for key in config() if key != "kind"]
    keys += ["encoder_model", "encoder_sha256", "waveform_norm", "feature_norm", "step", "measured_on", "figures"]
    calm = model_card(config())
    configs = [config(**{key: value}) for key in keys]
    configs += [config(figures={"normalized_error": value, str(value): value}), dict.fromkeys(config(), value)]
    for hostile in configs:
        card = model_card(hostile)
        card.encode()
        matter, body = front_matter(card)
        assert matter == front_matter(calm)[0]
        assert not re.search(r"^---", body, re.M)
        assert not re.search(r"(?<!\\)<", body)
        rows(card)
        headings = [line for line in card.splitlines() if line.startswith("#")]
        assert len(headings) <= 5
        assert set(headings[1:]) <= {"## Facts", "## Figures", "## Use", "## Source"}
        assert body.count("```") == calm.count("```") or hostile["kind"] != "repcodec"
        assert len(card) < 10_000


def test_a_value_in_a_command_is_a_word():
    commands = model_card(config(encoder="x; rm -rf ~", layer="$(id)")).split("```bash")[1].split("```")[0]
    assert "features/ENCODER/lLAYER/" in commands
    assert not {"rm", "$(id)"} & set(commands.split())


def test_no_folder_of_this_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "hubert").mkdir(parents=True)
    for folder in ("/home/me/hubert", "models/hubert", "./hubert", "../x/hubert", "~/hubert", "C:\\hubert", 3, None):
        known = config(encoder_model=folder, features="/home/me/features")
        assert "hubert)" not in model_card(known)
        assert "/home" not in model_card(known)
        assert public(known) == config()
    assert public(config(encoder_model="me/hubert")) == config(encoder_model="me/hubert")


def test_hub_ids_have_one_slash():
    assert is_hub_id("facebook/hubert-base-ls960")
    assert is_hub_id("user_1/a.b")
    for name in ("codec", "a/b/c", "/a", "a/", "./a", "../a", "~/a", "a b/c", "a/b\n", "", "https://a/b"):
        assert not is_hub_id(name), name


def test_plain_text_stays_readable():
    assert plain("hubert_base, 3.5 x (a-b)") == "hubert_base, 3.5 x (a-b)"
    assert plain("a|b") == "a\\|b"


def test_card_of_kmeans_is_saved_beside_it(tmp_path):
    import torch

    KMeansTokenizer(torch.randn(8, 3)).save_pretrained(tmp_path, {"encoder": "whisper_tiny_en", "frame_rate": 50.0})
    card = (tmp_path / "README.md").read_text()
    assert "k-means 8" in card
    assert rows(card)["bits a second"] == "150"
    assert "KMeansTokenizer.from_pretrained" in card
    assert "is the baseline in" in " ".join(card.split())
