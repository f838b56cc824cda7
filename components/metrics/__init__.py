"""Feature extractors and the distances between feature distributions."""
