"""`chat`: a conversation with a model, as a job.

Not here: the conversation on a terminal (conversation), its line editor (chat_prompt).
"""

import argparse
from contextlib import suppress
from dataclasses import replace

from kernel.errors import NotPermitted, UsageError
from shell.commands.run import content_of, reply_arguments, say_waiting, spec_of
from shell.jobs import can_talk, start
from shell.registry import Arguments, CommandSpec
from shell.session import Shell


def _arguments(parser: Arguments) -> None:
    parser.add("model", metavar="MODEL", completes=("model",))
    parser.add("words", nargs="*", default=[], metavar="WORDS")
    reply_arguments(parser)


def _chat(shell: Shell, args: argparse.Namespace) -> int:
    content = content_of(shell, None, has_words=False)
    turns = turns_of(" ".join(args.words)) + turns_of(content or "")
    stays = content is None and can_talk(shell) and (shell.interactive or not shell.frame.background)
    if not turns and not stays:
        hint = f"`chat {args.model} < FILE`: each line that is not empty is a turn"
        raise UsageError("chat: nothing to say, and no terminal to say it at", hint)
    pid = shell.system.spawn(replace(spec_of(shell, args, turns), program="chat"))
    if not stays or shell.frame.background:  # a conversation says itself what it waits for
        say_waiting(shell, pid)
    if not stays:
        with suppress(NotPermitted):  # it has failed already
            shell.system.hang_up(pid)
    return start(shell, pid, asked=bool(turns))


def turns_of(text: str) -> tuple[str, ...]:
    """Each line that is not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


SPECS = (
    CommandSpec(
        "chat",
        "have a conversation with a model",
        _chat,
        _arguments,
        (
            "chat nano",
            'chat nano --system "Answer in one line." which jobs run',
            "chat nano < turns.txt > replies.txt &",
        ),
        notes="^C ends a reply and keeps what there is of it, ^D leaves, ^Z stops the job (`fg` goes back);\n"
        "/help lists what else there is. Words are the first turn. With `< FILE`, or in a pipe, each\n"
        "non-empty line is a turn; all are read before the first reply, and after the last it ends.",
        group="processes",
        background=True,
        patterns=False,
    ),
)
