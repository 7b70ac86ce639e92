"""The KV state of a sequence as bytes: a header of ours around llama.cpp's own, which has no checksum.

Owner: none, pure functions. The header binds the state to the model file and to the tokens it was
computed from, so a state that does not belong is refused before native code sees it.
Not here: protection against forgery (kernel.checkpoint signs whole files).
"""

import zlib
from collections.abc import Sequence
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from kernel.errors import CheckpointInvalid

_HEAD: Final = Struct("<8s16sIIIQ")  # magic, model, tokens, their checksum, the state's, its bytes
_MAGIC: Final = b"LLMOSKV1"


def pack(model: bytes, tokens: Sequence[int], state: npt.NDArray[np.uint8]) -> bytes:
    """`tokens` are the ones the state was computed from."""
    check = zlib.crc32(state.data)
    return _HEAD.pack(_MAGIC, model, len(tokens), _sum(tokens), check, state.size) + state.tobytes()


def unpack(model: bytes, tokens: Sequence[int], packed: bytes) -> tuple[int, npt.NDArray[np.uint8]]:
    """(tokens computed, state) of a packed state of a sequence of these tokens. Raises CheckpointInvalid."""
    if len(packed) < _HEAD.size:
        raise CheckpointInvalid("the KV state is truncated")
    magic, made_by, computed, tokens_check, check, size = _HEAD.unpack_from(packed)
    if magic != _MAGIC:
        raise CheckpointInvalid("not a KV state")
    if made_by != model:
        raise CheckpointInvalid("the KV state was made by another model")
    state = np.frombuffer(packed, np.uint8, offset=_HEAD.size)
    if state.size != size or zlib.crc32(state.data) != check:
        raise CheckpointInvalid("the KV state is damaged")
    if computed >= len(tokens) or _sum(tokens[:computed]) != tokens_check:
        raise CheckpointInvalid("the KV state belongs to other tokens")
    return computed, state


def _sum(tokens: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes())
