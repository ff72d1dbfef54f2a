"""Comparing a catalog with its bucket, and bringing the two together again."""
