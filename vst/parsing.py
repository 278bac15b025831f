"""From functions to command lines: parameters as options, docstrings as help, YAML files, errors in one sentence."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

from vst.fit.processes import leave_group
from vst.models.fields import shown
from vst.option_files import check_option_files
from vst.results.stopping import GOING_ON, ending

_IMPORT = "import"

Function = Callable[..., Any]
Words = Annotated[list[str], "words"]
"""Type of an option that is followed by one word or several, as in ``--for demo runs/demo/tree``.

A parameter of this type that is named for a word of Python's own, with an underscore (``for_``), is an option without
it.
"""


def command(function: Function, args: list[str] | None = None) -> None:
    """Run one function as a script of its own, its parameters as options (``train/stitch.py`` and its like)."""
    parser = _add(_parser(), function)
    with _quiet_when_unread():
        with ending() as advise, _one_sentence():
            values = _own(_read(parser, args).as_dict(), function)
            advise(_how_to_go_on(function, values))
            function(**values)
        leave_group()


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
    _add_import(out)
    choices = out.add_subcommands(title="commands", metavar="COMMAND")
    for function in functions:
        choices.add_subcommand(function.__name__, _add(_parser(), function), help=_summary(function))
    return _read(out, args)


def run(functions: Sequence[Function], args: list[str] | None = None, **texts: str) -> None:
    """Parse as :func:`parse` does, and call the function that was named."""
    with _quiet_when_unread(), _plain_warnings():
        with ending() as advise, _one_sentence():
            parsed = parse(functions, args, **texts).as_dict()
            function = next(f for f in functions if f.__name__ == parsed["subcommand"])
            values = _own(parsed[function.__name__], function)
            advise(_how_to_go_on(function, values))
            function(**values)
        leave_group()


def _how_to_go_on(function: Function, values: dict[str, Any]) -> str:
    """What is said when a command is stopped; nothing of one that keeps nothing."""
    if function in GOING_ON:
        return "The same call goes on from what was saved."
    if "resume" in values and values.get("out") is not None:
        return "The same call with --resume goes on from the last state that was saved, or begins again where none was."
    return ""


def _read(parser: Any, args: list[str] | None) -> Any:
    """Options as objects; what they import is imported before the objects are made."""
    words = _words(args)
    check_option_files(words)
    values = parser.parse_args(words)
    inner = values.get(values.get("subcommand") or "") or {}
    for names in (values.get(_IMPORT), inner.get(_IMPORT)):
        for name in (names or "").split(","):
            if name.strip():
                _import(name.strip())
    try:
        return parser.instantiate_classes(values)
    except TypeError as error:  # a class of one's own that takes other options than were given
        raise ValueError(f"The options cannot be read ({error}): correct them.") from error


def _import(name: str) -> None:
    """Import a module by its name, also from the working folder, or a file by its path."""
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ImportError(f"--import names {name}, and there is no such file.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise ImportError(
            f"--import names {name}, and there is no such module here; give its name or FILE.py."
        ) from None


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

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            super().error(_sentence(message), ex)

    return Parser(formatter_class=_Help, allow_abbrev=False, **options)


def _sentence(message: str) -> str:
    """What the parser says about a value of another type, which takes many lines, in one."""
    found = re.match(r'(?:Parser key|Argument) "(.+?)":\s*(.*)', message, re.DOTALL)
    if found is None:
        return message
    key, text = found[1], found[2]
    union = re.search(r"Subtypes: \[(.*?)\]\n.*Given value: (.*)", text, re.DOTALL)
    single = re.match(r"Expected an? (.*?)\. Got value: (.*)", text, re.DOTALL)
    if (told := union or single) is None:
        return f"{key}: {' '.join(text.split())}"
    kinds = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>|(?:\w+\.)+(?=[A-Z])", lambda m: m[1] or "", told[1])
    return f"{key} is {shown(told[2].strip())}; expected {kinds.replace('NoneType', 'null')}."


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Errors that users can mend end the process with one sentence (VST_DEBUG=1 shows where they came from)."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if os.environ.get("VST_DEBUG") or (isinstance(error, BrokenPipeError) and _unread()):
            raise
        sys.exit(f"{type(error).__name__}: {error}")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings to users without the line of code that they came from (with VST_DEBUG=1 as Python shows them)."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        return f"Warning: {message}\n" if category is UserWarning else usual(message, category, *place, **line)

    warnings.formatwarning = usual if os.environ.get("VST_DEBUG") else plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


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
    _add_import(parser)
    given = inspect.signature(function).parameters
    switches = {name: p.default for name, p in given.items() if isinstance(p.default, bool)}
    first = next(iter(given.values()), None)
    positional = first is not None and first.name == "path" and first.default is inspect.Parameter.empty
    hints = get_type_hints(function, include_extras=True)
    words = [name for name in given if hints.get(name) in (Words, Words | None)]
    parser.add_function_arguments(function, as_group=False, as_positional=positional, skip={*switches, *words})
    told = {p.arg_name: p.description for p in parse_docstring(function.__doc__ or "").params}
    for name in words:
        needed = given[name].default is inspect.Parameter.empty
        options = {"required": True} if needed else {"default": given[name].default}
        parser.add_argument(
            f"--{name.rstrip('_')}", type=str, nargs="+", action="extend", help=told.get(name), **options
        )
    for name, default in switches.items():
        parser.add_argument(
            f"--{name.rstrip('_')}", action=ActionYesNo, nargs="?", default=default, help=told.get(name)
        )
    return parser


def _summary(function: Function) -> str:
    return (function.__doc__ or "").split("\n")[0]


def _add_import(parser: Any) -> None:
    told = "modules (or FILE.py), comma-separated, that register stitch families, objectives or tasks of your own"
    parser.add_argument(f"--{_IMPORT}", type=str, default=None, metavar="MODULE", help=told)


def _own(values: dict[str, Any], function: Function) -> dict[str, Any]:
    """The function's own options, by the names of its parameters."""
    names = {name.rstrip("_"): name for name in inspect.signature(function).parameters}
    return _without_config({names.get(k, k): v for k, v in values.items() if k != _IMPORT})


def _without_config(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_config(v) if isinstance(v, dict) else v for k, v in values.items() if k != "config"}
