"""What a person or a scheduler starts: the `ddpm` command and its presets."""
