"""What a run shows of itself: rates, pictures, curves, a summary, the saved codec as an artifact; W&B's logger."""

import csv
import logging
import math
import os
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from requests.utils import get_netrc_auth
from torch import Tensor

from repcodec.checkpointing import of_this_run
from repcodec.figures import codebook_figure, curves_figure, png, usage_figure
from repcodec.files import atomic_write
from repcodec.loaders import ResumableLoader
from repcodec.logs import read_validations
from repcodec.module import CodecModule
from repcodec.quantizers import EMAQuantizer, Quantizer, valid_rows

log = logging.getLogger("repcodec")

SAMPLE = 5_000
"""Vectors of the validation set in the picture of the codebook, at most about so many."""

MOST_CODES = 2**16
"""A quantizer without a codebook of its own shows what its codes stand for when it has no more than these."""

BEST = ("valid/normalized_error", "valid/perplexity", "valid/used_share")
"""What the summary has of the best validation."""


class WandbRun(WandbLogger):
    """W&B's logger: online where somebody is logged in and the server answers, offline elsewhere.

    `wandb login`, WANDB_API_KEY or a netrc file log in; WANDB_MODE=offline or disabled, or `wandb offline`,
    turn it down for all runs, `offline` for one.
    """

    def __init__(self, *, offline: bool | None = None, **options: Any) -> None:
        """Take what `WandbLogger` takes.

        Args:
            offline: True or False whatever else says; None decides as the class does.
            options: of `WandbLogger`.
        """
        import wandb

        # Nobody waits for a server that is away: neither at the start nor at the end, when what is missing
        # stays on disk for `wandb sync`.
        super().__init__(settings=wandb.Settings(init_timeout=30, finish_timeout=600), **options)
        del self._wandb_init["anonymous"]  # W&B warns of it, even where it is not set
        self.offline = offline

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; made by the first call, on rank 0."""
        if self._experiment is None:
            import wandb

            try:
                self._wandb_init["mode"] = self._mode()
                return super().experiment
            except (wandb.errors.UsageError, wandb.errors.CommError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                log.warning("W&B cannot be used online (%s): the run is kept offline, for `wandb sync` later.", reason)
                wandb.teardown()  # or the run's id would still be in use
                self._wandb_init["mode"] = "offline"
        return super().experiment

    def _mode(self) -> str:
        """Return W&B's mode of this run."""
        import wandb

        if self.offline is not None:
            return "offline" if self.offline else "online"
        if mode := os.environ.get("WANDB_MODE"):
            return mode
        settings = wandb.setup().settings
        if settings.mode != "online":  # after `wandb offline`
            return settings.mode
        # Not by `wandb.login`, which asks the server and waits where that does not answer.
        hosts = [settings.base_url]
        if "WANDB_BASE_URL" not in os.environ:
            hosts.append("https://api.wandb.ai")  # where those who logged in before W&B's server had a new name
        known = settings.api_key or settings.identity_token_file or any(get_netrc_auth(host) for host in hosts)
        return "online" if known else "offline"


