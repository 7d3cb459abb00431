"""Against a server that others wrote: `transformers serve` with a tiny random model of pictures and words."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pipeline.cli import main
from tests.encoders import tiny_models
from tests.small_mbeir import TASK, SmallMbeir

_MISSING = [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400),
              pytest.mark.skipif(bool(_MISSING), reason=f"needs transformers[serving]: {', '.join(_MISSING)}")]
_TEMPLATE = ("{% for message in messages %}[INST] {% for part in message['content'] %}"
             "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %} [/INST]"
             "{% endfor %}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    directory = tiny_models.llava(tmp_path_factory.mktemp("served") / "tiny-vlm")
    LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(directory), tiny_models.llava_tokenizer(), patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            if httpx.get(url, trust_env=False).status_code < 500:
                return
        except httpx.RequestError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def test_pictures_are_captioned_by_a_real_server(url: str, model: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    asked = ["caption", str(small.experiment), "--url", url, "--model", str(model), "--max-tokens", "6", "--prompt",
             "Say it.", "--temperature", "none", "--request", '{"generation_config": "{\\"do_sample\\": false}"}',
             "--concurrency", "2", "--json"]
    assert main(asked) == 0
    found, = json.loads(capsys.readouterr().out)["captions"]
    assert found["answered"] == 4 and found["completion_tokens"] > 0 and found["prompt_tokens"] > 4 * 4
    folder = small.experiment.parent / "work" / "experiments" / "experiment" / "captioned"
    corpus = [json.loads(line) for line in (folder / TASK / "corpus.jsonl").open()]
    assert len(corpus) == 4 and [row["_id"] for row in corpus] == [f"7:{number}" for number in range(1, 5)]
    assert main(["run", str(small.experiment), f"benchmark={folder / 'benchmark.yaml'}", "name=as_text"]) == 0


def test_retrieved_candidates_are_sent_with_their_pictures(url: str, model: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    small = SmallMbeir(tmp_path).write()
    assert main(["run", str(small.experiment)]) == 0
    capsys.readouterr()
    assert main(["generate", str(small.experiment), "--pool", "local", "--top", "2", "--url", url, "--model",
                 str(model), "--max-tokens", "5", "--prompt", "Go.", "--metric", "token_f1", "--json",
                 "--references", str(_references(tmp_path))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answered"] == 4 and found["failed"]["count"] == 0 and found["scores"]["scored"] == 4


def _references(directory: Path) -> Path:
    path = directory / "references.jsonl"
    path.write_text("".join(json.dumps({"query_id": f"7:{n}", "references": ["x"]}) + "\n" for n in range(1, 5)))
    return path
