"""A ``ModuleDict`` whose members have a known type, for readers and type checkers."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from typing import Generic, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModuleMap(nn.ModuleDict, Generic[M]):
    """``nn.ModuleDict`` of modules of one type."""

    def __getitem__(self, key: str) -> M:
        return cast(M, super().__getitem__(key))

    def items(self) -> ItemsView[str, M]:
        """Names and modules."""
        return cast("ItemsView[str, M]", super().items())

    def values(self) -> ValuesView[M]:
        """The modules."""
        return cast("ValuesView[M]", super().values())
