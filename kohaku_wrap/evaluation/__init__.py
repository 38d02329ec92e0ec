"""What a training came to: how often each tag was trained, and what judges say of the pictures."""
