"""What `import keras_optkit` adds to `import keras`: the smallest of several fresh interpreters, by `-X importtime`.

python examples/benchmarks/import_time.py
"""

import re
import subprocess
import sys

ROUNDS = 5


def import_times() -> dict[str, float]:
    """Seconds for each module, with all that it imports first, in one fresh interpreter."""
    command = [sys.executable, "-X", "importtime", "-c", "import keras, keras_optkit"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = re.findall(r"^import time: *\d+ \| *(\d+) \| *(\S+)$", report, re.MULTILINE)
    return {module: int(microseconds) / 1e6 for microseconds, module in rows}


def main() -> None:
    rounds = [import_times() for _ in range(ROUNDS)]
    for module in ("keras", "keras_optkit"):
        print(f"{module:13s} {min(times[module] for times in rounds):7.3f} s")


if __name__ == "__main__":
    main()
