"""Directories that are damaged at random and then used: a documented error, or an earlier state with a warning.

`tests/test_damage.py` runs a share of it; the long form is

    python tests/damage.py --number 1000 --subjects resume

A subject is something that keeps files in a directory and can be used again with it; everything runs in this process.
To add one, derive from `Subject` and list it in `SUBJECTS`.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np

import keras_optkit as ok

# -- damages ----------------------------------------------------------------------------------------------------------

Damage = Callable[[random.Random, Path], None]
DAMAGES: dict[str, Damage] = {}

#: Those after which files are missing and nothing else is wrong.
REMOVALS = {"delete", "harmless"}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__.replace("_", " ")] = function
    return function


def a_file(rng: random.Random, directory: Path) -> Path:
    """One of the files, mostly one with content."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.is_symlink())
    full = [path for path in files if path.stat().st_size]
    return rng.choice(full if full and rng.random() < 0.9 else files)


def change(rng: random.Random, directory: Path, how: Callable[[bytearray], bytearray | None]) -> None:
    path = a_file(rng, directory)
    content = bytearray(path.read_bytes())
    changed = how(content)
    path.write_bytes(content if changed is None else changed)


@damage
def flip_a_bit(rng: random.Random, directory: Path) -> None:
    def how(content: bytearray) -> None:
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    change(rng, directory, how)


@damage
def change_some_bytes(rng: random.Random, directory: Path) -> None:
    def how(content: bytearray) -> None:
        for _ in range(rng.randint(1, 20)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)

    change(rng, directory, how)


@damage
def cut(rng: random.Random, directory: Path) -> None:
    change(rng, directory, lambda content: content[: rng.randint(0, len(content))])


@damage
def empty(rng: random.Random, directory: Path) -> None:
    change(rng, directory, lambda _: bytearray())


@damage
def extend(rng: random.Random, directory: Path) -> None:
    change(rng, directory, lambda content: content + rng.randbytes(rng.choice([1, 32, 4096])))


@damage
def zero_a_part(rng: random.Random, directory: Path) -> None:
    def how(content: bytearray) -> None:
        begin = rng.randint(0, len(content))
        end = min(len(content), begin + rng.choice([1, 512, 4096]))
        content[begin:end] = bytes(end - begin)

    change(rng, directory, how)


@damage
def zero_all(rng: random.Random, directory: Path) -> None:
    change(rng, directory, lambda content: bytearray(len(content)))


@damage
def take_out_the_middle(rng: random.Random, directory: Path) -> None:
    def how(content: bytearray) -> bytearray:
        begin = rng.randint(0, len(content))
        return content[:begin] + content[begin + rng.randint(1, 100) :]

    change(rng, directory, how)


@damage
def other_content(rng: random.Random, directory: Path) -> None:
    change(rng, directory, lambda content: bytearray(rng.randbytes(len(content))))


@damage
def text(rng: random.Random, directory: Path) -> None:
    content = rng.choice([b"null", b"[]", b"{}", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n"])
    change(rng, directory, lambda _: bytearray(content))


@damage
def another_archive(rng: random.Random, directory: Path) -> None:
    """What `numpy.savez` writes, with a right digest at its end."""
    path = a_file(rng, directory)
    with path.open("wb") as file:
        np.savez(file, **{rng.choice(["a", "state.json"]): np.zeros(3)})
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())


@damage
def swap(rng: random.Random, directory: Path) -> None:
    one, other = a_file(rng, directory), a_file(rng, directory)
    one_content, other_content = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_content)
    other.write_bytes(one_content)


@damage
def copy_over_another(rng: random.Random, directory: Path) -> None:
    one, other = a_file(rng, directory), a_file(rng, directory)
    other.write_bytes(one.read_bytes())


@damage
def copy_to_a_new_name(rng: random.Random, directory: Path) -> None:
    path = a_file(rng, directory)
    shutil.copy(path, path.with_name(new_name(rng, path)))


@damage
def rename(rng: random.Random, directory: Path) -> None:
    path = a_file(rng, directory)
    path.rename(path.with_name(new_name(rng, path)))


def new_name(rng: random.Random, path: Path) -> str:
    """As tools, people and mishaps rename files; with another number if there is one in it."""
    numbers = re.findall(r"\d+", path.name)
    digits = numbers[0] if len(numbers) == 1 else rng.choice(numbers) if numbers else ""
    names = [f"{path.name}.part", f"{path.name}.bak", f"{path.stem} (1){path.suffix}", f"~{path.name}", "x.bin"]
    if digits:
        names += [path.name.replace(digits, f"{rng.randrange(10 ** len(digits)):0{len(digits)}}")] * 5
    name = rng.choice(names)
    return f"{path.name}.bak" if name == path.name else name


