"""The compact trainer for the same TOMLs, on diffusers, transformers, LyCORIS and accelerate."""
