"""RepCodec: speech to discrete tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repcodec.codec import RepCodec

__all__ = ["RepCodec"]


def __getattr__(name: str):
    """Import the codec only when it is asked for: `import repcodec` stays light."""
    if name == "RepCodec":
        from repcodec.codec import RepCodec

        return RepCodec
    raise AttributeError(f"module 'repcodec' has no attribute {name!r}")
