import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figures as drawing
from benchmarks.figures import JOINTS, decode, heatmaps, hits, render


def test_a_figure_depends_on_the_seed_and_its_row_only() -> None:
    few, many = render(3, seed=5), render(6, seed=5)
    np.testing.assert_array_equal(few.images, many.images[:3])
    np.testing.assert_array_equal(few.keypoints, many.keypoints[:3])
    assert (render(3, seed=6).images != few.images).any(axis=(1, 2, 3)).all()
    assert (many.images[0] != many.images[1]).any()


@pytest.mark.parametrize("side", [32, 64, 96])
def test_every_joint_lies_in_the_image(side: int) -> None:
    figures = render(50, side=side)
    assert figures.images.shape == (50, side, side, 3)
    assert figures.images.dtype == np.uint8
    assert figures.keypoints.shape == (50, len(JOINTS), 2)
    assert figures.keypoints.min() >= 0
    assert figures.keypoints.max() <= side - 1
    head, neck = figures.keypoints[:, JOINTS.index("head")], figures.keypoints[:, JOINTS.index("neck")]
    np.testing.assert_allclose(figures.heads, np.hypot(*(head - neck).T), rtol=1e-6)


def test_keypoints_are_where_the_limbs_are_drawn() -> None:
    figures = render(100)

    def brightness(joint: str) -> np.ndarray:
        x, y = figures.keypoints[:, JOINTS.index(joint)].round().astype(int).T
        return figures.images[np.arange(100), y, x].mean(-1)

    # The left trousers are 0.55 as bright as the right ones of the same figure, wherever it stands.
    ratio = brightness("left_ankle") / brightness("right_ankle")
    assert np.median(ratio) == pytest.approx(0.55, abs=0.1)


def test_an_image_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="side=16"):
        render(1, side=16)


def test_a_heatmap_is_a_gaussian_around_the_keypoint() -> None:
    maps = heatmaps(np.array([[[25.5, 33.5]]], np.float32), 64, 16, sigma=1.5)
    assert maps.shape == (1, 1, 16, 16)
    # A cell is 4 pixels wide: 25.5 is 26 pixels from the left edge, 6.5 cells, and cell 6 has its centre at 6.5.
    for row in range(16):
        for column in range(16):
            squared = (column - 6) ** 2 + (row - 8) ** 2
            assert maps[0, 0, row, column] == pytest.approx(np.exp(-squared / (2 * 1.5**2)), rel=1e-4)


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0])
def test_decoding_a_drawn_heatmap_gives_the_keypoint_back(sigma: float) -> None:
    figures = render(40)
    found = decode(heatmaps(figures.keypoints, 64, 16, sigma=sigma), 64)
    np.testing.assert_allclose(found, figures.keypoints, atol=1e-3)


def test_decoding_stays_in_the_image_for_any_map() -> None:
    maps = np.random.default_rng(0).normal(size=(5, 14, 8, 8)).astype(np.float32)
    maps[0] = 0
    maps[1] = -1
    found = decode(maps, 32)
    assert np.isfinite(found).all()
    assert found.min() >= -0.5
    assert found.max() <= 31.5


def test_a_joint_is_hit_within_half_a_head() -> None:
    figures = render(4)
    towards = figures.heads[:, None, None] * np.array([0.6, 0.8], np.float32)  # a vector of one head length
    assert hits(figures.keypoints + 0.49 * towards, figures).all()
    assert not hits(figures.keypoints + 0.51 * towards, figures).any()
    assert hits(figures.keypoints + 0.51 * towards, figures, threshold=0.6).all()


def test_the_file_holds_three_splits_without_a_figure_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.npz"
    sizes = ["--train", "3", "--val", "2", "--test", "2"]
    monkeypatch.setattr(sys, "argv", ["figures", "--out", str(out), "--side", "32", *sizes])
    drawing.main()
    with np.load(out) as arrays:
        assert arrays["x_train"].shape == (3, 32, 32, 3)
        assert arrays["y_train"].shape == (3, len(JOINTS), 2)
        assert arrays["length_val"].shape == (2,)
        np.testing.assert_allclose(
            np.linalg.norm(arrays["y_val"][:, 0] - arrays["y_val"][:, 1], axis=1), arrays["length_val"]
        )
        images = np.concatenate([arrays[f"x_{split}"] for split in ("train", "val", "test")])
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7
