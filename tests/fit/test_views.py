"""Random views of pictures: of all models alike, the same wherever they are read."""

import pytest
import torch
import torch.nn.functional as F

from vst import FitConfig, fit_stitches
from vst.data.pictures import ImageSet
from vst.data.views import Views, random_view
from vst.fit.teacher import transforms

FIT = {"epochs": 4, "batch_size": 8, "lr": 3e-3, "show_progress": False}


def state_of(tree):
    return {k: v.clone() for k, v in tree.state_dict().items()}


def test_views_are_of_all_models_alike_and_the_same_in_every_process(tree_of, pictures, tmp_path, monkeypatch):
    tree = tree_of("dinov2", "siglip")  # patches of 14 and 16 pixels
    data = ImageSet(pictures, transforms(tree))
    views = Views(data, 3)
    state = torch.get_rng_state()
    one, again, other = views[5], Views(data, 3)[5], views[5 + len(data)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one["trunk"], again["trunk"])
    assert not torch.equal(one["trunk"], other["trunk"])
    seen = [random_view(pictures[5].convert("RGB")) for _ in range(200)]
    assert all(0.3 <= v.width * v.height / (48 * 48) <= 1 for v in seen)
    assert len({v.size for v in seen}) > 20
    for item in (5, 7 + len(data)):  # one view, resized for each and in the normalisation of each
        shown = {}
        for name, t in data.transforms.items():
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (t.mean, t.std))
            shown[name] = F.interpolate((views[item][name] * std + mean)[None], (28, 28), mode="area")
        assert float((shown["trunk"] - shown["target_siglip"]).abs().mean()) < 0.02
    results = {}
    for name, options in (("whole", {}), ("workers", {"workers": 2})):
        tree = tree_of("dinov2", "clip", splits=[2])
        fit_stitches(tree, pictures, augment=True, folder=tmp_path / name, **FIT, **options)
        results[name] = state_of(tree)
    assert all(torch.equal(v, results["workers"][k]) for k, v in results["whole"].items())
    with pytest.raises(ValueError, match="uses no cached targets: leave out cache"):
        FitConfig(augment=True, cache="x")
