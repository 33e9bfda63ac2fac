"""The second writer of a folder is refused, in this process and in another; a killed one leaves it free."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foley.core.locks import FolderInUseError, only_writer

HOLD = """
import sys, time
from pathlib import Path
from foley.core.locks import only_writer
with only_writer(Path(sys.argv[1]), "clips"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_of_this_process_is_refused_by_name(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "new", "these clips"),
        pytest.raises(FolderInUseError, match=f"writing these clips to {tmp_path / 'new'}"),
        only_writer(tmp_path / "new", "these clips"),
    ):
        pass
    with only_writer(tmp_path / "new", "these clips"):
        pass


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError), only_writer(tmp_path, "clips"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with only_writer(tmp_path, "clips"):
        pass
