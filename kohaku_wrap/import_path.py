"""The import path of a program that was started with `python -m`: without the folder in which one stands.

Imports nothing but what every Python has loaded at its start, not even `__future__`, as the current folder could bring
its own.
"""

# ruff: noqa: PTH100, PTH109, PTH117 (pathlib is not loaded yet)

import os
import sys


def drop_current_folder() -> None:
    """Take off the import path what `python -m` and empty or relative entries of PYTHONPATH have put there."""
    try:
        here = os.getcwd()
    except OSError:  # a folder that was removed; Python has not put it there either
        return
    given = os.environ.get("PYTHONPATH", "")
    entries = given.split(os.pathsep) if given else []
    # Python has made them absolute by now.
    dropped = {os.path.abspath(entry) for entry in entries if not os.path.isabs(entry)}
    dropped -= {os.path.normpath(entry) for entry in entries if os.path.isabs(entry)}
    first = 1 if sys.path and sys.path[0] in ("", here) and not sys.flags.safe_path else 0
    sys.path[:] = [entry for entry in sys.path[first:] if os.path.isabs(entry) and entry not in dropped]
