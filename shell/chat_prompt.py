"""The line editor of a conversation. Imports prompt-toolkit.

Not here: what is done with a line (conversation, chat_commands).
"""

from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from shell.chat_commands import COMMANDS
from shell.completer import files
from shell.conversation import BYE, STOP
from shell.jobs import Job
from shell.repl import announce_ends, open_history
from shell.session import Shell


class ChatPrompt:
    """`you> `"""

    def __init__(self, shell: Shell, job: Job) -> None:
        self._shell = shell
        self._job = job
        self._session: PromptSession[str] = PromptSession(
            "you> ",
            history=open_history(shell, shell.chat_history),
            completer=ChatCompleter(),
            complete_while_typing=False,
            key_bindings=self._bindings(),
            prompt_continuation=lambda width, number, wrapped: " " * max(width - 2, 0) + "> ",
            enable_open_in_editor=True,
            tempfile_suffix=".txt",
        )

    def ask(self) -> str:
        """What was typed; "" when the chat has ended meanwhile. Raises KeyboardInterrupt at an empty line."""
        draft, self._job.draft = self._job.draft, ""
        try:
            return self._session.prompt(default=draft, pre_run=self._watch)
        except EOFError:
            return BYE
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                return ""  # it was for the line
            raise

    def _watch(self) -> None:
        get_app().create_background_task(announce_ends(self._shell, self._has_ended))

    def _has_ended(self) -> bool:
        return self._shell.system.process(self._job.pid).state == "ZOMBIE"

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()

        @bindings.add("escape", "enter")
        def newline(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-z")
        def stop(event: KeyPressEvent) -> None:
            if not self._shell.interactive:  # the shell behind us has the jobs
                event.app.suspend_to_background()
                return
            self._job.draft = event.current_buffer.text
            event.app.exit(result=STOP)

        return bindings


class ChatCompleter(Completer):
    """Completes `/` commands, and the file of `/save`."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/save "):
            begin = text.removeprefix("/save ").lstrip()
            for candidate in files(begin):
                yield Completion(candidate.text, start_position=-len(begin))
        elif text.startswith("/") and " " not in text:
            for name, command in COMMANDS.items():
                if name.startswith(text[1:]):
                    yield Completion(f"/{name}", start_position=-len(text), display_meta=command.summary)
