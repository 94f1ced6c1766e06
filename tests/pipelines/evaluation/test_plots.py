import numpy as np

from pipelines.evaluation.plots import MIN_TILE, label_grid


def test_small_images_are_enlarged_by_whole_pixels_and_keep_their_values():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(8, 1).repeat(8, 2) * 40
    grid = label_grid(images, columns=3, gap=4)
    assert grid.shape == (2 * (MIN_TILE + 4) + 4, 3 * (MIN_TILE + 4) + 4, 3)
    for i in range(6):
        y, x = 4 + i // 3 * (MIN_TILE + 4), 4 + i % 3 * (MIN_TILE + 4)
        assert (grid[y : y + MIN_TILE, x : x + MIN_TILE] == i * 40).all()


def test_names_stand_above_their_columns_and_colours_stay():
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    images[1, ..., 0] = 255
    grid = label_grid(images, columns=2, names=("cat", "dog"))
    assert (grid[18 + 4 + 10, 4 + 64 + 4 + 10] == [255, 0, 0]).all()
    assert grid[:18].min() < 128
