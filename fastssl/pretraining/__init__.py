"""Pretraining: its configuration, trainer and step, micro-batches and replay."""
