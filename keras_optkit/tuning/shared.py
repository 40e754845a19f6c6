"""A search that several machines share: its directory here follows the storage, and trials have leases.

Each process works in a directory of its own, as a search without a storage does. The books in it are brought up to date
before they are read and stored after they were changed, in one transaction that locks the search; what a trial leaves
beside them is stored with each bundle, and fetched by who continues it.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from keras_optkit import arguments
from keras_optkit.files import TEMPORARY
from keras_optkit.tuning.books import HISTORY
from keras_optkit.tuning.storage import Storage, Transaction, changed

_TICK = 1.0  # seconds between two looks for news
_BOOKS = ("*.json", "trial_*/trial.json", f"trial_*/{HISTORY}")
_BOOK = re.compile(rf"[^/]+\.json|trial_[^/]+/(trial\.json|{re.escape(HISTORY)})")
_BUNDLES = "run_*/bundle-*.npz"


class Shared:
    """The storage of a search, as one of its processes sees it.

    Args:
        storage: As in `search`.
        directory: Where this process works; of its own.
        lease: As in `search`.

    Attributes:
        others: Whether other processes are training trials, as of the last look into the books.
    """

    def __init__(self, storage: Any, directory: Path, lease: float) -> None:
        self.lease = arguments.real("lease", lease, 1)
        self._storage = Storage(storage)
        self._directory = directory
        self._known: dict[str, str] = {}  # digests of the books, as they are here and in the storage
        self._tokens: dict[str, str] = {}  # of the trials that are trained here
        self._claimed: dict[str, str] = {}  # since the books were opened
        self._lost: set[str] = set()
        self._open: Transaction | None = None
        self._seen = -1
        self._looked = 0.0
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """The storage, without a password."""
        return self._storage.name

    # The books

    @contextlib.contextmanager
    def books(self, *, clear: bool = False) -> Iterator[None]:
        """In the block the books are as all processes have left them, and they are this one's; then they are stored.

        If the block raises, nothing is stored, and what is in the directory is not to be used any more.

        Args:
            clear: Whether to delete the search before.

        Raises:
            RuntimeError: If another process has deleted the search, or, with `clear`, if somebody trains a trial of it.
        """
        with self._storage.transaction(locked=True) as opened:
            self._open = opened
            try:
                if clear:
                    self._clear(opened)
                stored = opened.listed()
                if not self._known.keys() <= stored.keys():
                    raise RuntimeError(f"The search in storage={self.name!r} was deleted by another process.")
                for path, digest in stored.items():
                    if _BOOK.fullmatch(path) and self._known.get(path) != digest:
                        opened.get(path, self._directory / path, digest)
                        self._known[path] = digest
                yield
                new = changed(self._local(_BOOKS), self._known)
                for path, file in new.items():
                    self._known[path] = opened.put(path, file)
                if new:
                    opened.count_change()
                self._seen = opened.version()
            finally:
                self._open = None
                claimed, self._claimed = self._claimed, {}
        if claimed:  # not before others can see them: a lease that cannot be renewed is taken for lost
            with self._guard:
                self._tokens |= claimed
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._thread.start()

    def _local(self, patterns: Collection[str], below: str = "") -> Iterator[tuple[str, Path]]:
        for pattern in patterns:
            for file in sorted(self._directory.glob(below + pattern)):
                if file.is_file() and TEMPORARY not in file.name and file.name != "lock":
                    yield file.relative_to(self._directory).as_posix(), file

    @property
    def _opened(self) -> Transaction:
        assert self._open is not None, "the books are closed"
        return self._open

    def news(self) -> bool:
        """Whether others have changed the books, or a lease is over; looks once in a while."""
        if time.monotonic() - self._looked < _TICK:
            return False
        self._looked = time.monotonic()
        with self._storage.transaction() as opened:
            return opened.version() != self._seen or opened.late() > 0

    def _clear(self, opened: Transaction) -> None:
        if trials := opened.held():
            raise RuntimeError(
                f"overwrite must be False while trials of storage={self.name!r} are trained, got True, with "
                f"{len(trials)} of them."
            )
        opened.clear()
        self._known = {}

    # Leases; with open books

    def held(self) -> set[str]:
        """The trials that are being trained, here or elsewhere."""
        return self._opened.held()

    def claim(self, trial: str) -> None:
        """Takes the lease of a trial, and fetches what was left of it."""
        token = self._opened.claim(trial, self.lease)
        assert token is not None, f"trial {trial} is being trained"  # what is late is locked while books are open
        self._fetch(self._opened, f"trial_{trial}/", last=True)
        self._claimed[trial] = token

    def is_ours(self, trial: str) -> bool:
        """Whether no other process has taken a trial that is trained here."""
        return trial in self._tokens and self._opened.holds(trial, self._tokens[trial])

    def end(self, trial: str) -> None:
        """A trial has ended or is paused: stores what it has left, and gives the lease back."""
        self._store(self._opened, trial)
        self._opened.release(trial, self._tokens[trial], ended=True)
        with self._guard:
            del self._tokens[trial]

    def tidy(self, ended: Collection[str], kept: Collection[str]) -> None:
        """Deletes what trials that have ended have left, but for the models that are kept."""
        gone = []
        for path in self._opened.listed():
            folder, _, name = path.partition("/")
            trial = folder.removeprefix("trial_")
            if not _BOOK.fullmatch(path) and trial in ended and not (trial in kept and name.startswith("model")):
                gone.append(path)
        self._opened.delete(gone)

    def fetch_models(self, trials: Collection[str]) -> None:
        """Fetches the models that are kept."""
        for trial in trials:
            self._fetch(self._opened, f"trial_{trial}/model", last=False)

    # What trials leave

    def store(self, trial: str) -> None:
        """Stores what a trial that is trained here has left so far, with its last bundle; books are closed."""
        with self._storage.transaction() as opened:
            if trial in self._tokens and opened.holds(trial, self._tokens[trial]):
                self._store(opened, trial)
            else:
                self._lose(trial)

    def _store(self, opened: Transaction, trial: str) -> None:
        below = f"trial_{trial}/"
        local = {path: file for path, file in self._local(["*"], below) if not _BOOK.fullmatch(path)}
        newest: dict[Path, tuple[str, Path]] = {}
        for path, file in self._local([_BUNDLES], below):  # in order of their numbers
            newest[file.parent] = path, file
        local |= dict(newest.values())
        stored = {path: digest for path, digest in opened.listed(below).items() if not _BOOK.fullmatch(path)}
        for path, file in changed(local.items(), stored).items():
            opened.put(path, file)
        opened.delete(sorted(stored.keys() - local.keys()))

    def _fetch(self, opened: Transaction, below: str, *, last: bool) -> None:
        """Makes the files of a trial here those in the storage.

        Args:
            opened: The transaction.
            below: How their paths begin.
            last: Whether to delete what is here and not there.
        """
        stored = {path: digest for path, digest in opened.listed(below).items() if not _BOOK.fullmatch(path)}
        local = {path: file for path, file in self._local(["*", "run_*/*"], below) if not _BOOK.fullmatch(path)}
        if last:
            for path in local.keys() - stored.keys():
                local[path].unlink()
        same = {path for path in local.keys() & stored.keys() if path not in changed([(path, local[path])], stored)}
        for path in stored.keys() - same:
            opened.get(path, self._directory / path, stored[path])

    # Renewal

    def _renew(self) -> None:
        """Renews the leases of this process until it ends."""
        while not self._ended.wait(self.lease / 4):
            with self._guard:
                tokens = dict(self._tokens)
            with contextlib.suppress(Exception):  # tried again; a lease that another has taken meanwhile is lost
                with self._storage.transaction() as opened:
                    gone = [trial for trial, token in tokens.items() if not opened.renew(trial, token, self.lease)]
                for trial in gone:
                    if self._tokens.get(trial) == tokens[trial]:
                        self._lose(trial)

    def _lose(self, trial: str) -> None:
        with self._guard:
            self._tokens.pop(trial, None)
            self._lost.add(trial)

    def lost(self) -> set[str]:
        """The trials that others have taken since the last call."""
        with self._guard:
            lost, self._lost = self._lost, set()
        return lost

    def close(self) -> None:
        """Gives all leases back, for others to take at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        tokens, self._tokens = self._tokens, {}
        if tokens:
            with contextlib.suppress(Exception), self._storage.transaction() as opened:  # they end by themselves
                for trial, token in tokens.items():
                    opened.release(trial, token, ended=False)
        self._ended = threading.Event()
