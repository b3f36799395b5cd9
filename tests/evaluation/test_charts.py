"""Charts, checked by reading the figure's own texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iic_dist.evaluation.charts import choices, confusion, render
from iic_dist.evaluation.health import Health, recommend


def _tick_texts(figure: object) -> tuple[list[str], list[str]]:
    axes = figure.axes[0]
    return [t.get_text() for t in axes.get_xticklabels()], [t.get_text() for t in axes.get_yticklabels()]


def test_confusion_puts_clusters_in_hungarian_order() -> None:
    counts = torch.tensor([[0, 1, 8], [6, 0, 0], [1, 9, 0]])
    figure = confusion(counts, ["cat", "dog", "fish"])
    assert _tick_texts(figure) == (["cat", "dog", "fish"], ["1 (6)", "2 (10)", "0 (9)"])
    (image,) = figure.axes[0].get_images()
    expected = np.array([[6, 0, 0], [1, 9, 0], [0, 1, 8]]) / np.array([[6], [10], [9]])
    np.testing.assert_allclose(image.get_array(), expected)
    texts = {(t.get_position(), t.get_text()) for t in figure.axes[0].texts}
    assert texts == {((0, 0), "6"), ((0, 1), "1"), ((1, 1), "9"), ((1, 2), "1"), ((2, 2), "8")}
    assert figure.axes[0].get_title() == "accuracy 0.920 on 25 images"


def test_confusion_puts_clusters_without_class_or_images_last() -> None:
    more_clusters = np.array([[0, 3], [1, 0], [9, 0], [0, 8], [0, 2]])
    assert _tick_texts(confusion(more_clusters, ["a", "b"]))[1] == [
        "2 (9)",
        "3 (8)",
        "1 (1)",
        "0 (3)",
        "4 (2)",
    ]
    fewer_clusters = np.array([[0, 0, 7, 1], [5, 0, 0, 0]])
    assert _tick_texts(confusion(fewer_clusters, list("abcd")))[1] == ["1 (5)", "0 (8)"]
    empty = np.array([[0, 0], [0, 4]])
    assert _tick_texts(confusion(empty, list("ab")))[1] == ["1 (4)", "0 (0)"]


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(10, 10), (70, 10), (5, 30), (150, 120)])
def test_confusion_stays_a_picture_of_sane_size(num_clusters: int, num_classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (num_clusters, num_classes))
    picture = render(confusion(counts, [f"class {c}" for c in range(num_classes)]))
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert max(picture.shape) <= 3000
    assert picture.std() > 1


def test_confusion_draws_no_texts_for_many_classes() -> None:
    assert len(confusion(np.ones((21, 21), int), [str(c) for c in range(21)]).axes[0].texts) == 0


def test_choices_shows_every_k_and_marks_the_recommended_one() -> None:
    healths = [
        Health(f"clustering_{k}", k, share, 1.0, used, [9 * k] * k, 0.9, mean, 0.02, 5)
        for k, share, used, mean in ((5, 0.7, 5, 0.6), (10, 0.9, 10, 0.9), (20, 0.8, 17, 0.7))
    ]
    figure = choices(recommend(healths))
    assert figure.get_suptitle() == "K = 10 is recommended"
    stability, information, sizes = figure.axes
    assert [label.get_text() for label in stability.get_xticklabels()] == ["5", "10", "20"]
    assert information.lines[0].get_ydata().tolist() == [0.7, 0.9, 0.8]
    assert {text.get_text() for text in sizes.texts} == {"5 used", "10 used", "17 used"}
    assert render(figure).shape == (360, 1100, 3)
