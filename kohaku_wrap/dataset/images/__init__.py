"""From tars to verified images in numbered folders."""
