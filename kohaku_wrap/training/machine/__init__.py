"""What a training asks of this machine, before it starts."""
