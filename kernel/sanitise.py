"""The one sanitiser: what a model or a file says is data, and must not steer a terminal.

Not here: markup (readers draw text as text), widths and columns.
"""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8; no terminal encoding takes them
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line separators, bidi controls
    "\U000e0000-\U000e007f]"  # the tag block
)


def sanitise(text: str, *, pictures: bool = False) -> str:
    """Text whose only control characters are tab and newline. `pictures` stand for what was there."""
    text = _SURROGATE.sub("\ufffd", text)
    return _UNSAFE.sub(_picture if pictures else "", text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
