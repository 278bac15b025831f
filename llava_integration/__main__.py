"""``python -m llava_integration COMMAND ...``, or what another package runs, with trees known to it.

That is a host's module (llava.train.train), any other (trl.scripts.sft), or an installed command (transformers serve).
"""

from __future__ import annotations

import signal
import sys


def main(words: list[str]) -> None:
    """Run a command of ours, a module where the first word has a dot, or an installed command of that name."""
    if len(words) > 1 and words[0].startswith("--local_rank"):  # DeepSpeed's launcher puts it before everything
        words = [words[1], words[0], *words[2:]]
    first = words[0] if words else ""
    if "." in first and not first.startswith("-"):
        from llava_integration.hosts import run_module

        return run_module(first, words[1:])
    if first == "doctor":  # has to work where the other commands cannot be imported
        from llava_integration.hosts.doctor import main as doctor

        return doctor(words[1:])
    from llava_integration.hosts.versions import check_auto_classes

    try:
        check_auto_classes()
    except ImportError as error:
        sys.exit(f"ImportError: {error}")
    from llava_integration.commands import COMMANDS
    from llava_integration.hosts.running import find_script, run_script
    from vst.parsing import run

    if first not in {command.__name__ for command in COMMANDS} and (script := find_script(first)) is not None:
        return run_script(script, words[1:])

    return run(COMMANDS, words, prog="python -m llava_integration", description=str(__doc__))


if __name__ == "__main__":
    if sys.argv[1:2] == ["doctor"] and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # it does nothing but print: ``| head`` may end it
    main(sys.argv[1:])
