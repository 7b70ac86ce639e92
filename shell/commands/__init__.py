"""The built-in commands, a file per subject."""

from shell.commands import builtins, jobs, models, process, resume, run, system
from shell.registry import Registry


def builtin_registry() -> Registry:
    """A registry with every built-in command; plugins are added to it."""
    registry = Registry()
    for module in (process, run, resume, jobs, models, system, builtins):
        for spec in module.SPECS:
            registry.add(spec)
    return registry
