"""kohya sd-scripts in its own process: the worker, the corrected loop, and the calls of it that kwrap takes over."""
