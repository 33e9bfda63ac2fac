"""A manifest with events, and a server that speaks the chat protocol."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def strong_manifest(tmp_path: Path) -> Callable[[int], Path]:
    """Rows as `dataset=audioset` makes them of strong labels; their files are not needed."""

    def write(count: int) -> Path:
        rows = [
            {
                "id": f"clip{n}",
                "path": f"{n}.wav",
                "caption": "dog",
                "license": "CC0",
                "events": [[0.5, n + 1.0, "Dog"]],
            }
            for n in range(count)
        ]
        path = tmp_path / "manifest.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
