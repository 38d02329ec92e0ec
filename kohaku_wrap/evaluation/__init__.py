"""What a training came to: how often each tag was trained, the loss on other posts, and what judges say of pictures."""
