"""Verify a shard folder, locate the damage, and repair it."""
