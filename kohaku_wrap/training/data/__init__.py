"""What is trained, and in which order: columns of captions, buckets in batches, and the draws of each item."""
