"""What a model or a user wrote, made fit for a terminal: no control, bidi or tag characters.

Not here: markup. Panels draw text as segments, which have none.
"""

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line separators, bidi controls
    "\ud800-\udfff"  # lone surrogates, which no terminal encoding takes
    "\U000e0000-\U000e007f]"  # tags
)


def sanitise(text: str) -> str:
    """Text whose only control character is the newline; others show as pictures or U+FFFD."""
    text = text.replace("\r\n", "\n").expandtabs(8)
    return _UNSAFE.sub(_picture, text)


def one_line(text: str) -> str:
    """Sanitised, and line breaks as spaces."""
    return sanitise(text).replace("\n", " ")


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
