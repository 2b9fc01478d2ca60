"""Describe a shard folder in numbers and in one picture."""
