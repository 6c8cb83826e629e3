"""sbi infers how an epidemic's reproduction number changed over 16 weeks; its posteriors sample with `jf.accelerate`.

The simulator is the SIR model with a reproduction number for each week. Neural posterior estimation (NPE) learns all 16
from the weekly case counts: once with sbi's "maf", a flow of nflows, and once with "zuko_nsf", splines of zuko.
"""

# %% The simulator: 200 infectious among a million, infectious for 5 days on average, 3 cases in 10 reported.
import time

import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn

import jacobiflow as jf

torch.manual_seed(0)
WEEKS, PEOPLE = 16, 1e6


def simulate(log_r):
    """Log reproduction numbers (B, 16) to logs of the reported cases of each week (B, 16), by half-day Euler steps."""
    infectious = torch.full((len(log_r),), 200.0)
    susceptible = PEOPLE - infectious
    weeks = []
    for r in log_r.exp().T:
        cases = torch.zeros(len(log_r))
        for _ in range(14):
            recovered = infectious / 10
            infected = torch.minimum(r * recovered * susceptible / PEOPLE, susceptible)
            susceptible, infectious, cases = susceptible - infected, infectious + infected - recovered, cases + infected
        weeks.append(torch.poisson(0.3 * cases))
    return torch.stack(weeks, dim=1).log1p()


# %% The prior is a random walk: R is about 1.2 in the first week and changes by some 17 % from week to week.
week = torch.arange(1.0, WEEKS + 1)
covariance = 0.1 + 0.03 * torch.minimum(week, week[:, None])
prior = torch.distributions.MultivariateNormal(torch.full((WEEKS,), 0.2), covariance)
theta = prior.sample((1000,))
x = simulate(theta)
truth = torch.tensor([1.8, 1.8, 1.7, 1.5, 1.3, 1.1, 1.0, 0.9, 0.8, 0.8, 0.9, 1.0, 1.1, 1.2, 1.2, 1.1]).log()
observed = simulate(truth[None])


# %% Each posterior by sbi alone, accelerated to identical bits, and to a tolerance.
def draw(posterior):
    """Samples (2000, 16), from the same seed in each call, and the seconds of the fastest of 3 calls."""
    seconds = []
    for _ in range(3):
        torch.manual_seed(1)
        start = time.perf_counter()
        samples = posterior.sample((2000,), show_progress_bars=False)
        seconds.append(time.perf_counter() - start)
    return samples, min(seconds)


results = {}
for name in ("maf", "zuko_nsf"):
    inference = NPE(prior, density_estimator=posterior_nn(name, num_transforms=3), show_progress_bars=False)
    inference.append_simulations(theta, x)
    inference.train(training_batch_size=200, learning_rate=5e-3, stop_after_epochs=5)
    posterior = inference.build_posterior().set_default_x(observed)

    samples, seconds = draw(posterior)
    with jf.accelerate(posterior) as acceleration:
        fast, fast_seconds = draw(posterior)
    with jf.accelerate(posterior, tolerance=1e-3) as near:
        close, close_seconds = draw(posterior)

    passes, close_passes = list(acceleration.passes.values()), list(near.passes.values())
    identical = torch.equal(fast.view(torch.int32), samples.view(torch.int32))
    error = float(((close - samples).abs() / samples.std(dim=0)).max())
    results[name] = {"samples": samples, "fast": fast, "passes": passes, "close_passes": close_passes, "error": error}
    print(f"\n\n{name}: {acceleration}")
    print(f"sbi: {1000 * seconds:.0f} ms for 2,000 samples, {WEEKS} passes in each transform")
    print(f"accelerated: {1000 * fast_seconds:.0f} ms, {seconds / fast_seconds:.1f}x, {passes} passes")
    print(f"bits identical: {identical}")
    print(f"tolerance 1e-3: {1000 * close_seconds:.0f} ms, {seconds / close_seconds:.1f}x, {close_passes} passes")
    print(f"largest error: {error:.1e} of the posterior's standard deviation")

# %% What was inferred: the posterior mean of log R in each week, as an R, and the interval that holds 95 % of R.
print("\nweek  true R" + "".join(f"{name:>20}" for name in results))
for i, r in enumerate(truth.exp()):
    row = f"{i + 1:4}  {r:6.2f}"
    for result in results.values():
        log_r = result["samples"][:, i]
        low, high = log_r.quantile(torch.tensor([0.025, 0.975])).exp()
        row += f"{log_r.mean().exp():8.2f} ({low:.2f}-{high:.2f})"
    print(row)
