"""Export a codec to ONNX: one graph from features to codes, one from codes to features.

Axes: B batch, T frames, D feature width, K codebooks, N codes an utterance, V codes a codebook, C their width. The
graphs hold the codec's own modules, their weights inside. B, T and N are free.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError, first_line
from repcodec.files import atomic_write
from repcodec.packing import Tokenizer
from repcodec.quantizers import EMACodebook, EMAQuantizer

FILES = ("encode.onnx", "decode.onnx")
"""What an export leaves in its folder."""

MAX_BYTES = 2**31 - 2**24
"""Weights that one ONNX file can hold: 2 GiB, less room for the graph itself."""

TIE = 1e-5
"""Two codes whose distances to a vector differ by less, relatively, are both the nearest."""


@dataclass(frozen=True)
class OnnxCheck:
    """How the exported graphs, run by onnxruntime, compare with the codec.

    Attributes:
        frames: frames of features compared.
        codes: codes compared.
        share: share of the codes that differ, 0 to 1.
        not_ties: places (of N) whose codes differ although the two distances do, by `TIE` or more.
        relative_error: |decode graph - codec| / |codec| of the features made of the same codes, the largest of all
            utterances.
    """

    frames: int
    codes: int
    share: float
    not_ties: int
    relative_error: float

    def __str__(self) -> str:
        return (
            f"onnxruntime and the codec, over {self.frames} frames: {self.share:.4%} of {self.codes} codes differ, at "
            f"{self.not_ties} places that are no ties; decoded features by {self.relative_error:.1e}."
        )


def export_onnx(codec: Tokenizer, folder: Path | str) -> tuple[Path, Path]:
    """Write encode.onnx and decode.onnx, each whole or not at all.

    encode.onnx takes "features" (B, T, D) float32, T >= 1, all of a row valid, and gives "codes" (B, K, N) int64, N as
    `Architecture.num_codes` says. decode.onnx takes "codes" (B, K, N), N >= 1, -1 beyond an utterance's last code, and
    gives "features" (B, N * stride, D), zero there. A graph runs an utterance as a whole: memory grows with its length.

    The files' metadata say kind, stride, encoder, layer, frame rate and the hash of the codec's weights.

    Args:
        codec: a codec of published quantizer; left as it is, whatever its device, precision and mode.
        folder: made when missing.

    Returns:
        The two files.

    Raises:
        RepCodecError: the extra `onnx` is not installed, the tokenizer is no such codec or has more weights than a file
            can hold, or the folder cannot be written.
    """
    onnx = _module("onnx")
    _module("onnxscript")
    codec = _exportable(codec)
    about = _about(codec)
    codec = deepcopy(codec).cpu().float().eval()
    stride = codec.stride
    features, codes = torch.zeros(2, 4 * stride, codec.dim), torch.zeros(2, codec.num_codebooks, 4, dtype=torch.int64)
    axes = [{0: "B", 1: "T"}, {0: "B", 2: "N"}]
    graphs = [_traced(_Encode(codec), features, *axes), _traced(_Decode(codec), codes, *axes[::-1])]
    for graph, (given, made) in zip(graphs, [("features", "codes"), ("codes", "features")], strict=True):
        onnx.helper.set_model_props(graph, about)
        graph.doc_string = f"RepCodec: {given} -> {made}"
    encode, decode = (Path(folder) / name for name in FILES)
    # Both take their places at the very end, one right after the other.
    with atomic_write(encode, "w+b") as first, atomic_write(decode, "w+b") as second:
        first.write(graphs[0].SerializeToString())
        second.write(graphs[1].SerializeToString())
    return encode, decode


@torch.no_grad()
def check_onnx(codec: Tokenizer, folder: Path | str, utterances: Iterable[npt.NDArray[np.floating]]) -> OnnxCheck:
    """Compare exported graphs, run by onnxruntime on the CPU, with the codec they were made from.

    Args:
        codec: the codec.
        folder: what `export_onnx` wrote.
        utterances: features (T, D) of each, float; those too short for a code are passed over.

    Raises:
        RepCodecError: onnxruntime is not installed, the files are missing, damaged or of another codec, or the features
            have another width or not a single code.
    """
    codec = _exportable(codec)
    about = _about(codec)
    encode, decode = (_session(Path(folder) / name, about) for name in FILES)
    frames = num_codes = different = not_ties = 0
    relative_error = 0.0
    for utterance in utterances:
        features = torch.from_numpy(np.asarray(utterance, dtype=np.float32))[None].to(codec.feature_mean)
        expected = codec.encode(features)
        if not expected.numel():  # shorter than a code
            continue
        found = torch.from_numpy(encode.run(None, {"features": features.cpu().float().numpy()})[0]).to(expected)
        if found.shape != expected.shape:
            raise RepCodecError(
                f"{folder}/{FILES[0]}: {features.shape[1]} frames gave codes {tuple(found.shape)}, the codec gives "
                f"{tuple(expected.shape)}; this is a bug, do not use the file."
            )
        frames += features.shape[1]
        num_codes += expected.numel()
        different += int((found != expected).sum())
        not_ties += _count_not_ties(codec, codec.vectors(features), expected[0].T, found[0].T)
        decoded = codec.decode(expected).cpu().float()
        error = torch.from_numpy(decode.run(None, {"codes": expected.cpu().numpy()})[0]) - decoded
        relative_error = max(relative_error, float(error.norm() / decoded.norm()))
    if not num_codes:
        raise RepCodecError(
            "no utterance is as long as a code: the exported graphs need some speech to be checked with."
        )
    return OnnxCheck(frames, num_codes, different / num_codes, not_ties, relative_error)


class _Encode(nn.Module):
    """The encode graph."""

    def __init__(self, codec: RepCodec):
        super().__init__()
        self.codec = codec

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> codes (B, K, N)."""
        shape, num_frames = self.codec.architecture, features.shape[1]
        x, valid = self.codec.normalize(features), None
        if shape.stride > 1:
            x = nn.functional.pad(x, (0, 0, 0, -num_frames % shape.stride))
            if not shape.pad_to_stride:
                valid = (torch.arange(x.shape[1]) < num_frames)[None]
        z, _ = self.codec.encoder(x, valid)
        residual, codes = z.flatten(0, 1), []
        # The quantizer picks valid frames and takes them in blocks, of which a graph of free T can do neither.
        for book in _books(self.codec):
            chosen = torch.addmm(book.square().sum(1) / 2, residual, book.T, alpha=-1).argmin(1)
            residual = residual - book[chosen]
            codes.append(chosen)
        every: Tensor = torch.stack(codes, 1).unflatten(0, z.shape[:2]).mT
        if valid is None:
            return every
        for stride in shape.enc_strides:
            if stride > 1:  # as `num_codes`, but nothing is negative: ONNX rounds that the other way
                num_frames = (num_frames + stride - 2) // stride
        return every[..., :num_frames]


