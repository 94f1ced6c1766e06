import pytest

from ddpm.image_size import central_part, parse_image_size


@pytest.mark.parametrize("value", [0, -8, 5000, "48x", "x64", "48x64x3", "64px", [], [48, 64, 3], True, 64.0, None, ""])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match="a number of pixels, such as 64, or HEIGHTxWIDTH, such as 48x64, each in 1"):
        parse_image_size(value)


@pytest.mark.parametrize("size", [8, (48, 64), (64, 48), (1, 9), (7, 3)])
@pytest.mark.parametrize("height", [1, 8, 47, 480])
@pytest.mark.parametrize("width", [1, 8, 64, 641])
def test_the_central_part_is_the_largest_of_its_proportions_in_the_middle(size, height, width):
    top, left, rows, columns = central_part(height, width, size)
    wanted = 1 if isinstance(size, int) else size[0] / size[1]
    assert rows == height or columns == width
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert abs(height - rows - 2 * top) <= 1
    assert abs(width - columns - 2 * left) <= 1
    # Within rounding to whole pixels the proportions are those of the size, unless less than a pixel would be left.
    assert abs(rows - columns * wanted) <= max(1, wanted) / 2 + 1e-9 or 1 in (rows, columns)
