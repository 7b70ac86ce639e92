"""Colours for the line that is being typed, from the shell's own lexer. Imports prompt-toolkit."""

from collections.abc import Callable

from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.lexers import Lexer as PromptLexer
from prompt_toolkit.styles import Style

from shell.lexer import Token, scan
from shell.registry import Registry
from shell.syntax import Incomplete, ShellSyntaxError, Span, Text, Variable

STYLE = Style.from_dict(
    {
        "command": "ansigreen bold",
        "unknown": "ansired",
        "error": "ansired underline",
        "string": "ansiyellow",
        "variable": "ansicyan",
        "option": "ansiblue",
        "operator": "bold",
        "comment": "ansibrightblack",
        "status": "ansired bold",
        "bottom-toolbar": "noreverse ansibrightblack",
    }
)


def styles(text: str, registry: Registry) -> list[tuple[Span, str]]:
    """Which characters get which style; what is not named gets none."""
    found: list[tuple[Span, str]] = []
    expects_command = True
    try:
        for token in scan(text):
            found += _token_styles(token, registry, expects_command)
            if token.kind in ("operator", "newline"):
                expects_command = token.text in (";", "&", "&&", "||", "\n")
            elif token.word is not None:
                expects_command = False
    except Incomplete as error:
        found.append((error.span, "class:string"))
    except ShellSyntaxError as error:
        found.append((error.span, "class:error"))
    return found


def _token_styles(token: Token, registry: Registry, expects_command: bool) -> list[tuple[Span, str]]:
    if token.word is None:
        return [(token.span, f"class:{token.kind}")] if token.kind != "newline" else []
    if expects_command:
        constant = all(isinstance(part, Text) for part in token.word.parts)
        name = "".join(part.text for part in token.word.parts if isinstance(part, Text))
        if not constant or "=" in name:
            return []
        return [(token.span, "class:command" if name in registry else "class:unknown")]
    found = [(token.span, "class:option")] if token.text.startswith("-") else []
    for part in token.word.parts:
        if isinstance(part, Variable):
            found.append((part.span, "class:variable"))
        elif part.quoted:
            found.append((part.span, "class:string"))
    return found


class Highlighter(PromptLexer):
    """Adapts `styles` to prompt-toolkit, which asks line by line."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
        text = document.text
        of_character = [""] * (len(text) + 1)
        for span, style in styles(text, self._registry):
            of_character[span.start : span.end] = [style] * (span.end - span.start)
        starts = [0]
        for line in document.lines:
            starts.append(starts[-1] + len(line) + 1)

        def styled_line(number: int) -> StyleAndTextTuples:
            if number >= len(document.lines):
                return []
            start = starts[number]
            return [(of_character[start + at], char) for at, char in enumerate(document.lines[number])]

        return styled_line