@damage
def delete(rng: random.Random, directory: Path) -> None:
    a_file(rng, directory).unlink()


@damage
def a_directory_in_place_of_a_file(rng: random.Random, directory: Path) -> None:
    path = a_file(rng, directory)
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "inside").write_bytes(b"x")


@damage
def a_link_in_place_of_a_file(rng: random.Random, directory: Path) -> None:
    path = a_file(rng, directory)
    path.unlink()
    others = [other.name for other in directory.iterdir()]
    path.symlink_to(rng.choice([path.name, "nowhere", *others]))


@damage
def a_pipe_in_place_of_a_file(rng: random.Random, directory: Path) -> None:
    path = a_file(rng, directory)
    path.unlink()
    os.mkfifo(path)


@damage
def no_permission(rng: random.Random, directory: Path) -> None:
    a_file(rng, directory).chmod(0)


@damage
def harmless(rng: random.Random, directory: Path) -> None:
    """What lies about in directories."""
    name = rng.choice([".x.tmp", ".DS_Store", "notes.txt", ".nfs000123", "tmp.1234abcd"])
    path = directory / name
    if rng.random() < 0.3:
        path.mkdir(exist_ok=True)
    elif not path.exists():
        path.write_bytes(b"x")


# -- subjects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What came of using a directory."""

    right: bool  # what it gave is what it must be
    lost: bool = False  # it gave less than an undamaged directory would have given
    all_lost: bool = False  # it gave nothing, as an empty directory would have


class Subject(abc.ABC):
    """Something that keeps files in a directory."""

    #: The types of exceptions that are documented for damaged files.
    documented: tuple[type[Exception], ...] = (RuntimeError, ValueError)

    @abc.abstractmethod
    def make(self, root: Path) -> list[Path]:
        """Makes undamaged directories below `root`, in several states."""

    @abc.abstractmethod
    def use(self, directory: Path, undamaged: Path) -> Used:
        """Uses a damaged copy of one of them; raises what the user would see."""

    def is_empty(self, directory: Path) -> bool:
        """Whether nothing is left of what it wrote, so that beginning from nothing is right."""
        return not any(path.suffix == ".npz" for path in directory.iterdir())


@dataclass
class Tally:
    """How often what came out, and what must not."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def try_out(subject: Subject, number: int, seed: int, root: Path) -> Tally:
    """Damages copies of the subject's directories in so many ways, and uses them."""
    rng, tally = random.Random(seed), Tally()
    bases = subject.make(root / "undamaged")
    for i in range(number):
        base, directory = rng.choice(bases), root / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(base, directory, symlinks=True)
        done = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            name = rng.choice(list(DAMAGES))
            if any(path.is_file() and not path.is_symlink() for path in directory.iterdir()):
                DAMAGES[name](rng, directory)
                done.append(name)
        outcome = _outcome(subject, directory, base, done)
        tally.outcomes[outcome.split(":")[0]] += 1
        if outcome.startswith(("SILENT", "RAW")):
            tally.bad.append(f"{i} ({base.name}; {', '.join(done)}) {outcome}")
    return tally


def _outcome(subject: Subject, directory: Path, base: Path, done: list[str]) -> str:
    emptied = subject.is_empty(directory)
    removed_only = set(done) <= REMOVALS
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            used = subject.use(directory, base)
        except subject.documented as error:
            return "refused" if str(error) else f"RAW: {type(error).__name__} without a message"
        except BaseException as error:
            return f"RAW: {error!r}"
    if not used.right:
        return "SILENT: wrong" if not told else "SILENT: wrong, with a warning about something else"
    if not used.lost:
        return "nothing lost"
    if told:
        return "earlier, with a warning" if not used.all_lost or emptied else "SILENT: from nothing, with a warning"
    if used.all_lost and not emptied:
        return "SILENT: from nothing"
    return "earlier, as files were removed" if removed_only or emptied else "SILENT: earlier"


class Stop(Exception):
    pass


class StopAfter(keras.callbacks.Callback):
    stateless = True

    def __init__(self, batches: int):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


