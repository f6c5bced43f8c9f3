"""What is wrong with a request, in the shape that OpenAI's clients know.

A mistake of who asks is a `RequestError` and costs an answer of status 4xx; it is no `UserError`, which is a mistake of
who starts the server.
"""

from typing import Any

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's names of errors by status; other ones are an invalid request, from 500 on a server's error."""
LONGEST = 80
"""Characters of a value that a message repeats."""


class RequestError(Exception):
    """A request that is not answered.

    Args:
        message: what is wrong, and what would be right.
        param: the field of the request.
        status: HTTP status.
        code: OpenAI's name of what is wrong, where it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """Return the answer."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def shown(value: object) -> str:
    """Return a value as a message repeats it."""
    text = repr(value[:LONGEST] if isinstance(value, str | list) else value)
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
