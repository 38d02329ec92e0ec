"""Programs that run inside the trainer's process; started by kwrap, never imported by it."""
