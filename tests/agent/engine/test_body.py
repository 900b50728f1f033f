"""What the agent changes in a body, and that it changes nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.engine.body import BodyInvalid, PreparedBody, prepare_body
from xim_protocol.routes import ROUTES_BY_PATH

CHAT = "/v1/chat/completions"

NAMES = st.one_of(st.sampled_from(["model", "stream", "cache_salt", "stream_options", "messages"]), st.text())
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=10)
BODIES = st.builds(
    lambda fields, ascii_only, indent: json.dumps(fields, ensure_ascii=ascii_only, indent=indent).encode(),
    st.dictionaries(NAMES, VALUES),
    st.booleans(),
    st.sampled_from([None, 2]),
)


def salt(client: str | None) -> str:
    return f"salt({client})"


def prepared(body: bytes, path: str = CHAT) -> PreparedBody:
    return prepare_body(body, route=ROUTES_BY_PATH[path], model="served", salt=salt)


def engine_sees(fields: object, path: str = CHAT) -> dict[str, Any]:
    seen = json.loads(prepared(json.dumps(fields).encode(), path).body)
    assert isinstance(seen, dict)
    return seen


def test_model_and_salt_are_set_and_nothing_else() -> None:
    sent = {"model": "any", "messages": [{"role": "user", "content": "hé\u2028 \U0001f600"}], "seed": 7, "top_p": 0.1}
    assert engine_sees(sent) == {**sent, "model": "served", "cache_salt": "salt(None)"}


def test_a_clients_salt_is_folded_in() -> None:
    assert engine_sees({"cache_salt": "mine"})["cache_salt"] == "salt(mine)"


def test_of_duplicate_salts_none_gets_through() -> None:
    body = prepared(b'{"cache_salt":"victim","model":"m","cache_salt":"last"}').body
    assert b"victim" not in body
    assert json.loads(body)["cache_salt"] == "salt(last)"


@pytest.mark.parametrize("sent", ["", 5, False, [], {}])
def test_a_salt_that_the_engine_refuses_is_left_for_it_to_refuse(sent: object) -> None:
    assert engine_sees({"cache_salt": sent})["cache_salt"] == sent


def test_an_error_counts_the_fields_that_the_client_sent() -> None:
    error = (
        b"{'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict of %d items>'}"
        b"{'type': 'missing', 'loc': 'body.messages.0.role', 'msg': 'Field required', 'input': '<dict of 2 items>'}"
    )
    body = prepared(b'{"seed":1}')
    assert (body.sent_fields, body.engine_fields) == (1, 3)
    assert body.restore_error(error % 3) == error % 1
    # On /v1/responses the engine counts a field of its own.
    assert body.restore_error(error % 4) == error % 2
    assert prepared(b'{"model":"m"}', "/tokenize").restore_error(error % 1) == error % 1


def test_a_route_that_knows_no_salt_gets_none() -> None:
    assert engine_sees({"input": "x", "cache_salt": "c"}, "/v1/embeddings") == {
        "input": "x",
        "cache_salt": "c",
        "model": "served",
    }


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_a_stream_is_asked_for_its_usage(options: object) -> None:
    body = prepared(json.dumps({"stream": True, "stream_options": options}).encode())
    assert json.loads(body.body)["stream_options"]["include_usage"] is True
    assert body.take_usage_out
    assert body.stream


@pytest.mark.parametrize("yes", [1, 1.0, "true", "True", "1", "yes", "on", "t", "Y"])
def test_a_stream_that_is_asked_for_in_another_word_is_asked_for_its_usage(yes: object) -> None:
    body = prepared(json.dumps({"stream": yes}).encode())
    assert json.loads(body.body)["stream_options"] == {"include_usage": True}
    assert body.take_usage_out
    assert body.stream


@pytest.mark.parametrize("no", [0, 0.0, "false", "FALSE", "0", "no", "off", "f", "N"])
def test_in_whichever_word_the_client_wants_no_usage_the_engine_is_asked(no: object) -> None:
    body = prepared(json.dumps({"stream": True, "stream_options": {"include_usage": no}}).encode())
    assert json.loads(body.body)["stream_options"] == {"include_usage": True}
    assert body.take_usage_out
    assert not prepared(json.dumps({"stream": no}).encode()).stream


@pytest.mark.parametrize("neither", [2, 0.5, "", "maybe", " true", [], [True], {}, {"a": 1}])
def test_what_is_no_word_for_a_stream_is_left_for_vllm_to_refuse(neither: object) -> None:
    sent = {"stream": neither}
    assert engine_sees(sent)["stream"] == neither
    assert "stream_options" not in engine_sees(sent)


def test_a_client_that_asked_keeps_its_usage() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = prepared(json.dumps({"stream": True, "stream_options": options}).encode())
    assert json.loads(body.body)["stream_options"] == options
    assert not body.take_usage_out


def test_our_own_asking_does_not_switch_on_usage_in_every_event() -> None:
    sent = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert engine_sees(sent)["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}


@pytest.mark.parametrize("options", ["x", 5, [], {"include_usage": "maybe"}])
def test_options_that_vllm_refuses_reach_it(options: object) -> None:
    body = prepared(json.dumps({"stream": True, "stream_options": options}).encode())
    assert json.loads(body.body)["stream_options"] == options
    assert not body.take_usage_out


def test_an_answer_that_is_no_stream_is_not_asked() -> None:
    assert "stream_options" not in engine_sees({"stream": False})
    assert not prepared(b"{}").stream


def test_the_responses_api_reports_by_itself() -> None:
    body = prepared(b'{"stream":true}', "/v1/responses")
    assert body.stream
    assert not body.take_usage_out
    assert b"stream_options" not in body.body


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b'"x"', b"{", b"\xff{}", b'{"a":"\xff"}', b'{"a":[1,]}', b'{"a":01}', b"[" * 100_000),
        *(
            b'{"a":' * 100_000,
            b'{"cache_salt":' + b"9" * 5000 + b"}",
            b'{"stream":true,"stream_options":' + b"9" * 5000 + b"}",
        ),
    ],
)
def test_what_is_no_json_object_is_refused_and_not_repeated(body: bytes) -> None:
    with pytest.raises(BodyInvalid) as refused:
        prepared(body)
    assert "999" not in refused.value.detail


def test_odd_but_legal_json_keeps_its_meaning() -> None:
    body = b'\xef\xbb\xbf{"a":"\\ud800","b":1e400,"c":0.1,"d":12345678901234567890}'
    seen = json.loads(prepared(body).body)
    assert (seen["a"], seen["b"], seen["c"], seen["d"]) == ("\ud800", float("inf"), 0.1, 12345678901234567890)


def test_values_reach_the_engine_as_they_were_written() -> None:
    body = prepared(
        b'{"temperature" : 0.10, "big":123456789012345678901234567890, "text":"\\u00e9\xc3\xa9", "e":1E-7}'
    ).body
    assert b'"temperature":0.10,"big":123456789012345678901234567890,"text":"\\u00e9\xc3\xa9","e":1E-7' in body


@given(BODIES)
def test_the_engine_sees_the_clients_fields_and_our_three(body: bytes) -> None:
    sent = json.loads(body)
    seen = json.loads(prepared(body).body)
    ours = {"model", "cache_salt", "stream_options"}
    assert {name: seen[name] for name in seen.keys() - ours} == {name: sent[name] for name in sent.keys() - ours}
    assert seen["model"] == "served"
    if sent.get("cache_salt") is None or (isinstance(sent["cache_salt"], str) and sent["cache_salt"]):
        assert seen["cache_salt"] == f"salt({sent.get('cache_salt')})"
    else:
        assert seen["cache_salt"] == sent["cache_salt"]
    assert (prepared(body).sent_fields, prepared(body).engine_fields) == (len(sent), len(seen))


@given(BODIES, st.data())
def test_however_a_body_is_broken_no_foreign_salt_gets_through(body: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body)))
    broken = (
        body[:at] + data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"}", b'{"', b",", b"\\"])) + body[at:]
    )
    try:
        seen = json.loads(prepared(broken).body)
    except BodyInvalid:
        return
    assert seen["model"] == "served"
    assert (
        str(seen["cache_salt"]).startswith("salt(") or not isinstance(seen["cache_salt"], str) or not seen["cache_salt"]
    )


@given(st.text(st.characters(categories=["Cs"]), min_size=1, max_size=1))
def test_names_and_values_that_unicode_forbids_stay(odd: str) -> None:
    seen = json.loads(prepared(json.dumps({odd: odd}).encode()).body)
    assert seen[odd] == odd


@pytest.mark.parametrize("field", ['"stream": %s', '"stream": 1, "stream_options": {"a": %s}', '"cache_salt": %s'])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_at_any_depth_is_taken_or_refused(field: str, opening: str, closing: str) -> None:
    """What one reader still takes may be too deep for the next: by how much depends on the caller's own depth."""
    refused: dict[int, str] = {}
    for depth in range(1, 1100):
        body = "{" + field % (opening * depth + "1" + closing * depth) + "}"
        try:
            prepared(body.encode())
        except BodyInvalid as error:
            refused[depth] = error.detail
    assert set(refused.values()) <= {"the body is nested too deeply"}
    assert list(refused) == list(range(min(refused, default=1100), 1100))
