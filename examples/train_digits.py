"""Train the demo's network on scikit-learn's handwritten digits and store it with the package.

    python examples/train_digits.py

The gains of its BatchNorm layers start log-normal instead of 1, so that the channels of a layer differ in range by a
factor of several, as those of trained mobile networks do; that is what makes 4-bit rounding with one range per layer
fail. Seeded, CPU only, about a minute. 1,297 digits are for training; the other 500 (a fixed split, see
`clusterq.data.digits`) are only counted at the end and never seen by the demo's quantization.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from clusterq.data import digits, evaluate, open_data
from clusterq.models import DIGITS_MEAN, DIGITS_STD, DIGITS_WEIGHTS
from clusterq.networks import DigitsConvNet


def train(epochs: int, batch_size: int, lr: float, weight_decay: float, gain_spread: float, seed: int) -> DigitsConvNet:
    """SGD with a one-cycle rate; each batch is shifted by up to two pixels in both directions.

    `gain_spread` is the standard deviation of the logarithm of BatchNorm's first gains.
    """
    torch.manual_seed(seed)
    model = DigitsConvNet().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.0, gain_spread)
            module.weight.data.exp_()
    images, labels = digits(held_out=False)
    images = (images - DIGITS_MEAN[0]) / DIGITS_STD[0]
    background = -DIGITS_MEAN[0] / DIGITS_STD[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    batches = len(labels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(labels))
        total = 0.0
        for chosen in order[: batches * batch_size].split(batch_size):
            padded = functional.pad(images[chosen], (2, 2, 2, 2), value=background)
            top, left = torch.randint(0, 5, (2,)).tolist()
            scores = model(padded[:, :, top : top + 16, left : left + 16])
            loss = functional.cross_entropy(scores, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}/{epochs}  loss {total / batches:.4f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--gain-spread", type=float, default=0.6, help="of the logarithm of BatchNorm's first gains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    options = (arguments.epochs, arguments.batch_size, arguments.lr, arguments.weight_decay)
    model = train(*options, arguments.gain_spread, arguments.seed)
    held_out = open_data("digits", input_shape=(1, 16, 16), mean=DIGITS_MEAN, std=DIGITS_STD)
    result = evaluate(model, held_out)
    metadata = {
        "network": "builtin:digits",
        "top1_held_out": f"{result.top1:.2f}",
        "images_held_out": str(result.count),
        "seed": str(arguments.seed),
        "epochs": str(arguments.epochs),
        "gain_spread": str(arguments.gain_spread),
        "torch": torch.__version__,
        "data": "scikit-learn load_digits, 16x16 bilinear",
    }
    arguments.output.write_bytes(save({k: v.contiguous() for k, v in model.state_dict().items()}, metadata))
    size = arguments.output.stat().st_size
    seconds = time.perf_counter() - start
    print(f"top-1 {result.top1:.2f} % on {result.count} held-out digits, {size} bytes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
