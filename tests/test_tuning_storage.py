"""Searches that several processes share: the database, its leases, and processes that are killed."""

import os
import re
import signal
import sys
import threading

import numpy as np
import postgres
import pytest
import sqlalchemy
import storage_search

import keras_optkit as ok
from keras_optkit.tuning import Choice, storage
from keras_optkit.tuning.shared import Shared
from keras_optkit.tuning.storage import Storage

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def server():
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "search.db")
    found = request.getfixturevalue("server")
    with sqlalchemy.create_engine(found.replace("://", "+psycopg://"), poolclass=sqlalchemy.NullPool).begin() as open_:
        for table in ("search", "files", "chunks", "leases"):
            open_.exec_driver_sql(f"DROP TABLE IF EXISTS keras_optkit_{table}")
    return found


# Leases


def test_a_lease_has_one_holder(url):
    database = Storage(url)
    with database.transaction() as opened:
        token = opened.claim("0", 1000)
        assert token is not None
        assert opened.claim("0", 1000) is None
        assert opened.held() == {"0"}
        assert opened.late() == 0
        assert not opened.renew("0", "another", 1000)
        assert opened.renew("0", token, 0.0)  # which is over at once
    with database.transaction() as opened:
        assert opened.held() == set()
        assert opened.late() == 1
        assert opened.renew("0", token, 0.0)  # nobody else has taken it
        other = opened.claim("0", 1000)
        assert other not in (None, token)
        assert not opened.renew("0", token, 1000)
        assert not opened.holds("0", token)
        assert opened.holds("0", other)
        opened.release("0", token, ended=True)  # no longer its own
        assert opened.held() == {"0"}
        opened.release("0", other, ended=False)
        assert opened.late() == 1
        last = opened.claim("0", 1000)
        opened.release("0", last, ended=True)
        assert opened.late() == 0
        assert opened.claim("0", 1000) is not None


@pytest.mark.parametrize("begun", [False, True], ids=["new", "late"])
def test_one_of_many_takes_a_lease(url, begun):
    database, taken = Storage(url), []
    if begun:
        with database.transaction() as opened:
            opened.claim("0", 0.0)
    ready = threading.Barrier(6)

    def take():
        ready.wait()
        with database.transaction() as opened:
            taken.append(opened.claim("0", 1000))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 6
    assert len([token for token in taken if token is not None]) == 1


def test_what_raises_changes_nothing(url, tmp_path):
    database, file = Storage(url), tmp_path / "file"
    file.write_bytes(b"content")

    def fails():
        with database.transaction() as opened:
            opened.claim("0", 1000)
            opened.put("file", file)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with database.transaction() as opened:
        assert opened.held() == set()
        assert opened.listed() == {}


# Files


