"""A normflows flow learns a density by maximum likelihood, with `jf.accelerate` in force.

A masked autoregressive transform of normflows maps latents to data in one pass of its network. The density needs the
other direction, which normflows computes by a pass for each feature, and training differentiates through all of these.
The data are scikit-learn's breast cancer measurements: 569 tumours, 30 features.
"""

# %% The data, each feature scaled to mean 0 and variance 1.
import time

import normflows
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import jacobiflow as jf

torch.manual_seed(0)
train, test = train_test_split(load_breast_cancer().data, test_size=0.25, random_state=0)
scaler = StandardScaler().fit(train)
train, test = (torch.tensor(scaler.transform(rows), dtype=torch.float32) for rows in (train, test))

# %% The flow, and what one does with it; nothing here knows of acceleration.
layers = []
for _ in range(5):
    layers += [normflows.flows.MaskedAffineAutoregressive(30, hidden_features=64), normflows.flows.Permute(30)]
flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(30, trainable=False), layers)


def held_out():
    """The mean log-likelihood of the test rows, in nats."""
    with torch.no_grad():
        return float(flow.log_prob(test).mean())


def train_for(steps):
    """Maximum likelihood by Adam."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = flow.forward_kld(train[torch.randint(len(train), (128,))])  # the mean negative log-likelihood
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()


def loss_and_gradient():
    """The loss of 128 rows, its gradient in all parameters as one vector, and the seconds of the fastest of 5 calls."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        loss = flow.forward_kld(train[:128])
        gradient = torch.autograd.grad(loss, list(flow.parameters()))
        seconds.append(time.perf_counter() - start)
    return loss.item(), torch.cat([part.flatten() for part in gradient]), min(seconds)


# %% Training, accelerated: the passes end when one changes no bit; gradients are by the implicit function theorem.
untrained = held_out()
with jf.accelerate(flow) as acceleration:
    print(acceleration)
    start = time.perf_counter()
    train_for(200)
    print(f"200 steps of training in {time.perf_counter() - start:.1f} s")
    trained = held_out()
    loss, gradient, seconds = loss_and_gradient()
passes = list(acceleration.passes.values())
print(f"held-out log-likelihood: {untrained:.1f} nats before training, {trained:.1f} after")

# %% Outside the block, the flow is normflows' own again: what would a step have cost, and what would it have been?
own_loss, own_gradient, own_seconds = loss_and_gradient()
difference = float((gradient - own_gradient).norm() / own_gradient.norm())
print(f"loss and gradient by normflows: {1000 * own_seconds:.0f} ms, 30 passes in each transform")
print(f"accelerated: {1000 * seconds:.0f} ms, {own_seconds / seconds:.1f}x, {passes} passes")
print(f"losses equal: {loss == own_loss}; gradients differ by {difference:.1e} of their norm, which is rounding")
