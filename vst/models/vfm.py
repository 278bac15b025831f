"""One vision foundation model, seen as stem -> blocks -> norm.

Shape suffixes: B batch, T tokens (prefix + patches), N patches (grid * grid), D width.
A *depth* n always means "after n blocks": depth 0 is the stem's output, depth ``spec.depth`` the last block's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from vst.models.blocks import block_of, resample_positions, rope_table, run_rotary
from vst.models.fields import as_list, checked, shown, whole
from vst.models.inputs import check_pixels, check_tensors, check_tokens
from vst.models.spec import MOST_GRID, VFMSpec


class VFM(nn.Module):
    """A vision transformer, whole or a range of its blocks, at one grid.

    Parameter names are timm's (``patch_embed.proj``, ``blocks.N.attn.qkv``, ...), with absolute block numbers in a
    partial model. A class token's own position is added into ``cls_token``, so ``pos_embed`` holds patches only.

    Args:
        spec: what to build.
        grid: patches a side.
        start, stop: blocks ``start`` to ``stop - 1`` are built; the default is all of them.
        stem: whether patch embedding, prefix tokens and positions are built.
        norm: whether the final norm is built.
    """

    rope: Tensor | None
    patch_embed: Any

    def __init__(
        self, spec: VFMSpec, grid: int, *, start: int = 0, stop: int | None = None, stem: bool = True, norm: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(spec, VFMSpec):
            raise ValueError(f"spec is {shown(spec)}; expected a VFMSpec, as vst.models.checkpoints.describe gives it.")
        grid, start = whole(grid, f"{spec.source}: grid", (1, MOST_GRID)), whole(start, f"{spec.source}: start")
        stop = spec.depth if stop is None else whole(stop, f"{spec.source}: stop")
        checked(stem, bool, f"{spec.source}: stem")
        checked(norm, bool, f"{spec.source}: norm")
        if not 0 <= start <= stop <= spec.depth:
            raise ValueError(
                f"{spec.source}: blocks {start} to {stop} were asked for; it has {spec.depth}: use 0 <= start <= stop "
                f"<= {spec.depth}."
            )
        self.spec, self.grid, self.start, self.stop = spec, grid, start, stop
        self.checkpointing = False
        layer_norm = partial(LayerNorm, eps=spec.norm_eps)
        if stem:
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, spec.width, spec.patch, spec.patch, bias=not spec.pre_norm)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width)) if spec.cls else None
            self.reg_token = nn.Parameter(torch.zeros(1, spec.registers, spec.width)) if spec.registers else None
            learned = spec.position == "learned"
            self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, spec.width)) if learned else None
            self.norm_pre = layer_norm(spec.width) if spec.pre_norm else nn.Identity()
        self.has_stem = stem
        self.blocks = nn.ModuleDict({str(i): block_of(spec, layer_norm) for i in range(start, stop)})
        self.norm = layer_norm(spec.width) if norm else None
        if spec.position == "rotary":
            self.register_buffer("rope", rope_table(spec, grid), persistent=False)
        else:
            self.rope = None  # no buffer: accelerate cannot place one that is None
        self.register_load_state_dict_post_hook(_renewed)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{self.spec.source}, grid={self.grid}, blocks {self.start}..{self.stop}, stem={self.has_stem}"

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.grid * self.spec.patch

    @property
    def tokens(self) -> int:
        """T: prefix and patch tokens of one picture."""
        return self.spec.prefix + self.grid**2

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, S, S]`` to the stem's output ``[B, T, D]`` (depth 0).

        Raises:
            ValueError: pictures of another size, or a model that was built without its stem.
        """
        return self(pixels, 0)

    def _stem(self, pixels: Tensor) -> Tensor:
        side = self.image_size
        check_pixels(pixels)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(
                f"{self.spec.source} got pictures of shape {list(pixels.shape)}; expected [batch, 3, {side}, {side}]: "
                "prepare them with the tree's transform()."
            )
        weight = self.patch_embed.proj.weight
        if pixels.device != weight.device and weight.device.type != "meta":  # what is offloaded comes for its call
            raise ValueError(
                f"{self.spec.source} is on {weight.device} and got pixels on {pixels.device}: move one of the two, "
                f"as by pixels.to({str(weight.device)!r})."
            )
        x = self.patch_embed.proj(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return self.norm_pre(torch.cat([*prefix, x], dim=1) if prefix else x)

    def run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks ``start`` to ``stop - 1`` on tokens ``[B, T, D]`` at depth ``start``.

        Raises:
            ValueError: a block that this (partial) model does not hold, or tokens of another model.
        """
        source = self.spec.source
        return self(x, whole(stop, f"{source}: stop"), start=whole(start, f"{source}: start"))

    def _held(self, start: int, depths: Sequence[int]) -> None:
        stop = max(depths)
        if not self.start <= start <= min(depths) <= stop <= self.stop:
            raise ValueError(
                f"{self.spec.source}: blocks {start} to {stop} were asked for, {self.start} to {self.stop} are held: "
                "load the model with the blocks that are needed."
            )

    def _step(self, i: int, x: Tensor) -> Tensor:
        block = self.blocks[str(i)]
        call = block if self.rope is None else partial(run_rotary, block, rope=self.rope)
        if self.checkpointing and torch.is_grad_enabled() and (x.requires_grad or _trains(block)):
            from torch.utils.checkpoint import checkpoint

            return checkpoint(call, x, use_reentrant=False)
        return call(x)

    def taps(self, pixels: Tensor, depths: int | Iterable[int]) -> dict[int, Tensor]:
        """Outputs ``[B, T, D]`` at one or several depths in one pass; nothing beyond the deepest is run.

        Raises:
            ValueError: a depth that is no whole number or not held, or none at all.
        """
        wanted = self._wanted(depths)
        return dict(zip(wanted, self(pixels, wanted), strict=True))

    def walk(self, pixels: Tensor, depths: int | Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """:meth:`taps` one by one, ascending: (depth, tokens ``[B, T, D]``), each block run when it is asked for."""
        x, at = pixels, None
        for depth in self._wanted(depths):
            x = self(x, depth, start=at)
            at = depth
            yield depth, x

    def _wanted(self, depths: int | Iterable[int]) -> list[int]:
        """Depths that a call asks for, ascending, each once."""
        what = f"{self.spec.source}: depth"
        given = {whole(depth, what, (0, self.stop)) for depth in as_list(depths)}
        # The stem's output is there whichever blocks are held.
        wanted = sorted(at if at == 0 and self.has_stem else whole(at, what, (self.start, self.stop)) for at in given)
        if not wanted:
            raise ValueError(
                f"{self.spec.source}: depths are {shown(depths)}; expected one or more, from {self.start} to "
                f"{self.stop}."
            )
        return wanted

    def forward(
        self,
        x: Tensor,
        depths: int | Sequence[int] | None = None,
        *,
        start: int | None = None,
        features: bool = False,
    ) -> Any:
        """Pixels ``[B, 3, S, S]``, or tokens ``[B, T, D]`` at a depth, to tokens at one depth or several.

        Whatever else this model offers is such a call, so that whoever hooks the calls of modules, to place their
        tensors or to gather them, sees all that is computed.

        Args:
            x: pixels as the model's own preparation makes them, which are cast to the weights' dtype; or tokens.
            depths: give the output at this depth ``[B, T, D]``, before any norm (0 is the stem's), or at several, as a
                tuple, ascending; None stands for all that is held, and the final norm.
            start: depth that tokens are at; None says that ``x`` are pixels.
            features: give patch tokens ``[B, N, D]`` alone, after the final norm where the model holds it.

        Raises:
            ValueError: pictures of another size, tokens of another model, a model that was built without its stem, or
                a depth that is no whole number or not held, or none at all.
        """
        source = self.spec.source
        if start is None:
            if not self.has_stem:
                raise ValueError(f"{source} was built without its stem and cannot see pixels: feed it tokens.")
            wanted = [self.stop] if depths is None else self._wanted(depths)
            x, at = self._stem(x), 0
        else:
            at = whole(start, f"{source}: start")
            stops = [self.stop] if depths is None else as_list(depths)
            wanted = sorted({whole(depth, f"{source}: stop") for depth in stops})
            self._held(at, wanted)
            check_tokens(self.spec, x)
        found: dict[int, Tensor] = {}
        for depth in wanted:
            for i in range(at, depth):
                x = self._step(i, x)
            found[depth], at = x, depth
        if (features or depths is None) and self.norm is not None:
            found = {depth: self.norm(x) for depth, x in found.items()}
        if features:
            found = {depth: x[:, self.spec.prefix :] for depth, x in found.items()}
        # Hooks of modules look into tuples for tensors, and not all of them into mappings by number.
        return tuple(found.values()) if isinstance(depths, Sequence) else found[wanted[0]]

    def patches(self, x: Tensor) -> Tensor:
        """Drop the prefix tokens: ``[B, T, D]`` to ``[B, N, D]``."""
        check_tokens(self.spec, x)
        return x[:, self.spec.prefix :]

    def features(self, x: Tensor) -> Tensor:
        """Patch tokens ``[B, N, D]`` of tokens ``[B, T, D]``, after the final norm where the model holds it."""
        return self.patches(x) if self.norm is None else self(x, self.stop, start=self.stop, features=True)

    def reset_parameters(self, seed: int = 0) -> VFM:
        """Random weights (normal, std 0.02, clipped at two), by ``seed`` and name; returns self.

        A partial model gets the same weights as the whole one.
        """
        seed = whole(seed, "seed")
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim > 1:
                    # the CPU generator keeps 32 bits of a seed: name and seed are hashed into them
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                    p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator).clamp_(-0.04, 0.04))
                elif name.endswith("bias"):
                    p.zero_()
        return self.renew_buffers()

    @classmethod
    def from_tensors(cls, spec: VFMSpec, tensors: Mapping[str, Tensor], grid: int, **parts: Any) -> VFM:
        """Build around existing tensors without allocating weights first.

        Args:
            spec: of the model.
            tensors: a state dict in this class's layout, at the spec's native grid; more blocks than needed are
                ignored, anything else that is foreign is an error.
            grid: patches a side to build for; the position table is resampled once, here.
            parts: ``start``, ``stop``, ``stem``, ``norm`` as in the constructor.

        Raises:
            ValueError: a missing, a foreign or a wrongly shaped tensor.
        """
        with torch.device("meta"):
            model = cls(spec, grid, **parts)
        tensors = dict(tensors)
        if "pos_embed" in tensors:
            tensors["pos_embed"] = resample_positions(tensors["pos_embed"], grid, antialias=spec.antialias)
        whole = set(tensors)
        expected = {name: p.shape for name, p in model.named_parameters()}
        foreign = {n for n in whole - set(expected) if not _left_out(n, model)}
        check_tensors(spec.source, expected, {n: tensors[n].shape for n in whole & (set(expected) | foreign)})
        model.load_state_dict({n: tensors[n] for n in expected}, strict=True, assign=True)
        return model

    def renew_buffers(self) -> VFM:
        """Fill what no checkpoint carries (rotary table, zero key biases) after a loader left placeholders there.

        ``to_empty``, casts and ``load_state_dict`` do it by themselves; returns self.
        """
        for name, buffer in list(self.named_buffers()):
            if name.endswith("k_bias"):
                owner: Any = self.get_submodule(name.rpartition(".")[0])
                like = owner.q_bias  # of the weights' device and dtype, which a load may have changed
                if like.is_meta:  # offloaded, or not loaded yet
                    like = buffer
                if not like.is_meta:
                    owner.k_bias = _filled(buffer, torch.zeros(like.shape, dtype=like.dtype), like.device)
        if self.rope is not None:
            weight = next(self.parameters(), self.rope)  # a model without blocks and norm has none
            device = self.rope.device if weight.is_meta else weight.device
            if device.type != "meta":
                self.rope = _filled(self.rope, rope_table(self.spec, self.grid), device)  # type: ignore[arg-type]
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> VFM:
        super()._apply(fn, recurse)
        # What a cast made of the angles, and what ``to_empty`` left for them, has no meaning; weights may be copied in
        # one by one after it, which no hook of a load would see.
        return self.renew_buffers()


def _trains(block: nn.Module) -> bool:
    """Whether a block holds what takes a gradient."""
    return any(p.requires_grad for p in block.parameters())


def _filled(buffer: Tensor, values: Tensor, device: torch.device) -> Tensor:
    """The buffer with these values, or a new one where it is of another kind; a captured graph keeps its place."""
    if (buffer.device, buffer.dtype) != (device, values.dtype) or buffer.is_inference():
        return values.to(device)
    return buffer.copy_(values)


def _renewed(model: VFM, incompatible: Any) -> None:
    """After a state dict was loaded."""
    model.renew_buffers()


def _left_out(name: str, model: VFM) -> bool:
    """Whether a tensor belongs to a part of the whole model that this (partial) build leaves out."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        number = rest.partition(".")[0]
        return number.isdigit() and int(number) < model.spec.depth and number not in model.blocks
    if head == "norm":
        return model.norm is None
    return head in {"patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre"} and not model.has_stem
