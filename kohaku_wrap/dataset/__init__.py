"""Selections, captions, images out of tars or of folders that one has, and their buckets."""
