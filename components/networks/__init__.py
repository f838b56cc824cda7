"""The networks that estimate what a diffusion process asks for: each kind in a module or folder of its own, beside its settings."""