class Rates(L.Callback):
    """Logs speed, every `log_every_n_steps`, and how many codes were revived, every validation.

    Logged:
        train/frames_per_second: valid frames of all ranks; time in validations, checkpoints and loggers does not count.
        train/data_wait_share: of a step's time, the share that the batch was waited for.
        train/revived_codes: moved onto frames since the last validation, over all codebooks.
    """

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Begin to count codes, before a checkpoint is loaded."""
        assert isinstance(module, CodecModule)
        self.quantizer = module.codec.quantizer
        self.revived_before = self.quantizer.revived

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to count frames and seconds."""
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self.frames: Tensor | int = 0
        self.seconds = 0.0
        self.waited_before = self._waited(trainer)

    def _waited(self, trainer: L.Trainer) -> float:
        """Seconds that the batches of the training were waited for, so far."""
        assert isinstance(trainer.train_dataloader, ResumableLoader)
        return trainer.train_dataloader.waited

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.started = perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log the speed since the last time."""
        self.frames = self.frames + batch.lengths.sum()
        logs = trainer._logger_connector.should_update_logs
        frames = float(self.frames) if logs else 0.0  # waits for the device, so that its time counts
        self.seconds += perf_counter() - self.started
        if logs:
            waited = self._waited(trainer) - self.waited_before
            seconds = self.seconds + waited
            module.log("train/frames_per_second", frames / seconds, sync_dist=True, reduce_fx="sum")
            module.log("train/data_wait_share", waited / seconds, sync_dist=True)
            self._begin(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the revived codes, of which every rank has the same number."""
        if trainer.global_step > 0:
            module.log("train/revived_codes", float(self.quantizer.revived - self.revived_before), sync_dist=True)
        self.revived_before = self.quantizer.revived

    def state_dict(self) -> dict[str, Any]:
        """Return the codes revived since the last validation, for the checkpoint."""
        return {"revived": self.quantizer.revived - self.revived_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.revived_before = self.quantizer.revived - state_dict["revived"]


class Dashboard(L.Callback):
    """Shows a run: a table and pictures every validation, a summary and the saved codec at the end.

    In the run's folder:
        validations.csv: a row a validation, all figures of it and of training up to it; a resumed run goes on with it.
        figures/: use of the codes and codebook over the vectors of each validation, and the curves, as PNG.
        commit.txt: the git commit of the code.
    W&B and TensorBoard get the pictures, and the use of each codebook as a histogram of their own; W&B also gets the
    summary, the commit and the codec as an artifact. Nothing here draws a random number or changes the training.
    """

    def __init__(self, folder: str, codec: str):
        """Take the run's folder, and where the codec of the best validation is saved."""
        self.folder, self.codec = Path(folder), Path(codec)
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Any] = {}
        self.hours_before = 0.0

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Note the commit."""
        self.began = perf_counter()
        if not trainer.is_global_zero:
            return
        commit = git_commit()
        with atomic_write(self.folder / "commit.txt") as file:
            file.write(f"{commit or 'not from a git checkout'}\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"git_commit": commit}, allow_val_change=True)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read what the run left that goes on here."""
        if trainer.is_global_zero and of_this_run(trainer.ckpt_path, self.folder / "figures"):
            self.rows = read_validations(self.folder / "validations.csv")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the losses up: the table has their means since the last validation."""
        assert isinstance(module, CodecModule)
        losses = {f"train/{name}": loss.double() for name, loss in module.losses.items()}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in {**losses, "batches": 1}.items()}

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to take a sample of what the quantizer sees, evenly spaced over this rank's utterances."""
        assert isinstance(module, CodecModule)
        if not trainer.is_global_zero:
            return
        lengths = trainer.datamodule.valid.lengths  # type: ignore[attr-defined]  # Lightning sets it on attach
        total = int((-(-lengths // module.codec.stride)).sum())
        self.every = max(1, -(-total // (trainer.world_size * SAMPLE)))
        self.seen = 0
        self.sample: list[Tensor] = []
        self.hook = module.codec.quantizer.register_forward_pre_hook(self._see)

    def _see(self, quantizer: torch.nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        """Keep every `every`-th valid vector that the quantizer gets."""
        vectors = valid_rows(*inputs)
        self.sample.append(vectors[-self.seen % self.every :: self.every].to("cpu", torch.float32, copy=True))
        self.seen += len(vectors)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the table and draw."""
        assert isinstance(module, CodecModule)
        if not trainer.is_global_zero:
            return
        self.hook.remove()
        step = trainer.global_step
        self._write_row(trainer)
        counts = module.valid_counts.cpu().numpy()
        pictures = {"code_usage": usage_figure(counts, step)}
        codes = first_codebook(module.codec.quantizer)
        if codes is not None:
            figure = codebook_figure(torch.cat(self.sample).numpy(), codes.float().cpu().numpy(), counts[0], step)
            pictures |= {"codebook": figure} if figure is not None else {}
        paths = {name: self.folder / "figures" / f"{name}-{step:08d}.png" for name in pictures}
        paths["curves"], pictures["curves"] = self.folder / "figures" / "curves.png", curves_figure(self.rows)
        for name, figure in pictures.items():
            with atomic_write(paths[name], "w+b") as file:
                file.write(png(figure))
        del paths["curves"]  # the loggers draw their own
        self._log(trainer, {f"valid/{name}": path for name, path in paths.items()}, counts)

    def _write_row(self, trainer: L.Trainer) -> None:
        """Add this validation to the table; rows of the same step or a later one are of a run before this one."""
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        if batches := self.sums.pop("batches", 0):
            row |= {name: float(total) / batches for name, total in self.sums.items()}
        self.sums = {}
        step = trainer.global_step
        row = {"step": step, "hours": self._hours(), **row}
        self.rows = [*(earlier for earlier in self.rows if earlier["step"] < step), row]
        with atomic_write(self.folder / "validations.csv") as file:
            names = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(self.rows)

    def _log(self, trainer: L.Trainer, pictures: dict[str, Path], counts: npt.NDArray[np.int64]) -> None:
        """Send the pictures, and a histogram a codebook: log10 of 1 + the frames of each code."""
        step = trainer.global_step
        histograms = {f"valid/log10_code_counts_{k}": np.log10(1 + row) for k, row in enumerate(counts)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
                values = {name: wandb.Histogram(row) for name, row in histograms.items()}
                logger.experiment.log({**images, **values, "trainer/global_step": step})
            elif isinstance(logger, TensorBoardLogger):
                from matplotlib.image import imread

                for name, path in pictures.items():
                    logger.experiment.add_image(name, imread(path)[..., :3], step, dataformats="HWC")
                for name, row in histograms.items():
                    logger.experiment.add_histogram(name, row, step)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print the summary; send it and the saved codec to W&B."""
        validated = [row for row in self.rows if row["step"] > 0 and math.isfinite(row.get(BEST[0], math.nan))]
        if not trainer.is_global_zero or not validated:
            return
        best = min(validated, key=lambda row: row[BEST[0]])
        speeds = [row["train/frames_per_second"] for row in validated if "train/frames_per_second" in row]
        summary = {f"best/{name.removeprefix('valid/')}": best[name] for name in ("step", *BEST)}
        summary |= {"hours": self._hours(), **({"frames_per_second": float(np.median(speeds))} if speeds else {})}
        print_summary(summary, trainer.global_step)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(summary)
                if (self.codec / "config.json").is_file():
                    import wandb

                    artifact = wandb.Artifact(f"codec-{logger.version}", "model", metadata=summary)
                    artifact.add_dir(str(self.codec), policy="immutable")  # read where it lies, not copied to $HOME
                    logger.experiment.log_artifact(artifact)

    def _hours(self) -> float:
        """Hours that the run has taken, validations included, and before it was resumed too."""
        return self.hours_before + (perf_counter() - self.began) / 3600

    def state_dict(self) -> dict[str, Any]:
        """Return the time taken and the losses since the last validation, for the checkpoint."""
        return {"hours": self._hours(), "sums": {name: float(value) for name, value in self.sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.hours_before, self.sums = state_dict["hours"], dict(state_dict["sums"])


def first_codebook(quantizer: Quantizer) -> Tensor | None:
    """Return the codes (V, C) of the first codebook, or what each code stands for; None where there are too many."""
    if isinstance(quantizer, EMAQuantizer):
        return quantizer.codebooks[0].codes  # type: ignore[return-value]  # nn.ModuleList tells no type
    if quantizer.num_codebooks > 1 or quantizer.codebook_size > MOST_CODES:
        return None
    device = [*quantizer.parameters(), *quantizer.buffers()][0].device
    with torch.inference_mode():
        return quantizer.decode(torch.arange(quantizer.codebook_size, device=device)[None, None])[0]


def git_commit() -> str | None:
    """Return the hash of the commit of this code, "-dirty" behind it where files were changed.

    None outside a checkout, as when installed, and without git.
    """
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def print_summary(summary: dict[str, float], steps: int) -> None:
    """Print the figures of the best validation, and what the run took, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"After {steps:,} steps")
    forms = {
        "best step": ("best/step", "{:,.0f}"),
        "normalized error": ("best/normalized_error", "{:.4f}"),
        "perplexity": ("best/perplexity", "{:,.0f}"),
        "codes used": ("best/used_share", "{:.1%}"),
        "frames/s": ("frames_per_second", "{:,.0f}"),
        "hours": ("hours", "{:.2f}"),
    }
    for heading in forms:
        table.add_column(heading, justify="right")
    table.add_row(*(form.format(summary[name]) if name in summary else "–" for name, form in forms.values()))
    Console().print(table)
