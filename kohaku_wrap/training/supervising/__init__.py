"""What is done with a run while its attempts run, watched, joined, ended and shown; and a run renamed or removed."""
