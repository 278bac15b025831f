"""``vst bundle`` and ``vst unbundle``."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import vst
from vst.bundle.contents import Contents
from vst.bundle.packing import folder_for, write_bundle
from vst.bundle.parts import bytes_of, told
from vst.bundle.recipes import SETS, add_recipes
from vst.bundle.sources import add_source, add_tree
from vst.bundle.unbundle import unbundle_folder
from vst.bundle.wheels import add_wheels
from vst.models.checkpoints import known_names
from vst.parsing import Words
from vst.results.stopping import goes_on


@goes_on
def bundle(
    path: str,
    for_: Words,
    wheels: Words | None = None,
    wheels_python: str | None = None,
    wheels_platform: Words | None = None,
    wheels_dependencies: bool = True,
    made: bool = False,
    part_size: str | int = "60MB",
    list_: bool = False,
    overwrite: bool = False,
) -> None:
    """Write what a job needs as numbered parts with a manifest, for a machine that reaches no network.

    Carry the whole folder over and give it to vst unbundle there.

    Examples:
        vst bundle bundles/demo --for demo --list
        vst bundle bundles/demo --for demo --wheels jsonargparse[signatures] onnx
        vst bundle bundles/mine --for runs/demo/tree timm:vit_small_patch14_dinov2.lvd142m --part-size 1GB
        vst bundle bundles/demo --for demo --wheels onnx --wheels-python 3.12 --wheels-platform manylinux_2_28_x86_64

    Args:
        path: folder to write to.
        for_: one or several of: demo, protocol (the demo's and Fashion-MNIST), llava-demo, a folder of a saved tree or
            of a language model on one, a model source (timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG or a ready name).
        wheels: names of packages as pip takes them, wheel files, or folders of wheel files.
        wheels_python: version of the Python on the other machine, such as 3.12; default: this one's.
        wheels_platform: tags of its platform, as pip knows them; default: this one's.
        wheels_dependencies: take what packages require, too (of accelerate that is torch: gigabytes).
        made: take every folder as it was made, though its archives are smaller: nothing is made on the other machine.
        part_size: the most bytes a part: 60MB, 1GB, or a number.
        list_: only tell what would be taken and how large it is.
        overwrite: write a bundle that is there again.
    """
    size, out, found = bytes_of(part_size), Path(path).expanduser(), Contents()
    if wheels is None and (wheels_python or wheels_platform):
        raise ValueError("wheels_python and wheels_platform tell for what machine wheels are: give --wheels, too.")
    options = {"python": wheels_python, "platforms": wheels_platform or (), "dependencies": wheels_dependencies}
    with tempfile.TemporaryDirectory(prefix="vst-wheels-") as folder:
        if list_:
            _gather(found, for_, made, dry=True)
            add_wheels(found, wheels or (), Path(folder), dry=True, **options)  # type: ignore[arg-type]
            _show(found)
            return
        with folder_for(out, for_, overwrite):
            _gather(found, for_, made, dry=False)
            add_wheels(found, wheels or (), Path(folder), **options)  # type: ignore[arg-type]
            _show(found)
            manifest = write_bundle(out, found, for_, size, vst.__version__)
    for archive in found.fetched:
        archive.unlink(missing_ok=True)
        with suppress(OSError):  # others lie there
            archive.parent.rmdir()
    total = sum(part.size for part in manifest.parts)
    print(f"{out}: {len(manifest.parts)} part(s), {told(total)}, and manifest.json")
    print(f"Copy the folder over; there: vst unbundle {out.name}")
    print(f"(where the packages of the command line are missing: python -m vst.bundle {out.name})")


def _gather(into: Contents, words: Words, made: bool, *, dry: bool) -> None:
    for word in dict.fromkeys(words):
        if word in SETS:
            add_recipes(into, word, made, dry)
        elif Path(word).expanduser().is_dir():
            add_tree(into, Path(word).expanduser(), dry)
        elif ":" in word or word in known_names():
            add_source(into, word, dry)
        else:
            raise ValueError(
                f"--for names {word!r}; expected {', '.join(SETS)}, a folder of a saved tree, or a model source such "
                "as timm:NAME, hf:ID or a ready name."
            )


def _show(found: Contents) -> None:
    for what, form, size, place in found.rows:
        print(f"{what}: {form}, {told(size) if size is not None else 'size not known before it is fetched'} -> {place}")
    known = [size for *_, size, _ in found.rows if size is not None]
    print(f"together {told(sum(known))}{'' if len(known) == len(found.rows) else ' and what is not known yet'}")
    for note in found.notes:
        print(f"note: {note}")


@goes_on
def unbundle(
    path: str,
    home: str | None = None,
    trees: str | None = None,
    hub: str | None = None,
    wheels: str | None = None,
    overwrite: bool = False,
) -> None:
    """Put a bundle in place, check it, and say what is missing and what to type next; no network is asked.

    Where the packages of this command line are missing: python -m vst.bundle FOLDER, with the same options.

    Examples:
        vst unbundle bundles/demo
        vst unbundle /media/stick/demo --home /data/vst --trees /data/trees

    Args:
        path: folder of the bundle: its parts and manifest.json.
        home: folder of the assets; default: $VST_HOME, else ~/.cache/vst.
        trees: folder of saved trees, and of models in folders; default: trees in home.
        hub: the Hugging Face hub's cache; default: where huggingface_hub looks.
        wheels: folder of wheels; default: wheels in home.
        overwrite: replace what differs from the bundle.
    """
    unbundle_folder(Path(path).expanduser(), home, trees, hub, wheels, overwrite)
