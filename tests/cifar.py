"""
Judges a run on CIFAR by a classifier that has only seen real images:

    python tests/cifar.py --run runs/cifar

Trains a small ResNet on the training images (the run keeps it in classifier.pt), draws 100 images of each class, and
writes to the run folder:

    cifar.json     how many real test images the classifier gets right, and how many drawn ones it gives the class that
                   was asked for; Fréchet distances in its features
    cifar.png      the first eight images of each class, a row per class, none chosen
    nearest.png    the first of each class; the training image nearest to it in pixels; the one nearest in features
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))
from sample import make_sheet, pick_device  # noqa: E402
from score import frechet, in_batches, wilson  # noqa: E402
from train import list_cifar, read_options  # noqa: E402
from wuerstchen import Wuerstchen  # noqa: E402


def conv(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Classifier(nn.Module):
    """A ResNet with nine layers (Page, 2018): images (B, 32, 32, 3) in [0, 1] -> logits (B, classes)"""

    def __init__(self, classes, width=24):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, width), conv(width, 2 * width), nn.MaxPool2d(2), Residual(conv(2 * width, 2 * width),
                                                                              conv(2 * width, 2 * width)),
            conv(2 * width, 4 * width), nn.MaxPool2d(2), conv(4 * width, 8 * width), nn.MaxPool2d(2),
            Residual(conv(8 * width, 8 * width), conv(8 * width, 8 * width)), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(8 * width, classes)

    def features(self, images):
        """-> (B, 8 * width)"""
        return self.body(4 * (images - 0.5).movedim(-1, 1))

    def forward(self, images):
        return self.head(self.features(images))


def train_classifier(network, images, labels, epochs=14, batch=64, lr=0.003):
    """AdamW, one cycle, label smoothing; images mirrored, moved by up to 4 pixels, a square of 8 cut out."""
    per_epoch = len(images) // batch
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    padded = F.pad(images.movedim(-1, 1), (4,) * 4, mode="reflect").movedim(1, -1)
    for step in (bar := trange(steps, desc="classifier")):
        if step % per_epoch == 0:
            order = torch.randperm(len(images))
        rows = order[step % per_epoch * batch:][:batch]
        (top, left), (y, x) = torch.randint(9, (2,)), torch.randint(25, (2,))
        chosen = padded[rows, top:top + 32, left:left + 32].clone()
        chosen[::2] = chosen[::2].flip(2)
        chosen[:, y:y + 8, x:x + 8] = 0.5
        loss = F.cross_entropy(network(chosen), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")


def load(options, split):
    """-> images (N, 32, 32, 3) in [0, 1], the second caption of each, "a cat" (N)"""
    items = list_cifar(options["data"], Path(options["data_dir"]), collections.defaultdict(list))
    images, captions = zip(*items[split])
    return torch.from_numpy(np.stack(images)) / 255, [lines[1] for lines in captions]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Judge a run on CIFAR.")
    parser.add_argument("--run", default="runs/cifar", help="run folder (default: runs/cifar)")
    parser.add_argument("--count", type=int, default=100, help="images to draw of each class (default: 100)")
    parser.add_argument("--cfg", type=float, help="guidance scale of Stage C (default: the run's)")
    parser.add_argument("--cfg-b", type=float, help="guidance scale of Stage B (default: the run's)")
    args = parser.parse_args(argv)
    folder, options = Path(args.run), read_options(args.run)
    (real, names), (test, test_names) = load(options, "train"), load(options, "test")
    classes = sorted(set(names))
    labels, test_labels = (torch.tensor([classes.index(name) for name in some]) for some in (names, test_names))
    torch.manual_seed(0)
    path, classifier = folder / "classifier.pt", Classifier(len(classes))
    if path.exists():
        classifier.load_state_dict(torch.load(path, weights_only=True))
    else:
        train_classifier(classifier, real, labels)
        torch.save(classifier.state_dict(), path)
    classifier.eval()

    def judge(features, labels):
        right = (classifier.head(features).argmax(dim=1) == labels).float()
        return {"right": right.mean().item(), "95 %": wilson(right.sum().item(), len(right)),
                "by class": {name: right[labels == i].mean().item() for i, name in enumerate(classes)}}

    asked = torch.arange(len(classes)).repeat(args.count)
    model = Wuerstchen.load(folder).to(pick_device("auto"))
    drawn = in_batches(lambda some, seeds: model.generate(some, seed=seeds, guidance=(args.cfg, args.cfg_b)).cpu(),
                       [classes[i] for i in asked], list(range(len(asked))), size=100)
    small = F.interpolate(drawn.movedim(-1, 1), (32, 32), mode="area").movedim(1, -1)
    with torch.no_grad():
        features, found, tested = (in_batches(classifier.features, x, size=100) for x in (real, small, test))
    half = len(test) // 2  # they are not in the order of their classes
    results = {"real test images": judge(tested, test_labels), "drawn": judge(found, asked),
               "Fréchet, drawn to half of the test images": frechet(found, tested[:half]),
               "Fréchet, between halves of the test images": frechet(tested[:half], tested[half:])}
    print(text := json.dumps(results, indent=1, ensure_ascii=False))
    (folder / "cifar.json").write_text(text + "\n", "utf-8")
    make_sheet([drawn[i::len(classes)][:8] for i in range(len(classes))]).save(folder / "cifar.png")
    first, both = small[:len(classes)], torch.cat([real, real.flip(2)])
    in_pixels = torch.cdist(first.flatten(1), both.flatten(1)).argmin(dim=1)
    in_features = torch.cdist(found[:len(classes)], features).argmin(dim=1)
    make_sheet([first, both[in_pixels], real[in_features]]).save(folder / "nearest.png")
    print(f"wrote cifar.json, cifar.png and nearest.png to {folder}")


if __name__ == "__main__":
    main()
