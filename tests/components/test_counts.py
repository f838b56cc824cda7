import pytest

from components.counts import counted


@pytest.mark.parametrize(
    ("number", "grouping", "words"), [(1, "", "1 image"), (0, "", "0 images"), (2, "", "2 images"), (1797, "", "1797 images"), (1797, ",", "1,797 images")]
)
def test_one_thing_is_no_plural(number: int, grouping: str, words: str):
    assert counted(number, "image", grouping) == words
