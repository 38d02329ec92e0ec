"""Selections, captions, images out of tars, and the folder that kohya reads."""