def test_files_are_those_that_were_put(url, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_CHUNK", 7)
    database, content = Storage(url), bytes(range(256)) * 3
    for name, part in {"whole": content, "empty": b"", "other": b"1234567"}.items():
        (tmp_path / name).write_bytes(part)
    with database.transaction() as opened:
        for path in ("trial_1/whole", "trial_1/empty", "trial_1x/other"):
            opened.put(path, tmp_path / path.partition("/")[2])
        opened.put("trial_1/whole", tmp_path / "other")
        opened.put("trial_1/whole", tmp_path / "whole")
    with database.transaction() as opened:
        assert opened.listed("trial_1/").keys() == {"trial_1/whole", "trial_1/empty"}
        for path, digest in opened.listed().items():
            opened.get(path, tmp_path / "got", digest)
            assert (tmp_path / "got").read_bytes() == (tmp_path / path.partition("/")[2]).read_bytes()
        one = database.chunks.c.number == 3
        opened.run(database.chunks.update().where(one).values(content=b"changed"))
        with pytest.raises(RuntimeError, match=r"'trial_1/whole' in storage=.* is damaged: its digest is wrong\."):
            opened.get("trial_1/whole", tmp_path / "got", opened.listed()["trial_1/whole"])
        opened.delete(["trial_1/whole"])
        assert opened.run(sqlalchemy.select(database.chunks.c.path)).scalars().all() == ["trial_1x/other"]


# The books, and what trials leave


def two(url, tmp_path):
    """Two processes of a search."""
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        found.append((Shared(url, tmp_path / name, lease=1000.0), tmp_path / name))
    return found


def test_books_are_read_as_others_have_left_them(url, tmp_path):
    (one, here), (other, there) = two(url, tmp_path)
    with one.books():
        (here / "oracle.json").write_text("1")
        (here / "trial_0").mkdir()
        (here / "trial_0" / "trial.json").write_text("a")
        (here / "trial_0" / "model.keras").write_text("no book")
    with other.books():
        assert (there / "oracle.json").read_text() == "1"
        assert (there / "trial_0" / "trial.json").read_text() == "a"
        assert not (there / "trial_0" / "model.keras").exists()
        (there / "oracle.json").write_text("2")
    assert one.news()

    def fails():
        with one.books():
            assert (here / "oracle.json").read_text() == "2"
            (here / "oracle.json").write_text("3")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    with other.books():
        assert (there / "oracle.json").read_text() == "2"


def test_one_process_at_a_time_has_the_books_open(url, tmp_path):
    shares = two(url, tmp_path)

    def count(shared, directory):
        for _ in range(15):
            with shared.books():
                book = directory / "tuner0.json"
                book.write_text(str(int(book.read_text()) + 1 if book.exists() else 1))

    threads = [threading.Thread(target=count, args=share) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with shares[0][0].books():
        assert (shares[0][1] / "tuner0.json").read_text() == "30"


def late(url):
    """Has the time of all leases be over."""
    with Storage(url).transaction() as opened:
        opened.run(opened._storage.leases.update().values(expires=0.0))


def test_a_trial_is_continued_elsewhere_with_its_last_bundle(url, tmp_path):
    (one, here), (other, there) = two(url, tmp_path)
    run = here / "trial_0" / "run_0"
    run.mkdir(parents=True)
    with one.books():
        one.claim("0")
    for number in (1, 2):
        (run / f"bundle-0000000{number}.npz").write_text(str(number))
    (run / "lock").write_text("")
    (run.parent / "reached_0.json").write_text("note")
    one.store("0")
    with other.books():
        assert other.held() == {"0"}
    late(url)
    (run.parent / "reached_0.json").write_text("a note that was not stored")
    (there / "trial_0").mkdir()
    (there / "trial_0" / "model.keras").write_text("of an attempt before")
    with other.books():
        assert other.held() == set()
        other.claim("0")
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert found == {"trial_0/reached_0.json", "trial_0/run_0/bundle-00000002.npz"}
    assert (there / "trial_0" / "reached_0.json").read_text() == "note"
    one.store("0")  # which is too late
    assert one.lost() == {"0"}
    assert one.lost() == set()
    with one.books():
        assert not one.is_ours("0")
    with other.books():
        assert other.is_ours("0")
        other.end("0")
        assert other.held() == set()
    with other._storage.transaction() as opened:
        got = opened.listed()
        opened.get("trial_0/reached_0.json", tmp_path / "note", got["trial_0/reached_0.json"])
    assert (tmp_path / "note").read_text() == "note"
    for shared in (one, other):
        shared.close()


def test_leases_are_renewed_and_given_back(url, tmp_path):
    (one, _), (other, _) = two(url, tmp_path)
    one.lease = 0.4
    with one.books():
        one.claim("0")
    renewed = threading.Event()
    begun = expires(url)
    for _ in range(200):
        if expires(url) > begun + 0.5:
            renewed.set()
            break
        renewed.wait(0.05)
    assert renewed.is_set()
    one.close()
    with other.books():
        assert other.held() == set()
        other.claim("0")
    other.close()


def expires(url):
    with Storage(url).transaction() as opened:
        return opened.run(sqlalchemy.select(opened._storage.leases.c.expires)).scalar()


def test_of_trials_that_have_ended_the_best_models_are_kept(url, tmp_path):
    (one, here), (other, there) = two(url, tmp_path)
    for trial in "012":
        with one.books():
            one.claim(trial)
        for name in ("trial.json", "model.keras", "model.built.json", "run_0/bundle-00000001.npz"):
            path = here / f"trial_{trial}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(trial)
        with one.books():
            one.end(trial)
    with other.books():
        other.tidy(ended=["0", "1"], kept=["1"])
        other.fetch_models(["1"])
    with other._storage.transaction() as opened:
        left = {path for path in opened.listed() if not path.endswith("trial.json")}
    assert {path.partition("/")[0] for path in left} == {"trial_1", "trial_2"}
    assert {path for path in left if path.startswith("trial_1/")} == {"trial_1/model.keras", "trial_1/model.built.json"}
    assert (there / "trial_1" / "model.keras").read_text() == "1"
    one.close()


def test_a_search_is_not_deleted_under_others(url, tmp_path):
    (one, here), (other, there) = two(url, tmp_path)
    with one.books():
        (here / "oracle.json").write_text("1")
        one.claim("0")
    message = r"overwrite must be False while trials of storage=.* are trained, got True, with 1 of them\."
    with pytest.raises(RuntimeError, match=message), other.books(clear=True):
        pass
    one.close()
    with other.books(clear=True):
        assert not (there / "oracle.json").exists()
    with pytest.raises(RuntimeError, match=r"The search in storage=.* was deleted by another process\."), one.books():
        pass


# Bad arguments


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r'storage must be a path, "sqlite:///FILE" or "postgresql://.*, or None, got 3\.'),
        ("", TypeError, "storage must be a path"),
        ("sqlite://", ValueError, "storage must be a path"),
        ("sqlite:///:memory:", ValueError, "storage must be a path"),
        (":memory:", ValueError, "which other processes can open, got ':memory:'"),
        ("sqlite:///a.db?mode=ro", ValueError, "without options, got 'sqlite:///a.db"),
        (__file__, ConnectionError, r"storage='sqlite:///.*' cannot be opened: file is not a database"),
        (f"{__file__}/a.db", ConnectionError, r"storage='sqlite:///.*' cannot be opened: "),
        ("mysql://me:secret@host/db", ValueError, r"got 'mysql://me:\*\*\*@host/db'\."),
        ("postgresql://%zz:x:y", ValueError, "storage must be a path"),
        ("postgresql://127.0.0.1:1/db", ConnectionError, r"storage='postgresql\+psycopg://.*' cannot be opened: "),
    ],
)
def test_bad_storages(given, error, message):
    with pytest.raises(error, match=message):
        Storage(given)


