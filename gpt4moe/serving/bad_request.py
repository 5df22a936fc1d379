"""What a client did wrong."""


class BadRequest(Exception):
    """Becomes an answer of status 4xx.

    Args:
        field: of the body that is wrong, if it is one.
    """

    def __init__(self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.field, self.status, self.code = message, field, status, code
