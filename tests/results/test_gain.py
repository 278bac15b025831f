"""The share of a gain: by hand, against a naive bootstrap, against the closed form of a difference's error."""

from functools import partial

import numpy as np
import pytest

from vst.data.probes import score_of_counts
from vst.results.gain import bootstrap_share_of_gain, share_of_gain


class TestGain:
    def test_the_papers_table(self):
        """VST-14 keeps 84 % where one model has 60.0, both have 65.0 and it has 64.2."""
        found = share_of_gain({0: 0.642}, {0: 0.60}, {0: 0.65})
        assert found.share == pytest.approx(0.84)
        assert found.share_error is None
        assert str(found) == "84 %"

    def test_means_and_errors_over_paired_seeds(self):
        one, full = {0: 0.5, 1: 0.4, 2: 0.6}, {0: 0.6, 1: 0.5, 2: 0.7}
        found = share_of_gain({0: 0.55, 1: 0.47, 2: 0.66}, one, full)
        assert found.gain == pytest.approx(0.1)
        assert found.gain_error == pytest.approx(0, abs=1e-12)
        assert found.share == pytest.approx(0.6)
        assert found.share_error == pytest.approx(0.01 / 3**0.5 / 0.1)
        assert share_of_gain(one, one, full).share == pytest.approx(0)
        assert share_of_gain(full, one, full).share == pytest.approx(1)

    @pytest.mark.parametrize(
        ("one", "full", "noise"),
        [
            ({0: 0.5}, {0: 0.5}, 0.0),
            ({0: 0.5}, {0: 0.4}, 0.0),
            ({0: 0.5, 1: 0.6}, {0: 0.6, 1: 0.58}, 0.0),  # +0.04 +- 0.06
            ({0: 0.5}, {0: 0.55}, 0.06),
        ],
    )
    def test_no_ratio_over_a_gain_within_noise(self, one, full, noise):
        found = share_of_gain(one, one, full, noise=noise)
        assert found.share is None
        assert "not distinguishable from zero" in str(found)
        assert ("noise 6.0" in str(found)) == (noise == 0.06)

    def test_seeds_must_meet(self):
        assert share_of_gain({0: 0.6, 1: 0.1}, {0: 0.5}, {0: 0.6, 2: 0.9}).seeds == 1
        with pytest.raises(ValueError, match="one seed in common"):
            share_of_gain({0: 0.5}, {1: 0.5}, {1: 0.6})


accuracy = partial(score_of_counts, kind="classification")
mean_iou = partial(score_of_counts, kind="segmentation")


def answers(rng, n, p):
    """Counts of a classifier of four classes that is right with probability p."""
    wanted = rng.integers(0, 4, n)
    given = np.where(rng.random(n) < p, wanted, (wanted + 1) % 4)
    return counts_of(given, wanted)


def counts_of(given, wanted):
    eye = np.eye(4, dtype=int)
    return np.stack([eye[wanted] * (given == wanted)[:, None], eye[wanted], eye[given]], 1)


class TestBootstrap:
    def test_the_interval_of_a_gain_is_that_of_its_standard_error(self):
        rng = np.random.default_rng(0)
        one, full, tower = (answers(rng, 4000, p) for p in (0.5, 0.7, 0.6))
        found = bootstrap_share_of_gain([tower], [one], [full], accuracy)
        right = [c[:, 0].sum(1) for c in (one, full, tower)]
        difference = right[1] - right[0]
        assert found.gain == pytest.approx(difference.mean())
        half = 1.96 * difference.std() / 4000**0.5
        assert found.gain_low == pytest.approx(found.gain - half, abs=0.1 * half)
        assert found.gain_high == pytest.approx(found.gain + half, abs=0.1 * half)
        assert found.share == pytest.approx((right[2] - right[0]).mean() / difference.mean())
        assert found.low < found.share < found.high

    @pytest.mark.parametrize("score", [accuracy, mean_iou])
    def test_draws_are_those_of_a_naive_bootstrap(self, score):
        rng = np.random.default_rng(1)
        towers = [[answers(rng, 60, p), answers(rng, 40, p)] for p in (0.75, 0.6, 0.9)]
        found = bootstrap_share_of_gain(*towers, score, draws=300, seed=5)
        rng, gains, shares = np.random.default_rng(5), [], []
        weights = [rng.multinomial(n, [1 / n] * n, size=300) for n in (60, 40)]
        for draw in range(300):
            scores = []
            for own in towers:
                parts = [np.repeat(c, w[draw], 0).sum(0) for c, w in zip(own, weights, strict=True)]
                scores.append(np.mean([score(p) for p in parts]))
            gains.append(scores[2] - scores[1])
            shares.append((scores[0] - scores[1]) / gains[-1])
        assert np.quantile(gains, [0.025, 0.975]) == pytest.approx([found.gain_low, found.gain_high])
        assert np.quantile(shares, [0.025, 0.975]) == pytest.approx([found.low, found.high])

    def test_the_same_pictures_for_all(self):
        """Towers that differ on no picture have no uncertain difference, however uncertain their scores."""
        rng = np.random.default_rng(2)
        one, full = answers(rng, 50, 0.3), answers(rng, 50, 0.9)
        found = bootstrap_share_of_gain([full], [one], [full], accuracy)
        assert (found.share, found.low, found.high) == (1, 1, 1)
        zero = bootstrap_share_of_gain([one], [one], [full], accuracy)
        assert (zero.share, zero.low, zero.high) == (0, 0, 0)

    def test_no_share_of_a_gain_that_reaches_zero(self):
        rng = np.random.default_rng(3)
        one, full = answers(rng, 40, 0.6), answers(rng, 40, 0.62)
        found = bootstrap_share_of_gain([full], [one], [full], accuracy)
        assert found.gain_low <= 0
        assert (found.share, found.low, found.high) == (None, None, None)
        assert "not distinguishable from zero" in str(found)

    def test_pictures_must_meet(self):
        rng = np.random.default_rng(4)
        with pytest.raises(ValueError, match="expected the same pictures"):
            bootstrap_share_of_gain([answers(rng, 5, 0.5)], [answers(rng, 6, 0.5)], [answers(rng, 5, 0.5)], accuracy)