@pytest.mark.parametrize(
    ("package", "given", "message"),
    [
        ("sqlalchemy", "search.db", r'storage needs SQLAlchemy, .*"keras-optkit\[storage\]"\.'),
        (
            "psycopg",
            "postgresql://a:b@c/d",
            r"'postgresql://a:\*\*\*@c/d' needs psycopg.*\"keras-optkit\[postgresql\]\"",
        ),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, given, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        Storage(given)


def test_another_version_is_refused(url):
    database = Storage(url)
    with database.transaction() as opened:
        opened.run(database.search.update().values(format=2))
    with pytest.raises(ValueError, match=r"storage must hold a search of this version .* in the format 2 instead of 1"):
        Storage(url)


X = np.arange(32, dtype="float32").reshape(16, 2)
DATA = X, X[:, :1]


def search(url, **changed):
    given = {"space": {"rate": Choice([0.1, 0.2])}, "data": DATA, "max_trials": 1, "epochs": 1, "seed": 0, "lease": 60}
    given |= {"objective": "val_loss", "verbose": 0, "storage": url} | changed
    return ok.tuning.search(storage_search.build, **given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"directory": "d"}, ValueError, "directory must be None where storage is given, which .*, got 'd'"),
        ({"lease": 0.5}, ValueError, "lease must be"),
        ({"lease": "60"}, TypeError, "lease must be"),
        (
            {"pruner": "median"},
            ValueError,
            "pruner must be one that pauses trials.* where storage is given, got Median",
        ),
    ],
)
def test_bad_arguments(tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        search(str(tmp_path / "search.db"), **changed)


# Searches


def test_a_search_is_continued_if_it_is_the_same(tmp_path):
    """What has ended is there for every process, with its model; another search is refused with what differs."""
    url = f"sqlite:///{tmp_path / 'search.db'}"
    first = search(url)
    again = search(url)
    assert len(again.trials) == 1
    assert [trial.values for trial in again.trials] == [trial.values for trial in first.trials]
    assert [trial.score for trial in again.trials] == [trial.score for trial in first.trials]
    np.testing.assert_array_equal(again.best_model.get_weights()[0], first.best_model.get_weights()[0])
    assert first.rerun(0).score == pytest.approx(first.trials[0].score, rel=1e-5)
    changes = {
        r"space\['rate'\] was .* and is": {"space": {"rate": Choice([0.1, 0.3])}},
        r"epochs was 1 and is 2": {"epochs": 2},
        r"strategy was 'random' and is 'grid'": {"strategy": "grid"},
        r"data\['data'\] was .* and is": {"data": (X, X[:, 1:])},
        r"pruner was None and is": {"pruner": "asha", "epochs": 4},
    }
    for message, changed in changes.items():
        with pytest.raises(ValueError, match=f"storage must be new or hold the same search, got .*{message}"):
            search(url, **changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process finds."""
    directory = tmp_path_factory.mktemp("alone")
    return storage_search.Process(directory / "search.db", directory / "told").end()


@pytest.mark.long
def test_a_process_is_killed_and_another_continues(url, whole, tmp_path):
    """The table and the model are those of one process; the trial is continued from its bundle, no other twice run."""
    one, other = (storage_search.Process(url, tmp_path / name) for name in ("one", "other"))
    storage_search.wait_for(tmp_path / "one", epochs=storage_search.EPOCHS - 4)
    storage_search.kill(one)
    assert other.end() == whole
    storage_search.check_epochs(tmp_path / "one", tmp_path / "other")


@pytest.mark.long
def test_a_process_that_slept_does_not_disturb_the_one_that_continues(whole, tmp_path):
    """It had the lease of a trial, which is over when it wakes; what it trains then is not taken."""
    url = tmp_path / "search.db"
    one, other = (storage_search.Process(url, tmp_path / name) for name in ("one", "other"))
    storage_search.wait_for(tmp_path / "one", epochs=storage_search.EPOCHS - 4)
    os.kill(one.process.pid, signal.SIGSTOP)
    storage_search.wait_for(tmp_path / "other", epochs=(storage_search.TRIALS - 1) * storage_search.EPOCHS + 1)
    os.kill(one.process.pid, signal.SIGCONT)
    assert other.end() == whole
    assert one.end() == whole
    assert re.search(r"trial \d is continued by another process, which has its lease", one.said())
