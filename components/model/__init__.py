"""The U-Net denoiser, its running averages, and the folder it is stored in."""
