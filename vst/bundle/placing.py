"""Put a bundle in place: into folders beside the targets first, and from there, whole and checked, by renaming."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from vst.bundle.manifest import Asset, Entry, Manifest, read_manifest
from vst.bundle.parts import Megabytes, PartsReader, check_parts, digest_of, find_parts, told
from vst.demo.unchanged import contents, object_in, remember, unchanged
from vst.results.folders import write_json
from vst.results.locks import LOCK, held
from vst.results.progress import progress
from vst.results.room import NoRoom, room_for

_BLOCK = 1 << 20


@dataclass
class Unit:
    """What is put in place by one rename: a folder, or a file.

    Attributes:
        path: in the bundle. target: where it goes. members: its files, by their path below ``target`` (``""`` of a
            file).
    """

    path: str
    target: Path
    members: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """What came of it: the bundle's manifest, what was put in place, and what was there already."""

    manifest: Manifest
    new: list[Unit]
    there: list[Unit]


def put_in_place(folder: Path, roots: Mapping[str, Path], *, overwrite: bool = False, show: bool = True) -> Placed:
    """Check a bundle and put all of it in place; what a stopped call did is not done again.

    Args:
        folder: the bundle's.
        roots: the folder of each place.
        overwrite: put it in the place of what differs from it.
        show: show progress.

    Raises:
        FileNotFoundError: the manifest or a part is missing.
        ValueError: anything in the folder is not what was written.
        FileExistsError: something else is there and ``overwrite`` is False.
        NoRoom: a disk is too small.
    """
    manifest = read_manifest(folder)
    paths = find_parts(folder, manifest)
    with progress("check parts", Megabytes.total(sum(part.size for part in manifest.parts)), show) as bar:
        counted = Megabytes(bar)
        check_parts(paths, manifest, counted.add)
        counted.end()
    new: list[Unit] = []
    there: list[Unit] = []
    for unit in units_of(manifest, roots):
        (there if _is_there(unit, manifest, roots["home"]) else new).append(unit)
    if not overwrite and (other := [str(unit.target) for unit in new if os.path.lexists(unit.target)]):
        raise FileExistsError(
            f"{', '.join(other[:3])}{' and others' if len(other) > 3 else ''} differ from what the bundle holds, and "
            "nothing was put in place: give --overwrite to replace them, or move them away."
        )
    stages = {place: root / f".unbundle-{manifest.id[:12]}" for place, root in roots.items()}
    used = {unit.path.partition("/")[0] for unit in new}
    with _staged({place: stage for place, stage in stages.items() if place in used or stage.exists()}) as stages:
        _unpack(manifest, paths, new, stages, roots, show)
        for unit in new:
            with room_for(str(unit.target)):
                _move(unit, stages)
    _note_made(manifest, roots["home"])
    return Placed(manifest, new, there)


def units_of(manifest: Manifest, roots: Mapping[str, Path]) -> list[Unit]:
    """What is renamed as one, in the order of the stream."""
    found: dict[str, Unit] = {}
    for member in manifest.members:
        top = next((whole for whole in manifest.whole if member.path.startswith(f"{whole}/")), member.path)
        place, _, rest = top.partition("/")
        unit = found.setdefault(top, Unit(top, roots[place] / rest))
        unit.members[member.path[len(top) + 1 :]] = member
    return list(found.values())


def is_made(asset: Asset, home: Path) -> bool:
    """Whether an asset's folder is there and is what was made from the same archives by the same recipe."""
    folder = home / asset.folder
    stored = object_in(home / "ready.json").get(asset.folder)
    return stored == asset.made_from | contents(folder) and unchanged(folder)


def _is_there(unit: Unit, manifest: Manifest, home: Path) -> bool:
    """Whether a target holds what it should; of an asset also the folder that its archives would be made into."""
    for asset in manifest.assets:
        own = [f"home/{asset.folder}", *(f"home/archives/{name}" for name in asset.archives)]
        if unit.path in own and is_made(asset, home):
            return True
    if "" in unit.members:
        return unit.target.is_file() and _holds(unit.target, unit.members[""])
    if not unit.target.is_dir():
        return False
    there = {p.relative_to(unit.target).as_posix() for p in unit.target.rglob("*") if not p.is_dir() and p.name != LOCK}
    return there == set(unit.members) and all(_holds(unit.target / name, m) for name, m in unit.members.items())


def _holds(path: Path, member: Entry) -> bool:
    return path.stat().st_size == member.size and digest_of(path) == member.sha256


