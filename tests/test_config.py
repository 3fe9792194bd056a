"""Every file of conf/ composes, its targets resolve, their arguments fit, and what can be made here is made."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from repcodec.data import FeaturesDataModule

CONF = Path(__file__).parent.parent / "conf"
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("experiment", "sweep")
]
RECIPES = [
    (path.parent.name, path.stem) for group in ("experiment", "sweep") for path in sorted(CONF.glob(f"{group}/*"))
]
WIDTHS = {"hubert_base": 768, "hubert_large": 1024, "data2vec_base": 768, "data2vec_large": 1024,
          "whisper_medium": 1024, "whisper_large_v2": 1280, "whisper_tiny_en": 384}  # fmt: skip


def configuration(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # Only a Hydra run has an output folder.
        config = compose(name, [*overrides, *required(overrides), "run_dir=/tmp/run", "run=test"])
    OmegaConf.resolve(config)
    return config


def required(overrides):
    """What an option cannot do without."""
    return ["data.train=train.tsv", "data.valid=valid.tsv"] if "data=audio" in overrides else []


def targets(node):
    """Yield every part of a configuration that names a class or function."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, ListConfig):
        for value in node:
            yield from targets(value)


def check_arguments(node):
    """Check a part's arguments against the signature of its target."""
    arguments = [name for name in node if name not in ("_target_", "_partial_")]
    if node._target_ == "datetime.timedelta":  # built in: Python knows no signature of it
        instantiate(node)
        return
    target = get_object(node._target_)
    signature = inspect.signature(target)
    if inspect.isclass(target) and issubclass(target, FeaturesDataModule):  # they hand their other options on
        signature.bind(**dict.fromkeys(arguments))
        known = {name for cls in target.__mro__ for name in inspect.signature(cls.__init__).parameters}
        assert set(arguments) <= known - {"options", "kwargs"}
    elif node.get("_partial_"):
        signature.bind_partial(**dict.fromkeys(arguments))
    else:
        signature.bind(**dict.fromkeys(arguments))


@pytest.mark.parametrize(("group", "option"), OPTIONS + RECIPES)
def test_every_option_composes_and_its_arguments_fit(group, option):
    config = configuration(f"{group}={option}")
    found = list(targets(config))
    assert found
    for node in found:
        check_arguments(node)


@pytest.mark.parametrize("encoder", WIDTHS)
def test_encoder_decides_every_width(encoder):
    config = configuration(f"encoder={encoder}")
    assert {config.encoder.dim, config.codec.dim, config.codec.code_dim, config.data.dim, config.quantizer.dim} == {
        WIDTHS[encoder]
    }
    assert config.layer == config.encoder.layer == config.data.layer


def test_recipes_override_the_keys_of_train_yaml():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=demo"])
        assert config.run == "demo"
        assert config.data.name == "demo"
        assert compose("train", ["experiment=demo", "run=mine"]).run == "mine"
        assert compose("train", ["experiment=published_hubert_base_l9", "encoder.layer=3"]).layer == 9


def test_width_is_written_only_in_the_encoder_group():
    for path in CONF.glob("**/*.yaml"):
        if path.parent.name != "encoder":
            # 1024 is a codebook's size too.
            assert not any(str(width) in path.read_text().split() for width in {*WIDTHS.values()} - {1024}), path


def test_layer_override_reaches_data_and_saved_codec():
    config = configuration("encoder=hubert_large", "layer=12")
    assert config.layer == config.data.layer == config.callbacks.save_codec.layer == 12


PUBLISHED = {
    "hubert_base_l9": ("hubert_base", 9), "hubert_large_l18": ("hubert_large", 18),
    "data2vec_base_l6": ("data2vec_base", 6), "data2vec_large_l18": ("data2vec_large", 18),
    "whisper_medium_l24": ("whisper_medium", 24), "whisper_large_l32": ("whisper_large_v2", 32),
}  # fmt: skip


@pytest.mark.parametrize("setting", PUBLISHED)
def test_published_recipe_is_exactly_the_published_one(setting):
    config = configuration(f"experiment=published_{setting}")
    assert (config.encoder.name, config.layer) == PUBLISHED[setting]
    assert config.module.reconstruction == "l2"
    assert (config.module.reconstruction_weight, config.module.commitment_weight) == (45, 1)
    optimizer = instantiate(config.optimizer)([torch.zeros(1, requires_grad=True)])
    assert type(optimizer).__name__ == "Adam"
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["weight_decay"]) == (1e-4, (0.5, 0.9), 0)
    assert config.scheduler._target_ == "transformers.get_constant_schedule"
    assert (config.trainer.max_steps, config.data.batch_size, config.data.crop) == (200_000, 32, 96)
    assert "gradient_clip_val" not in config.trainer
    quantizer = config.quantizer
    assert (quantizer.codebook_size, quantizer.num_codebooks, quantizer.decay, quantizer.revive_below) == (
        1024,
        1,
        0.8,
        0,
    )
    assert "start" not in config.callbacks


@pytest.mark.parametrize("option", [path.stem for path in sorted((CONF / "codec").glob("*.yaml"))])
@pytest.mark.parametrize("quantizer", [path.stem for path in sorted((CONF / "quantizer").glob("*.yaml"))])
def test_codecs_are_made(option, quantizer):
    size = "quantizer.levels=[4]" if quantizer == "fsq" else "quantizer.codebook_size=4"
    module = instantiate(configuration(f"codec={option}", f"quantizer={quantizer}", "encoder.dim=8", size).module)
    assert module.codec.codebook_size == 4
    assert module.codec.num_codebooks == (4 if quantizer == "rvq" else 1)
    assert module.codec.stride == {"strided": 2, "strided4": 4}.get(option, 1)


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g, o in OPTIONS if (g, o) not in {("trainer", "gpu"), ("trainer", "ddp"), ("trainer", "slurm")}],
)
def test_everything_that_needs_no_gpu_and_no_hub_is_made(group, option, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["encoder=whisper_tiny_en", f"{group}={option}"]
        config = compose("train", [*overrides, *required(overrides), f"run_dir={tmp_path}", "run=test"])
    node = config[group]
    parts = [node] if "_target_" in node else list(node.values()) if group in ("logger", "callbacks") else []
    for part in parts:
        assert instantiate(part) is not None


@pytest.mark.parametrize("encoder", WIDTHS)
def test_encoder_table_and_hydra_read_the_same_files(encoder):
    from dataclasses import asdict

    from repcodec.speech_encoders import encoder_table

    assert asdict(encoder_table()[encoder]) == yaml.safe_load((CONF / "encoder" / f"{encoder}.yaml").read_text())


def test_evaluate_composes():
    config = configuration("encoder=whisper_tiny_en", "data=demo", name="evaluate")
    for node in targets(config):
        check_arguments(node)


def test_every_encoder_has_its_family():
    families = {"hubert": "hubert", "data2vec": "data2vec-audio", "whisper": "whisper"}
    for path in (CONF / "encoder").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["family"] == families[path.stem.split("_")[0]]
