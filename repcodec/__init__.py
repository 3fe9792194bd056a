"""RepCodec: speech to discrete tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repcodec.codec import RepCodec
    from repcodec.pipeline import SpeechTokenizer

__all__ = ["RepCodec", "SpeechTokenizer"]


def __getattr__(name: str) -> "type[RepCodec] | type[SpeechTokenizer]":
    """Import the classes only when they are asked for: `import repcodec` stays light."""
    if name == "RepCodec":
        from repcodec.codec import RepCodec

        return RepCodec
    if name == "SpeechTokenizer":
        from repcodec.pipeline import SpeechTokenizer

        return SpeechTokenizer
    raise AttributeError(f"module 'repcodec' has no attribute {name!r}")
