"""The figures show what they are given, and stay readable whatever it is."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from training.evaluation.bootstrap import Estimate
from training.evaluation.metrics import CalibrationError
from training.evaluation.plots import (
    COLORS,
    ConfusedPair,
    plot_batch_sizes,
    plot_confused_pairs,
    plot_confusion_matrix,
    plot_reliability,
    short_names,
)
from training.evaluation.protocols import PROTOCOLS, Predictions


# Of mathematics, of another script, and long.
NAMES = ["$x^{2", "a_b", "x" * 200]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws with one of the functions and gives the figure; the file must be an image, and nothing be warned of."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), savefig(self, *args, **kwargs))
    )

    def draw(plot, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot(tmp_path / "figure.png", *args)
        with Image.open(tmp_path / "figure.png") as image:
            assert image.format == "PNG" and max(image.size) < 3000
        return figures[-1]

    return draw


def _estimate(value):
    return Estimate(value, value - 0.1, value + 0.05)


class TestBatchSizes:
    def test_curves_with_bands_and_level_lines(self, drawn):
        values = {8: 0.5, 32: 0.6, 16: 0.7}
        curves = {
            "single": {None: _estimate(0.4)},
            "shuffled": {size: _estimate(value) for size, value in values.items()},
        }
        (axes,) = drawn(plot_batch_sizes, curves).axes
        lines = {line.get_label(): line for line in axes.lines}
        assert lines["single"].get_ydata() == pytest.approx([40, 40])
        assert lines["shuffled"].get_xdata().tolist() == [8, 16, 32]
        assert lines["shuffled"].get_ydata() == pytest.approx([50, 70, 60])
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(40) and corners[:, 1].max() == pytest.approx(75)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "32"]

    def test_one_size(self, drawn):
        (axes,) = drawn(plot_batch_sizes, {"sorted": {8: _estimate(0.5)}, "reference": {None: _estimate(0.6)}}).axes
        assert len(axes.containers) == 1, "a bar in place of the band"

    def test_every_protocol_has_a_color(self):
        assert list(COLORS) == list(PROTOCOLS)
        assert len(set(COLORS.values())) == len(COLORS)


class TestConfusionMatrix:
    def test_shares_and_numbers(self, drawn):
        counts = torch.tensor([[3.0, 1, 0], [0, 5, 0], [0, 0, 0]], dtype=torch.float64)
        axes = drawn(plot_confusion_matrix, counts, NAMES, "title $").axes[0]
        shown = axes.images[0].get_array()
        assert shown[:2].tolist() == [[0.75, 0.25, 0], [0, 1, 0]]
        assert np.ma.getmaskarray(shown)[2].all(), "no images, no share"
        assert sorted(text.get_text() for text in axes.texts) == ["1", "3", "5"]
        assert [label.get_text() for label in axes.get_yticklabels()][:2] == NAMES[:2]
        assert len(axes.get_yticklabels()[2].get_text()) < 30

    @pytest.mark.slow
    def test_classes_of_one_name_and_of_long_names_that_begin_alike(self, drawn):
        names = ["crane (0)", *(f"{'x' * 30} {part}" for part in "ab"), "crane (3)", f"{'y' * 30} (4)", "y" * 31]
        short = short_names(names)
        assert short[0] == "crane (0)" and short[3] == "crane (3)" and short[4].endswith("… (4)")
        assert short[1].endswith("… (1)") and short[2].endswith("… (2)")
        assert len(set(short)) == 6 and max(map(len, short)) < 30 and short_names(short) == short
        counts = torch.eye(6, dtype=torch.float64)
        for given, expected in ((names, short), (short, short), (["crane"] * 6, [f"crane ({n})" for n in range(6)])):
            axes = drawn(plot_confusion_matrix, counts, given, "title").axes[0]
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                assert [label.get_text() for label in labels] == expected

    @pytest.mark.slow
    def test_of_many_classes_those_with_errors(self, drawn):
        counts = 10 * torch.eye(300, dtype=torch.float64)
        counts[7, 250] = counts[100, 101] = 4
        axes = drawn(plot_confusion_matrix, counts, [f"class {number}" for number in range(300)], "title").axes[0]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(labels) == 40 and {"class 7", "class 250", "class 100", "class 101"} <= set(labels)
        assert labels[-1] == "261 others"
        shown = axes.images[0].get_array()
        assert shown[labels.index("class 7"), labels.index("class 250")] == pytest.approx(4 / 14)
        assert shown[-1, -1] == 1
        assert np.allclose(shown.sum(1), 1)


def test_reliability_is_that_of_the_calibration_error(drawn):
    labels = torch.randint(0, 4, (300,))
    scores = torch.randn(300, 4) + torch.eye(4)[labels]
    scores[0] = torch.nan
    upper, lower = drawn(
        plot_reliability, {"single": ("single", Predictions.from_scores(scores, labels))}, labels
    ).axes
    line = next(line for line in upper.lines if line.get_label() == "single")
    shares = lower.lines[0].get_ydata()
    assert shares.sum() == pytest.approx(1)
    gaps = np.abs(np.asarray(line.get_xdata()) - np.asarray(line.get_ydata()))
    expected = CalibrationError().compute(predictions=scores, references=labels)["calibration_error"]
    assert (gaps * shares[shares > 0]).sum() == pytest.approx(expected, abs=1e-6)


class TestConfusedPairs:
    @pytest.mark.slow
    def test_a_row_for_each_pair(self, drawn):
        rows = {"first": [1], "first as second": [2, 3], "second as first": [], "second": [4, 5]}
        loaded = []

        def load(row):
            loaded.append(row)
            return Image.new("RGB", (300, 10 + row))

        figure = drawn(plot_confused_pairs, [ConfusedPair(*NAMES[:2], 2, 0.5, rows)] * 6, load, "title")
        assert loaded == [1, 2, 3, 4, 5] * 6
        assert [len(axes.images) for axes in figure.axes] == [1, 0, 1, 1, 0, 0, 1, 1] * 6
        assert figure.axes[2].get_title(loc="left") == "$x^{2\npredicted as a_b: 2"

    def test_without_errors(self, drawn):
        figure = drawn(plot_confused_pairs, [], pytest.fail, "title")
        assert "All predictions are correct" in figure.get_suptitle()
