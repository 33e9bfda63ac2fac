"""What users import, room by room: a name that goes is noticed here."""

import subprocess
import sys

import pytest

import foley

EXPORTS = {
    "foley": ["Clip", "EditMask", "EditMasks", "Generation", "GenerationSettings", "TextToAudio", "__version__"],
}


@pytest.mark.parametrize("module", EXPORTS)
def test_public_names_are_these_and_exist(module: str) -> None:
    room = __import__(module, fromlist=["*"])
    assert sorted(room.__all__) == EXPORTS[module]
    assert all(hasattr(room, name) for name in room.__all__)


def test_import_foley_alone_is_light() -> None:
    code = "import foley, sys; assert 'torch' not in sys.modules and foley.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(AttributeError, match=r"'foley' has no attribute 'TextToMusic'.*TextToAudio"):
        _ = foley.TextToMusic
