"""Python packages as wheels: by their names through pip, for this Python or another machine's, or as files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from vst.bundle.contents import Contents, member


def add_wheels(
    into: Contents,
    wanted: Sequence[str],
    folder: Path,
    *,
    python: str | None = None,
    platforms: Sequence[str] = (),
    dependencies: bool = True,
    dry: bool = False,
) -> None:
    """Add wheels.

    Args:
        into: what they are added to.
        wanted: requirements as pip takes them, wheel files, and folders of wheel files.
        folder: an empty one that wheels are downloaded to.
        python: version of the Python that they are for, such as 3.12; default: this one.
        platforms: tags of the platforms that they may be for; default: this one.
        dependencies: download what the requirements require, too.
        dry: tell what would be taken, and fetch nothing.

    Raises:
        ValueError: a version of Python that is none, or a file that is no wheel.
        RuntimeError: pip is missing or fails.
    """
    if python is not None and not re.fullmatch(r"\d+(\.\d+){0,2}", python):
        raise ValueError(f"wheels_python is {python!r}; expected a version such as 3.12.")
    files, names = [], []
    for word in wanted:
        path = Path(word).expanduser()
        if path.is_dir():
            if not (inside := sorted(path.glob("*.whl"))):
                raise ValueError(
                    f"{path} holds no wheels; expected a folder of .whl files, or give the requirement's name."
                )
            files += inside
        elif word.endswith(".whl"):
            files.append(path)
        else:
            names.append(word)
    for file in files:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file} is no wheel, or there is no such file; expected one that pip or a build wrote.")
    if names and dry:
        more = " with what they require" if dependencies else ""
        into.rows.append((", ".join(names), f"wheels by pip{more}", None, "wheels"))
    elif names:
        files += _download(names, folder, python, platforms, dependencies)
    held = {m.path for m in into.members}
    for file in files:
        if (place := f"wheels/{file.name}") not in held:
            into.members.append(member(place, file))
            into.rows.append((file.name, "wheel", file.stat().st_size, "wheels"))
            held.add(place)


def _download(
    names: Sequence[str], folder: Path, python: str | None, platforms: Sequence[str], dependencies: bool
) -> list[Path]:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"This Python has no pip, expected for fetching {', '.join(names)}: run {sys.executable} -m ensurepip, or "
            "give wheel files."
        )
    command = [sys.executable, "-m", "pip", "download", "--only-binary", ":all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += ["--python-version", python] if python else []
    for platform in platforms:
        command += ["--platform", platform]
    command += [] if dependencies else ["--no-deps"]
    done = subprocess.run([*command, "--", *names], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")] or said[-1:]
        raise RuntimeError(
            f"pip could not download {', '.join(names)} (status {done.returncode}): "
            f"{' '.join(errors)[-500:].rstrip('.')}; check names, versions and the network, or give wheel files."
        )
    return sorted(folder.glob("*.whl"))
