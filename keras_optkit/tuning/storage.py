"""The database of a search that several machines share: its books, the files of its trials, and who trains which.

A search is one row, which is locked while its books are open, so that one process at a time reads and changes them.
A trial that is trained has a lease. All times are those of the database, since the clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from keras_optkit.files import atomic_write

_FORMAT = 1
_CHUNK = 1 << 22  # bytes of a file in one row; PostgreSQL takes less than 1 GiB
_OPEN = 300  # seconds after which PostgreSQL ends a transaction whose process does nothing: its machine may be gone
_CREATING = 0x6F70746B  # of a lock of PostgreSQL, while tables are made

_CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}


def url_of(storage: Any) -> Any:
    """The argument `storage` as SQLAlchemy's URL.

    Raises:
        TypeError: If it is neither a path nor a string.
        ValueError: If it is not a file of SQLite or a database of PostgreSQL.
        ImportError: If SQLAlchemy or psycopg is needed and not installed.
    """
    allowed = 'a path, "sqlite:///FILE" or "postgresql://USER@HOST/DATABASE"'
    if not isinstance(storage, str | os.PathLike) or not str(storage):
        raise TypeError(f"storage must be {allowed}, or None, got {storage!r}.")
    text = os.fspath(storage)
    if not isinstance(text, str) or "\0" in text:
        raise TypeError(f"storage must be {allowed}, or None, got {storage!r}.")
    if ":memory:" in text:
        raise ValueError(f"storage must be {allowed}, which other processes can open, got {text!r}.")
    sql = _package("sqlalchemy", "storage", "SQLAlchemy", "storage")
    if "://" not in text:
        return sql.URL.create("sqlite", database=str(Path(text).absolute()))
    try:
        url = sql.engine.make_url(text)
    except (sql.exc.ArgumentError, ValueError) as error:
        raise ValueError(f"storage must be {allowed}, got {text!r}.") from error
    shown = url.render_as_string(hide_password=True)
    if url.drivername == "sqlite" and url.query:
        raise ValueError(f"storage must be {allowed}, without options, got {shown!r}.")
    if url.drivername == "sqlite" and url.database:
        return url.set(database=str(Path(url.database).absolute()))
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        _package("psycopg", f"storage={shown!r}", "psycopg", "postgresql")
        return url.set(drivername="postgresql+psycopg")
    raise ValueError(f"storage must be {allowed}, got {shown!r}.")


def _package(name: str, argument: str, title: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{argument} needs {title}, which is not installed: pip install "keras-optkit[{extra}]".'
        ) from error


class Storage:
    """A database.

    Args:
        storage: As in `search`.

    Attributes:
        name: Its URL, without a password.

    Raises:
        TypeError: If `storage` has a wrong type.
        ValueError: If it is no database of a kind that is known, or of another version of this package.
        ImportError: If a package is missing.
        ConnectionError: If it cannot be opened.
    """

    def __init__(self, storage: Any) -> None:
        url = url_of(storage)
        import sqlalchemy as sql

        self._sql = sql
        self.name: str = url.render_as_string(hide_password=True)
        self._kind = url.get_backend_name()
        if self._kind == "sqlite":
            try:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConnectionError(f"storage={self.name!r} cannot be opened: {error}") from error
        options: dict[str, Any] = {"isolation_level": "READ COMMITTED"}  # each statement sees what was locked before it
        if self._kind == "sqlite":
            options = {"connect_args": {"timeout": 300.0}}
        self._engine = sql.create_engine(url, poolclass=sql.pool.NullPool, **options)
        if self._kind == "sqlite":
            # Python's module begins a transaction with the first change, after what was read has become old.
            sql.event.listen(self._engine, "connect", _leave_transactions_to_us)
            sql.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        self.clock = sql.literal_column(_CLOCKS[self._kind], sql.Float)
        self._tables()
        self._patience = 0.0
        try:
            self._create()
        except sql.exc.DBAPIError as error:  # no database, or one that this user may not change
            raise ConnectionError(f"storage={self.name!r} cannot be opened: {str(error.orig).strip()}") from error
        self._patience = 60.0

    def _tables(self) -> None:
        sql, self._metadata = self._sql, self._sql.MetaData()

        def table(name: str, *columns: Any) -> Any:
            return sql.Table(f"keras_optkit_{name}", self._metadata, *columns)

        def key(name: str, kind: Any) -> Any:
            return sql.Column(name, kind, primary_key=True, autoincrement=False)

        def column(name: str, kind: Any) -> Any:
            return sql.Column(name, kind, nullable=False)

        self.search = table(
            "search", key("id", sql.Integer), column("format", sql.Integer), column("version", sql.Integer)
        )
        self.files = table("files", key("path", sql.Text), column("digest", sql.Text))
        self.chunks = table(
            "chunks", key("path", sql.Text), key("number", sql.Integer), column("content", sql.LargeBinary)
        )
        self.leases = table(
            "leases", key("trial", sql.Text), column("token", sql.Text), column("expires", sql.Float(53))
        )

    def _create(self) -> None:
        with self.transaction() as open_:
            if self._kind == "postgresql":
                open_.run(self._sql.select(self._sql.func.pg_advisory_xact_lock(_CREATING)))
            self._metadata.create_all(open_.connection)
            row = open_.run(self._sql.select(self.search.c.format)).scalar()
            if row is None:
                open_.run(self.search.insert().values(id=1, format=_FORMAT, version=0))
            elif row != _FORMAT:
                raise ValueError(
                    f"storage must hold a search of this version of the package, got {self.name!r} with one in the "
                    f"format {row} instead of {_FORMAT}."
                )

    @contextlib.contextmanager
    def transaction(self, *, locked: bool = False) -> Iterator[Transaction]:
        """What is done in the block is done as a whole, or not at all if it raises.

        Args:
            locked: Whether to wait until no other process has the books open, and to keep others from it.

        Raises:
            ConnectionError: If the database cannot be reached.
        """
        with self._connected() as connection, connection.begin():
            if self._kind == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {_OPEN * 1000}")
            opened = Transaction(self, connection)
            if locked:
                opened.run(self._sql.select(self.search.c.id).with_for_update()).all()
            yield opened

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """A connection; a server that restarts is waited for."""
        until = time.monotonic() + self._patience
        while True:
            try:
                connection = self._engine.connect()
                break
            except self._sql.exc.OperationalError as error:
                if time.monotonic() >= until:
                    reason = str(error.orig).strip()
                    raise ConnectionError(f"storage={self.name!r} cannot be opened: {reason}") from error
                time.sleep(0.5)
        with contextlib.closing(connection):
            yield connection


class Transaction:
    """What can be done with a storage, in one transaction.

    Args:
        storage: The storage.
        connection: Of SQLAlchemy.
    """

    def __init__(self, storage: Storage, connection: Any) -> None:
        self._storage = storage
        self._sql = storage._sql
        self.connection = connection
        self.run = connection.execute

    # Leases

    def claim(self, trial: str, seconds: float) -> str | None:
        """Takes the lease of a trial, if nobody has it or its time is over.

        Returns:
            A token, which renews or releases it, or None if another has it.
        """
        leases, token = self._storage.leases, secrets.token_hex(8)
        clock = self._storage.clock
        late = (leases.c.trial == trial) & (leases.c.expires <= clock)
        if self.run(leases.update().where(late).values(token=token, expires=clock + seconds)).rowcount == 1:
            return token
        insert = importlib.import_module(f"sqlalchemy.dialects.{self._storage._kind}").insert(leases)
        new = insert.values(trial=trial, token=token, expires=clock + seconds).on_conflict_do_nothing()
        return token if self.run(new.returning(leases.c.trial)).first() is not None else None

    def renew(self, trial: str, token: str, seconds: float) -> bool:
        """Prolongs a lease; whether it was still this one's. One that is late can be renewed until another takes it."""
        leases = self._storage.leases
        mine = (leases.c.trial == trial) & (leases.c.token == token)
        found = self.run(leases.update().where(mine).values(expires=self._storage.clock + seconds))
        return bool(found.rowcount == 1)

    def holds(self, trial: str, token: str) -> bool:
        """Whether a lease is still this one's, which it stays until the transaction ends."""
        leases = self._storage.leases
        mine = (leases.c.trial == trial) & (leases.c.token == token)
        return self.run(self._sql.select(leases.c.trial).where(mine).with_for_update()).first() is not None

    def release(self, trial: str, token: str, *, ended: bool) -> None:
        """Gives a lease back: of a trial that is no longer to be trained, or else for another to take."""
        leases = self._storage.leases
        mine = (leases.c.trial == trial) & (leases.c.token == token)
        self.run(leases.delete().where(mine) if ended else leases.update().where(mine).values(expires=0.0))

    def held(self) -> set[str]:
        """The trials that are being trained.

        Those whose lease is over cannot be renewed before this transaction ends. A lease that is being renewed at this
        moment (SKIP LOCKED) is not over.
        """
        leases = self._storage.leases
        late = self._sql.select(leases.c.trial).where(leases.c.expires <= self._storage.clock)
        over = set(self.run(late.with_for_update(skip_locked=True)).scalars())
        return set(self.run(self._sql.select(leases.c.trial)).scalars()) - over

    def late(self) -> int:
        """How many leases are over."""
        leases = self._storage.leases
        count = self._sql.select(self._sql.func.count()).select_from(leases)
        return int(self.run(count.where(leases.c.expires <= self._storage.clock)).scalar())

    # Versions

    def version(self) -> int:
        """How often the books were changed."""
        return int(self.run(self._sql.select(self._storage.search.c.version)).scalar())

    def count_change(self) -> None:
        """Notes that the books were changed."""
        search = self._storage.search
        self.run(search.update().values(version=search.c.version + 1))

    # Files

    def listed(self, below: str = "") -> dict[str, str]:
        """The digests of files, by path, whose path begins so."""
        files = self._storage.files
        found = self._sql.select(files.c.path, files.c.digest).where(files.c.path.startswith(below, autoescape=True))
        return {row.path: row.digest for row in self.run(found)}

    def put(self, path: str, file: Path) -> str:
        """Writes a file of the disk into the storage; returns its digest."""
        self.delete([path])
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            for number, content in enumerate(iter(lambda: opened.read(_CHUNK), b"")):
                digest.update(content)
                self.run(self._storage.chunks.insert().values(path=path, number=number, content=content))
        self.run(self._storage.files.insert().values(path=path, digest=digest.hexdigest()))
        return digest.hexdigest()

    def get(self, path: str, file: Path, digest: str) -> None:
        """Writes a file of the storage to the disk.

        Raises:
            RuntimeError: If it is not what was put there.
        """
        chunks, seen = self._storage.chunks, hashlib.sha256()
        count = self._sql.select(self._sql.func.count()).where(chunks.c.path == path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as opened:
            for number in range(self.run(count).scalar()):
                one = (chunks.c.path == path) & (chunks.c.number == number)
                content = self.run(self._sql.select(chunks.c.content).where(one)).scalar()
                seen.update(content or b"")
                opened.write(content or b"")
            if seen.hexdigest() != digest:
                raise RuntimeError(f"{path!r} in storage={self._storage.name!r} is damaged: its digest is wrong.")

    def delete(self, paths: Collection[str]) -> None:
        """Deletes files."""
        for path in paths:
            for table in (self._storage.files, self._storage.chunks):
                self.run(table.delete().where(table.c.path == path))

    def clear(self) -> None:
        """Deletes the search."""
        for table in (self._storage.files, self._storage.chunks, self._storage.leases):
            self.run(table.delete())
        self.count_change()


def digest_of(file: Path) -> str:
    """The digest of a file on the disk."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def changed(files: Iterable[tuple[str, Path]], known: dict[str, str]) -> dict[str, Path]:
    """Those files whose digest is not the known one."""
    return {path: file for path, file in files if digest_of(file) != known.get(path)}


def _leave_transactions_to_us(connection: Any, record: Any) -> None:  # noqa: ARG001  (SQLAlchemy's interface)
    connection.isolation_level = None