class Resumed(Subject):
    """`Resume`: a run that was interrupted, one that is finished, and one that is finished and is to be longer."""

    EPOCHS = 3

    def _train(self, directory: Path, epochs: int, *callbacks: keras.callbacks.Callback) -> tuple[bytes, object]:
        keras.utils.set_random_seed(1)
        x = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        model.compile(ok.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
        resume = ok.callbacks.Resume(directory, every=2, keep=3)
        data = ok.data.Shuffled(x, x[:, :1], batch_size=8, seed=1)
        model.fit(data, epochs=epochs, callbacks=[resume, *callbacks], verbose=0)
        return b"".join(w.tobytes() for w in model.get_weights()), resume.resumed_from

    def make(self, root: Path) -> list[Path]:
        self._ends = {epochs: self._train(root.parent / f"whole-{epochs}", epochs)[0] for epochs in (3, 4)}
        with contextlib.suppress(Stop):
            self._train(root / "interrupted", self.EPOCHS, StopAfter(8))
        self._train(root / "finished", self.EPOCHS)
        shutil.copytree(root / "finished", root / "longer")
        self._from = {}
        for name in ("interrupted", "finished", "longer"):
            shutil.copytree(root / name, root.parent / "intact")
            self._from[name] = self._train(root.parent / "intact", self._epochs(name))[1]
            shutil.rmtree(root.parent / "intact")
        return [root / name for name in self._from]

    def _epochs(self, name: str) -> int:
        return self.EPOCHS + (name == "longer")

    def use(self, directory: Path, undamaged: Path) -> Used:
        epochs = self._epochs(undamaged.name)
        end, begun = self._train(directory, epochs)
        return Used(end == self._ends[epochs], begun != self._from[undamaged.name], begun is None)


class Checkpointed(Subject):
    """`Checkpoint`: what it gives, at once or after another `fit` whose values are worse."""

    documented = (ValueError,)
    VALUES = (0.5, 0.125, 0.25)

    def _model(self) -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    def _callback(self, directory: Path) -> ok.callbacks.Checkpoint:
        of = directory if directory.name in self._names else self._of
        many = 1 if of.name.startswith("one") else 2
        save = "model" if of.name.endswith("models") else "weights"
        return ok.callbacks.Checkpoint(directory, "loss", "min", top_k=many, last_n=many, save=save)

    def _walk(self, callback: ok.callbacks.Checkpoint, first: int, values: Sequence[float]) -> None:
        """Trains epochs that end with these values; every weight is the number of the epoch."""
        model = self._model()
        callback.set_model(model)
        callback.on_train_begin()
        for epoch, value in enumerate(values, first):
            callback.on_epoch_begin(epoch)
            model.set_weights([np.full_like(weight, epoch + 1) for weight in model.get_weights()])
            callback.on_epoch_end(epoch, {"loss": value})
        callback.on_train_end()

    _names = ("two weights", "two models", "one weights", "two weights, fit", "two models, fit", "one weights, fit")

    def make(self, root: Path) -> list[Path]:
        paths = [root / name for name in self._names]
        for path in paths:
            self._walk(self._callback(path), 0, self.VALUES if path.name.startswith("two") else self.VALUES[:2])
        return paths

    def use(self, directory: Path, undamaged: Path) -> Used:
        self._of = undamaged
        last = 3 if undamaged.name.startswith("two") else 2
        others = {path: path.read_bytes() for path in directory.iterdir() if self._is_foreign(path)}
        if undamaged.name.endswith("fit"):
            self._walk(self._callback(directory), last, [1.0])
            last += 1
        model, found = self._model(), []
        for load in ("load_best", "load_latest"):
            getattr(self._callback(directory), load)(model)
            weights = np.concatenate([weight.ravel() for weight in model.get_weights()])
            if len(set(weights)) != 1:
                return Used(right=False)
            found.append(int(weights[0]))
        kept = all(path.exists() and path.read_bytes() == content for path, content in others.items())
        right = kept and found[0] in range(1, last + 1) and found[1] in range(1, last + 1)
        return Used(right, found != [2, last], undamaged.name.endswith("fit") and found == [last, last])

    def _is_foreign(self, path: Path) -> bool:
        return path.is_file() and not path.name.startswith("epoch=") and path.name != "checkpoints.json"

    def is_empty(self, directory: Path) -> bool:
        return not any(path.name.startswith("epoch=") for path in directory.iterdir())


SUBJECTS: dict[str, type[Subject]] = {"resume": Resumed, "checkpoint": Checkpointed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=100, help="damages of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    arguments = parser.parse_args(argv)
    failed = False
    for name in arguments.subjects:
        with tempfile.TemporaryDirectory() as root:
            tally = try_out(SUBJECTS[name](), arguments.number, arguments.seed, Path(root))
        counts = ", ".join(f"{count} {outcome}" for outcome, count in tally.outcomes.most_common())
        print(f"{name}, {arguments.number} damages: {counts}", *tally.bad, sep="\n  ", flush=True)
        failed = failed or bool(tally.bad)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
