"""Batches in the making: the stream of threads that fills them, caches, prefetch, and what stands in for bad samples."""