@contextmanager
def _staged(stages: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Hold the folders that are unpacked to; they are taken away where all went well, and gone on with else."""
    try:
        with ExitStack() as stack:
            for stage in stages.values():
                stack.enter_context(held(stage))
            yield stages
            for path in (path for stage in stages.values() for path in stage.iterdir() if path.name != LOCK):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    finally:
        for stage in stages.values():
            with suppress(OSError):  # it holds what the next call goes on with
                stage.rmdir()


def _unpack(
    manifest: Manifest,
    paths: list[Path],
    new: list[Unit],
    stages: Mapping[str, Path],
    roots: Mapping[str, Path],
    show: bool,
) -> None:
    """Write the files of units to their stages, each under its name only once its digest is right."""
    wanted = {member.path: _stage(member.path, stages) for unit in new for member in unit.members.values()}
    wanted = {
        member.path: wanted[member.path]
        for member in manifest.members
        if member.path in wanted and not (wanted[member.path].is_file() and _holds(wanted[member.path], member))
    }
    _check_room(manifest, wanted, roots)
    if not wanted:
        return
    with (
        progress("unpack", Megabytes.total(sum(member.size for member in manifest.members)), show) as bar,
        PartsReader(paths) as reader,
    ):
        counted = Megabytes(bar)
        try:
            tar = tarfile.open(fileobj=reader, mode="r|", bufsize=tarfile.RECORDSIZE)  # noqa: SIM115 (closed with its file)
            for member in manifest.members:
                header = tar.next()
                if header is None or not header.isreg() or (header.name, header.size) != (member.path, member.size):
                    what = "nothing more" if header is None else _shown(header)
                    raise ValueError(
                        f"{reader.at} holds {what} where the manifest names the file {member.path!r} of {member.size} "
                        "bytes: nothing is put in place; get the bundle from whom you trust."
                    )
                if (target := wanted.get(member.path)) is not None:
                    file = tar.extractfile(header)
                    assert file is not None
                    _write(file.read, member, target, reader.at)
                counted.add(member.size)
            if tar.next() is not None:
                raise ValueError(f"{reader.at} holds more than the manifest names: get the bundle from whom you trust.")
        except tarfile.TarError as error:
            raise ValueError(
                f"{reader.at} cannot be read ({error}), though it is what was written: write the bundle anew."
            ) from error
        counted.end()


def _shown(header: tarfile.TarInfo) -> str:
    kind = "file" if header.isreg() else "link" if header.issym() or header.islnk() else "folder or device"
    return f"the {kind} {header.name!r} of {header.size} bytes"


def _write(read: Callable[[int], bytes], member: Entry, target: Path, part: str) -> None:
    digest, left = hashlib.sha256(), member.size
    temporary = target.with_name(f".{target.name[:200]}.tmp")
    with room_for(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                while left and (block := read(min(left, _BLOCK))):
                    digest.update(block)
                    file.write(block)
                    left -= len(block)
                file.flush()
                os.fsync(file.fileno())
            if left or digest.hexdigest() != member.sha256:
                raise ValueError(
                    f"{member.path} (in {part}) is not what the manifest tells: nothing is put in place; write the "
                    "bundle anew."
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _stage(path: str, stages: Mapping[str, Path]) -> Path:
    place, _, rest = path.partition("/")
    return stages[place] / rest


def _check_room(manifest: Manifest, wanted: Mapping[str, Path], roots: Mapping[str, Path]) -> None:
    """See that every disk holds what comes to it, and what is made there."""
    needed: dict[int, tuple[Path, int]] = {}
    to_make = [a for a in manifest.assets if a.form == "archives" and not is_made(a, roots["home"])]
    sizes = [(roots[m.path.partition("/")[0]], m.size) for m in manifest.members if m.path in wanted]
    for root, size in [*sizes, *((roots["home"], asset.bytes) for asset in to_make)]:
        there = next(path for path in (root, *root.parents) if path.exists())
        disk = there.stat().st_dev
        needed[disk] = (there, needed.get(disk, (there, 0))[1] + size)
    for there, size in needed.values():
        if (free := shutil.disk_usage(there).free) < size:
            raise NoRoom(
                errno.ENOSPC,
                f"{there} has room for {told(free)}, and the bundle takes {told(size)} there: make room, or give "
                "another folder (--home, --trees, --hub, --wheels).",
            )


def _move(unit: Unit, stages: Mapping[str, Path]) -> None:
    staged = _stage(unit.path, stages)
    unit.target.parent.mkdir(parents=True, exist_ok=True)
    folder = unit.target.is_dir() and not unit.target.is_symlink()
    if folder or ("" not in unit.members and os.path.lexists(unit.target)):  # which nothing can be renamed over
        old = stages[unit.path.partition("/")[0]] / f".old-{unit.target.name}"
        os.replace(unit.target, old)
    os.replace(staged, unit.target)


def _note_made(manifest: Manifest, home: Path) -> None:
    """Note folders that came made as what their recipe made, so that nothing is fetched for them."""
    came = [asset for asset in manifest.assets if asset.form == "made" and not is_made(asset, home)]
    if not came:
        return
    with (home / "lock").open("a") as lock:  # as vst.demo.assets takes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        for asset in came:
            remember(home / asset.folder)
            entry = asset.made_from | contents(home / asset.folder)
            write_json(home / "ready.json", object_in(home / "ready.json") | {asset.folder: entry})
