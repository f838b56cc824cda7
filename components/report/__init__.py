"""A page for people about an evaluation or a comparison."""
