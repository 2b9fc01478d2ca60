import dataclasses
from typing import get_args, get_type_hints

import pytest

from shards.errors import UserError
from shards.images.policy import Policy

CHOICES = [(name, value) for name, kind in get_type_hints(Policy).items() for value in get_args(kind)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quality": 0}, r"--quality is 0, but it must be between 1 and 100"),
        ({"quality": 101}, r"--quality is 101"),
        ({"short_side": -1}, r"--short-side is -1, but it must be at least 0"),
        ({"max_pixels": 0}, r"--max-pixels is 0"),
        ({"min_side": 0}, r"--min-side is 0"),
        ({"min_side": 100, "max_pixels": 9999}, r"--min-side is 100, but --max-pixels 9999 allows no such"),
        ({"store": "jpg"}, r"There is no --store 'jpg'.*jpeg"),
        ({"alpha": "green"}, r"There is no --alpha 'green'"),
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict, words: str):
    with pytest.raises(UserError, match=words):
        Policy(**settings)


@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_every_choice_is_told_of(name: str, value: str):
    default = Policy()
    chosen = dataclasses.replace(default, **{name: value})
    told = chosen.describe()
    assert all(text[0].isupper() and text.endswith(".") for text in told)
    assert (told == default.describe()) == (chosen == default)


def test_numbers_are_told_of_where_they_matter():
    assert "quality 70" in " ".join(Policy(quality=70).describe())
    assert "--quality does nothing" in " ".join(Policy(store="png").describe())
    assert "256 pixels" in " ".join(Policy(short_side=256).describe())
