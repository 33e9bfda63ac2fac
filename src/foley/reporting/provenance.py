"""Where a measurement comes from: command, commit, date and machine."""

import datetime
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from foley.config import PROJECT_ROOT


def provenance() -> dict[str, str]:
    """What a number was measured on, and of which state of the code; plain text, fit for JSON and for a page."""
    facts = {
        "command": shlex.join(["python", *sys.argv]).replace(f"{PROJECT_ROOT}/", ""),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "processor": f"{_processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(describe, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
