"""Record what real clients send, for tests/server/test_clients.py.

    python tests/support/record_clients.py [--python PYTHON] [--node FOLDER] [PACKAGE...]

serves the three models of `clients.py` and runs its cases, and those of `clients.mjs`, against them; what comes is written to
tests/data/clients/PACKAGE.json with the versions of the packages. PYTHON is an interpreter with openai, ollama, anthropic, langchain-openai,
langchain-ollama, langchain-anthropic and litellm; FOLDER has node_modules with openai, ai, @ai-sdk/openai, @ai-sdk/openai-compatible, zod, ollama and
@anthropic-ai/sdk. Without them their cases are left out. Headers that tell of a machine are not written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE, DATA = ROOT / "tests/support", ROOT / "tests/data/clients"
HEADERS = ("content-type", "accept", "authorization", "x-api-key", "anthropic-version", "anthropic-beta")
NAMED = re.compile(r'"(?:id|call_id|tool_use_id)": ?"([^"]+)"')


class Recorder:
    """An application that writes down what passes through it: requests, and of answers the status, the kinds of events and names."""

    def __init__(self, app: Any):
        self.app = app
        self.exchanges: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, said, begun = [], [], {}

        async def received() -> Any:
            message = await receive()
            body.append(message.get("body", b""))
            return message

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                begun.update(status=message["status"])
            said.append(message.get("body", b""))
            await send(message)

        await self.app(scope, received, sent)
        if scope["path"] != "/metrics":
            headers = {k.decode(): v.decode() for k, v in scope["headers"]}
            path = scope["path"] + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
            asked, text = b"".join(body), b"".join(said).decode()
            self.exchanges.append({"method": scope["method"], "path": path, "headers": {k: headers[k] for k in HEADERS if k in headers},
                                   "body": json.loads(asked) if asked else None, "status": begun["status"], "text": text})


def names_of(text: str) -> list[str]:
    """Names that an answer gives to itself, its items and calls, in their order."""
    return list(dict.fromkeys(NAMED.findall(text)))


def kept(exchanges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exchanges with the names of answers that later requests mention, by their places; requests that come again are left out."""
    seen, out = set(), []
    for i, exchange in enumerate(exchanges):
        text = exchange.pop("text")
        later = "".join(e["path"] + json.dumps(e["body"]) for e in exchanges[i + 1:])
        names = {str(n): name for n, name in enumerate(names_of(text)) if name in later}
        key = json.dumps([exchange["method"], exchange["path"], exchange["body"]])
        if key not in seen:
            out.append({**exchange, **({"names": names} if names else {})})
        seen.add(key)
    return out


@contextmanager
def serving() -> Iterator[tuple[str, Recorder]]:
    """Serve the models from a thread, behind a recorder."""
    from pyengine.server.app import application, listen, server
    from pyengine.server.models import load

    files = (ROOT / "models/qwen2.5-coder-0.5b-q4_k_m.gguf", ROOT / "models/smollm2-135m-q4_1.gguf", ROOT / "converters/demo/weights/demo-q8_0.gguf")
    recorder = Recorder(application([load(str(path), n_ctx=1024, n_seq=4) for path in files]))
    taken = listen("127.0.0.1", 0)
    running = server(recorder)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{taken.getsockname()[1]}", recorder
    running.should_exit = True
    thread.join(10)


def record(title: str, version: str, cases: list[str], command: list[str], at: tuple[str, Recorder], env: dict[str, str]) -> None:
    """Run cases and write their exchanges."""
    url, recorder = at
    found = {}
    for case in cases:
        recorder.exchanges.clear()
        subprocess.run([*command[:2], url, *command[2:], case], check=True, env={**os.environ, **env})
        found[case] = kept(recorder.exchanges)
        print(title, case, len(found[case]))
    made = {"made_by": "tests/support/record_clients.py", "package": title, "version": version, "cases": found}
    (DATA / f"{title}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Record."""
    options = argparse.ArgumentParser()
    options.add_argument("packages", nargs="*")
    options.add_argument("--python", default=sys.executable)
    options.add_argument("--node")
    given = options.parse_args()
    with serving() as at:
        command = [given.python, str(HERE / "run_client.py")]
        for name, own in json.loads(subprocess.run([*command, "--list"], check=True, capture_output=True).stdout).items():
            if not given.packages or name in given.packages:
                record(name, own["version"], own["cases"], [*command, name], at, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"})
        if given.node:
            command = ["node", str(HERE / "clients.mjs")]
            for name, cases in json.loads(subprocess.run([*command, "--list"], check=True, capture_output=True).stdout).items():
                title = "npm-" + name.strip("@").replace("/", "-")
                if not given.packages or title in given.packages:
                    version = json.loads((Path(given.node) / "node_modules" / name / "package.json").read_text())["version"]
                    record(title, version, [c for c in cases if c != "aborted"], [*command, name], at, {"CLIENTS_HOME": given.node})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
