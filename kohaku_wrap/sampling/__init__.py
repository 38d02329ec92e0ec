"""Pictures from checkpoints: prompts as people write them, sheets of cells, and what a picture says about itself."""
