"""What is done with a run: created, resumed, watched, joined, ended, verified."""
