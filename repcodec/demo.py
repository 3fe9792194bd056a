"""The DataModule that makes the demo's corpus and features on first use (`data=demo`)."""

from pathlib import Path
from typing import Any

from repcodec.data import ShardsDataModule
from repcodec.demo_corpus import SPLITS, build_corpus, split_recordings
from repcodec.demo_weights import convert_whisper_tiny_en
from repcodec.extraction import extract
from repcodec.manifest import Manifest
from repcodec.speech_encoders import encoder_table, load_speech_encoder

SHIPPED = "whisper_tiny_en"
"""The encoder whose weights the extra `demo` ships."""


class DemoDataModule(ShardsDataModule):
    """Makes corpus, manifests and features on first use, then serves them as any feature shards."""

    def __init__(
        self,
        *,
        cache: str,
        name: str,
        audio: str | None,
        encoder: str,
        layer: int,
        model: str,
        labels: str | None,
        corpus_seed: int,
        **options: Any,
    ):
        """Describe what to make; nothing is made before `prepare_data`.

        Args:
            cache: folder for all that is made: the converted encoder, and a folder a corpus.
            name: of the corpus's folder.
            audio: a folder of sound files instead of the demo corpus; a tenth of the files becomes the validation
                split and another the test split.
            encoder, layer: of the features.
            model: hub id or folder of the speech encoder; that of Whisper tiny.en itself needs no network.
            labels: phone labels of `audio`.
            corpus_seed: of the demo corpus, or of the split of `audio`.
            options: see `ShardsDataModule`.
        """
        self.cache, self.corpus = Path(cache), Path(cache) / name
        if audio is None and labels is None:
            labels = str(self.corpus / "phones.tsv")
        self.audio, self.model, self.corpus_seed = audio, model, corpus_seed
        super().__init__(root=str(self.corpus / "features"), encoder=encoder, layer=layer, labels=labels, **options)

    @property
    def corpus_name(self) -> str:
        """See `FeaturesDataModule`."""
        return super().corpus_name if self.audio is not None else "the demo corpus spoken by espeak-ng"

    def prepare_data(self) -> None:
        """Make what is missing: manifests, weights, features.

        Raises:
            RepCodecError: see `build_corpus`, `split_recordings`, `convert_whisper_tiny_en` and `extract`.
        """
        if self.audio is None:
            build_corpus(self.corpus, self.corpus_seed)
        else:
            split_recordings(Path(self.audio), self.corpus, self.corpus_seed)
        spec = encoder_table()[self.encoder]
        shipped = self.model == encoder_table()[SHIPPED].model
        model = convert_whisper_tiny_en(self.cache) if shipped else self.model
        encoder = load_speech_encoder(spec, self.layer, model)
        for split in SPLITS:
            manifest = Manifest.read(self.corpus / f"{split}.tsv")
            extract(manifest, self.dirs[0] / split, spec, encoder, model=model, description=f"Features, {split}")
        super().prepare_data()
