"""Loggers of a run that goes on: one record, as if the run had never stopped."""

import csv
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write

if TYPE_CHECKING:  # it takes ten seconds to load, and who reads a table needs none of it
    from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


def open_logs(loggers: "Sequence[Logger]", run_dir: Path, step: int | None) -> None:
    """Let loggers go on where a run stands, or begin; call it on the first rank, before anything is logged.

    Tables and TensorBoard's files lose what a killed run logged after the checkpoint, since it is logged again. W&B
    goes on under the id in the run's folder.

    Args:
        loggers: of the trainer.
        run_dir: the run's folder.
        step: optimizer steps taken; None when the run begins.

    Raises:
        RepCodecError: the folder cannot be written.
    """
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _identify(logger, run_dir / "wandb_id.txt", new=step is None)
        elif isinstance(logger, CSVLogger | TensorBoardLogger) and step is not None:
            logger._version = max(0, int(logger._get_next_version()) - 1)  # the newest there is
            if isinstance(logger, TensorBoardLogger):
                logger._kwargs["purge_step"] = step
            else:
                _open_table(logger, step)


def close_logs(loggers: "Sequence[Logger]", status: int) -> None:
    """Say that the run has ended, with this exit code; W&B says where it lies and how to sync it."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=status)


def _open_table(logger: "CSVLogger", step: int) -> None:
    """Go on with metrics.csv; a row's step is the number of optimizer steps before its own."""
    path = Path(logger.log_dir) / "metrics.csv"
    aside = path.with_name("metrics.before.csv")  # Lightning deletes metrics.csv when it opens it
    if path.exists() and not aside.exists():  # it does if a kill came in between
        os.replace(path, aside)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # its deleting
        experiment = logger.experiment
    if not aside.exists():
        return
    experiment.metrics_keys, rows = read_table(aside, step)
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, experiment.metrics_keys, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
    aside.unlink()


def read_table(path: Path, step: int) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a metrics.csv, and its rows of steps before `step`.

    Raises:
        RepCodecError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, restkey="")
            columns = list(table.fieldnames or [])
            rows = [row for row in table if (row["step"] or "").isdecimal() and int(row["step"]) < step]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise RepCodecError(f"{path}: not a readable table of a training ({error!r}); remove it.") from error
    return columns, [{name: row[name] for name in columns} for row in rows]


def read_validations(path: Path) -> list[dict[str, float]]:
    """Return the rows of a validations.csv, without its empty cells; none where there is no such file.

    Raises:
        RepCodecError: it cannot be read.
    """
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise RepCodecError(f"{path}: not a readable table of validations ({error!r}); remove it.") from error


def _identify(logger: "WandbLogger", file: Path, new: bool) -> None:
    """Give W&B's run the id that its folder holds, one of its own when it begins."""
    if new or not file.is_file():
        with atomic_write(file) as writer:
            writer.write(secrets.token_hex(4))
    logger._wandb_init["id"] = logger._id = file.read_text(encoding="utf-8").strip()
