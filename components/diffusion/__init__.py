"""The forward process, the objective and the samplers."""
