"""Runs: what they write down, how they are started, watched, compared and proved, and the engines that train."""
