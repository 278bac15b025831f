"""Result folders: the resolved config, the environment, results row by row, and how a stopped run goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path, PurePath
from typing import Any
from weakref import finalize

import numpy as np
import torch

from vst.results.later import later_defaults
from vst.results.locks import LOCK, hold, let_go
from vst.results.room import room_for

# fmt: off
PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "huggingface_hub", "numpy", "pillow", "transformers", "tokenizers",
    "accelerate", "peft", "deepspeed", "datasets", "open_clip_torch", "scikit-learn", "torchmetrics", "onnx",
    "jsonargparse", "lmms_eval", "llava",
)
# fmt: on
_OVERWRITE = "restore it, start the run again (overwrite), or give another folder"
_KEY = re.compile(r"[\w=+,@-][\w.=+,@-]{0,199}", re.ASCII)


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """Tell on what a result was computed, without any name of a user or host and without any path.

    Args:
        device: the device computed on; None stands for the first CUDA device, or the CPU where there is none.

    Returns:
        ``time`` (UTC, ISO 8601), ``python``, ``platform``, ``cpu``, ``cpu_count`` (those this process may use),
        ``torch_threads``, ``device``, ``device_name``, ``cuda`` (version torch was built for, or None) and
        ``versions`` of the installed packages among ``PACKAGES`` and of ``vst``.

    Raises:
        ValueError: the device is a CUDA device and there is none.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cpu = _cpu_name()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"The device is {device}, but torch finds no CUDA device; give 'cpu'.")
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = cpu if device.type == "cpu" else device.type
    versions = {"vst": getattr(sys.modules["vst"], "__version__", None)}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": device_name,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and move it there only if nothing was raised.

    Readers see the old file or the new one, never half of one. The folder is made where it is missing; the temporary
    name keeps the suffix, for writers that go by it.

    Raises:
        NoRoom: the disk is full; what was there before is kept.
        RuntimeError: nothing was written to the temporary path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    with room_for(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if not temporary.exists():
                raise RuntimeError(f"Nothing was written for {path}; write to the path that atomic_path yields.")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write JSON atomically (UTF-8, two spaces of indent, keys in the order given).

    NaN and infinities become null; paths, dtypes and devices strings; dataclasses objects; numpy and torch scalars
    numbers, their arrays lists, and enums their values.

    Raises:
        ValueError: something in ``obj`` has no form in JSON; the message says where.
    """
    text = json.dumps(_plain(obj, "the top"), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        # A file name that is no UTF-8 holds lone surrogates; their backslash form is JSON's own.
        temporary.write_bytes((text + "\n").encode("utf-8", errors="backslashreplace"))


def read_json(path: str | os.PathLike, advice: str = "restore it, or move it away") -> Any:
    """Read JSON.

    Args:
        path: of the file.
        advice: what to do where it is damaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {advice}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); {advice}.") from error


