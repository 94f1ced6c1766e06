import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.plots import (
    MAX_COLUMNS,
    MIN_TILE,
    class_grid,
    grid_choice,
    grid_classes,
    grid_shape,
    label_grid,
)


def test_small_images_are_enlarged_by_whole_pixels_and_keep_their_values():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(8, 1).repeat(8, 2) * 40
    grid = label_grid(images, columns=3, gap=4)
    assert grid.shape == (2 * (MIN_TILE + 4) + 4, 3 * (MIN_TILE + 4) + 4, 3)
    for i in range(6):
        y, x = 4 + i // 3 * (MIN_TILE + 4), 4 + i % 3 * (MIN_TILE + 4)
        assert (grid[y : y + MIN_TILE, x : x + MIN_TILE] == i * 40).all()


@given(st.integers(1, 16), st.integers(1, 64))
def test_a_grid_of_classes_is_about_as_wide_as_high_and_shows_each_image_below_the_name_of_its_class(classes, rows):
    values = np.arange(rows * classes) % 200
    images = values.astype(np.uint8).reshape(-1, 1, 1, 1).repeat(MIN_TILE, 1).repeat(MIN_TILE, 2)
    grid = class_grid(images, classes)
    height, width, _ = grid.shape
    assert height <= 2.1 * width
    assert width <= max(2.3, 1.1 * classes / rows) * height
    tile = MIN_TILE + 4
    starts = [x for x in range(width) if not (grid[4 : 4 + MIN_TILE, x] == 255).all()]
    across = len(starts) // MIN_TILE // classes
    lefts = [x for x in starts if x - 1 not in starts]
    assert len(lefts) == classes * across
    for i, value in enumerate(values):
        row, label = divmod(i, classes)
        y, x = 4 + row // across * tile, lefts[label * across + row % across]
        assert (grid[y : y + MIN_TILE, x : x + MIN_TILE] == value).all()


@pytest.mark.parametrize(
    "images, classes, rows, columns",
    [(32, 2, 6, 6), (64, 2, 8, 8), (64, 1, 8, 8), (64, 10, 7, 10), (30, 10, 3, 10), (48, 3, 8, 6), (2, 1, 1, 2)],
)
def test_few_classes_have_several_columns_each(images, classes, rows, columns):
    apart = 8 * (classes - 1) if columns > classes else 0
    size = (rows * (MIN_TILE + 4) + 4, columns * (MIN_TILE + 4) + 4 + apart, 3)
    assert class_grid(np.zeros((images, 8, 8, 1), np.uint8), classes).shape == size


def test_a_name_stands_above_all_columns_of_its_class_and_has_their_width():
    images = np.full((32, MIN_TILE, MIN_TILE, 1), 200, np.uint8)
    grid = class_grid(images, 2, ("a beach in the sun", "b"))
    shape = class_grid(images, 2).shape
    assert grid.shape == (shape[0] + 18, shape[1], 3)
    dark = np.flatnonzero((grid[:18] < 128).any((0, 2)))
    middle, of_three = shape[1] // 2, 4 + (3 * (MIN_TILE + 4) - 4) / 2
    first, second = dark[dark < middle], dark[dark > middle]
    assert abs((first[0] + first[-1]) / 2 - of_three) < 4
    assert abs((second[0] + second[-1]) / 2 - (shape[1] - of_three)) < 4


def test_names_stand_above_their_columns_and_colours_stay():
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    images[1, ..., 0] = 255
    grid = label_grid(images, columns=2, names=("cat", "dog"))
    assert (grid[18 + 4 + 10, 4 + 64 + 4 + 10] == [255, 0, 0]).all()
    assert grid[:18].min() < 128


def test_a_long_name_stands_in_several_lines_and_none_is_cut_from_the_images():
    images = np.full((1, 64, 64, 3), 255, dtype=np.uint8)
    images[:, 0] = [255, 0, 0]
    one, two = (label_grid(images, columns=1, names=(name,)) for name in ("a circle", "a circle in red"))
    assert len(two) > len(one)
    tops = [np.flatnonzero((grid[:, 30] == [255, 0, 0]).all(1))[0] for grid in (one, two)]
    assert tops[1] - tops[0] == len(two) - len(one)
    assert two[tops[0] - 4 : tops[1] - 2].min() < 128  # the second line


@given(st.integers(0, 3000), st.integers(1, 200))
def test_a_grid_has_no_more_images_than_asked_for_whatever_the_number_of_classes(num_classes, limit):
    rows, columns = grid_shape(num_classes, limit)
    classes = grid_classes(num_classes, limit)
    assert 1 <= rows * columns <= limit
    assert limit < rows * columns + columns
    if num_classes > 1:
        assert len(classes) == columns
    assert list(classes) == sorted(set(classes))
    assert all(0 <= c < num_classes for c in classes)
    assert classes == grid_classes(num_classes, limit)


def test_classes_that_do_not_all_fit_are_spread_over_the_list_and_others_are_all_there():
    assert grid_classes(10, 64) == tuple(range(10))
    spread = grid_classes(1000, 64)
    assert [c * MAX_COLUMNS // 1000 for c in spread] == list(range(MAX_COLUMNS))
    assert spread != grid_classes(1000, 64, seed=1)


@pytest.mark.parametrize("num_classes, shape", [(0, (8, 8)), (1, (8, 8)), (10, (6, 10)), (1000, (4, 16))])
def test_the_columns_of_a_choice_are_classes_with_equally_many_images(num_classes, shape):
    labels = np.random.default_rng(0).permutation(np.arange(20_000) % max(num_classes, 1))
    choice = grid_choice(labels, num_classes, 64)
    assert choice.shape == shape
    assert len(set(choice.ravel())) == choice.size
    if num_classes > 1:
        assert (labels[choice] == np.array(grid_classes(num_classes, 64))).all()


def test_a_choice_from_few_images_leaves_out_classes_without_any_and_stays_even():
    choice = grid_choice(np.array([5, 2, 5, 2, 5, 9]), 10, 64)
    assert choice.tolist() == [[1, 0, 5]]
    assert grid_choice(np.zeros(5, np.int64), 1, 64).tolist() == [[0, 1], [2, 3]]
