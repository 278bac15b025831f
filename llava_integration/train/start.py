"""A closed-form start for the projector: picture tokens begin near the words that are said about their pictures.

A new projector gives the language model vectors that are like no word, and most of stage 1 goes by until they mean
something. Ridge regression from the tower's tokens to the mean input embedding of the picture's answers, scaled to the
spread of the embeddings, costs seconds. In LLaVA's two-layer projector the first layer whitens the tower's tokens and
the second is the regression on what comes out of the GELU.

Train such a projector gently: its weights are small, and Adam at LLaVA-1.5's 1e-3 moves each of them by as much as it
is within ten steps, after which its tokens say no more than those of a random one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import LlavaForConditionalGeneration

from llava_integration.train.data import Conversations
from vst.results.progress import track
from vst.tree.projector import Projector
from vst.tree.ridge import RidgeSums

TOKENS = 64  # tokens taken of each picture
PENALTY = 1e-2
_FLOOR = 0.1  # of the mean variance: what whitening adds to each direction's


def ridge_start(
    model: LlavaForConditionalGeneration,
    data: Conversations,
    pictures: int,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    show: bool = True,
) -> float:
    """Set the projector's weights from conversations about one picture each.

    Where several processes train together, each has to call this: the first one computes, and all get its weights.

    Args:
        model: its projector is changed in place, whatever it is: transformers' own or one of the library's.
        data: captions, or conversations whose answers say what the picture shows.
        pictures: how many conversations to look at.
        seed: of the tokens that are taken and of directions beyond those of the tower's width.
        device: to run the tower on, which comes back to where it was afterwards, and one that the processes can send
            from (their own GPU under NCCL); default: where the tower is.
        show: progress.

    Returns:
        Share of the targets' variance that the regression explains, mean over projectors.

    Raises:
        ValueError: none of those looked at is about exactly one picture.
    """
    whole: Any = model
    place = whole.model.vision_tower.device if device is None else torch.device(device)
    shared = distributed.is_available() and distributed.is_initialized()
    share, wrong = 0.0, None
    if not shared or distributed.get_rank() == 0:
        try:
            share = _fit(whole, data, pictures, seed, place, show)
        except ValueError as error:
            if not shared:
                raise
            wrong = str(error)  # the others wait for the outcome, whatever it is
    if not shared:
        return share
    outcome: list[Any] = [share, wrong]
    distributed.broadcast_object_list(outcome, src=0)
    share, wrong = outcome
    if wrong is not None:
        raise ValueError(wrong)
    for p in whole.model.multi_modal_projector.parameters():
        sent = p.detach().to(place)
        distributed.broadcast(sent, src=0)
        p.data.copy_(sent)
    return share


@torch.no_grad()
def _fit(whole: Any, data: Conversations, pictures: int, seed: int, device: torch.device, show: bool) -> float:
    generator = torch.Generator().manual_seed(seed)
    tower, table = whole.model.vision_tower, whole.get_input_embeddings().weight
    home = tower.device
    tower.to(device)
    special = torch.tensor(data.tokenizer.all_special_ids)
    tokens, targets = [], []
    order = torch.randperm(len(data), generator=generator)[:pictures].tolist()
    for i in track(order, "projector's start", len(order), show):
        sample = data[i]
        words = sample["labels"][sample["labels"] >= 0]
        words = words[~torch.isin(words, special)]  # the end of a turn says nothing of a picture
        if len(sample["pixel_values"]) != 1 or not len(words):
            continue
        seen = tower(sample["pixel_values"].to(device)).last_hidden_state[0].float().cpu()
        tokens.append(seen[torch.randperm(len(seen), generator=generator)[:TOKENS]])
        targets.append(table[words.to(table.device)].float().mean(0).cpu())
    tower.to(home)
    if not tokens:
        raise ValueError(
            f"None of {pictures} conversations is about exactly one picture, so the projector has nothing to start "
            "from; set tune.start to random."
        )
    y = torch.stack(targets).repeat_interleave(torch.tensor([len(t) for t in tokens]), dim=0)
    spread, explained = table.float().std().item(), []
    for layers, x in _parts(whole.model.multi_modal_projector, torch.cat(tokens)):
        explained.append(_set(layers, x, y, spread, generator))
    return sum(explained) / len(explained)


def _parts(projector: nn.Module, x: Tensor) -> list[tuple[list[nn.Linear], Tensor]]:
    """Linear layers of each projector with the tokens that it sees."""
    if isinstance(projector, Projector):
        parts = x.split(projector.widths, dim=-1)
        maps: list[nn.Module] = list(projector.maps)
    else:
        parts, maps = (x,), [projector]
    layers = [[m for m in part.modules() if isinstance(m, nn.Linear)] for part in maps]
    return list(zip(layers, parts, strict=True))


def _set(layers: list[nn.Linear], x: Tensor, y: Tensor, spread: float, generator: torch.Generator) -> float:
    if len(layers) == 2:
        first, last = layers
        weight, bias = _whitening(x, first.out_features, generator)
        first.weight.copy_(weight)
        first.bias.copy_(bias)
        x = nn.functional.gelu(x @ weight.T + bias)
    else:
        (last,) = layers
    sums = RidgeSums()
    sums.update(x, y)
    fit = sums.solve(PENALTY)
    weight = fit.y_std[:, None] * fit.weight / fit.x_std
    gain = spread / ((x - fit.x_mean) @ weight.T).std().item()  # the regression shrinks towards the mean; words do not
    last.weight.copy_(gain * weight)
    last.bias.copy_(fit.y_mean - gain * (weight @ fit.x_mean))
    return fit.explained


def _whitening(x: Tensor, directions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leading principal directions of ``x`` at unit variance; more than its width are random mixtures of them."""
    mean = x.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((x - mean).T))
    variance, basis = variance.flip(0).clamp(min=0), basis.flip(1)
    weight = (basis / (variance + _FLOOR * variance.mean()).sqrt()).T[:directions]
    if (more := directions - len(weight)) > 0:
        mixed = torch.randn(more, len(weight), generator=generator) / len(weight) ** 0.5
        weight = torch.cat([weight, mixed @ weight])
    return weight, -(weight @ mean)
