"""A work copy of real photos in two stores, and what can happen to them between two runs.

Every write and every touch gives a file a time that no other has, so a size and a time always mean one content; that
is what the index relies on.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NAMES = ("a", "B", "IMG_0001", "été", "写真", "two words", "new\nline", "\udcff", "\udce9t\udce9", "-n", "100%", "'\"")
SUFFIXES = (".jpg", ".JPG", ".jpeg", ".png", ".webp", ".gif", ".tif", ".heic")
STORES = ("first store", "sec\udcf6nd")


class Library:
    """The folders of two stores below `folder`, filled from the files `sources`. Randomness is all from `chance`."""

    def __init__(self, folder: Path, sources: Sequence[Path], *, chance: random.Random) -> None:
        self.stores = [folder / name for name in STORES]
        self._outside = folder / "outside"
        self._sources = sources
        self._chance = chance
        self._time_ns = 1_600_000_000_000_000_000
        self._versions = 0
        self._broken: dict[Path, tuple[bytes, int]] = {}
        for place in (*self.stores, self._outside):
            place.mkdir(parents=True)
        self._write(self._outside / "outside.jpg", self._content())

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.add()

    def change(self) -> str:
        """Do one random thing; its name. What meets no file, or a file in its way, is left undone."""
        action = self._chance.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        try:
            action(self)
        except OSError as error:
            # Links that lead nowhere, a folder moved into itself, a name in the way.
            if error.errno not in {
                errno.ENOENT,
                errno.EINVAL,
                errno.ELOOP,
                errno.EEXIST,
                errno.ENOTDIR,
                errno.EISDIR,
                errno.ENOTEMPTY,
                errno.ENXIO,
                errno.ENAMETOOLONG,
            }:
                raise
        return action.__name__

    # -- what can happen ---------------------------------------------------------------------------------------

    def add(self) -> None:
        self._write(self._new_name(), self._content())

    def change_in_place(self) -> None:
        self._write(self._file(), self._content())

    def replace(self) -> None:
        """As careful programs write: to another name, then renamed."""
        partial = self._file().with_name(".partial")
        target = self._file()
        self._write(partial, self._content())
        os.replace(partial, target)

    def touch(self) -> None:
        self._stamp(self._file())

    def rename(self) -> None:
        file = self._file()
        file.rename(self._free(file.parent))

    def move(self) -> None:
        self._file().rename(self._new_name())

    def move_onto_another(self) -> None:
        os.replace(self._file(), self._file())

    def swap(self) -> None:
        one, two = self._file(), self._file()
        spare = one.with_name(".spare")
        one.rename(spare)
        os.replace(two, one)
        os.replace(spare, two)

    def copy(self) -> None:
        shutil.copy2(self._file(), self._new_name())

    def copy_as_new(self) -> None:
        target = self._new_name()
        shutil.copyfile(self._file(), target)
        self._stamp(target)

    def hard_link(self) -> None:
        self._new_name().hardlink_to(self._file())

    def link(self) -> None:
        """To a photo of this store, or of the other one, or outside of both, or to nothing, a folder, or itself."""
        name = self._new_name()
        targets = [self._file(), self._outside / "outside.jpg", Path("nowhere.jpg"), self._folder(), name]
        name.symlink_to(self._chance.choice(targets))

    def delete(self) -> None:
        self._file().unlink()

    def truncate(self) -> None:
        file = self._file()
        self._remember(file)
        os.truncate(file, self._chance.randrange(max(1, file.stat().st_size)))
        self._stamp(file)

    def damage(self) -> None:
        file = self._file()
        self._remember(file)
        data = bytearray(file.read_bytes())
        for _ in range(20):
            if data:
                data[self._chance.randrange(len(data))] = self._chance.randrange(256)
        self._write(file, bytes(data))

    def break_(self) -> None:
        file = self._file()
        self._remember(file)
        self._write(
            file, self._chance.choice((b"", b"\0" * 100, b"<html>not found</html>", self._chance.randbytes(500)))
        )

    def restore(self) -> None:
        """What was broken comes back, as from a backup: with its old time, or a new one."""
        if not self._broken:
            return
        file = self._chance.choice(sorted(self._broken))
        data, time_ns = self._broken.pop(file)
        self._write(file, data)
        if self._chance.random() < 0.5:
            os.utime(file, ns=(time_ns, time_ns))

    def flicker(self) -> None:
        """For a moment it is another file, and then again what it was, with its old time."""
        file = self._file()
        data, time_ns = file.read_bytes(), file.stat().st_mtime_ns
        self._write(file, self._content())
        time.sleep(0.03)
        file.write_bytes(data)
        os.utime(file, ns=(time_ns, time_ns))

    def swap_for_a_moment(self) -> None:
        one, two = self._file(), self._file()
        spare = one.with_name(".spare")
        for first, second in ((one, two), (two, one)):
            first.rename(spare)
            os.replace(second, first)
            os.replace(spare, second)
            time.sleep(0.03)

    def hide(self) -> None:
        file = self._file()
        file.rename(file.with_name("." + file.name[:200]))

    def change_suffix(self) -> None:
        file = self._file()
        file.rename(file.with_suffix(self._chance.choice((*SUFFIXES, ".txt", ""))))

    def make_special(self) -> None:
        name = self._new_name()
        if self._chance.random() < 0.5:
            os.mkfifo(name)
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                try:
                    listener.bind(os.fsencode(name))
                except OSError as error:  # a path too long for a socket has no number
                    raise OSError(errno.ENAMETOOLONG, "too long") from error

    def make_folder(self) -> None:
        folder = self._free(self._folder(), suffix=self._chance.choice(("", "", ".jpg", "@eaDir")))
        (folder.with_name("@eaDir") if folder.name.endswith("@eaDir") else folder).mkdir()

    def rename_folder(self) -> None:
        folder = self._folder()
        if folder not in self.stores:
            folder.rename(self._free(self._folder(), suffix=""))

    def remove_folder(self) -> None:
        folder = self._folder()
        if folder not in self.stores:
            shutil.rmtree(folder)

    def empty_folder(self) -> None:
        for entry in sorted(self._folder().iterdir()):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()

    def file_becomes_folder(self) -> None:
        file = self._file()
        file.unlink()
        file.mkdir()
        self._write(file / "within.jpg", self._content())

    # -- what there is -----------------------------------------------------------------------------------------

    def _all(self) -> list[Path]:
        return [path for store in self.stores for path in sorted(store.rglob("*"))]

    def _file(self) -> Path:
        files = [path for path in self._all() if path.is_file()]
        if not files:
            raise FileNotFoundError(errno.ENOENT, "no file is left")
        return self._chance.choice(files)

    def _folder(self) -> Path:
        folders = [path for path in self._all() if path.is_dir() and not path.is_symlink()]
        return self._chance.choice([*self.stores, *folders])

    def _new_name(self) -> Path:
        return self._free(self._folder(), suffix=self._chance.choice(SUFFIXES))

    def _free(self, folder: Path, *, suffix: str | None = None) -> Path:
        suffix = self._chance.choice(SUFFIXES) if suffix is None else suffix
        while True:
            number = self._chance.choice(("", str(self._chance.randrange(100))))
            path = folder / (self._chance.choice(NAMES) + number + suffix)
            if not os.path.lexists(path):
                return path

    def _content(self) -> bytes:
        """A photo that was not there before: what follows the end of a picture does not change it."""
        self._versions += 1
        data = self._chance.choice(self._sources).read_bytes()
        return data + b"%d" % self._versions if self._chance.random() < 0.7 else data

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self._stamp(path)

    def _stamp(self, path: Path) -> None:
        self._time_ns += self._chance.randrange(1, 10**12)
        os.utime(path, ns=(self._time_ns, self._time_ns))

    def _remember(self, file: Path) -> None:
        if file.stat().st_size < 10**6:
            self._broken[file] = (file.read_bytes(), file.stat().st_mtime_ns)


ACTIONS: dict[Callable[[Library], None], int] = {
    Library.add: 12,
    Library.change_in_place: 6,
    Library.replace: 4,
    Library.touch: 6,
    Library.rename: 6,
    Library.move: 8,
    Library.move_onto_another: 3,
    Library.swap: 4,
    Library.copy: 4,
    Library.copy_as_new: 4,
    Library.hard_link: 3,
    Library.link: 4,
    Library.delete: 8,
    Library.truncate: 4,
    Library.damage: 4,
    Library.break_: 5,
    Library.restore: 6,
    Library.flicker: 3,
    Library.swap_for_a_moment: 3,
    Library.hide: 2,
    Library.change_suffix: 3,
    Library.make_special: 2,
    Library.make_folder: 4,
    Library.rename_folder: 3,
    Library.remove_folder: 2,
    Library.empty_folder: 2,
    Library.file_becomes_folder: 1,
}
