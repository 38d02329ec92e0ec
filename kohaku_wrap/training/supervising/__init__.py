"""What is done with a run while its attempts run: watched, joined, ended, told."""
