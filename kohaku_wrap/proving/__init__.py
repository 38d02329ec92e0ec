"""Exact resume proved on this machine: real trainings killed, resumed and compared, and what each option does."""
