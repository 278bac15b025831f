"""Probes against the conditions of their optimum, scores against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score

from vst.data.probes import IGNORED, ClassCounts, dense_probe, linear_probe, picture_counts, score_of_counts


def scenes(pictures=12, grid=4, width=6, side=8, classes=3, seed=0):
    """Tokens that know their patch's class, with noise."""
    rng = torch.Generator().manual_seed(seed)
    patch = torch.randint(0, classes, (pictures, grid, grid), generator=rng)
    tokens = torch.randn(pictures, grid * grid, width, generator=rng)
    tokens[..., :classes] += 3 * torch.nn.functional.one_hot(patch.flatten(1), classes)
    return 5 * tokens + 2, patch.repeat_interleave(side // grid, 1).repeat_interleave(side // grid, 2)


def test_the_dense_probe_is_at_its_optimum():
    tokens, masks = scenes()
    head = dense_probe(tokens, masks, 3, penalty=0.1, iterations=200)
    weight = head.linear.weight.clone().requires_grad_()
    bias = head.linear.bias.clone().requires_grad_()
    z = (tokens - tokens.flatten(0, 1).mean(0)) / tokens.flatten(0, 1).std(0)
    logits = (z @ weight.T + bias).transpose(1, 2).unflatten(2, (4, 4))
    logits = torch.nn.functional.interpolate(logits, size=(8, 8), mode="bilinear")
    loss = torch.nn.functional.cross_entropy(logits, masks) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4
    again = dense_probe(tokens, masks, 3, penalty=0.1, iterations=200)
    assert torch.equal(again.linear.weight, head.linear.weight)


def test_the_dense_probe_finds_what_tokens_know():
    tokens, masks = scenes(pictures=40)
    head = dense_probe(tokens[:30], masks[:30], 3)
    given = head.resized(head(tokens[30:]), masks[30:]).argmax(1)
    assert (given == masks[30:]).float().mean() > 0.85
    ignoring = masks[:30].clone()
    ignoring[:, :4] = IGNORED
    assert torch.isfinite(dense_probe(tokens[:30], ignoring, 3).linear.weight).all()


def test_bad_masks_are_named():
    tokens, masks = scenes()
    with pytest.raises(ValueError, match="12 pictures and 11 masks"):
        dense_probe(tokens, masks[1:], 3)
    with pytest.raises(ValueError, match=r"hold only the class \[2\]"):
        dense_probe(tokens, torch.full_like(masks, 2), 3)


def test_scores_of_counts():
    rng = np.random.default_rng(0)
    wanted = torch.from_numpy(rng.integers(0, 5, (7, 6, 6)))
    given = torch.where(torch.from_numpy(rng.random((7, 6, 6)) < 0.6), wanted, (wanted + 1) % 5)
    counts = picture_counts(given, wanted, 9)
    assert counts.shape == (7, 3, 9)
    flat = wanted.flatten().numpy(), given.flatten().numpy()
    assert score_of_counts(counts.sum(0), "classification") == pytest.approx(accuracy_score(*flat))
    assert score_of_counts(counts.sum(0), "segmentation") == pytest.approx(jaccard_score(*flat, average="macro"))
    own = score_of_counts(counts, "segmentation")
    assert own[3] == pytest.approx(jaccard_score(wanted[3].flatten(), given[3].flatten(), average="macro"))
    streamed = ClassCounts(9)
    streamed.update(given, wanted)
    for kind in ("classification", "segmentation"):
        assert score_of_counts(counts.sum(0), kind) == pytest.approx(streamed.score(kind))
    wanted[0] = IGNORED
    assert not picture_counts(given, wanted, 9)[0].any()


def test_a_linear_probe_tells_its_answers():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 80)
    features = np.eye(3)[labels] + 0.4 * rng.normal(size=(80, 3))
    found = linear_probe(features[:50], labels[:50], features[50:], labels[50:])
    assert found.accuracy == np.mean(found.given == labels[50:]) > 0.7
