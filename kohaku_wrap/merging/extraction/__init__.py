"""A change of weights written as a network."""
