"""Typed look-ups in a header's metadata, under its architecture's name.

Not here: what the keys mean (shape.py, deadly.py).
"""

from typing import Final

from drivers.llamacpp.header import Header, Value
from kernel.errors import ModelInvalid

MAX_LAYERS: Final = 512  # more make the native loader abort


class Keys:
    """A value of the wrong kind, or out of range, is the file's fault. Raises ModelInvalid."""

    def __init__(self, header: Header) -> None:
        architecture = header.metadata.get("general.architecture")
        if (
            not isinstance(architecture, str)
            or not architecture.isprintable()
            or not 0 < len(architecture) < 64
        ):
            raise ModelInvalid(f"{header.path}: no general.architecture")
        self.architecture: Final = architecture
        self._metadata = header.metadata
        self._prefix = architecture + "."

    def value(self, key: str) -> Value | None:
        return self._metadata.get(self._prefix + key)

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata

    def whole(self, key: str, low: int, high: int, default: int = 0) -> int:
        return self._whole(key, self._metadata.get(self._prefix + key, default), low, high, default)

    def per_layer(self, key: str, layers: int, high: int, default: int) -> tuple[int, ...]:
        value = self._metadata.get(self._prefix + key, default)
        if not isinstance(value, tuple):
            return (self._whole(key, value, 0, high, default),) * layers
        if len(value) < layers:
            raise ModelInvalid(f"{self._prefix}{key} lists {len(value)} of {layers} layers")
        return tuple(self._whole(key, item, 0, high, default) for item in value[:layers])

    def flags(self, key: str, layers: int) -> tuple[bool, ...] | None:
        """A list with a flag for each layer; None if there is no list."""
        if not isinstance(self._metadata.get(self._prefix + key), tuple):
            return None
        return tuple(map(bool, self.per_layer(key, layers, 1, default=0)))

    def _whole(self, key: str, value: Value, low: int, high: int, default: int) -> int:
        if not isinstance(value, int) or (not low <= value <= high and value != default):
            raise ModelInvalid(f"{self._prefix}{key} is {value!r}; expected {low} to {high}")
        return value
