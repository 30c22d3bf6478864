import _thread
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import train  # noqa: E402

SMALL = ["--image-size", "64", "--steps", "4", "--batch-size", "8", "--cache", "64", "--save-every", "4"]
SECONDS = 300  # limit for a test, and for its fixtures


# If the suite runs in the background, Ctrl-C may be ignored, also in the processes that it starts: undo that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def limited(item):
    """A time limit: an endless loop fails instead of hanging."""
    timer = threading.Timer(SECONDS, _thread.interrupt_main)
    timer.start()
    try:
        return (yield)
    except KeyboardInterrupt:
        if timer.is_alive():  # it was Ctrl-C
            raise
        pytest.fail(f"longer than {SECONDS} s")
    finally:
        timer.cancel()


pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(limited)  # setup: the fixtures


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run, trained for a few steps. Tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Shapes, "captions", lambda self: map(self.caption, range(2000)))
        train.main(["--run", str(folder), *SMALL])
    return folder


def run_script(*args, **options):
    return subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True, timeout=SECONDS,
                          **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
