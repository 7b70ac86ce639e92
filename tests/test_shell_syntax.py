"""The lexer and the parser: what a line means, and where it is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shell.expand import expand_words
from shell.lexer import quote, scan, tokenize
from shell.parser import parse
from shell.syntax import Command, Incomplete, ShellSyntaxError, Variable, Word

SHELLISH = st.text(st.sampled_from("ab=x1:- \t\n'\"\\$#;&|<>(){}~*?[]`!%-é\u202e"), max_size=30)


def words_of(text: str, variables: dict[str, str] | None = None) -> list[str]:
    """The words of the first command, expanded."""
    (item, *_) = parse(text).items
    return expanded(item.first.words, variables or {})


def expanded(words: tuple[Word, ...], variables: dict[str, str], *, patterns: bool = False) -> list[str]:
    def lookup(variable: Variable) -> str:
        return variables[variable.name]

    return expand_words(words, lookup, ("one", "two words"), patterns=patterns)


def commands_of(text: str) -> list[tuple[str, Command]]:
    """Each command with what stands before it: "" first, `;` or `&` after an end, `&&`, `||`."""
    found = []
    for item in parse(text).items:
        found.append(("&" if item.background else ";", item.first))
        found += list(item.rest)
    return found


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=6))
def test_quoted_words_come_back(words: list[str]) -> None:
    assert words_of(" ".join(["echo", *map(quote, words)])) == ["echo", *words]


@given(SHELLISH)
def test_any_text_parses_or_says_where_it_does_not(text: str) -> None:
    try:
        script = parse(text)
    except ShellSyntaxError as error:
        assert 0 <= error.span.start <= error.span.end <= len(text)
        assert error.excerpt().endswith("^")
        return
    for item in script.items:
        assert 0 <= item.span.start < item.span.end <= len(text)
        for command in (item.first, *(command for _, command in item.rest)):
            for word in command.words:
                assert item.span.start <= word.span.start < word.span.end <= item.span.end


@given(SHELLISH)
def test_tokens_cover_the_text_in_order(text: str) -> None:
    end = 0
    try:
        for token in scan(text):
            assert token.span.start >= end
            assert token.text == text[token.span.start : token.span.end]
            assert not text[end : token.span.start].replace("\\\n", "").strip(" \t\r")
            end = token.span.end
    except ShellSyntaxError:
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run nano what is this", ["run", "nano", "what", "is", "this"]),
        ("echo 'a  b' \"c  d\" e\\ f", ["echo", "a  b", "c  d", "e f"]),
        ("echo '$x' \"$x\" $x ${x}y", ["echo", "$x", "2 words", "2 words", "2 wordsy"]),
        ('echo "\\$x \\" \\\\ \\n"', ["echo", '$x " \\ \\n']),
        ("echo '' \"\" $empty", ["echo", "", "", ""]),
        ("echo a\\\nb  c # not this", ["echo", "ab", "c"]),
        ("echo a#b x=1 50% $ {} !", ["echo", "a#b", "x=1", "50%", "$", "{}", "!"]),
        ('echo "$@" $@ "all: $@"', ["echo", "one", "two words", "one", "two words", "all: one two words"]),
        ("echo \\\n  next", ["echo", "next"]),
        ("echo what's 'up'?'", ["echo", "whats up?"]),
        (
            'echo ${x:-no} ${empty:-a  b} "${empty:-$x\'s \\} it}"',
            ["echo", "2 words", "a  b", "2 words's } it"],
        ),
        ("echo ${empty:-} ${empty:-'}'}${empty:-${x}}", ["echo", "", "}2 words"]),
        ("echo ${empty:-*}", ["echo", "*"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    variables = {"x": "2 words", "empty": "", "@": "one two words"}
    assert words_of(text, variables) == words


def test_lists_conditions_and_background() -> None:
    found = commands_of("a; b & c && d ||\n\n e\n# comment\nf")
    assert [(before, command.words[0].parts[0].text) for before, command in found] == [  # type: ignore[union-attr]
        (";", "a"),
        ("&", "b"),
        (";", "c"),
        ("&&", "d"),
        ("||", "e"),
        (";", "f"),
    ]


def test_redirections_may_stand_anywhere() -> None:
    (_, command), *_ = commands_of("run >out.txt nano <in.txt hello >>'log file'")
    assert expanded(command.words, {}) == ["run", "nano", "hello"]
    targets = [(r.operator, expanded((r.target,), {})[0]) for r in command.redirections]
    assert targets == [(">", "out.txt"), ("<", "in.txt"), (">>", "log file")]


def test_assignments() -> None:
    (_, command), *_ = commands_of("x=1 y='a b'$z empty=")
    assert [a.name for a in command.assignments] == ["x", "y", "empty"]
    assert [expanded((a.value,), {"z": "!"})[0] for a in command.assignments] == ["1", "a b!", ""]
    assert words_of("'x'=1") == ["x=1"]


@pytest.mark.parametrize(
    "text",
    [
        "echo 'a",
        'echo "a',
        'echo "a $x',
        "echo a \\",
        "a &&",
        "a ||\n",
        "echo ${x",
        "echo ${x:-a b",
        "echo ${x:-'}",
    ],
)
def test_incomplete(text: str) -> None:
    with pytest.raises(Incomplete):
        parse(text)


@pytest.mark.parametrize(
    ("text", "column", "about"),
    [
        ("ps | cat", 3, "`|`"),
        ("; a", 0, "`;`"),
        ("a ; ; b", 4, "`;`"),
        ("a & & b", 4, "`&`"),
        ("a && ; b", 5, "`;`"),
        ("a &> f", 2, "`&>`"),
        ("a << END", 2, "`<<`"),
        ("a 2> f", 2, "`2>`"),
        ("a >", 2, "needs a file name"),
        ("> f", 0, "no command"),
        ("x=1 a", 4, "for one command alone"),
        ("echo $(date)", 5, "`$(`"),
        ("echo `date`", 5, "``"),
        ("echo ${x:=1}", 5, "variable's name"),
        ('echo "${x:-"1"}"', 11, '`"`'),
        ("echo ${x:-$(date)}", 10, "`$(`"),
        ("(a)", 0, "`(`"),
    ],
)
def test_wrong(text: str, column: int, about: str) -> None:
    with pytest.raises(ShellSyntaxError) as caught:
        parse(text)
    assert not isinstance(caught.value, Incomplete)
    assert caught.value.span.start == column
    assert about in caught.value.message


def test_the_caret_stands_under_the_place() -> None:
    with pytest.raises(ShellSyntaxError) as caught:
        parse("echo one\necho\ttwo | three\necho four")
    assert caught.value.line_number == 2
    assert caught.value.excerpt() == "echo two | three\n         ^"


def test_patterns_and_home(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("b.md", "a.md", "[x].txt"):
        (tmp_path / name).touch()
    (item,) = parse("cat *.md '*.md' *.none $v \"[x]\"* ~ ~/x '~' a~").items
    found = expanded(item.first.words, {"v": "*.md"}, patterns=True)
    home = "/home/someone"
    assert found == ["cat", "a.md", "b.md", "*.md", "*.none", "*.md", "[x].txt", home, home + "/x", "~", "a~"]


def test_comments_are_for_highlighters_only() -> None:
    assert [token.kind for token in scan("a # b")] == ["word", "comment"]
    assert [token.kind for token in tokenize("a # b")] == ["word"]
