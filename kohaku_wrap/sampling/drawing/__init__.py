"""What runs inside a process that draws: models, text encoding, samplers; only this imports torch and diffusers."""
