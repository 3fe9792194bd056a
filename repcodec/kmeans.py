"""The baseline: k-means over single frames, behind the same tokenizer contract as the codec."""

from pathlib import Path

import torch
from torch import Tensor, nn

from repcodec.checkpoint import load_tensors, read_config, save_folder
from repcodec.errors import RepCodecError
from repcodec.quantizers import NO_CODE, nearest_code
from repcodec.stacks import frame_mask


class KMeansTokenizer(nn.Module):
    """Codes are the nearest centroids.

    Attributes:
        dim: D.
        codebook_size: V.
        num_codebooks: 1.
        stride: 1, frames a code.
    """

    num_codebooks = 1
    stride = 1
    centroids: Tensor

    def __init__(self, centroids: Tensor):
        """Take (V, D) centroids."""
        super().__init__()
        self.codebook_size, self.dim = centroids.shape
        self.register_buffer("centroids", centroids)

    def save_pretrained(self, folder: Path | str, about: dict | None = None) -> None:
        """Save the centroids: config.json and model.safetensors.

        Raises:
            RepCodecError: the folder cannot be written.
        """
        shape = {"kind": "kmeans", "dim": self.dim, "codebook_size": self.codebook_size}
        save_folder(folder, {**shape, **(about or {})}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "KMeansTokenizer":
        """Load saved centroids.

        Raises:
            RepCodecError: the folder holds no k-means model, or a damaged one.
        """
        config = read_config(folder)
        if config["kind"] != "kmeans":
            raise RepCodecError(f"{folder} holds a {config['kind']}, expected a kmeans.")
        try:
            tokenizer = cls(torch.zeros(config["codebook_size"], config["dim"]))
        except (KeyError, TypeError, RuntimeError) as error:
            raise RepCodecError(f"{folder}/config.json: codebook_size or dim is missing or no number.") from error
        load_tensors(folder, tokenizer)
        return tokenizer.eval()

    @torch.no_grad()
    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) and valid frames (B,) -> codes (B, 1, T), `NO_CODE` beyond the lengths."""
        codes = nearest_code(features.flatten(0, 1), self.centroids).view(features.shape[:2])
        if lengths is not None:
            codes = codes.masked_fill(~frame_mask(lengths, features.shape[1]), NO_CODE)
        return codes[:, None]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, T) -> (B, T, D), zero where a code is `NO_CODE`."""
        features = self.centroids[codes[:, 0].clamp(min=0)]
        return features * (codes[:, 0] != NO_CODE)[..., None]
