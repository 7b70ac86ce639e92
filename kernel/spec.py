"""What to run: a process's specification, checked, and read back from a file.

Plain data. Not here: what becomes of it (process), which model it names (the catalog).
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from kernel.device import Sampling
from kernel.errors import UsageError
from kernel.fairness import WEIGHTS

T = TypeVar("T")

DEFAULT_SAMPLING = Sampling()  # one for all who ask for no other


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run; all that is needed to run it again.

    `prompts` are answered each from a fresh context, `threads` of them at a time, and each of them
    `samples` times, with one seed after another; the output is in order. With `lines`, each reply is
    one line of output (line breaks inside it become spaces). With `raw`, the chat template is not applied.
    `system` is said before every prompt, in the model's own way.
    Program "chat": the prompts, and then what the user says, are turns of one conversation.
    """

    model: str
    prompts: tuple[str, ...]
    program: str = "generate"
    system: str = ""
    lines: bool = False
    raw: bool = False
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int = 0  # output tokens per prompt; 0 = until the window is full
    nice: int = 0
    command: str = ""
    group: str = ""  # the group whose weight it shares; "": its own, by nice
    context_tokens: int = 0  # asked of the model if this process makes it load; 0 = the driver's choice
    sink: str = ""  # where the shell sends the output; nothing to the kernel, comes back with `resume`
    threads: int = 1
    samples: int = 1
    cpus: float = 0.0  # processors that it needs from its admission to its end, in fractions
    gpus: float = 0.0
    mem_bytes: int = 0  # of RAM, beside the model's weights and KV
    wait: bool = True  # what does not fit now waits; False: it is refused

    @property
    def items(self) -> int:
        """Replies to give."""
        return len(self.prompts) * self.samples


def check_nice(nice: int) -> None:
    """Raises UsageError."""
    if not -20 <= nice < -20 + len(WEIGHTS):
        raise UsageError(f"nice value {nice} is out of range", "-20 (most) to 19 (least)")


def check_spec(spec: ProcessSpec) -> None:
    """Raises UsageError."""
    check_nice(spec.nice)
    if spec.program not in ("generate", "chat"):
        raise UsageError(f"no program {spec.program}")
    chat = spec.program == "chat"
    if not (spec.prompts or chat) or not all(prompt.strip() for prompt in spec.prompts):
        raise UsageError("the prompt is empty", "give words, -f FILE, or standard input")
    if chat and (spec.threads > 1 or spec.samples > 1 or spec.raw or spec.lines):
        raise UsageError("a chat has one thread, one reply to each turn, and the model's chat template")
    sampling = spec.sampling
    for name, value, least, most in (
        ("temperature", sampling.temperature, 0.0, 100.0),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("top_k", sampling.top_k, 0, 2**31 - 1),
        ("repeat_penalty", sampling.repeat_penalty, 0.01, 100.0),
        ("seed", sampling.seed, 0, 2**63 - 1),
        ("max_tokens", spec.max_tokens, 0, 2**31 - 1),
        ("ctx", spec.context_tokens, 0, 2**31 - 1),
        ("threads", spec.threads, 1, 256),
        ("samples", spec.samples, 1, 10_000),
        ("cpus", spec.cpus, 0.0, 1e6),
        ("gpus", spec.gpus, 0.0, 1e6),
        ("mem", spec.mem_bytes, 0, 2**63 - 1),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name} {value} is out of range", f"{least} to {most}")


def spec_from(values: dict[str, Any]) -> ProcessSpec:
    """A specification from what `asdict` made of one. Raises KeyError, TypeError (it may be anybody's)."""
    plain = dict(values)
    sampling = _typed(Sampling, plain.pop("sampling"))
    plain["prompts"] = tuple(plain["prompts"])
    if not all(type(prompt) is str for prompt in plain["prompts"]):
        raise TypeError("prompts")
    return _typed(ProcessSpec, plain | {"sampling": sampling})


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    """A flat dataclass from a mapping, each value of its default's type."""
    made = kind(**values)
    for name, default in ((f.name, f.default) for f in fields(kind)):  # type: ignore[arg-type]
        value = getattr(made, name)
        if isinstance(default, float) and type(value) is int:
            continue
        if isinstance(default, str | int | float) and type(value) is not type(default):
            raise TypeError(name)
    return made
