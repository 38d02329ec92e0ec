"""Template layers, the trainer's options and their check, rendering and the step plan."""