def begun_with(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The config that a run in a folder was begun with; None where there is none.

    Raises:
        ValueError: its file is damaged.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        return None
    stored = read_json(path, _OVERWRITE)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no run's config (a JSON object); {_OVERWRITE}.")
    return stored


class Run:
    """A folder of results: run.json (the config), environment.json, rows/KEY.json and, once finished, results.json.

    A folder that does not exist or is empty becomes a new run, whatever the flags. The folder is this process' alone
    (:mod:`vst.results.locks`) until ``close`` is called or the object is gone.

    Args:
        folder: the run's folder.
        config: the resolved config: a mapping or dataclass of what ``write_json`` takes.
        resume: go on with the run in the folder; its config must be the same.
        overwrite: delete config, environment, rows and results of the run in the folder first. Other files stay.
        device: as for ``environment``.
        lock: False in the other processes of a job whose first process holds the folder.
        later: what fields that an earlier version did not have stood for, by dotted key; default: as ``config`` says
            (:mod:`vst.results.later`).

    Raises:
        FileExistsError: the folder is not empty and neither flag is given.
        FolderInUse: another process writes to the folder.
        ValueError: both flags are given, the folder holds something else than a run, or the config differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: Any,
        *,
        resume: bool = False,
        overwrite: bool = False,
        device: str | torch.device | None = None,
        lock: bool = True,
        later: Mapping[str, Any] | None = None,
    ):
        if not isinstance(folder, (str, os.PathLike)) or not str(folder):
            raise ValueError(f"folder is {folder!r}; expected the path of a run folder.")
        for name, flag in (("resume", resume), ("overwrite", overwrite)):
            if not isinstance(flag, bool):  # "no" would be true
                raise ValueError(f"{name} is {flag!r}; expected true or false.")
        self.folder = Path(folder)
        self.config: dict[str, Any] = _plain(config, "the config")
        self._later = later_defaults(config) if later is None else later
        self._next: int | None = None
        if resume and overwrite:
            raise ValueError("Both resume and overwrite are given, but a run either goes on or starts again; give one.")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, but a run needs a folder; give another name.")
        now = environment(device)
        if lock:
            hold(self.folder)
        self._held = finalize(self, let_go, self.folder.resolve()) if lock else None
        try:
            self._open(now, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, now: dict[str, Any], resume: bool, overwrite: bool) -> None:
        # The environment is written first and the config last, so a folder with a config is a whole run.
        if self.folder.exists() and {entry.name for entry in self.folder.iterdir()} - {"environment.json", LOCK}:
            if not resume and not overwrite:
                raise FileExistsError(
                    f"{self.folder} is not empty; give resume to go on with the run in it, overwrite to start it "
                    "again, or another folder."
                )
            if not (self.path("run.json").is_file() and self.path("environment.json").is_file()):
                raise ValueError(
                    f"{self.folder} holds no run (run.json and environment.json), so it is left as it is; give "
                    "another folder."
                )
            if resume:
                self._check_same_config()
                self._check_environment(now)
                return
            for path in [*self.folder.glob("rows/*.json"), *self.folder.glob("results.json")]:
                path.unlink()
        write_json(self.path("environment.json"), now)
        write_json(self.path("run.json"), self.config)

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._held is not None:
            self._held()

    def path(self, name: str) -> Path:
        """Path of a file in the run's folder."""
        return self.folder / name

    def add(self, row: Mapping[str, Any], key: str) -> None:
        """Store one row of results; a row of the same key is replaced and keeps its place.

        Raises:
            ValueError: the key is not made of letters, digits and ``._-=+,@``, or starts with a point.
        """
        path = self._row_path(key)
        if path.exists():
            ordinal = _stored_row(path)["ordinal"]
        else:
            if self._next is None:
                self._next = 1 + max((stored["ordinal"] for stored in self._stored()), default=-1)
            ordinal = self._next
            self._next += 1
        write_json(path, {"ordinal": ordinal, "key": key, "row": row})

    def has(self, key: str) -> bool:
        """Whether a row of this key is stored."""
        return self._row_path(key).exists()

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were added, those from before a resume first."""
        return [stored["row"] for stored in self._stored()]

    def finish(self, results: Any) -> Path:
        """Write results.json with ``config``, ``environment`` (of the run's start) and ``results``; return its path."""
        path = self.path("results.json")
        environment = read_json(self.path("environment.json"))
        write_json(path, {"config": self.config, "environment": environment, "results": results})
        return path

    def _row_path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"The row's key is {key!r}, but names a file: use at most 200 letters, digits and ._-=+,@ and do not "
                "start with a point."
            )
        return self.folder / "rows" / f"{key}.json"

    def _stored(self) -> list[dict[str, Any]]:
        stored = [_stored_row(path) for path in self.folder.glob("rows/*.json") if not path.name.startswith(".")]
        return sorted(stored, key=lambda entry: (entry["ordinal"], entry["key"]))

    def _check_same_config(self) -> None:
        before, now = {**self._later, **_flat(begun_with(self.folder))}, {**self._later, **_flat(self.config)}
        differences = [
            f"{key} ({_shown(before, key)} in the run, {_shown(now, key)} now)"
            for key in {**before, **now}
            if key not in before or key not in now or before[key] != now[key]
        ]
        if differences:
            raise ValueError(
                f"{self.folder} cannot be resumed because its config differs in {', '.join(differences)}; give the "
                "config it was started with, or another folder."
            )

    def _check_environment(self, now: dict[str, Any]) -> None:
        """See at once that the environment can be told at the end; a run that is sound otherwise goes on."""
        path = self.path("environment.json")
        try:
            fault = None if isinstance(read_json(path), dict) else "it holds no JSON object"
        except ValueError as error:
            fault = str(error.__cause__)
        if fault is not None:
            warnings.warn(
                f"{path} is damaged ({fault}): on what the run began is not known any more, and what it goes on on is "
                "written in its place.",
                stacklevel=5,
            )
            write_json(path, now)


def _stored_row(path: Path) -> dict[str, Any]:
    try:
        stored = read_json(path)
    except ValueError as error:
        fault = str(error.__cause__)
    else:
        keys = set(stored) if isinstance(stored, dict) else set()
        whole = keys >= {"ordinal", "key", "row"} and isinstance(stored["row"], dict)
        if whole and type(stored["ordinal"]) is int and stored["key"] == path.stem:
            return stored
        fault = "it holds something else than what was written"
    raise ValueError(f"The row {path} is damaged ({fault}): restore it, or delete it to have it made again.")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match[1].strip()
    elif platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if name:
            return name
    return platform.processor() or platform.machine()


def _plain(obj: Any, where: str) -> Any:
    """Reduce to what JSON has; ``where`` names the place for the error."""
    if isinstance(obj, Enum):
        obj = obj.value
    if isinstance(obj, (np.ndarray, np.generic, torch.Tensor)):
        obj = obj.tolist()
    if obj is None or isinstance(obj, (bool, int)):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, (str, PurePath, torch.dtype, torch.device)):
        return str(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        plain = {str(key): _plain(value, f"{where}, {key}") for key, value in obj.items()}
        if len(plain) < len(obj):
            raise ValueError(f"At {where}, two keys are the same once written as text; rename one.")
        return plain
    if isinstance(obj, (list, tuple)):
        return [_plain(value, f"{where}, {place}") for place, value in enumerate(obj)]
    raise ValueError(
        f"At {where} is a {type(obj).__name__}, which JSON cannot hold; turn it into numbers, text or lists."
    )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; an empty object is a value."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    return {key: value for name, part in config.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
