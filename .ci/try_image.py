"""Starts the command of an image in its root file system, asks it for its health and a sound, and ends it by SIGTERM.

python3 .ci/try_image.py ROOT INSPECTED: a folder, and what `podman image inspect` says. As root; no runtime is needed.
"""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SECONDS = 300
BODY = {"prompt": "a dog barks", "seed": 1, "model": "demo-student"}


def entered(root: str, config: dict, command: list[str]) -> list[str]:
    """`command` in the image: its user, variables and folder, no capability, no more rights by any file."""
    user, folder = config["User"], config["WorkingDir"]
    rights = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    inside = ["env", "-i", f"--chdir={folder}", *config["Env"], *command]
    return ["chroot", root, *rights, "--bounding-set=-all", "--inh-caps=-all", *inside]


def written(root: str, since: float) -> list[str]:
    """What changed outside of the volume and /tmp; the folders of the kernel are not the image's."""
    apart = {"data", "tmp", "proc", "sys", "dev"}
    files = [file for top in Path(root).iterdir() if top.name not in apart for file in top.rglob("*")]
    return [str(file) for file in files if not file.is_symlink() and file.is_file() and file.stat().st_mtime > since]


def main(root: str, inspected: str) -> None:
    (image,) = json.loads(Path(inspected).read_text())
    config = image["Config"]
    health = entered(root, config, image["Healthcheck"]["Test"][1:])
    started = time.time()
    server = subprocess.Popen(entered(root, config, [*config["Entrypoint"], *config["Cmd"]]))
    try:
        while subprocess.run(health, capture_output=True, check=False).returncode:
            assert server.poll() is None, "the server has ended"
            assert time.time() < started + SECONDS, "the server has not become healthy"
            time.sleep(2)
        request = urllib.request.Request("http://127.0.0.1:8000/v1/audio/generate", json.dumps(BODY).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert answer.read(4) == b"RIFF"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
    assert written(root, started) == []
    sys.stdout.write("healthy, a sound, a clean end, and nothing written outside of /data and /tmp\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
