"""Where LLMOS keeps its files.

`LLMOS_HOME` moves everything into one folder; without it each kind of file goes where the platform wants it
(on Linux: ~/.config/llmos, ~/.local/share/llmos, ~/.local/state/llmos). Nothing here makes a folder but
`writable`, and nothing raises for a home that is read-only or missing: what cannot be kept is not kept.

Owner: boot makes one `Paths`. Not here: what is in the files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders of one user. With LLMOS_HOME all of them are the same folder."""

    config: Path
    data: Path
    state: Path

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def plugins(self) -> Path:
        """Python files that add commands."""
        return self.config / "plugins"

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def checkpoints(self) -> Path:
        return self.data / "checkpoints"

    @property
    def history_file(self) -> Path:
        """Lines typed at the prompt."""
        return self.state / "history"

    @property
    def chat_history_file(self) -> Path:
        """What was said to models at the prompt."""
        return self.state / "chat_history"


def find_paths(environ: Mapping[str, str] = os.environ) -> Paths:
    """The paths of the user who runs this."""
    if chosen := environ.get("LLMOS_HOME"):
        home = expand(chosen)
        return Paths(home, home, home)
    import platformdirs  # deferred: not needed with LLMOS_HOME

    folders = platformdirs.PlatformDirs("llmos", appauthor=False)
    return Paths(folders.user_config_path, folders.user_data_path, folders.user_state_path)


def expand(text: str, folder: Path | None = None) -> Path:
    """An absolute path; a relative one counts from `folder`, or else from the current folder."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # "~" of a user who has no home
        path = Path(text)
    if path.is_absolute():
        return path  # also where the current folder is gone
    return (folder or Path.cwd()) / path


def writable(folder: Path) -> Path | None:
    """The folder, made if need be (mode 0700) and open for writing; None if that cannot be had.

    The caller goes on without it and says so once.
    """
    if not folder.is_absolute():  # no home at all: never make a folder named "~"
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
