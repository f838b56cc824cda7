"""Autoencoders, which take images to latents and back; the network is diffusers' `AutoencoderKL`."""
