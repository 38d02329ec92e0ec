"""A merge formula: its text, its tree, and the exact coefficients that it comes to."""
