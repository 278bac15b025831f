"""Random views of pictures, the same for every model that looks: a part of the cut picture, perhaps mirrored."""

from __future__ import annotations

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from vst.data.pictures import ImageSet, Skipped

AREA, ASPECT = (0.35, 1.0), (3 / 4, 4 / 3)


class Views(Dataset):
    """Views of an :class:`vst.data.pictures.ImageSet`, each by a number of its own.

    Item ``index + draw * len(pictures)`` is view number ``draw`` of picture ``index``, by the seed alone: always the
    same, in whichever process it is read.

    Args:
        pictures: what is viewed.
        seed: of the views.
    """

    def __init__(self, pictures: ImageSet, seed: int) -> None:
        self.pictures, self.seed = pictures, seed

    def __getitem__(self, item: int) -> dict[str, Tensor] | Skipped:
        index = item % len(self.pictures)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + item)
            return self.pictures.read(index, random_view)


def random_view(image: Image.Image) -> Image.Image:
    """A part of a picture, mirrored half the time, drawn from torch's own generator.

    The part has 35 to 100 % of the picture's area and an aspect ratio from 3:4 to 4:3, as torchvision draws it (Szegedy
    et al. 2015, with a larger least area: what is matched are patches, which should still show something).
    """
    from torchvision.transforms import RandomResizedCrop

    top, left, height, width = RandomResizedCrop.get_params(image, list(AREA), list(ASPECT))
    part = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if torch.rand(()) < 0.5 else part
