"""A PostgreSQL server of Debian's package for the tests: in a directory of its own, on a socket and no port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    assert found, "the tests of PostgreSQL need Debian's package postgresql"
    return found[-1]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts a server; gives the URL of its database, and stops it at the end.

    It refuses to run as root, so that it runs as `postgres` then. Its directory has a short name, since that of a
    socket may have no more than 107 characters.
    """
    directory = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    user: dict[str, str | int] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam("postgres")
        os.chown(directory, entry.pw_uid, entry.pw_gid)
        user = {"user": entry.pw_uid, "group": entry.pw_gid}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "check": True, "cwd": "/"}
    data, control = directory / "data", _programs() / "pg_ctl"
    try:
        subprocess.run(
            [_programs() / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"], **quiet, **user
        )
        options = f"-c listen_addresses='' -c unix_socket_directories={directory} -c fsync=off"
        log = directory / "log"
        subprocess.run([control, "-D", data, "-o", options, "-l", log, "-w", "start"], **quiet, **user)
        try:
            yield f"postgresql://postgres@/postgres?host={directory}"
        finally:
            subprocess.run([control, "-D", data, "-m", "immediate", "-w", "stop"], **quiet, **user)
    finally:
        shutil.rmtree(directory)
