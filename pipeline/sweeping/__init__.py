"""A search over settings: trials are ordinary runs, and Ray Tune decides which of them go on."""
