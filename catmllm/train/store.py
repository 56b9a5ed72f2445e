"""Folders on disks and on stores of objects (S3 and what speaks like it), through fsspec.

A store has no rename and no lock: an object is there, whole, when its writing ends. So a folder is complete
when it has the object that is written last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from catmllm.config import STAGES
from catmllm.models.state import GRAPH
from catmllm.world import World

HERE_ALONE = ("checkpoints", "hang", "profile", "init")  # folders that are not copied
UNFINISHED = (".tmp", ".partial")
LAST = ("model.safetensors",)  # without it a stage has not ended


class StoreError(ValueError):
    """A store cannot be reached, read or written; says which and where to look."""


class Folder:
    """A folder by its path, or by its address on a store (`s3://bucket/name`)."""

    def __init__(self, at: Path | str) -> None:
        self.at = at
        disk = LocalFileSystem(auto_mkdir=True)
        self.fs: AbstractFileSystem
        self.root: str
        self.fs, self.root = (disk, str(at.absolute())) if isinstance(at, Path) else url_to_fs(at)
        self.local = isinstance(self.fs, LocalFileSystem)
        if self.local:
            self.fs = disk

    def __str__(self) -> str:
        return str(self.at)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.at / name if isinstance(self.at, Path) else f"{self.at.rstrip('/')}/{name}")

    def names(self) -> list[str]:
        """What it holds, in order; nothing where it is not there."""
        self.fs.invalidate_cache()  # other processes write too
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            return sorted(PurePosixPath(p).name for p in self.fs.ls(self.root, detail=False))
        return []

    def read(self, name: str) -> bytes | None:
        """A file's content, or None where there is none."""
        with self.reaching(), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self.fs.cat_file(f"{self.root}/{name}")
        return None

    def write(self, name: str, data: bytes) -> None:
        with self.reaching():
            self.fs.pipe_file(f"{self.root}/{name}", data)

    def delete(self, name: str) -> None:
        """Delete a file of it, if it is there."""
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    def remove(self) -> None:
        """Delete it with all that it holds, if it is there."""
        self.fs.invalidate_cache()
        with self.reaching(), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.root, recursive=True)

    @contextlib.contextmanager
    def reaching(self) -> Iterator[None]:
        """What goes wrong on a store becomes a StoreError; on a disk it stays what it is."""
        try:
            yield
        except Exception as error:  # of any library that fsspec brings
            if self.local:
                raise
            reason = next(iter(str(error).splitlines()), "")
            where = "its bucket and your access to it"
            if str(self).startswith("s3"):
                where = "that bucket, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL"
            raise StoreError(
                f"the store {self} cannot be used ({type(error).__name__}: {reason}); look at {where}"
            ) from error


class Mirror:
    """A run's folder `out` on a store too, so that another machine can go on with the run. Checkpoints are
    written to the store alone; all other files of `out` are copied there by the main rank, and from there by
    the first rank of every machine that lacks them."""

    def __init__(self, address: str, out: Path, world: World) -> None:
        self.out, self.world = out, world
        self.folder = Folder(address)
        self.known: dict[str, tuple[int, int]] = {}  # size and time of what the store has of a file

    def share(self) -> None:
        """Every machine gets what the main rank has written; called by all ranks together."""
        self._together(self.push if self.world.main else None)
        self._together(None if self.world.main else self.pull)

    def fetch(self) -> None:
        """Every machine gets what the store has."""
        self._together(self.pull)

    def begin(self) -> None:
        """Every machine gets what the store has; what `out` has beside it is copied there."""
        self.fetch()
        self._together(self.push if self.world.main else None)

    def _together(self, act: Callable[[], None] | None) -> None:
        """Have the ranks act; where one fails, all raise what it says."""
        problem = None
        try:
            if act is not None:
                act()
        except (StoreError, OSError) as error:
            problem = str(error)
        if problem := next((p for p in self.world.gather(problem) if p), None):
            raise StoreError(problem)

    def push(self) -> None:
        """Copy what has changed in `out` since the last time; a stage's weights come last."""
        for path in sorted(self.out.rglob("*"), key=lambda p: (p.name in LAST, p)):
            name = path.relative_to(self.out)
            if not _copied(name) or not path.is_file():
                continue
            now = _state(path)
            if self.known.get(name.as_posix()) != now:
                with self.folder.reaching():
                    self.folder.fs.put_file(str(path), f"{self.folder.root}/{name.as_posix()}")
                self.known[name.as_posix()] = now

    def pull(self) -> None:
        """Copy what is missing in `out`, and what has grown on the store since it was written there. Of the
        ranks of a machine the first does it."""
        if int(os.environ.get("LOCAL_RANK", "0")):
            return
        fs, root = self.folder.fs, self.folder.root
        with self.folder.reaching():
            fs.invalidate_cache()
            found = fs.find(root, detail=True)
            for address, about in sorted(found.items(), key=lambda f: (PurePosixPath(f[0]).name in LAST, f)):
                name = PurePosixPath(address).relative_to(PurePosixPath(root))
                path = self.out / name
                if not _copied(name):
                    continue
                if not path.exists() or (
                    path.stat().st_size != about["size"]
                    and fs.modified(address).timestamp() > path.stat().st_mtime
                ):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary = path.with_name(f"{path.name}.{self.world.rank}.tmp")
                    fs.get_file(address, str(temporary))
                    temporary.replace(path)
                if path.stat().st_size == about["size"]:
                    self.known[name.as_posix()] = _state(path)


def fetched(address: str, out: Path, world: World) -> Path:
    """A stage or an export that lies on a store, or the last finished stage of a run there, copied into
    `out`/init on every machine. Raises FileNotFoundError where there is neither, StoreError for a store that
    cannot be used. Called by all ranks together."""
    source: str = world.gather(_model(address))[0]
    scheme, _, path = source.partition("://")
    place = out / "init" / scheme / path.strip("/")
    Mirror(source, place, world).fetch()
    return place


def _model(address: str) -> str:
    """The address of a model: the folder itself, or that of its last finished stage."""
    folder = Folder(address)
    if {*folder.names()} & {*LAST, GRAPH}:
        return address
    for stage in reversed(STAGES):
        if {*(folder / stage).names()} & {*LAST}:
            return str(folder / stage)
    raise FileNotFoundError(f"{address}: no trained stage there; give the address of a run or of a stage")


def _copied(name: Path | PurePosixPath) -> bool:
    return name.suffix not in UNFINISHED and not set(name.parts[:-1]) & {*HERE_ALONE}


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
