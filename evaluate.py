"""Compare tokenizers on a set of features: `python evaluate.py --help`."""

import os
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from repcodec.checkpoint import read_config
from repcodec.errors import RepCodecError, one_sentence
from repcodec.evaluation import evaluate, fit_kmeans
from repcodec.pipeline import load_tokenizer, usable_device
from repcodec.report import print_table, read_curve, write_report
from repcodec.speech_encoders import EncoderSpec
from repcodec.tokenization import check_fits, label


def compare(config: DictConfig) -> None:
    """Evaluate every tokenizer, print the table and write the report."""
    for folder in config.tokenizers:
        read_config(folder)  # a misspelt folder is told before any features are made
    EncoderSpec(**config.encoder).valid_layer(config.layer)
    data = instantiate(config.data)
    device = data.device = usable_device(config.device)
    data.prepare_data()
    run_dir = Path(config.run_dir)
    scored = data.split(config.split)
    tokenizers = [(folder, load_tokenizer(folder)) for folder in config.tokenizers]
    for folder, tokenizer in tokenizers:
        check_fits(tokenizer, folder, scored)
    # A folder's name tells codecs apart only where there are several.
    where = {folder: f", {folder}" if len(tokenizers) > 1 else "" for folder, _ in tokenizers}
    models = [(f"{label(tokenizer)}{where[folder]}", tokenizer) for folder, tokenizer in tokenizers]
    for size in config.kmeans:
        kmeans = fit_kmeans(data, size, run_dir / f"kmeans-{size}")
        models.append((label(kmeans), kmeans))
    if not models:
        raise RepCodecError("tokenizers and kmeans are both empty: name at least one tokenizer to evaluate.")
    results = [evaluate(model.to(device), name, data, config.split, config.corpus) for name, model in models]
    minutes = scored.lengths.sum() / config.encoder.frame_rate / 60
    facts = {
        "features": f"{config.encoder.name}, layer {config.layer}, width {config.encoder.dim}",
        "set": f"{config.split}, {minutes:.1f} minutes, of {data.source}",
    }
    write_report(run_dir, results, facts, data.phone_labels, read_curve(run_dir / "logs"))
    print_table(results, f"{facts['features']}: {config.split}")
    print(f"Written to {run_dir}: report.html, results.json, results.csv and the plots as PNG")


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run; a user's mistake ends in one sentence and exit code 1."""
    with one_sentence():
        compare(config)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's errors too come here, to end in one sentence
    with one_sentence():
        main()
