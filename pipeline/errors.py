"""Errors of a run that a person can mend: the command prints their message and exits 2."""


class ConfigError(Exception):
    """Raised when a setting is wrong. The message, or each of several, names the key, the value, and what would be right."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class TrainingError(ConfigError):
    """Raised when a training cannot go on with its settings, whenever it is tried."""


class RegistryError(Exception):
    """Raised when the tracking server or model registry cannot do what was asked. The message says what would be right."""
