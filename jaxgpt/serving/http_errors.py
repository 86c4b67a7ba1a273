"""What goes wrong with a request, as OpenAI's clients expect to be told of it."""


class ApiError(Exception):
    """A request that is not answered: an HTTP status, and a body of OpenAI's form.

    https://platform.openai.com/docs/guides/error-codes
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        error = {"message": self.message, "type": _TYPES.get(self.status, _kind(self.status))}
        return {"error": {**error, "param": self.param, "code": self.code}}


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def _kind(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def too_busy(waiting: int, seconds: int) -> ApiError:
    return ApiError(
        429,
        f"{waiting} requests are waiting, which is as many as may; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def not_ready(state: str) -> ApiError:
    """`state`: "loading", "stopping" or "failed"."""
    message = {
        "loading": "the model is being loaded; try again soon",
        "stopping": "the server is stopping; ask another one",
        "failed": "the server has failed and is about to end",
    }[state]
    return ApiError(503, message, code=state, headers={"Retry-After": "2"})


def too_slow(seconds: float) -> ApiError:
    # Asking again would take as long again: OpenAI's clients would otherwise try twice more.
    headers = {"x-should-retry": "false"}
    return ApiError(504, f"the answer was not ready after {seconds:g} s", code="deadline", headers=headers)
