"""What is known of a trainer before a process of it starts: the checkout, its commit and places, what it needs."""
