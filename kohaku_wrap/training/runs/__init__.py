"""A run and its attempts: made, launched, watched, resumed."""
