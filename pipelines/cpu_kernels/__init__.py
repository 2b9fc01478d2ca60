"""The views of one image in a CPU thread, compiled by Numba: they hold no lock of Python while they work."""
