"""A VQ-VAE whose codebook is ClusterQ's, inside vector-quantize-pytorch.

    python examples/vq_vae.py

Two small autoencoders of 8x8 digits start alike; one keeps the codebook of the library, the other gets its twin. After
some steps of training, losses, codes and states have to be equal; then the time of one step of either codebook.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from clusterq.nn import EMACodebook
from clusterq.testing import interleave


class VQVAE(nn.Module):
    """Images [N, 1, 8, 8] to 4x4 codes and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.quantizer = VectorQuantize(dim=16, codebook_size=64, decay=0.9, accept_image_fmap=True)
        self.decoder = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, codes, commitment = self.quantizer(self.encoder(images))
        return F.mse_loss(self.decoder(quantized), images) + commitment, codes


def digits() -> Tensor:
    """Two thousand images of one bright stroke each."""
    rows = torch.arange(8.0)
    angle, shift = torch.rand(2, 2000, 1, 1, generator=torch.Generator().manual_seed(0))
    distance = (rows - 3.5)[:, None] * (3.1 * angle).cos() + (rows - 3.5) * (3.1 * angle).sin() + 4 * shift - 2
    return torch.exp(-distance.square()).unsqueeze(1)


def main() -> None:
    torch.manual_seed(0)
    images = digits()
    theirs = VQVAE()
    ours = copy.deepcopy(theirs)
    ours.quantizer._codebook = EMACodebook.from_codebook(ours.quantizer._codebook)

    losses: list[float] = []
    optimizers = [torch.optim.Adam(model.parameters(), lr=2e-3) for model in (theirs, ours)]
    for step in range(150):
        batch = images[torch.arange(64 * step, 64 * step + 64) % len(images)]
        results = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss, codes = model(batch)
            loss.backward()
            optimizer.step()
            results.append((loss.detach(), codes))
        if step < 10:
            torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
            assert torch.equal(results[1][1], results[0][1]), f"step {step}: other codes"
        if step == 9:
            state = theirs.state_dict()
            for name, tensor in ours.state_dict().items():
                torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-4)
            print("10 steps: losses, codes and state_dicts are equal to those of vector-quantize-pytorch")
        losses.append(results[1][0].item())
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
    print(f"150 steps: {losses[0]:.4f} to {losses[-1]:.4f}")

    latents = torch.randn(16, 256, 32)
    large = VectorQuantize(dim=32, codebook_size=512)._codebook
    twin = EMACodebook.from_codebook(large)
    times = interleave({"clusterq": lambda: twin(latents), "library": lambda: large(latents)}, rounds=7, warmup=1)
    ratio = times["library"].ratio_to(times["clusterq"])
    print(f"a step of the codebook, 4096 rows and 512 entries: {ratio:.1f} times as fast as the library's")


if __name__ == "__main__":
    main()
