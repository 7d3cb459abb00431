"""Endpoints: every item gets the vector that the service defines for it, whatever fails in between.

The service is a real HTTP server in a thread; faults are put into its way one by one.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load
from pipeline.embeddings import EmbeddingStore, read_table, vectors_of
from pipeline.encoders import Item, endpoint
from pipeline.encoders.endpoint import EndpointEncoder, Params
from pipeline.pieces import available
from pipeline.plan import make_plan
from pipeline.support import http
from pipeline.support.errors import UserError
from pipeline.workers import run_stage
from tests.fault_server import KEY, Fault, FaultServer, Handler, answering, cut, dropped, running

D = 8
RED = Image.new("RGB", (6, 4), (250, 10, 10))
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 20, 3), dtype=np.uint8))


def vector_of(sent: Any, fields: dict[str, Any]) -> np.ndarray:
    """The service's model: numbers from the hash of what it is sent, fields of the request included."""
    seed = sha256(json.dumps([sent, fields], sort_keys=True).encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "big")).normal(size=D).astype(np.float32)


class Service(FaultServer):
    path = "/v1/embeddings"
    packed = False

    @property
    def url(self) -> str:
        return f"{self.address}{self.path}"

    def defined(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in no particular order, as services are free to give it; numbers, or base64."""
        fields = dict(body)
        inputs = fields.pop("input", None) or fields.pop("inputs")
        vectors = [vector_of(sent, fields) for sent in inputs]
        shown = [base64.b64encode(each.astype("<f4").tobytes()).decode() if self.packed else each.tolist()
                 for each in vectors]
        rows = [{"object": "embedding", "index": number, "embedding": each} for number, each in enumerate(shown)]
        return {"object": "list", "data": rows[::-1], "model": body["model"], "usage": {"total_tokens": 3}}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with running(Service(), monkeypatch) as found:
        yield found


def params_of(service: Service, style: str = "openai", **options: Any) -> Params:
    return Params(style, service.url, "a-model", D, key_variable="TEST_KEY", **options)


def encoder_of(service: Service, style: str = "openai", **options: Any) -> EndpointEncoder:
    return endpoint.build(params_of(service, style, **options), "cpu", "fp32")


def encoded(encoder: EndpointEncoder, items: list[Item]) -> np.ndarray:
    prepared = pickle.loads(pickle.dumps([encoder.prepare(item) for item in items]))
    return encoder.encode(prepared)


def texts(count: int) -> list[Item]:
    return [Item(f"text {number}", None) for number in range(count)]


def expected_texts(count: int, **fields: Any) -> np.ndarray:
    return np.stack([vector_of(f"text {number}", {"model": "a-model", **fields}) for number in range(count)])


def packed(image: Image.Image, kind: str = "png", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"items_per_request": 1, "concurrency": 8}, {"concurrency": 1},
                                     {"items_per_request": 3, "concurrency": 16}])
def test_vectors_are_the_services_own_in_order(service: Service, is_packed: bool, options: dict[str, Any]) -> None:
    service.packed = is_packed
    found = encoded(encoder_of(service, **options), texts(50))
    assert found.dtype == np.float32 and np.array_equal(found, expected_texts(50))
    size = options.get("items_per_request", 16)
    assert len(service.bodies) == -(-50 // size) and max(len(body["input"]) for body in service.bodies) == size


def test_requests_are_under_way_at_the_same_time_and_no_more_than_allowed(service: Service) -> None:
    under_way, most = [0], [0]

    def slow(handler: Handler) -> bool:
        with service.lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with service.lock:
            under_way[0] -= 1
        return False
    service.faults = [slow] * 12
    found = encoded(encoder_of(service, items_per_request=1, concurrency=4), texts(12))
    assert np.array_equal(found, expected_texts(12)) and most[0] == 4


def test_neither_batch_nor_order_nor_concurrency_changes_a_vector(service: Service) -> None:
    encoder = encoder_of(service, "jina", items_per_request=3)
    items = [Item(text, image, role=role) for role in ("query", "candidate") for text in ("", "a", "b\u00e9\U0001f600")
             for image in (None, RED, NOISE)]
    together = encoded(encoder, items)
    assert np.array_equal(encoded(encoder, items[::-1])[::-1], together)
    assert np.array_equal(np.concatenate([encoded(encoder, [item]) for item in items]), together)


def test_openai_sends_texts(service: Service) -> None:
    encoder = encoder_of(service, request={"dimensions": D}, query_request={"input_type": "query"})
    found = encoded(encoder, [Item("\u00e9 \U0001f600", None), Item("b", None, role="query"), Item("c", None)])
    first, second = {"model": "a-model", "dimensions": D, "input_type": "query"}, {"model": "a-model", "dimensions": D}
    bodies = sorted(service.bodies, key=lambda body: len(body["input"]))
    assert bodies == [{**first, "input": ["b"]}, {**second, "input": ["\u00e9 \U0001f600", "c"]}]
    expected = [vector_of("\u00e9 \U0001f600", second), vector_of("b", first), vector_of("c", second)]
    assert np.array_equal(found, expected)
    assert encoder.modalities == {"text"}


def test_jina_adds_the_vectors_of_text_and_image(service: Service) -> None:
    encoder = encoder_of(service, "jina")
    text, image = {"text": "a"}, {"image": packed(NOISE)}
    both, only_text, only_image = encoded(encoder, [Item("a", NOISE), Item("a", None), Item("", NOISE)])
    fields = {"model": "a-model"}
    assert np.array_equal(only_text, vector_of(text, fields)) and np.array_equal(only_image, vector_of(image, fields))
    np.testing.assert_allclose(both, only_text + only_image, atol=1e-6)
    assert encoder.modalities == {"text", "image", "image,text"}


def test_voyage_sends_text_and_image_as_one_input(service: Service) -> None:
    encoder = encoder_of(service, "voyage", candidate_request={"input_type": "document"})
    found = encoded(encoder, [Item("a", NOISE), Item("a", None), Item(None, NOISE)])
    text = {"type": "text", "text": "a"}
    image = {"type": "image_base64", "image_base64": f"data:image/png;base64,{packed(NOISE)}"}
    inputs = [{"content": content} for content in ([text, image], [text], [image])]
    fields = {"model": "a-model", "input_type": "document"}
    assert service.bodies == [{**fields, "inputs": inputs}]
    assert np.array_equal(found, [vector_of(each, fields) for each in inputs])


@pytest.mark.parametrize("style", list(endpoint.STYLES))
def test_an_item_without_content_is_the_zero_vector_and_costs_nothing(service: Service, style: str) -> None:
    found = encoded(encoder_of(service, style), [Item(None, None), Item("", None), Item(" \n", None), Item("a", None)])
    assert not found[:3].any() and found[3].any() and len(service.bodies) == 1
    assert encoded(encoder_of(service, style), []).shape == (0, D)
    assert not encoded(encoder_of(service, style), [Item("", None)]).any()


def test_images_are_sent_exactly_or_smaller_as_asked(service: Service) -> None:
    sent = encoder_of(service, "jina").prepare(Item(None, NOISE)).inputs[0][0]["image"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))), np.asarray(NOISE))
    small = encoder_of(service, "jina", image_max_side=15).prepare(Item(None, NOISE)).inputs[0][0]["image"]
    assert small == packed(NOISE.resize((10, 15), Image.Resampling.LANCZOS))
    line = Image.new("RGB", (1000, 1))
    thin = encoder_of(service, "jina", image_max_side=15).prepare(Item(None, line)).inputs[0][0]["image"]
    assert Image.open(io.BytesIO(base64.b64decode(thin))).size == (15, 1)
    jpeg = encoder_of(service, "voyage", image_format="jpeg", jpeg_quality=50).prepare(Item(None, NOISE)).inputs[0][0]
    assert jpeg["content"][0]["image_base64"] == "data:image/jpeg;base64," + packed(NOISE, "jpeg", quality=50)


def test_texts_are_cut_where_asked_and_never_inside_a_character(service: Service) -> None:
    cases = {"abcdef": "abcde", "abc\u00e9\u00e9": "abc\u00e9", "abcd\U0001f600": "abcd", "     x": None}
    encoder = encoder_of(service, max_text_bytes=5)
    for text, kept in cases.items():
        assert [sent for sent, _ in encoder.prepare(Item(text, None)).inputs] == ([kept] if kept else [])
    whole = "\u00e9" * 100_000
    assert encoder_of(service).prepare(Item(whole, None)).inputs[0][0] == whole
    assert encoded(encoder_of(service), [Item("a\ud800b", None)]).any()


def test_large_inputs_are_spread_over_requests(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_BYTES", 40)
    found = encoded(encoder_of(service), [*texts(7), Item("x" * 100, None), *texts(2)])
    assert np.array_equal(found[:7], expected_texts(7))
    assert sorted(len(body["input"]) for body in service.bodies) == [1, 2, 2, 5]  # eight bytes each


def late(handler: Handler) -> bool:
    time.sleep(0.6)
    return True


def changed(change: Callable[[list[dict[str, Any]]], Any]) -> Fault:
    """The answer that the service would give, with its rows changed."""
    def fault(handler: Handler) -> bool:
        answer = handler.server.defined(handler.sent)
        handler.answer(200, {**answer, "data": change(answer["data"])})
        return True
    return fault


def with_embedding(value: Any) -> Fault:
    return changed(lambda rows: [{**row, "embedding": value} for row in rows])


PASSING = {
    "429": answering(429), "500": answering(500), "503 without a word": answering(503, b""),
    "502 page": answering(502, b"<html>"), "cut": cut, "dropped": dropped, "late": late,
    "not JSON": answering(200, b"{"), "not text": answering(200, b"\xff\xfe\x00"), "a list": answering(200, []),
    "no data": answering(200, {"ok": True}), "rows of numbers": answering(200, {"data": [1, 2]}),
    "NaN": with_embedding([float("nan")] * D), "infinity": with_embedding([float("inf")] * D),
    "null": with_embedding([None] * D), "words": with_embedding(["a"] * D), "nothing": with_embedding(None),
    "nested": with_embedding([[1.0] * D]), "bad base64": with_embedding("AAAA!"), "odd base64": with_embedding("AAAA"),
    "index twice": changed(lambda rows: [{**row, "index": 0} for row in rows]),
    "index beyond": changed(lambda rows: [{**row, "index": row["index"] + 1} for row in rows]),
    "index missing": changed(lambda rows: [{"embedding": rows[0]["embedding"]}, *rows[1:]]),
    "index of words": changed(lambda rows: [{**row, "index": [str(row["index"])]} for row in rows]),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_asked_again(service: Service, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    service.faults = [fault, None, fault]
    encoder = encoder_of(service, items_per_request=2, concurrency=1, timeout=0.3)
    assert np.array_equal(encoded(encoder, texts(5)), expected_texts(5))
    assert len(service.bodies) == 5 and [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert KEY not in caplog.text and "attempt 2 of 7" in caplog.text


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_ends_with_a_sentence(service: Service, fault: Fault) -> None:
    service.faults = [fault] * 9
    with pytest.raises(UserError, match="after 2 attempts.*127.0.0.1") as found:
        encoded(encoder_of(service, retries=1, timeout=0.3), texts(2))
    assert len(service.bodies) == 2 and KEY not in str(found.value)


def test_all_faults_at_once_under_concurrency(service: Service) -> None:
    service.faults = [*list(PASSING.values())[:5], None, *list(PASSING.values())[7:]] * 2
    encoder = encoder_of(service, items_per_request=1, concurrency=8, retries=40, timeout=5)
    assert np.array_equal(encoded(encoder, texts(40)), expected_texts(40))


def test_an_answer_without_indices_is_in_order(service: Service) -> None:
    service.faults = [changed(lambda rows: [{"embedding": row["embedding"]} for row in rows[::-1]])]
    assert np.array_equal(encoded(encoder_of(service), texts(3)), expected_texts(3)) and len(service.bodies) == 1


def test_waiting_as_long_as_the_service_asks(service: Service) -> None:
    service.faults = [answering(429, b"", Retry_After="0.4")]
    encoded(encoder_of(service), texts(1))
    assert 0.4 <= service.times[1] - service.times[0] < 5
    service.faults = [answering(503, b"", Retry_After=formatdate(time.time() + 2, usegmt=True))]
    encoded(encoder_of(service), texts(1))
    assert 0.5 <= service.times[3] - service.times[2] < 10
    service.faults = [answering(429, {"error": {"message": "daily quota"}}, Retry_After="86400")]
    with pytest.raises(UserError, match="429: daily quota; it asks to wait 86,400 seconds"):
        encoded(encoder_of(service), texts(1))


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        outcome = None
        attempt_number = 0
    longest = []
    for State.attempt_number in range(1, 12):
        waits = [http._seconds_to_wait(State()) for _ in range(200)]  # type: ignore[arg-type]
        assert min(waits) >= max(waits) / 2.1 and len(set(waits)) > 100
        longest.append(max(waits))
    assert longest[0] < 1 and all(first < second for first, second in zip(longest[:5], longest[1:6]))
    assert 55 < longest[-1] < http.LONGEST_WAIT


@pytest.mark.parametrize("status, content, message", [
    (400, {"error": {"message": "maximum context length is 8192 tokens"}}, "400: maximum context length"),
    (404, {"detail": "no such model"}, "404: no such model"), (422, {"message": "field x"}, "422: field x"),
    (422, {"detail": [{"loc": ["input"]}]}, '422: .*"loc"'), (400, b"plain\nwords", "400: plain words"),
    (400, b"", "400: Bad Request"), (302, b"", "302.*\n.*redirects"), (413, b"<html>" + b"x" * 9999, "413: <html>x+ "),
])
def test_the_users_mistake_is_told_in_the_services_words(service: Service, status: int, content: Any,
                                                         message: str) -> None:
    service.faults = [answering(status, content, Location="http://127.0.0.1:9/")]
    with pytest.raises(UserError, match=message) as found:
        encoded(encoder_of(service), texts(1))
    assert len(service.bodies) == 1 and len(str(found.value)) < 600


def test_a_wrong_key_names_its_variable_and_is_never_shown(service: Service, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_KEY", " sk-other-9876543210\n")
    with pytest.raises(UserError, match="401: no: Bearer <key>.*\n.*TEST_KEY") as found:
        encoded(encoder_of(service), texts(1))
    assert "sk-other" not in f"{found.value!r}{caplog.text}" and len(service.bodies) == 1
    with pytest.raises(UserError, match="401: no: None.*\n.*key_variable"):
        encoded(endpoint.build(replace(params_of(service), key_variable=None), "cpu", "fp32"), texts(1))


@pytest.mark.parametrize("value", [None, "", " \n", "a\nb", "\u00e9"])
def test_a_key_that_is_none_is_known_before_anything_is_sent(service: Service, monkeypatch: pytest.MonkeyPatch,
                                                             value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("TEST_KEY")
    else:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(UserError, match="TEST_KEY"):
        encoder_of(service)
    assert endpoint.identity(params_of(service))  # a plan needs no key


def test_a_service_that_is_not_there(service: Service) -> None:
    nowhere = replace(params_of(service), url="http://127.0.0.1:9/v1/embeddings", retries=1)
    with pytest.raises(UserError, match="no answer .ConnectError.*after 2 attempts"):
        encoded(endpoint.build(nowhere, "cpu", "fp32"), texts(1))


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[1:], "2 vectors for 3 inputs"), (lambda rows: [*rows, rows[0]], "4 vectors for 3 inputs"),
    (lambda rows: [{**row, "embedding": row["embedding"][1:]} for row in rows], "7 dimensions, not 8.*\n.*sion: 7"),
    (lambda rows: [*rows[1:], {**rows[0], "embedding": []}], "0 dimensions, not 8"),
])
def test_a_wrong_number_of_vectors_or_dimensions_is_refused(service: Service, change: Any, message: str) -> None:
    service.faults = [changed(change)]
    with pytest.raises(UserError, match=message):
        encoded(encoder_of(service), texts(3))
    assert len(service.bodies) == 1


def test_one_failure_abandons_the_rest(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 30.0)
    service.faults = [answering(500), answering(500), answering(400)]
    started = time.monotonic()
    with pytest.raises(UserError, match="answered 400"):
        encoded(encoder_of(service, items_per_request=1, concurrency=3), texts(50))
    assert time.monotonic() - started < 10 and len(service.bodies) < 10


def test_requests_per_minute(service: Service) -> None:
    encoded(encoder_of(service, items_per_request=1, concurrency=8, requests_per_minute=600), texts(6))
    assert service.times[-1] - service.times[0] >= 0.45


def test_identity_is_what_changes_vectors(service: Service) -> None:
    plain = params_of(service, "jina")
    same = [replace(plain, **change) for change in (
        {"items_per_request": 1}, {"concurrency": 1}, {"retries": 0}, {"timeout": 1.0}, {"requests_per_minute": 5},
        {"key_variable": None}, {"url": f"{plain.url}?region=eu"}, {"jpeg_quality": 3})]
    assert all(endpoint.identity(each) == endpoint.identity(plain) for each in same)
    other = [replace(plain, **change) for change in (
        {"style": "voyage"}, {"style": "openai"}, {"url": "http://127.0.0.1:1/"}, {"model": "b"}, {"dimension": 9},
        {"version": "2026"}, {"request": {"a": 1}}, {"query_request": {"a": 1}}, {"candidate_request": {"a": 1}},
        {"max_text_bytes": 8}, {"image_max_side": 9}, {"image_format": "jpeg"})]
    assert len({json.dumps(endpoint.identity(each), sort_keys=True) for each in [plain, *other]}) == 13
    named = [endpoint.identity(replace(plain, service="ours", url=f"http://node{number}:80/")) for number in (1, 2)]
    assert named[0] == named[1] and KEY not in str(named)


@pytest.mark.parametrize("change, message", [
    ({"style": "cohere"}, "style 'cohere' is not known.*\n.*openai, jina, voyage"),
    ({"image_format": "webp"}, "image_format"), ({"dimension": 0}, "dimension is 0"),
    ({"concurrency": 0}, "concurrency"), ({"max_text_bytes": 0}, "max_text_bytes"),
    ({"requests_per_minute": 0}, "requests_per_minute"),
    ({"retries": -1}, "retries"), ({"timeout": 0}, "timeout"), ({"url": "api.openai.com/v1"}, "not the URL"),
    ({"url": "file:///etc/passwd"}, "not the URL"), ({"url": "http://a:b/"}, "not valid"),
    ({"url": "https://me:secret@host/v1"}, "holds a name or password"),
])
def test_options_that_cannot_be_meant(service: Service, change: dict[str, Any], message: str) -> None:
    for ask in (endpoint.identity, lambda params: endpoint.build(params, "cpu", "fp32")):
        with pytest.raises(UserError, match=message) as found:
            ask(replace(params_of(service), **change))
        assert "secret" not in str(found.value)


def test_without_the_optional_packages_there_is_a_sentence(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    assert endpoint.identity(params_of(service))
    with pytest.raises(UserError, match="needs tenacity, which is not installed.*\n.*pip install httpx tenacity"):
        encoder_of(service)


def test_the_shipped_ones_can_be_planned_and_hold_no_key() -> None:
    choices = load("quickstart", [f"encoders=[{','.join(available('encoders'))}]"]).encoders
    shipped = [choice for choice in choices if choice.module == "endpoint"]
    assert len(shipped) == 4
    for choice in shipped:
        params = choice.params
        assert params.url.startswith("https://") and params.key_variable.endswith("_API_KEY")
        found = choice.identity()
        assert found["model"] == params.model and found["service"].startswith("api.")
        json.dumps(found)
    jina = next(choice.params for choice in shipped if choice.params.style == "jina")
    assert jina.request == {"normalized": True} and jina.query_request == {"task": "retrieval.query"}


def test_planning_imports_neither_torch_nor_the_client() -> None:
    code = ("import sys; from pipeline.encoders import endpoint as e, precomputed, random_vectors as r;"
            "e.identity(e.Params('jina', 'https://host/', 'm', 3)); r.identity(r.Params());"
            "print([name for name in ('torch', 'httpx', 'tenacity', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_benchmark_is_embedded_through_a_service(service: Service, small_arguments: list[str],
                                                   tmp_path: Path) -> None:
    """Loaders fork, requests fail now and then, and the vectors on disk are the service's."""
    path = tmp_path / "served.yaml"
    path.write_text(f"# A service of a test.\nencoder: endpoint\nstyle: voyage\nurl: {service.url}\nmodel: a-model\n"
                    f"dimension: {D}\nkey_variable: TEST_KEY\nquery_request: {{input_type: query}}\n")
    service.faults = [None, answering(500), None, cut]
    experiment = load("quickstart", [
        f"work_dir={tmp_path}/work", f"encoders=[{path}]", *small_arguments, "tasks=[scenes_task0]", "pools=[local]",
        "embed.loaders=2", "embed.storage=float32", "embed.instruction=none"])
    for stage in ("collect", "embed"):
        run_stage(experiment, stage)
    job = next(job for job in make_plan(experiment).jobs["embed"] if ".pool." not in job.artifact.name)
    store = EmbeddingStore.of(job.artifact)
    found = np.concatenate([vectors_of(store.shard(number)) for number in range(len(store.files))])
    tables = [read_table(job.table.path(shard["file"]), None) for shard in job.shards]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    fields = {"model": "a-model", "input_type": "query"}
    expected = [vector_of({"content": [{"type": "text", "text": text}]}, fields) for text in texts]
    assert len(expected) > 5 and np.array_equal(found, expected)
