"""Train a RepCodec on features of a frozen speech encoder: `python train.py --help`."""

import logging
import os
import warnings
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from repcodec.errors import RepCodecError, one_sentence
from repcodec.speech_encoders import EncoderSpec

log = logging.getLogger("repcodec")
# Advice about workers and intervals that do not fit batches read from a memory map.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*number of training batches.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
# Which devices there are and which products to try.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def train(config: DictConfig) -> float:
    """Train as configured; return the best validation's normalized reconstruction error."""
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise RepCodecError(f"ckpt_path={config.ckpt_path}: no such checkpoint; a run has its own in checkpoints/.")
    EncoderSpec(**config.encoder).valid_layer(config.layer)
    L.seed_everything(config.seed, workers=True, verbose=False)
    run_dir = Path(config.run_dir)
    data = instantiate(config.data)
    module = instantiate(config.module)
    loggers = [instantiate(logger) for logger in config.logger.values()]
    callbacks = {name: instantiate(callback) for name, callback in config.callbacks.items()}
    trainer = instantiate(config.trainer, logger=loggers, callbacks=list(callbacks.values()))
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    if trainer.is_global_zero:
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    status = 1
    try:
        trainer.fit(module, data, ckpt_path=config.ckpt_path, weights_only=True)
        if trainer.global_step % config.trainer.val_check_interval:  # the last steps have no checkpoint yet
            trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt")
        status = 0
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=status)  # says where the run lies and how to sync it
    saved = callbacks["save_codec"]
    if trainer.is_global_zero:
        log.info("Codec of the best validation, normalized error %.4f: %s", saved.best, saved.folder)
    return saved.best


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Run one job; a user's mistake ends in one sentence and exit code 1."""
    with one_sentence():
        return train(config)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors too come here, to end in one sentence
    with one_sentence():
        main()
