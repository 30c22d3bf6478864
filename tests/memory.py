"""
What training on a folder of pictures takes in memory, whatever their number:

    python tests/memory.py 1000
    python tests/memory.py 100000

Draws so many small pictures into a temporary folder, trains every stage on all of them for a few steps, and prints the
peak of the memory that is the process's own. (Pages of mapped files, which the system takes back when it needs them,
don't count.)
"""
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402


def own_memory():
    """In MiB (Linux)."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def watch(peak):
    while True:
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.02)


if __name__ == "__main__":
    count, peak, rng = int(sys.argv[1]), [0], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        for i in range(count):
            folder = data / f"{i // 1000:04}"
            folder.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(256, size=(4, 6, 3), dtype=np.uint8))
            noise.resize((72, 48), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg")
            (folder / f"{i:06}.txt").write_text(f"noise number {i}\n")
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        train.main(["--run", f"{place}/run", "--data", "folder", "--data-dir", str(data), "--image-size", "32",
                    "--steps", "20", "--batch-size", "32", "--cache", str(count)])
    print(f"{count} pictures: {peak[0]:.0f} MiB at most")
