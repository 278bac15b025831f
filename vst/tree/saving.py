"""Trees on disk: ``config.json``, one safetensors file, the preparation of pictures and a model card; or the stitches.

Written to temporary files and renamed, never over an existing tree unless asked; nothing is ever unpickled.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vst.models.fields import checked, dtype_of, shown
from vst.models.inputs import check_tensors
from vst.results.folders import atomic_path, write_json
from vst.tree.card import model_card
from vst.tree.changes import apply_changes, change_shapes, changed_weights
from vst.tree.config import VSTConfig
from vst.tree.folder import (
    CARD,
    CONFIG,
    PREPROCESSOR,
    STITCHES,
    WEIGHTS,
    preprocessor,
    read_config,
    warn_preparation,
    weight_files,
)
from vst.tree.seal import bit_sum, made_with, sealed_onto, write_sealed
from vst.tree.tensors import check_finite, opened, read_tensors

Tree = TypeVar("Tree", bound="OnDisk")


class OnDisk(nn.Module):
    """A module described by a ``VSTConfig`` that is saved and loaded: base of :class:`vst.tree.encoder.VSTEncoder`."""

    config: VSTConfig
    changes: dict[str, Tensor] | None = None
    """Of a tuned tree what was trained besides the stitches, as it is saved; None: not held apart from the weights."""
    onto: Mapping[str, int] = MappingProxyType({})
    """Of a tuned tree's weights as they were before the changes, the sums of their bits, so far as they are known."""

    @classmethod
    def skeleton(cls: type[Tree], config: VSTConfig) -> Tree:
        """The module on the ``meta`` device: shapes without memory."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_config(cls: type[Tree], config: VSTConfig, *, pretrained: bool = True, seed: int = 0) -> Tree:
        """The module with frozen weights from their sources, none of them tuned, and new stitches."""
        raise NotImplementedError

    def freeze(self: Tree) -> Tree:
        """Freeze everything but the stitches; returns self."""
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, state_dict: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write config, weights of the blocks that are held, picture preparation and a model card: all that is needed.

        Args:
            folder: to write to.
            overwrite: take the place of what is saved there.
            state_dict: these tensors in place of the module's own, under the same names and of the same shapes.

        Raises:
            FileExistsError: the folder holds a tree already and ``overwrite`` is False.
            ValueError: tensors that are not those of this module, or not finite.
        """
        own = self.state_dict()
        if state_dict is not None:
            expected, given = ({n: t.shape for n, t in tensors.items()} for tensors in (own, state_dict))
            check_tensors("the tree", expected, given, "Give its own state_dict, with other values only.")
        return self._save(folder, WEIGHTS, dict(own if state_dict is None else state_dict), overwrite)

    def save_stitches(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write config, stitches and a model card, a few MB; loading takes the frozen models from their sources.

        What was tuned of these models is written as well, as low-rank changes, and merged into them on load.

        Raises:
            FileExistsError: the folder holds a tree already and ``overwrite`` is False.
            ValueError: tensors that are not finite; a tuned tree that was loaded whole, and so without its changes.
        """
        self.check_changes()
        held = {k: v for k, v in self.state_dict().items() if _is_stitch(k)}
        return self._save(folder, STITCHES, held | self._own_changes(), overwrite, self._bits_below())

    def check_changes(self) -> None:
        """See that the stitches of this tree can be saved alone.

        Raises:
            ValueError: it was tuned, and its changes are not held apart from its weights.
        """
        if self.config.tuned is not None and self.changes is None:
            raise ValueError(
                "This tree's models were tuned, and it was loaded whole, with the changes merged into its weights, so "
                "that its stitches alone would not make it again: save it whole (save_pretrained), or load the "
                "stitches/ that its fit saved."
            )

    def _own_changes(self) -> dict[str, Tensor]:
        """Changes of the weights that are held; a tree that was cut to some splits holds fewer."""
        own = change_shapes(self, self.config.tuned)
        return {name: value for name, value in (self.changes or {}).items() if name in own}

    def take_changes(self, changes: Mapping[str, Tensor], config: VSTConfig) -> None:
        """Become the tuned tree of ``config``: merge changes into the weights, which are the sources' own.

        Raises:
            ValueError: weights that are not fp32.
        """
        before = self._bits_below()
        apply_changes(self, changes)
        self.changes, self.config = dict(changes), config
        self.onto = {name: before[name] for name in changed_weights(changes)}

    def _bits_below(self) -> dict[str, int]:
        """By name, the sum of the bits of each weight of the models' blocks as it was before any change, in fp32."""
        unknown = set(changed_weights(change_shapes(self, self.config.tuned))) - set(self.onto)
        held = {k: v for k, v in self.state_dict().items() if ".blocks." in k and not _is_stitch(k)}
        own = {k: bit_sum(v.cpu()) for k, v in held.items() if v.dtype == torch.float32 and k not in unknown}
        return {k: self.onto.get(k, value) for k, value in own.items()}

    def _check_below(self, path: Path, changes: Iterable[str]) -> dict[str, int]:
        """See that stitches in a file, and changes beside them, were trained on this tree's weights.

        Returns:
            What the file says of these weights: the sums of their bits by name, as far as it does.

        Raises:
            ValueError: changes were not. Stitches alone bring a warning.
        """
        with opened(path) as file:
            known = sealed_onto(path, file.metadata())
        own, changed = self._bits_below() if known else {}, set(changed_weights(changes))
        odd = sorted(name for name, value in own.items() if known.get(name, value) != value)
        which = f"in {len(odd)} of {len(own)} tensors ({', '.join(odd[:2])}{', ...' if odd[2:] else ''})"
        if changed & set(odd):
            raise ValueError(
                f"{path} holds changes that were trained on other weights than this tree's models have, {which}: merge "
                "them into a tree of the weights that they were trained on, or fit them again."
            )
        if odd:
            warnings.warn(
                f"{path}: the stitches were fitted between other weights than this tree's models have, {which}: "
                "measure them (vst.evaluate_stitches), or fit them again.",
                stacklevel=3,
            )
        return known

    def _save(
        self,
        folder: str | Path,
        file: str,
        tensors: dict[str, Tensor],
        overwrite: bool,
        onto: Mapping[str, int] | None = None,
    ) -> Path:
        folder = _folder(folder)
        checked(overwrite, bool, "overwrite")
        if not overwrite and (present := [n for n in (CONFIG, *weight_files(folder)) if (folder / n).exists()]):
            raise FileExistsError(
                f"{folder} already holds {', '.join(present)}: choose another folder, or pass overwrite=True "
                "(--overwrite true)."
            )
        check_finite(
            tensors,
            "The tree holds",
            ", so it is not saved: a training diverged or a cast overflowed; go back to what was saved before",
        )
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / file) as path:
            write_sealed(path, tensors, self.config, onto)
        for other in set(weight_files(folder)) - {file}:
            (folder / other).unlink()
        write_json(folder / CONFIG, self.config.to_dict())
        write_json(folder / PREPROCESSOR, preprocessor(self.config))
        with atomic_path(folder / CARD) as path:
            path.write_text(model_card(self.config, stitches_only=file == STITCHES), encoding="utf-8")
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Save to a temporary folder and upload it (``options`` go to huggingface_hub's ``upload_folder``)."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "tree")
            url = api.create_repo(repo_id, exist_ok=True, private=private)
            api.upload_folder(repo_id=repo_id, folder_path=str(folder), **options)
        return str(url)

    def load_stitches(self, folder: str | Path) -> None:
        """Take the stitches that :meth:`save_stitches` wrote of this tree; frozen weights stay as they are.

        Where that tree was tuned, its changes are merged into the weights, unless they were before.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a damaged file, or the stitches of another tree.
        """
        path = _folder(folder) / STITCHES
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: restore it, or make it anew.")
        saved, now = read_config(path.parent)[1], self.config.tuned
        if now is not None and (saved.tuned is None or saved.tuned.digest != now.digest):
            raise ValueError(
                f"{path.parent} holds the stitches of a tree that was {'not' if saved.tuned is None else 'otherwise'} "
                "tuned, and this tree is tuned already: load them into a tree that was built from its sources."
            )
        self._check_models(path.parent, saved)
        own, changes = {k: v.shape for k, v in self.state_dict().items()}, change_shapes(self, saved.tuned)
        wanted = {k: shape for k, shape in own.items() if _is_stitch(k)} | changes
        found = read_tensors(path, wanted, own | changes, None)
        trained = {k: found.pop(k) for k in changes}
        known = self._check_below(path, trained)
        if trained and now is None:
            self.take_changes(trained, replace(self.config, tuned=saved.tuned))
        elif trained and self.changes is None:  # loaded whole: they are in its weights already
            self.changes = trained
            self.onto = {k: known[k] for k in changed_weights(trained) if k in known}
        self.load_state_dict(found, strict=False)

    def _check_models(self, folder: Path, saved: VSTConfig) -> None:
        """See that stitches were fitted between models like this tree's."""
        own, theirs = made_with(self.config), made_with(saved)
        for name in own.keys() - {"the tree"}:
            for key, value in own[name].items():
                if (other := theirs.get(name, {}).get(key)) != value:
                    raise ValueError(
                        f"{folder} holds the stitches of another tree: its {key} of {name} is {shown(other)}, and this "
                        f"tree's is {shown(value)}."
                    )

    @classmethod
    def from_pretrained(
        cls: type[Tree],
        source: str | Path,
        *,
        splits: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        fold: bool = False,
    ) -> Tree:
        """Load a saved tree from a folder (no network) or a hub id.

        Args:
            source: folder of :meth:`save_pretrained` or :meth:`save_stitches`, or a hub id.
            splits: keep only these, for all branches or by branch name; only the blocks that they need are read.
            dtype: floating dtype to load into, itself or its name; default: as saved, and where several were saved the
                smallest that holds them all.
            revision: of a hub id.
            fold: for inference: fold the stitches' standardisation into their linear layers, before any cast; the same
                tokens to rounding with fewer steps.

        Raises:
            FileNotFoundError: there is no tree there.
            ValueError: a damaged or foreign checkpoint, weights that are not finite, or a split that it does not hold.
        """
        kind = None if dtype is None else dtype_of(dtype)
        checked(fold, bool, "fold")
        folder, whole = read_config(source, revision, weights=True)
        warn_preparation(folder, whole)
        config = whole if splits is None else whole.pruned(splits)
        possible = {k: v.shape for k, v in cls.skeleton(whole).state_dict().items()}
        if (folder / WEIGHTS).is_file():
            tree = cls.skeleton(config)
            wanted = {k: v.shape for k, v in tree.state_dict().items()}
            tree.load_state_dict(read_tensors(folder / WEIGHTS, wanted, possible, kind), strict=True, assign=True)
        elif (folder / STITCHES).is_file():
            tree = cls.from_config(config)
            changes = change_shapes(tree, config.tuned)
            possible |= change_shapes(cls.skeleton(whole), whole.tuned)
            wanted = {k: v.shape for k, v in tree.state_dict().items() if _is_stitch(k)} | changes
            found = read_tensors(folder / STITCHES, wanted, possible, None)
            tree.load_state_dict({k: v for k, v in found.items() if k not in changes}, strict=False, assign=True)
            tree._check_below(folder / STITCHES, changes)
            if config.tuned is not None:
                tree.take_changes({k: found[k] for k in changes}, config)
            tree = tree if kind is None else tree.to(kind)
        else:
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {STITCHES}: the saved tree is incomplete.")
        if fold:
            _fold(tree, folder / (WEIGHTS if (folder / WEIGHTS).is_file() else STITCHES), possible)
        return tree.freeze()


def _folder(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path) or Path(path).is_file():
        raise ValueError(f"folder is {shown(path)}; expected the path of a folder.")
    return Path(path)


def _stitches(tree: Any) -> list[tuple[str, Any]]:
    """Stitches by the place that their tensors are saved under."""
    return [(f"branches.{name}.stitches.{split}", s) for (name, split), s in tree.stitches().items()]


def _fold(tree: Any, path: Path, possible: dict[str, torch.Size]) -> None:
    """Fold stitches as they were saved, in float32 at least: digits that a cast drops would count more."""
    for place, stitch in _stitches(tree):
        prefix = f"{place}."
        wanted = {f"{prefix}{k}": v.shape for k, v in stitch.state_dict().items()}
        kinds = {k: v.dtype for k, v in stitch.state_dict().items()}
        saved = read_tensors(path, wanted, possible, None)
        wide = {k.removeprefix(prefix): v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in saved.items()}
        stitch.load_state_dict(wide, strict=True, assign=True)
        stitch.fold()
        cast = {k: v.to(kinds[k]) for k, v in stitch.state_dict().items()}
        check_finite(cast, f"Folded, {place} has", ": load the tree without fold")
        stitch.load_state_dict(cast, strict=True, assign=True)


def _is_stitch(key: str) -> bool:
    """Whether a tensor is a stitch's, by its name."""
    return key.startswith("branches.") and ".stitches." in key
