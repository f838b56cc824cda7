"""The error that names a bad file."""


class DataError(Exception):
    """Raised when an image, a folder or a dataset cannot be used. The message names it and says what would be right.

    Attributes:
        reason: a short class for counting, such as `truncated` or `not_an_image`.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])
