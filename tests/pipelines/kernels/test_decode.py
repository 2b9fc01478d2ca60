import numpy as np
import pytest
import torch

from pipelines.kernels import decode, reference
from tests.pictures import encoded, photo

FILES = {
    "colour JPEG": encoded(photo(61, 47), "JPEG", quality=85),
    "4:4:4 JPEG": encoded(photo(61, 47), "JPEG", quality=85, subsampling=0),
    "progressive JPEG": encoded(photo(61, 47), "JPEG", progressive=True),
    "grey JPEG": encoded(photo(61, 47).convert("L"), "JPEG"),
    "PNG": encoded(photo(61, 47), "PNG"),
    "grey PNG": encoded(photo(61, 47).convert("L"), "PNG"),
    "WebP": encoded(photo(61, 47), "WEBP", quality=80),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("decoder", [decode.decode_rgb, decode._decode_with_pillow])
def test_pixels_are_those_of_pillow(name, decoder):
    pixels = decoder(memoryview(FILES[name]))
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(reference.decode(FILES[name])))


@pytest.mark.parametrize("decoder", [decode.decode_rgb, decode._decode_with_pillow])
@pytest.mark.parametrize("data", [b"", b"junk" * 50, FILES["PNG"][:300]])
def test_damaged_files_raise(decoder, data):
    with pytest.raises(RuntimeError):
        decoder(memoryview(data))


def test_without_the_operator_pillow_decodes(monkeypatch):
    monkeypatch.setattr(decode, "_operator", lambda: None)
    assert decode.decode_rgb(memoryview(FILES["PNG"])).shape == (3, 47, 61)


def test_where_the_library_cannot_be_loaded_alone_torchvision_is_imported(monkeypatch):
    tried = []

    def refuse(path):
        tried.append(path)
        raise OSError(f"Could not load this library: {path}")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    decode._operator.cache_clear()
    try:
        assert decode.decode_rgb(memoryview(FILES["PNG"])).shape == (3, 47, 61)
    finally:
        decode._operator.cache_clear()
    assert tried
