"""Training on the workers, and following it from the driver."""
