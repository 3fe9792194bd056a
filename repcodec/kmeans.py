"""The baseline: k-means over single frames, behind the same tokenizer contract as the codec."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repcodec.checkpoint import load_tensors, read_config, save_folder
from repcodec.errors import RepCodecError, first_line
from repcodec.hub import local_folder, push
from repcodec.quantizers import NO_CODE, nearest_code
from repcodec.stacks import frame_mask


class KMeansTokenizer(nn.Module):
    """Codes are the nearest centroids.

    Attributes:
        dim: D.
        codebook_size: V.
        num_codebooks: 1.
        stride: 1, frames a code.
        output_dim: D too.
        reach, decoder_reach: 0, a code depends on its own frame alone.
        about: what config.json says besides: speech encoder, layer, frame rate …
    """

    num_codebooks = 1
    stride = 1
    reach = (0, 0)
    decoder_reach = 0
    centroids: Tensor

    def __init__(self, centroids: Tensor):
        """Take (V, D) centroids."""
        super().__init__()
        self.codebook_size, self.dim = centroids.shape
        self.output_dim = self.dim
        self.about: dict[str, Any] = {}
        self.register_buffer("centroids", centroids)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.buffers()).device

    def config(self) -> dict[str, Any]:
        """Return what config.json says."""
        return {"kind": "kmeans", "dim": self.dim, "codebook_size": self.codebook_size, **self.about}

    def save_pretrained(self, folder: Path | str, about: dict[str, Any] | None = None) -> None:
        """Save the centroids: config.json, model.safetensors and a model card.

        Raises:
            RepCodecError: the folder cannot be written.
        """
        save_folder(folder, {**self.config(), **(about or {})}, self.state_dict())

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
    ) -> str:
        """Save the centroids on the Hugging Face hub; see `RepCodec.push_to_hub`.

        Raises:
            RepCodecError: there is no token, or the hub cannot be reached or refuses.
        """
        return push(self.config(), self.state_dict(), repo_id, private=private, token=token, revision=revision)

    @classmethod
    def from_pretrained(cls, folder: Path | str, revision: str | None = None) -> "KMeansTokenizer":
        """Load saved centroids; see `RepCodec.from_pretrained`.

        Raises:
            RepCodecError: the folder holds no k-means model, or a damaged one; or the hub cannot be reached.
        """
        folder = local_folder(folder, revision)
        config = read_config(folder)
        if config["kind"] != "kmeans":
            raise RepCodecError(f"{folder} holds a {config['kind']}, expected a kmeans.")
        try:
            tokenizer = cls(torch.empty(config["codebook_size"], config["dim"], device="meta"))
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise RepCodecError(f"{folder}/config.json: codebook_size or dim is missing or no number.") from error
        described = ("kind", "dim", "codebook_size", "weights_sha256")
        tokenizer.about = {key: value for key, value in config.items() if key not in described}
        load_tensors(folder, tokenizer)
        return tokenizer.eval()

    @classmethod
    def from_joblib(cls, path: Path | str, allow_pickle: bool = False) -> "KMeansTokenizer":
        """Load scikit-learn's k-means model, as fairseq's scripts save it with joblib.

        Args:
            path: the file.
            allow_pickle: unpickling runs whatever code the file holds: only for files of your own.

        Raises:
            RepCodecError: it is not allowed, or the file holds no k-means model.
        """
        if not allow_pickle:
            raise RepCodecError(
                f"{path} is a pickle, and reading one runs whatever code is in it; if it is your own, say "
                "allow_pickle=true."
            )
        import joblib

        try:
            centroids = torch.as_tensor(joblib.load(path).cluster_centers_, dtype=torch.float32)
        except Exception as error:  # a pickle may raise anything
            raise RepCodecError(f"{path}: not a k-means model of scikit-learn ({first_line(error)}).") from error
        if centroids.ndim != 2 or not torch.isfinite(centroids).all():
            raise RepCodecError(f"{path}: cluster_centers_ are not finite (V, D) centroids.")
        return cls(centroids).eval()

    @torch.no_grad()
    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) and valid frames (B,) -> codes (B, 1, T), `NO_CODE` beyond the lengths.

        Raises:
            RepCodecError: features of another width or shape.
        """
        if features.ndim != 3 or features.shape[2] != self.dim:
            raise RepCodecError(
                f"features of shape {tuple(features.shape)}: the k-means model takes (B, T, {self.dim}); they are of "
                "another speech encoder."
            )
        codes = nearest_code(features.flatten(0, 1).to(self.centroids.dtype), self.centroids).view(features.shape[:2])
        if lengths is not None:
            codes = codes.masked_fill(
                ~frame_mask(torch.as_tensor(lengths, device=codes.device), features.shape[1]), NO_CODE
            )
        return codes[:, None]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, T) -> (B, T, D), zero where a code is `NO_CODE`.

        Raises:
            RepCodecError: codes of another shape, or one that there is no centroid of.
        """
        if codes.ndim != 3 or codes.shape[1] != 1 or bool(((codes >= self.codebook_size) | (codes < NO_CODE)).any()):
            raise RepCodecError(
                f"the k-means model decodes codes (B, 1, T) from 0 to {self.codebook_size - 1}, but got shape "
                f"{tuple(codes.shape)} with another code; decode with the one that made them."
            )
        features = self.centroids[codes[:, 0].clamp(min=0)]
        return features * (codes[:, 0] != NO_CODE)[..., None]

    def encode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Features (T, D) of each piece -> its codes (T, 1)."""
        codes = nearest_code(torch.cat(pieces), self.centroids)[:, None]
        return list(codes.split([len(piece) for piece in pieces]))

    def decode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Codes (T, 1) of each piece -> its features (T, D)."""
        return [self.centroids[piece[:, 0]] for piece in pieces]
