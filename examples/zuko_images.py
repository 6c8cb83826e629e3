"""A zuko flow draws 100 handwritten digits, by zuko's own inverse and with `jf.accelerate`.

The flow is a masked autoregressive flow (MAF) on the 8x8 digits of scikit-learn, conditioned on the class. zuko inverts
each of its transforms by 64 passes of a network, one for each pixel.
"""

# %% The data: logits of dequantised pixels, as the MAF paper has them, and classes as one-hot contexts.
import time

import torch
import zuko
from sklearn.datasets import load_digits
from torch.nn.functional import one_hot

import jacobiflow as jf

torch.manual_seed(0)
pixels, classes = load_digits(return_X_y=True)  # 1797 images, grey levels 0 to 16
pixels, contexts = torch.tensor(pixels, dtype=torch.float32), one_hot(torch.tensor(classes), 10).float()


def logits(pixels):
    """(B, 64) grey levels to logits; uniform noise fills the steps between the levels."""
    unit = (pixels + torch.rand_like(pixels)) / 17
    return torch.logit(1e-3 + (1 - 2e-3) * unit)


# %% Training, by zuko alone: the density is its fast side, one pass for each transform.
flow = zuko.flows.MAF(features=64, context=10, transforms=5, hidden_features=(128, 128))
optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
losses = []
for _ in range(600):
    rows = torch.randint(len(pixels), (128,))
    loss = -flow(contexts[rows]).log_prob(logits(pixels[rows])).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
flow.eval()
print(f"training: {losses[0]:.0f} nats at the first step, {losses[-1]:.0f} at the last")


# %% Ten samples of each class, by zuko's own inverse.
def draw():
    """Samples (10, 10, 64), from the same latents in each call, and the seconds of the fastest of 5 calls."""
    seconds = []
    for _ in range(5):
        torch.manual_seed(1)
        start = time.perf_counter()
        samples = flow(torch.eye(10)).sample((10,))
        seconds.append(time.perf_counter() - start)
    return samples, min(seconds)


samples, seconds = draw()
print(f"zuko: {1000 * seconds:.0f} ms, 64 passes in each transform")

# %% The same call, accelerated: the passes of a transform end when one changes no bit, so no later one would.
acceleration = jf.accelerate(flow)
print(acceleration)
fast, fast_seconds = draw()
passes = list(acceleration.passes.values())
identical = torch.equal(fast.view(torch.int32), samples.view(torch.int32))
print(f"accelerated: {1000 * fast_seconds:.0f} ms, {seconds / fast_seconds:.1f}x, {passes} passes")
print(f"bits identical: {identical}")
acceleration.restore()

# %% A tolerance is faster, and no longer exact. It holds within the block; after it, the flow is zuko's again.
with jf.accelerate(flow, tolerance=1e-3) as near:
    close, close_seconds = draw()
close_passes = list(near.passes.values())
error = float((close - samples).abs().max())
levels = float((close.sigmoid() - samples.sigmoid()).abs().max()) * 17
print(f"tolerance 1e-3: {1000 * close_seconds:.0f} ms, {seconds / close_seconds:.1f}x, {close_passes} passes")
print(f"largest error: {error:.1e} in logits, {levels:.1e} of a grey level")
