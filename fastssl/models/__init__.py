"""Backbones by name, their settings, and activation checkpointing."""
