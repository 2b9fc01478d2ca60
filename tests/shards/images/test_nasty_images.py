import importlib.util

import pytest

from shards.images.policy import Policy
from shards.images.proof import prove
from tests.shards.nasty import PAGE, cases, matches, outcome, page


@pytest.mark.parametrize("name", cases())
def test_what_happens_to_a_nasty_image(name: str):
    case = cases()[name]
    found = outcome(case.data, case.name, Policy())
    assert matches(found, case.outcome), found
    for (key, value), expected in case.policies.items():
        found = outcome(case.data, case.name, Policy(**{key: value}))
        assert matches(found, expected), (key, value, found)


@pytest.mark.parametrize("name", cases())
def test_what_is_stored_is_kept_the_second_time(name: str):
    case = cases()[name]
    if case.outcome.startswith("refused"):
        pytest.skip("it is refused")
    stored = prove(case.data, case.name)
    again = prove(stored.data, f"a.{stored.ext}")
    assert (again.data, again.how) == (stored.data, "kept")
    assert (again.width, again.height, again.channels) == (stored.width, stored.height, stored.channels)
    assert again.dtype == stored.dtype
    # JPEG loses something, and so gets another hash.
    assert stored.how.startswith("kept") or stored.ext == "jpg" or again.pixels_hash == stored.pixels_hash


def test_the_page_tells_what_the_tests_check():
    if importlib.util.find_spec("rasterio") is None:
        pytest.skip("the page also tells of images that rasterio makes")
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.shards.nasty`"
