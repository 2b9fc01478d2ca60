"""Tests of what a backbone has learned."""
