"""vLLM's errors in vLLM's words (0.32): which status, which envelope, which type."""

from http import HTTPStatus

from tests.support.fake_vllm_dialect import encoded

ANTHROPIC = "/v1/messages"


class Refusal(Exception):
    """The request is answered with an error. `kind` is the type in the body, by default the status's phrase."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.kind = status, param, kind or HTTPStatus(status).phrase

    def body(self, path: str) -> bytes:
        """The body of the answer; the messages route has Anthropic's envelope for what its handler finds."""
        if self.status == HTTPStatus.UNAUTHORIZED:
            return encoded({"error": "Unauthorized"})
        if path == ANTHROPIC and self.kind != HTTPStatus(self.status).phrase:
            return encoded({"type": "error", "error": {"type": self.kind, "message": str(self)}})
        return encoded({"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}})


def invalid(kind: str, where: str, message: str) -> Refusal:
    """The form of the body is wrong, as the web framework finds it before vLLM does."""
    location = f"body.{where}" if where else "body"
    details = {"type": kind, "loc": location, "msg": message}
    return Refusal(400, f"1 validation error:\n  {details}", location)


def not_json_type() -> Refusal:
    """vLLM answers a wrong content type as a validation error: 400, not 415."""
    return Refusal(400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed")


def bad_value(message: str, param: str) -> Refusal:
    """A value is out of its range."""
    return Refusal(400, message, param, "BadRequestError")


def no_such_model(model: object) -> Refusal:
    """The model is not one of the served names."""
    return Refusal(404, f"The model `{model}` does not exist.", "model", "NotFoundError")
