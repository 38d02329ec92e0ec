"""kwrap: a thin wrapper around kohya sd-scripts for large SDXL fine-tunes."""

__version__ = "0.2.0"
"""Its one home: setup.cfg, locks, states and recipes take it from here. 0.1 wrote older forms of lock and ledger."""
