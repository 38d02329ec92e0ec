"""Network files: their modules, and what those change."""
