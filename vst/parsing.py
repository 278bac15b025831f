"""From functions to command lines: parameters as options, docstrings as help, YAML files, errors in one sentence."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vst.fit.processes import leave_group

Function = Callable[..., Any]


def command(function: Function, args: list[str] | None = None) -> None:
    """Run one function as a script of its own, its parameters as options (``train/stitch.py`` and its like)."""
    parser = _add(_parser(), function)
    with _quiet_when_unread():
        _call(function, parser.instantiate_classes(parser.parse_args(_words(args))).as_dict())


def parse(
    functions: Sequence[Function], args: list[str] | None = None, *, prog: str = "vst", description: str = ""
) -> Any:
    """Parse a command line with a subcommand for each function: ``subcommand`` and, under its name, the values.

    Args:
        functions: one a subcommand, named alike; a first parameter without a default that is named ``path`` can be
            given without its name.
        args: words; default: the process'.
        prog, description: for the help.
    """
    out = _parser(prog=prog, description=description.split("\n")[0].replace("`", ""))
    choices = out.add_subcommands(title="commands", metavar="COMMAND")
    for function in functions:
        choices.add_subcommand(function.__name__, _add(_parser(), function), help=_summary(function))
    return out.instantiate_classes(out.parse_args(_words(args)))


def run(functions: Sequence[Function], args: list[str] | None = None, **texts: str) -> None:
    """Parse as :func:`parse` does, and call the function that was named."""
    with _quiet_when_unread():
        values = parse(functions, args, **texts).as_dict()
        function = next(f for f in functions if f.__name__ == values["subcommand"])
        _call(function, values[function.__name__])


def _words(args: list[str] | None) -> list[str]:
    """The words with options' hyphens as underscores, so that both can be typed.

    What follows a dot may be a key of the user's own (``--protocol.models.clip-b SOURCE``) and stays as it is.
    """
    own = re.compile(r"--[\w-]+")
    words = sys.argv[1:] if args is None else args
    return [own.sub(lambda name: f"--{name[0][2:].replace('-', '_')}", word, 1) if own.match(word) else word
            for word in words]  # fmt: skip


def _parser(**options: Any) -> Any:
    try:
        from jsonargparse import ArgumentParser, set_parsing_settings
    except ImportError:
        sys.exit('The command line needs jsonargparse: pip install "vfm-stitch-tree[fit]".')
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(formatter_class=_Help, allow_abbrev=False, **options)


def _call(function: Function, values: dict[str, Any]) -> None:
    """Call; errors that users can mend end the process with one sentence (VST_DEBUG=1 shows where they came from)."""
    try:
        function(**_without_config(values))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("VST_DEBUG") or (isinstance(error, BrokenPipeError) and _unread()):
            raise
        sys.exit(f"{type(error).__name__}: {error}")
    leave_group()


@contextmanager
def _quiet_when_unread() -> Iterator[None]:
    """Where who reads the output leaves early (``| head``), end without a word, as a program does on SIGPIPE."""
    try:
        try:
            yield
        finally:
            for stream in _outputs():
                stream.flush()
    except BrokenPipeError:
        gone = _unread()
        if not gone:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still held back, which is written at the exit
        for stream in gone:
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _outputs() -> list[Any]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None and not stream.closed]


def _unread() -> list[Any]:
    """Those of stdout and stderr whose reader is gone; a pipe that broke elsewhere, as a worker's, is none of these."""
    gone = []
    for stream in _outputs() if hasattr(select, "poll") else ():
        try:
            number = stream.fileno()
        except OSError:  # not a file of the system, as in tests
            continue
        look = select.poll()
        look.register(number, 0)
        if any(event & select.POLLERR for _, event in look.poll(0)):
            gone.append(stream)
    return gone


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of examples, and show defaults."""


def _add(parser: Any, function: Function) -> Any:
    """Options for a function's parameters; switches can stand alone, or be followed by true or false."""
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ActionYesNo

    doc = (function.__doc__ or "").partition("Args:")[0]
    parser.description = "\n".join(line.removeprefix("    ") for line in doc.splitlines()).strip()
    parser.add_argument("--config", action="config", help="YAML file with any of these options; options given win")
    given = inspect.signature(function).parameters
    switches = {name: p.default for name, p in given.items() if isinstance(p.default, bool)}
    first = next(iter(given.values()), None)
    positional = first is not None and first.name == "path" and first.default is inspect.Parameter.empty
    parser.add_function_arguments(function, as_group=False, as_positional=positional, skip=set(switches))
    told = {p.arg_name: p.description for p in parse_docstring(function.__doc__ or "").params}
    for name, default in switches.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=default, help=told.get(name))
    return parser


def _summary(function: Function) -> str:
    return (function.__doc__ or "").split("\n")[0]


def _without_config(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_config(v) if isinstance(v, dict) else v for k, v in values.items() if k != "config"}
