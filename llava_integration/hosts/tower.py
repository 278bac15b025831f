"""The tree as the vision tower of the original LLaVA, of LLaVA-NeXT and of forks that build towers as they do.

Hosts build a tower twice over: as part of a model whose weights a checkpoint is about to bring, and on its own, to be
filled from its own source. So the tower has all its parameters from the start, ``load_model`` brings what no checkpoint
has brought, and ``is_loaded`` is False until then.

Shape suffixes: B batch, S side of the pictures in pixels, N tokens, C width of a fused token.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llava_integration.hosts import restored, trained
from llava_integration.hosts.guarded import GuardedTower
from llava_integration.hosts.images import HostImageProcessor
from llava_integration.hosts.options import HostConfig, check_options, no_grid, parse_name, trains_whole
from llava_integration.hosts.partitioned import fill_partitioned, is_partitioned
from llava_integration.hosts.renamed import own_names, rename
from vst.models.vfm import VFM
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import read_config
from vst.tree.fusion import FUSIONS
from vst.tree.splits import Split

LOG = logging.getLogger("llava_integration")
_AUTO_MAPS = (None, "auto", "balanced", "balanced_low_0", "sequential")


class VSTVisionTower(GuardedTower):
    """A saved tree with the attributes that LLaVA's own towers have. Frozen; casts its input in and its tokens out.

    A host that trains the tower trains the stitches of the split in use; ``+whole`` behind the name, all that it
    reaches. Whatever walks through the modules, as optimizers do, finds it so.

    Args:
        vision_tower: ``vst:PATH`` of a saved tree (folder or hub id), with ``@SPLIT`` to load what that depth needs
            alone, and ``+whole`` to have all of it trained where the host trains it; or a saved tree's folder.
        args: the host's config or model arguments.
        delay_load: leave the weights to a checkpoint, or to :meth:`load_model`.

    Raises:
        FileNotFoundError: there is no tree.
        ValueError: options of the host that the tree cannot serve.
    """

    def __init__(self, vision_tower: str, args: Any = None, delay_load: bool = False) -> None:
        super().__init__(trains_whole(vision_tower))
        self.vision_tower_name, self.args, self.delay_load = vision_tower, args, delay_load
        self.unfreeze_mm_vision_tower = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        self._source, split = parse_name(vision_tower)
        config: VSTConfig = read_config(self._source)[1]
        self.tree_config = config = config if split is None else config.at(split)
        self._splits = None if split is None else {b.name: b.splits for b in config.branches}
        check_options(self.tree_config, args)
        self.image_processor = HostImageProcessor(self.tree_config)
        probe = nn.Linear(1, 1).weight  # built as the host has its modules built at this moment
        waits = delay_load or probe.is_meta or hasattr(probe, "ds_id")
        self.vision_tower = rename(_skeleton(config) if waits else VSTEncoder.skeleton(config))
        self.vision_tower.requires_grad_(False)
        self.watch()
        if not delay_load and not probe.is_meta:
            self.load_model()

    def load_model(self, device_map: Any = None, **kwargs: Any) -> None:
        """Bring the weights that no checkpoint has restored; those that one has are left as they are.

        Args:
            device_map: a device, or a map of the whole tower to one; None and ``auto`` mean where the tower is.
            kwargs: nothing else is known.

        Raises:
            FileNotFoundError: there is no tree.
            ValueError: an unknown option, a damaged tree, or one that does not fit the checkpoint.
        """
        if kwargs:
            raise ValueError(
                f"load_model was given {', '.join(sorted(kwargs))}, which a tree has no use for; give device_map alone."
            )
        if self.is_loaded:
            LOG.info("%s is already loaded; load_model leaves it as it is", self.vision_tower_name)
            return
        kept = set(self._recorder.names)
        if is_partitioned(self.vision_tower):
            fill_partitioned(self.vision_tower, self._read, kept)
        else:
            self._replace(kept, device_map)
        where = f"{len(kept)} tensors from the checkpoint, the others " if kept else ""
        self._finish(f"{where}read from {self._source}")

    def to_tree(self) -> VSTEncoder:
        """The tree with the weights as they are now, to be saved as a tree of its own."""
        state = self.vision_tower.state_dict()
        tree = VSTEncoder.skeleton(self.vision_tower.config)
        tree.load_state_dict(
            {own: state[name].clone() for own, name in own_names(self.vision_tower).items()}, assign=True
        )
        return tree.to(self.device).freeze()

    def _read(self) -> VSTEncoder:
        return rename(VSTEncoder.from_pretrained(self._source, splits=self._splits))

    def _replace(self, kept: set[str], device_map: Any) -> None:
        """Put the tree that was saved in the skeleton's place: what a host did to unfilled modules goes with them."""
        old, tree = self.vision_tower, self._read()
        restored.check_unstamped(self.vision_tower_name, old, tree, kept)
        dtype, device = self.dtype if self.delay_load else None, self._device_for(device_map)
        tree.to(device=device, dtype=dtype)
        state = {n: t for n, t in old.state_dict().items() if n in kept}
        tree.load_state_dict(state, strict=False)
        wanted = trained.freed(old)
        for name, parameter in tree.named_parameters():
            parameter.requires_grad_(name in wanted)
        self.vision_tower = tree
        self._recorder.watch(tree)

    def _device_for(self, device_map: Any) -> torch.device:
        if isinstance(device_map, dict):
            device_map = device_map.get("")
        if device_map in _AUTO_MAPS:
            if self.device.type != "meta":
                return self.device
            device_map = "cuda" if device_map is not None and torch.cuda.is_available() else "cpu"
        return torch.device(device_map)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Fused tokens ``[B, N, C]`` of pictures ``[B, 3, S, S]``, in the dtype of the pictures.

        A list of pictures ``[3, S, S]`` gives a list of ``[1, N, C]``.

        Raises:
            RuntimeError: the weights are not there yet.
            ValueError: pictures of the wrong size.
        """
        if not self.is_loaded:
            raise RuntimeError(f"The weights of {self.vision_tower_name} are not loaded: call load_model() first.")
        if isinstance(images, list):
            return [self._tokens(image[None] if image.ndim == 3 else image) for image in images]
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.trains()
        with torch.set_grad_enabled(trains), torch.autocast(self.device.type, enabled=False):
            return self.vision_tower(images.to(device=self.device, dtype=self.dtype)).to(images.dtype)

    def feature_select(self, tokens: Tensor) -> Tensor:
        """The tree's own choice of layer is behind the tokens already: they come back as they are."""
        return tokens

    @property
    def split(self) -> int | dict[str, int]:
        """Split of the tree's calls; can be set to any that is held."""
        return self.vision_tower.split

    @split.setter
    def split(self, value: Split | None) -> None:
        self.vision_tower.split = value
        self.choose_again()

    @property
    def config(self) -> HostConfig:
        """Sizes, for whoever builds around the tower."""
        tree = self.tree_config
        return HostConfig(tree.fuser().width, tree.image_size, tree.trunk.patch, tree.trunk.depth)

    @property
    def dummy_feature(self) -> Tensor:
        """``[1, C]`` zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def select_layer(self) -> int:
        """Hidden state that the tree reads of its models, whatever ``mm_vision_select_layer`` says."""
        return self.tree_config.feature_layer

    @property
    def select_feature(self) -> str:
        """``patch``: prefix tokens are gone."""
        return "patch"

    @property
    def hidden_size(self) -> int:
        """C."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """S."""
        return self.config.image_size

    @property
    def input_image_size(self) -> int:
        """S."""
        return self.config.image_size

    @property
    def patch_size(self) -> int:
        """Side of the trunk's patches in pixels."""
        return self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.tree_config.fuser().tokens(self.tree_config.grid**2)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_patches

    @property
    def num_patches_per_side(self) -> int:
        """Side of the grid that the N tokens are.

        Raises:
            ValueError: they are no grid.
        """
        if FUSIONS[self.tree_config.fusion].multiplies:
            raise ValueError(no_grid(self.tree_config))
        return self.tree_config.grid

    @property
    def grid_size(self) -> int:
        """As :attr:`num_patches_per_side`."""
        return self.num_patches_per_side


def _skeleton(config: VSTConfig) -> VSTEncoder:
    """A tree with parameters of whatever device and dtype modules get here, unfilled."""
    tree = VSTEncoder(config)
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # rotary angles lose their meaning in half precision
    try:
        for module in tree.modules():
            if isinstance(module, VFM):
                module.renew_buffers()
    finally:
        torch.set_default_dtype(kind)
    return tree
