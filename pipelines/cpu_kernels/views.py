"""One view of an 8-bit image in one call, from the crop to normalised floats, so that a thread asks for Python's lock once a view."""

from __future__ import annotations

from pipelines.cpu_kernels.colour import adjust_colors, complete
from pipelines.cpu_kernels.crop import resize, scratch_bytes
from pipelines.kernel_cache import njit


def num_scratch(height: int, width: int, size: int) -> int:
    """Return the bytes of scratch memory that a view of S = `size` pixels needs of any image up to this height and width."""
    return 5 * size * size + scratch_bytes(height, width, size)


@njit(nogil=True, cache=True)
def cut_view(pixels, draws, index, cubic, memory, size):
    """Apply what comes before the pointwise operations of `draws[index]` to an image: the crop and the colours.

    Args:
        pixels: contiguous uint8 (H, W, 3).
        cubic: whether the crop is resized with the cubic filter.
        memory: uint8, at least `num_scratch` bytes.
        size: the side of the view, S.

    Returns:
        uint8 (3, S, S); it lies in `memory`.
    """
    draw = draws[index]
    plane = size * size
    view = memory[: 3 * plane].reshape(3, size, size)
    spare = memory[3 * plane : 5 * plane].reshape(2, size, size)
    resize(pixels, draw.top, draw.left, draw.height, draw.width, cubic, memory[5 * plane :], view)
    adjust_colors(view, draws, index, spare)
    return view


@njit(nogil=True, cache=True)
def make_view(pixels, draws, index, cubic, scale, bias, fill, table, memory, out):
    """Make the view of `draws[index]`, without its pointwise operations, and write it to `out`, float32 (3, S, S).

    `pixels`, `memory`: as for `cut_view`; the rest as for `colour.complete`.
    """
    view = cut_view(pixels, draws, index, cubic, memory, out.shape[1])
    complete(view, draws, index, scale, bias, fill, table, out)
