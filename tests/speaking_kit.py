"""A tiny language model on a tree whose answers differ by question and picture."""

import torch

from llava_integration.models.assemble import assemble


def speaking(tree_of, lm):
    """The model and its processor; special tokens are hardly ever said: an answer is text, and of full length."""
    model, processor = assemble(tree_of("dinov2", "clip", splits=(1, 3), split=3), *lm())
    torch.manual_seed(5)
    with torch.no_grad():
        for p in [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]:
            if p.ndim > 1:
                p.normal_(0, 0.3)
        model.lm_head.weight[:3] = 0
    return model, processor
