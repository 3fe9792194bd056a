"""Train a RepCodec on features of a frozen speech encoder: `python train.py --help`."""

import logging
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from repcodec.errors import RepCodecError, one_sentence
from repcodec.files import locked
from repcodec.sweeps import in_sweep, run_job

if TYPE_CHECKING:  # Lightning is loaded where it is used: --help and a misspelt option come at once
    import lightning as L

log = logging.getLogger("repcodec")


def train(config: DictConfig) -> float:
    """Train as configured; return the best validation's normalized reconstruction error.

    Raises:
        RepCodecError: a user's mistake; another process is training in this folder.
    """
    from lightning import seed_everything

    from repcodec.speech_encoders import EncoderSpec

    EncoderSpec(**config.encoder).valid_layer(config.layer)
    if not (config.callbacks.get("checkpoints") and config.callbacks.get("save_codec")):
        raise RepCodecError("a run needs callbacks.checkpoints and callbacks.save_codec, or it would leave nothing.")
    data = instantiate(config.data)
    seed_everything(config.seed, workers=True, verbose=False)
    module = instantiate(config.module)
    loggers = [instantiate(logger) for logger in config.logger.values()]
    callbacks = {name: instantiate(callback) for name, callback in config.callbacks.items()}
    every = config.trainer.val_check_interval * config.trainer.get("accumulate_grad_batches", 1)  # Lightning's: batches
    trainer = instantiate(config.trainer, logger=loggers, callbacks=list(callbacks.values()), val_check_interval=every)
    with locked(Path(config.run_dir) / "checkpoints") if trainer.is_global_zero else nullcontext():
        return fit(config, trainer, module, data, callbacks)


def fit(config: DictConfig, trainer: "L.Trainer", module: Any, data: Any, callbacks: dict[str, Any]) -> float:
    """Go on from the checkpoint that the configuration names, or begin; return as `train` does."""
    from repcodec.checkpointing import find_checkpoint
    from repcodec.logs import close_logs, open_logs

    run_dir, loggers = Path(config.run_dir), trainer.loggers
    start = find_checkpoint(config.ckpt_path, run_dir / "checkpoints")
    if start is not None:
        start.check_fits(module.codec, config.encoder.name, config.layer)
        if start.is_finished(trainer.max_steps, run_dir):
            return start.best
    if trainer.is_global_zero:
        open_logs(loggers, run_dir, start.step if start else None)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    choices: Any = OmegaConf.to_container(config, resolve=True)
    for logger in loggers:
        logger.log_hyperparams(choices)
    status = 1
    try:
        trainer.fit(module, data, ckpt_path=start.path if start else None, weights_only=True)
        status = 0
    finally:
        close_logs(loggers, status)
    saved = callbacks["save_codec"]
    if trainer.is_global_zero:
        if callbacks["checkpoints"].stopped:
            sys.exit(143)  # as a process that SIGTERM ended
        log.info("Codec of the best validation after step 0, normalized error %.4f: %s", saved.best, saved.folder)
    return float(saved.best)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Run one job; a user's mistake ends in one sentence and exit code 1, or with the sweep whose job it is."""
    # Here and not above, for a launcher's processes too. Advice that does not fit batches read from a memory map:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of what torch gives up
    # Which devices there are and which products to try.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    if in_sweep():
        return run_job(train, config, __file__)
    with one_sentence():
        return train(config)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors too come here, to end in one sentence
    with one_sentence():
        main()
