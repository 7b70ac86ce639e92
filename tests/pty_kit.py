"""A program of ours on a terminal of its own."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pexpect


def started(
    words: list[str], environment: Mapping[str, str], columns: int, timeout_s: int
) -> "pexpect.spawn[str]":
    """Python with these words."""
    child = pexpect.spawn(
        sys.executable,
        words,
        env=environment,
        dimensions=(24, columns),
        encoding="utf-8",
        timeout=timeout_s,
    )
    child.delaybeforesend = None
    return child


@contextmanager
def on_terminal(
    words: list[str], environment: Mapping[str, str], columns: int, timeout_s: int
) -> Iterator["pexpect.spawn[str]"]:
    """The same; it is gone at the end, whatever it does."""
    child = started(words, environment, columns, timeout_s)
    try:
        yield child
    finally:
        child.close(force=True)
