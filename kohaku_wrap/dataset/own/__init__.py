"""Folders of images and captions that one has, made into what both engines train from."""
