"""How samples are drawn and measured: actors, features, numbers, tests, pictures."""
