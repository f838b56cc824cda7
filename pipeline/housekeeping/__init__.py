"""What a storage root holds, what of it is needed, and removing the rest."""