class _Decode(nn.Module):
    """The decode graph."""

    def __init__(self, codec: RepCodec):
        super().__init__()
        self.codec = codec

    def forward(self, codes: Tensor) -> Tensor:
        """(B, K, N) -> features (B, N * stride, D)."""
        num_frames = codes.shape[-1] * self.codec.stride
        return self.codec._features(self.codec.quantizer.decode(codes), codes[:, 0] >= 0, None, num_frames)


def _books(codec: RepCodec) -> list[Tensor]:
    """Return the codebooks (V, C), in the order in which they quantize."""
    return [book.codes for book in codec.quantizer.modules() if isinstance(book, EMACodebook)]


def _exportable(tokenizer: Tokenizer) -> RepCodec:
    """Return a codec whose parts ONNX files can hold."""
    if not isinstance(tokenizer, RepCodec):
        raise RepCodecError(
            f"a {type(tokenizer).__name__} cannot be exported: ONNX files are made of codecs, as train.py saves them "
            "in the codec/ folder of a run; k-means is its centroids and needs no graph."
        )
    if not isinstance(tokenizer.quantizer, EMAQuantizer):
        raise RepCodecError(
            f'a codec with the quantizer "{tokenizer.quantizer.kind}" cannot be exported: ONNX files are made of '
            'codecs with "ema" or "rotation", of one or more codebooks.'
        )
    for name, stack in (("encoder", tokenizer.encoder), ("decoder", tokenizer.decoder)):
        # In float32, as they will stand in the file.
        size = 4 * sum(weights.numel() for weights in [*stack.parameters(), *_books(tokenizer)])
        if size > MAX_BYTES:
            raise RepCodecError(
                f"the {name} has {size / 2**30:.1f} GiB of weights, but an ONNX file holds no more than "
                f"{MAX_BYTES / 2**30:.1f} GiB; export a smaller codec."
            )
    return tokenizer


def _about(codec: RepCodec) -> dict[str, str]:
    """Return what the files say of the codec, strings; the hash is that of its saved folder's config.json."""
    from safetensors.torch import save

    config = codec.config()
    about: dict[str, Any] = {
        name: config[name] for name in ("kind", "encoder", "layer", "frame_rate", "pad_to_stride") if name in config
    }
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in codec.state_dict().items()})
    about |= {"stride": codec.stride, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    return {name: str(value) for name, value in about.items()}


def _traced(part: nn.Module, example: Tensor, given: dict[int, str], made: dict[int, str]) -> Any:
    """Return a module of one input as an ONNX model.

    Args:
        part: an `_Encode` or a `_Decode`.
        example: an input.
        given: the free axes of its input, and what to call them.
        made: the same of its output.
    """
    names = ["features", "codes"] if isinstance(part, _Encode) else ["codes", "features"]
    shapes = {axis: torch.export.Dim(name) for axis, name in given.items()}
    with _quiet():
        program = torch.onnx.export(
            part.eval(), (example,), dynamo=True, dynamic_shapes=(shapes,), input_names=names[:1],
            output_names=names[1:], verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for axis, name in made.items():  # instead of the sum by which it follows from the input
        graph.output[0].type.tensor_type.shape.dim[axis].dim_param = name
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]  # where in whose source code it came from
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _module(name: str) -> Any:
    """Import a package of the extra `onnx`."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise RepCodecError(f"ONNX files need the package {name}: pip install 'repcodec[onnx]'.") from error


def _session(path: Path, about: dict[str, str]) -> Any:
    """Open one of a codec's graphs in onnxruntime, on the CPU."""
    onnxruntime = _module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises many kinds
        raise RepCodecError(
            f"{path}: no graph that onnxruntime can run ({first_line(error)}); export again."
        ) from error
    if session.get_modelmeta().custom_metadata_map != about:
        raise RepCodecError(f"{path} was exported from another codec than the one given; export that one again.")
    return session


def _count_not_ties(codec: RepCodec, vectors: Tensor, expected: Tensor, found: Tensor) -> int:
    """Count the vectors (N, C) whose two codes (N, K) differ, and in distance too.

    Codebooks after the first one whose codes differ quantize another rest: they differ because it does.
    """
    books, not_ties = _books(codec), 0
    for n in (expected != found).any(1).nonzero()[:, 0].tolist():
        k = int((expected[n] != found[n]).nonzero()[0])
        residual = vectors[n].double() - sum(books[j][expected[n, j]] for j in range(k))
        near, far = sorted(float((residual - books[k][codes[n, k]]).norm()) for codes in (expected, found))
        not_ties += far - near >= TIE * far
    return not_ties
