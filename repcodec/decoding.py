"""Tokens file -> feature shard."""

import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from repcodec.architecture import FRAME_RATE
from repcodec.errors import RepCodecError
from repcodec.packing import Tokenizer, decode_packed
from repcodec.shard_writer import write_shard
from repcodec.tokenization import label
from repcodec.tokens import Tokens, read_root, read_tokens


@torch.inference_mode()
def decode_tokens(tokenizer: Tokenizer, path: Path | str, folder: Path | str) -> int:
    """Decode a tokens file into a feature shard, `folder/0_1.npy`; return how many utterances it has.

    After a kill the same call goes on where the last one stopped. Frames are cropped to those that were coded where
    the file says how many; otherwise every code gives as many as the tokenizer's stride.

    Raises:
        RepCodecError: the file is broken or holds codes or codebooks that the tokenizer does not have, or the shard
            cannot be written or is there already.
    """
    path = Path(path)
    total = sum(1 for _ in read_tokens(path))  # a broken line is told before anything is decoded
    if total == 0:
        raise RepCodecError(f"{path}: the tokens file holds no utterance; make it again.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "root": read_root(path),
        "frame_rate": tokenizer.about.get("frame_rate", FRAME_RATE),
        "encoder": tokenizer.about.get("encoder"),
        "layer": tokenizer.about.get("layer"),
        "decoded_by": label(tokenizer),
        "tokens_sha256": digest,
    }
    waiting: deque[Tokens] = deque()
    with (
        write_shard(folder, 0, 1, tokenizer.output_dim, about) as shard,
        tqdm(total=total, initial=len(shard.utterances), desc="Decoding", unit="utt") as bar,
    ):

        def codes() -> Iterator[Tensor]:
            for tokens in islice(read_tokens(path), len(shard.utterances), None):
                _check_codes(tokenizer, tokens, path)
                waiting.append(tokens)
                yield torch.from_numpy(tokens.codes.T).to(tokenizer.device)

        for number, features in enumerate(decode_packed(tokenizer, codes()), start=1):
            tokens = waiting.popleft()
            if (tokens.num_frames or 0) >= len(features) + tokenizer.stride:
                raise RepCodecError(
                    f"{path}, {tokens.name}: says {tokens.num_frames} frames, but its codes stand for {len(features)}; "
                    "make the file again."
                )
            shard.append(tokens.name, features[: tokens.num_frames].cpu().numpy())
            if number % 64 == 0:
                shard.commit()
            bar.update()
        shard.commit()
    return total


def _check_codes(tokenizer: Tokenizer, tokens: Tokens, path: Path) -> None:
    num_codebooks, _ = tokens.codes.shape
    if num_codebooks != tokenizer.num_codebooks:
        found, expected = f"{num_codebooks} codebooks", str(tokenizer.num_codebooks)
    elif tokens.codes.size and (largest := int(tokens.codes.max())) >= tokenizer.codebook_size:
        found, expected = f"code {largest}", f"0 to {tokenizer.codebook_size - 1}"
    else:
        return
    raise RepCodecError(
        f"{path}, {tokens.name}: {found}, but the tokenizer has {expected}; decode with the one that made the file."
    )
