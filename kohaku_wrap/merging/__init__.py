"""Merges by formula: exact, streaming, with the recipe inside."""
