"""Words to strings: variables, `~` and file patterns.

Expansions never split and are never patterns: a prompt in a variable stays one word. Only `$@` by
itself becomes several words, one per argument.
"""

import glob
from collections.abc import Callable
from pathlib import Path

from shell.syntax import Text, Variable, Word

Lookup = Callable[[Variable], str]


def expand_word(word: Word, lookup: Lookup) -> str:
    """One string, patterns left alone: a redirection's file name, an assignment's value."""
    return "".join(_strings(word, lookup))


def expand_words(
    words: tuple[Word, ...], lookup: Lookup, arguments: tuple[str, ...], *, patterns: bool
) -> list[str]:
    """The words of a command. With `patterns`, a bare `*.md` becomes the files that match, if any do."""
    expanded: list[str] = []
    for word in words:
        if _is_all_arguments(word):
            expanded.extend(arguments)
        else:
            text = expand_word(word, lookup)
            expanded.extend((patterns and _files(word, lookup)) or [text])
    return expanded


def _is_all_arguments(word: Word) -> bool:
    parts = [part for part in word.parts if not (isinstance(part, Text) and part.text == "")]
    only = parts[0] if len(parts) == 1 else None
    return isinstance(only, Variable) and only.name == "@" and only.default is None


def _strings(word: Word, lookup: Lookup) -> list[str]:
    strings = [part.text if isinstance(part, Text) else _value(part, lookup) for part in word.parts]
    first = word.parts[0] if word.parts else None
    if isinstance(first, Text) and not first.quoted and first.text.startswith("~"):
        strings[0] = _home(first.text, whole=len(word.parts) == 1)
    return strings


def _value(variable: Variable, lookup: Lookup) -> str:
    value = lookup(variable)
    return value if value or variable.default is None else expand_word(variable.default, lookup)


def _home(text: str, *, whole: bool) -> str:
    """`~` alone or before a slash; `~other` and `~"quoted"` stay as they are."""
    if text.startswith("~/") or (text == "~" and whole):
        return str(Path.home()) + text[1:]
    return text


def _files(word: Word, lookup: Lookup) -> list[str]:
    bare = [isinstance(part, Text) and not part.quoted for part in word.parts]
    strings = _strings(word, lookup)
    if not any(is_bare and glob.has_magic(text) for is_bare, text in zip(bare, strings, strict=True)):
        return []
    pattern = "".join(
        text if is_bare else glob.escape(text) for is_bare, text in zip(bare, strings, strict=True)
    )
    return sorted(glob.glob(pattern))  # noqa: PTH207 - keeps the path as it was typed
