"""Compare tokenizers on a set of features, or tokens files by their codes alone: `python evaluate.py --help`."""

import os
from contextlib import nullcontext
from datetime import timedelta
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from repcodec.checkpoint import read_config
from repcodec.errors import RepCodecError, one_sentence
from repcodec.files import locked
from repcodec.hub import local_folder
from repcodec.labels import PhoneLabels

if TYPE_CHECKING:  # what takes long to load is loaded where it is used: --help and a misspelt option come at once
    from repcodec.data import FeaturesDataModule


def listed(value: Any) -> list[Any]:
    """Return a list's values, one value alone as a list of it, and nothing as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, ListConfig) else [value]


def chosen(config: DictConfig) -> tuple[list[str], list[str], list[int]]:
    """Return the tokens files, the tokenizers and the sizes of k-means to compare.

    Raises:
        RepCodecError: a size is no number, or a folder or file is not there: told before anything is loaded or made.
    """
    # Tokens files need no features: then tokenizers are measured too only where some are named.
    tokens, named = (list(map(str, listed(value))) for value in (config.tokens, config.tokenizers))
    if config.tokenizers is None and not tokens:
        named = [str(Path(config.run_dir) / "codec")]
    tokenizers = [place for pattern in named for place in sorted(glob(pattern)) or [pattern]]
    kmeans = [1024] if config.kmeans is None and not tokens else listed(config.kmeans)
    for size in kmeans:
        if type(size) is not int or size < 1:
            raise RepCodecError(f"kmeans={size}: expected numbers of codes, as in kmeans=[500,1024].")
    for place in map(Path, tokenizers):
        if not place.is_file():
            read_config(local_folder(place))
    for labels in (config.labels, config.data.get("labels")):
        if labels is not None and not os.path.exists(labels):
            raise RepCodecError(
                f"{labels}: no such label file or folder; give labels=PATH another one, or leave it out."
            )
    return tokens, tokenizers, kmeans


def compare(config: DictConfig) -> None:
    """Evaluate every tokenizer, print the table and write the report."""
    tokens, tokenizers, kmeans = chosen(config)
    from repcodec.comparison import Comparison, Plan
    from repcodec.dashboards import WandbRun
    from repcodec.distributed import first_rank_first, rank_and_world
    from repcodec.evaluation import Measures
    from repcodec.pipeline import usable_device
    from repcodec.report import log_table, print_table, write_report
    from repcodec.speech_encoders import EncoderSpec
    from repcodec.tokens_evaluation import TokensFacts

    run_dir, device = Path(config.run_dir), usable_device(config.device)
    data: FeaturesDataModule | None = None
    if tokenizers or kmeans:
        EncoderSpec(**config.encoder).valid_layer(config.layer)
        data = instantiate(config.data, **({"labels": config.labels} if config.labels else {}))
        data.device = device
        with first_rank_first() as first:
            if first:
                data.prepare_data()
    if data is not None:
        labels = data.phone_labels
    else:
        labels = PhoneLabels.read(config.labels) if config.labels is not None else None
    plan = Plan(
        run_dir=run_dir,
        data=data,
        split=config.split,
        measures=Measures(config.corpus, config.abx, config.probe, config.speaker),
        robustness=config.robustness,
        tokenizers=tokenizers,
        kmeans=kmeans,
        tokens=tokens,
        facts=TokensFacts(config.manifest, config.codes_per_second, config.codebook_size),
        labels=labels,
        allow_pickle=config.allow_pickle,
        device=device,
    )
    comparison = Comparison(plan)
    results = comparison.run()
    if rank_and_world()[0] > 0:
        return
    facts = comparison.facts()
    write_report(run_dir, results, facts, labels.phones if labels is not None else None, comparison.examples(results))
    print_table(results, facts.get("features", "tokens files"))
    if config.wandb is not None:
        run = WandbRun(project=config.wandb, name=config.run, save_dir=str(run_dir)).experiment
        log_table(results, run)
        run.finish()
    print(f"Written to {run_dir}: report.html, results.json, results.csv, results.md and the plots as PNG")


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run; a user's mistake ends in one sentence and exit code 1."""
    first = os.environ.get("RANK", "0") == "0"  # torchrun's
    alone = locked(Path(config.run_dir) / "results.json") if first else nullcontext()
    with one_sentence(), alone:
        compare(config)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors too come here, to end in one sentence
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun started several
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(days=1))  # a rank may wait long for another's share
    with one_sentence():
        main()
