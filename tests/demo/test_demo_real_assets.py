"""The demo's real encoders and emoji, as they are fetched and converted."""

import json
import time

import numpy as np
import pytest
import torch
from demo_kit import load_strictly
from PIL import Image

from vst.demo import assets, convert, emoji


@pytest.mark.assets
class TestRealAssets:
    @pytest.fixture(scope="class")
    def ready(self):
        return assets.prepare(quiet=True)

    def test_second_call_is_fast(self, ready):
        start = time.perf_counter()
        assert assets.prepare(quiet=True) == ready
        assert time.perf_counter() - start < 1
        assert not (assets.home() / "archives").exists()

    @pytest.mark.parametrize(
        ("folder", "kind", "parameters", "tokens", "width"),
        [
            ("dinov2", "Dinov2Model", 22_056_576, 257, 384),
            ("clip", "CLIPVisionModel", 85_799_424, 197, 768),
        ],
    )
    def test_transformers_loads_it(self, ready, folder, kind, parameters, tokens, width):
        transformers = pytest.importorskip("transformers")
        path = getattr(ready, folder)
        model = load_strictly(getattr(transformers, kind), path)
        assert sum(p.numel() for p in model.parameters()) == parameters
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape == (1, tokens, width)
        preprocessor = json.loads((path / "preprocessor_config.json").read_text())
        mean = {"dinov2": [0.485, 0.456, 0.406], "clip": [0.48145466, 0.4578275, 0.40821073]}
        assert preprocessor["image_mean"] == mean[folder]

    @pytest.mark.slow
    def test_clip_sees_what_is_drawn(self, ready):
        """The same emoji in another style is the nearest far more often than chance: the weights are CLIP's."""
        transformers = pytest.importorskip("transformers")
        model = load_strictly(transformers.CLIPVisionModel, ready.clip)
        chosen = [e.code for e in emoji.load(ready.emoji) if e.category in ("Animals & Nature", "Food & Drink")][::20]
        mean, std = (torch.tensor(convert.CLIP_PREPROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
        features = []
        for style in ("noto", "fluent"):
            shown = [p for p in emoji.pictures(ready.emoji, (style,)) if p.emoji.code in chosen]
            images = np.stack([np.asarray(emoji.open_picture(p, size=224)) for p in shown])
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
            with torch.no_grad():
                features.append(torch.nn.functional.normalize(model(pixels).pooler_output, dim=-1))
        nearest = (features[0] @ features[1].T).argmax(1)
        accuracy = (nearest == torch.arange(len(chosen))).float().mean()
        assert accuracy > 0.7, f"{accuracy:.2f} of {len(chosen)}, where chance is {1 / len(chosen):.2f}"

    def test_emoji(self, ready):
        known = emoji.load(ready.emoji)
        assert len(known) == len({e.code for e in known}) == 1852
        assert {e.category for e in known} >= {"Flags", "Food & Drink"}
        assert "Component" not in {e.category for e in known}
        assert {e.code: e.name for e in known}["1f34e"] == "RED APPLE"
        found = emoji.pictures(ready.emoji)
        assert len(found) == 3 * 1852
        for picture in found[300:303]:
            with Image.open(picture.path) as image:
                assert image.size == ((256, 256) if picture.style == "fluent" else (64, 64))
            assert emoji.open_picture(picture, size=112).size == (112, 112)

    def test_apple_is_red_in_every_style(self, ready):
        apples = [p for p in emoji.pictures(ready.emoji) if p.emoji.code == "1f34e"]
        for picture in apples:
            red, green, blue = np.asarray(emoji.open_picture(picture, size=64))[28:44, 20:44].reshape(-1, 3).mean(0)
            assert red > 1.5 * max(green, blue), picture.style

    def test_subcategory_task(self, ready):
        task = emoji.subcategory_task(ready.emoji)
        assert len(task) == 767
        assert {label for _, label in task} == set(range(20))
        assert sum(e.subcategory == "animal-mammal" for e, _ in task) == 66
