"""The audio files of a folder, found by the names that published data sets give them."""

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au"})


class AudioFolderError(ValueError):
    """There is no file by any of the names asked for, or more than one."""


class AudioFolder:
    """An index of everything that can be read as audio under `root`; it keeps file names only."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is no folder: give the folder of the audio as audio_dir")
        self.root = root
        self._by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            relative = Path(folder).relative_to(root)
            for file in sorted(files):
                path = PurePosixPath(relative, file)
                if path.suffix.lower() in SUFFIXES:
                    self._by_stem[path.stem].append(str(path))

    def __len__(self) -> int:
        return sum(map(len, self._by_stem.values()))

    def find(self, names: list[str]) -> str:
        """The path, relative to the root, of the file that the first of `names` to fit one names.

        A name has no extension; folders in it must be those that the file lies in.

        Raises:
            AudioFolderError: no file has any of the names, or several have the same one.
        """
        for name in names:
            *folders, stem = PurePosixPath(name).parts or ("",)
            found = [path for path in self._by_stem.get(stem, ()) if _lies_in(path, folders)]
            if len(found) > 1:
                raise AudioFolderError(f"{len(found)} files are named {name!r}: {', '.join(found[:3])}")
            if found:
                return found[0]
        raise AudioFolderError(f"no audio file is named {' or '.join(map(repr, names))}")


def _lies_in(path: str, folders: list[str]) -> bool:
    return not folders or list(PurePosixPath(path).parts[-1 - len(folders) : -1]) == folders
