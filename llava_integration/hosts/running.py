"""Programs of other packages, run in this process, where hosts are hooked and transformers knows trees."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

from llava_integration.hosts import hooks
from llava_integration.hosts.builders import LOG
from llava_integration.hosts.versions import auto_classes_served


def hook_for(module: str) -> None:
    """Hook the hosts for a module that is about to run.

    A module of no host may need the Auto classes alone, which know trees since this package was imported: no host has
    to be there for it, and one that cannot be hooked is told of in the log.

    Raises:
        ImportError: it is a host's, or nothing else would serve it, and no host can be hooked.
    """
    try:
        hooks.install()
    except ImportError as error:
        if module.partition(".")[0] in hooks.known_hosts() or not auto_classes_served():
            raise
        if hooks.find_hosts():
            LOG.warning("%s", error)


def find_script(name: str) -> EntryPoint | None:
    """The command of an installed package, such as ``transformers`` or ``trl``, or None."""
    return next(iter(entry_points(group="console_scripts", name=name)), None)


def run_script(script: EntryPoint, args: list[str]) -> None:
    """Run an installed package's command as the shell would, in this process.

    Args:
        script: of :func:`find_script`.
        args: its command line.

    Raises:
        SystemExit: as the command ends, or with a sentence where it or a host cannot be imported.
    """
    from vst.fit.processes import leave_group

    try:
        hook_for(script.module)
        command = script.load()
    except ImportError as error:
        sys.exit(f"ImportError: {error}")
    sys.argv = [script.name, *args]
    try:
        code = command()
    except SystemExit as end:
        code = end.code
    if code not in (None, 0):
        sys.exit(code)
    leave_group()
