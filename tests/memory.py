"""
How much memory training on a folder of images takes, for any number of images:

    python tests/memory.py 1000
    python tests/memory.py 100000

Writes that many small images to a temporary folder, trains every stage on them for a few steps, with the latents of all
of them cached, and prints the peak of the process's own memory. (Pages of mapped files, which the system takes back
when it needs them, don't count.)
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


def watch(peak):
    """Keeps in peak[0] the most memory that this process itself has used so far, in MiB (Linux)."""
    while True:
        used = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        peak[0] = max(peak[0], int(used) / 1024)
        time.sleep(0.02)


if __name__ == "__main__":
    count, peak, rng = int(sys.argv[1]), [0], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for i in range(count):
            file = Path(place) / "data" / f"{i // 1000:04}" / f"{i:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(256, size=(4, 6, 3), dtype=np.uint8))
            noise.resize((72, 48), Image.Resampling.BICUBIC).save(file)
            file.with_suffix(".txt").write_text(f"noise number {i}\n")
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        train.main(["--run", f"{place}/run", "--data", "folder", "--data-dir", f"{place}/data", "--image-size", "32",
                    "--steps", "20", "--batch-size", "32"])
    print(f"{count} images: {peak[0]:.0f} MiB at most")
