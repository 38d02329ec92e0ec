"""kwrap: a thin wrapper around kohya sd-scripts for large SDXL fine-tunes."""

__version__ = "0.1.0"
