"""
Judges each part of a run on CIFAR, with a classifier that has seen only real images:

    python tests/cifar.py --run runs/cifar

Trains a small ResNet on the training images (the run keeps it in classifier.pt) and shows it 100 test images of each
class: as they are; at the run's size; reconstructed by Stage A; reconstructed by Stage B from their own semantic
latents, without captions, with them, and with guidance; then as many images generated from the same captions, without
and with guidance. All are reduced to 32 px first. It prints a line for each of these, and writes to the run folder:

    cifar.json     the share of images that it classifies correctly; Fréchet distance, in its features, to as many
                   other test images; what `grid` and `border` measure (for the real images, at 32 px)
    cifar.png      the first eight generated images of each class, a row per class, uncurated
    nearest.png    the first generated image of each class; the training image, or its mirror image, nearest to it in
                   pixels; the training image nearest in features
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
from sample import load_image, make_sheet, number, pick_device, run_script, to_tensor  # noqa: E402
from score import frechet, in_batches, wilson  # noqa: E402
from tokenizer import UserError  # noqa: E402
from train import CIFAR, list_cifar, read_options  # noqa: E402
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
    """AdamW, a one-cycle schedule, label smoothing. In each batch, every second image is mirrored; all are moved by up
    to 4 pixels, and a square of 8x8 pixels is made grey."""
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
    """-> images (N, 32, 32, 3) in [0, 1], the second caption of each, such as "a cat" (N)"""
    items = list_cifar(options["data"], Path(options["data_dir"]), collections.defaultdict(list))
    images, captions = zip(*items[split])
    return torch.from_numpy(np.stack(images)) / 255, [lines[1] for lines in captions]


def grid(images):
    """How strongly dots repeat every four pixels, Stage A's stride, where an image is flattest: in the 16x16 pixels
    that vary least, the power of horizontal and vertical waves 4 pixels long, divided by the geometric mean of the
    powers of their neighbours, 8 and 2.7 pixels long. (N, H, W, 3) -> number, below 1 for real images"""
    patches = images.mean(dim=-1).unfold(1, 16, 4).unfold(2, 16, 4).flatten(1, 2)
    patches = patches[torch.arange(len(patches)), patches.var(dim=(2, 3)).argmin(dim=1)]
    window = torch.hann_window(16)
    waves = torch.fft.fft2((patches - patches.mean(dim=(1, 2), keepdim=True)) * window * window[:, None])
    power = waves.abs().square().mean(dim=0)
    power = power[0] + power[:, 0]
    return (power[4] / (power[2] * power[6]).sqrt()).item()


def border(images):
    """How much brighter the outermost pixels are than those four pixels further in, on a scale from 0 to 255.
    (N, H, W, 3) -> number"""
    rings = [torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], dim=1) for x in (images, images[:, 4:-4, 4:-4])]
    return 255 * (rings[0].mean() - rings[1].mean()).item()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Judge a run on CIFAR.")
    parser.add_argument("--run", default="runs/cifar", help="run folder (default: runs/cifar)")
    parser.add_argument("--count", type=number(int, 1, 10_000), default=100,
                        help="images of each class (default: 100; at most half of the class's test images)")
    parser.add_argument("--cfg", type=float, help="guidance scale of Stage C (default: the run's)")
    parser.add_argument("--cfg-b", type=float, help="guidance scale of Stage B (default: the run's)")
    args = parser.parse_args(argv)
    folder, options = Path(args.run), read_options(args.run)
    if options.get("data") not in CIFAR:
        raise UserError(f"{folder} is not a run on CIFAR")
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

    # The first test images of each class, the classes in turn; they are compared with as many others.
    of_class = [(test_labels == i).nonzero()[:, 0] for i in range(len(classes))]
    count = min(args.count, *(len(some) // 2 for some in of_class))
    chosen = torch.stack([some[:count] for some in of_class], dim=1).flatten()
    others = torch.cat([some[count:2 * count] for some in of_class])
    asked, captions, seeds = test_labels[chosen], [test_names[i] for i in chosen], list(range(len(chosen)))

    model = Wuerstchen.load(folder).to(device := pick_device("auto"))
    guidance = [own if given is None else given
                for own, given in zip(model.config.guidance, (args.cfg, args.cfg_b))]
    scaled = torch.stack([to_tensor(load_image((255 * image).round().byte().numpy(), (model.config.image_size,) * 2))
                          for image in test[chosen]])

    def reconstructed(captions, scale=1.0):
        """-> by Stage A, by Stage B"""
        def both(images, *told):
            return torch.stack(model.reconstruct(images.to(device), *told, guidance=scale), dim=1)
        return in_batches(both, scaled, captions, seeds, size=100).cpu().unbind(1)

    def generated(scales):
        return in_batches(lambda some, seeds: model.generate(some, seed=seeds, guidance=scales),
                          captions, seeds, size=100).cpu()

    (by_a, blind), (_, told), final = reconstructed([""] * len(captions)), reconstructed(captions), generated(guidance)
    images = {"real test images": test[chosen], "at the run's size": scaled, "by Stage A": by_a,
              "by Stage B, without caption": blind, "by Stage B": told,
              f"by Stage B, guidance {guidance[1]:g}": reconstructed(captions, guidance[1])[1],
              "generated, no guidance": generated((1.0, 1.0)),
              f"generated, guidance {guidance[0]:g} and {guidance[1]:g}": final}

    def at_32(images):
        return F.interpolate(images.movedim(-1, 1), (32, 32), mode="area").movedim(1, -1)

    @torch.no_grad()
    def features_of(images):
        return in_batches(lambda some: classifier.features(at_32(some)), images, size=100)

    compared, results = features_of(test[others]), {}
    for name, some in images.items():
        features = features_of(some)
        right = (classifier.head(features).argmax(dim=1) == asked).float()
        results[name] = {
            "right": right.mean().item(), "95%": wilson(right.sum().item(), len(right)),
            "Fréchet": frechet(features, compared), "grid": grid(some), "border": border(some),
            "by class": {one: right[asked == i].mean().item() for i, one in enumerate(classes)}}
        print(f"{name:32}{100 * results[name]['right']:6.1f}%  Fréchet {results[name]['Fréchet']:6.1f}  "
              f"grid {results[name]['grid']:5.2f}  border {results[name]['border']:5.1f}")
    (folder / "cifar.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    make_sheet([final[i::len(classes)][:8] for i in range(len(classes))]).save(folder / "cifar.png")
    first, both = at_32(final[:len(classes)]), torch.cat([real, real.flip(2)])
    in_pixels = torch.cdist(first.flatten(1), both.flatten(1)).argmin(dim=1)
    in_features = torch.cdist(features_of(first), features_of(real)).argmin(dim=1)
    make_sheet([first, both[in_pixels], real[in_features]]).save(folder / "nearest.png")
    print(f"wrote cifar.json, cifar.png and nearest.png to {folder}")


if __name__ == "__main__":
    run_script(main, "stopped")
