"""The routes under schemathesis: what fits their OpenAPI description, or just not, is no error of the server.

Rows 13 and 16 of docs/robustness.md.
"""
# ruff: noqa: E402

from collections import Counter

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings

from butterfly_llm.engine import Engine
from butterfly_llm.serve import create_app
from butterfly_llm.slots import stepper_for
from serving import TOKEN, model

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PATHS = {
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/contexts"), ("GET", "/v1/contexts"),
    ("DELETE", "/v1/contexts/{context}"), ("GET", "/v1/states"), ("PUT", "/v1/states/{name}"), ("GET", "/"),
}  # fmt: skip
EXAMPLES = 40


@pytest.fixture(scope="module")
def schema(model):
    with Engine(stepper_for(model, 8), slots=8, contexts=4, slice_chars=64) as engine:
        app = create_app(engine, token=TOKEN, max_chars=8)
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)


def operations(schema):
    return [each.ok() for each in schema.get_all_operations()]


def test_the_description_names_every_route_and_field(schema):
    found = {(each.method.upper(), each.path) for each in operations(schema)}
    assert found == PATHS
    for path, field in (("/v1/completions", "logprobs"), ("/v1/chat/completions", "messages")):
        body = schema.raw_schema["paths"][path]["post"]["requestBody"]
        described = body["content"]["application/json"]["schema"]
        assert field in described["properties"] and described["additionalProperties"] is False


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [("POSITIVE", *each) for each in sorted(PATHS)]
    + [("NEGATIVE", *each) for each in sorted(PATHS) if each[0] == "POST"],
)
def test_no_request_is_an_error_of_the_server(schema, mode, method, path):
    statuses = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def ask(case):
        answer = case.call(headers=HEADERS)
        statuses[answer.status_code] += 1
        assert answer.status_code in (200, 404, 405, 413, 422, 429), (case.body, answer.text)

    ask()
    if mode == "NEGATIVE":
        assert statuses[422] > EXAMPLES / 2 and not statuses[200], statuses
