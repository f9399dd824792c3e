"""Log step times of two models in the same rounds, with equal medians, under the kinds of noise that machines have."""

import json
from pathlib import Path

import numpy as np

H100 = Path(__file__).parents[2] / "tests" / "fixtures" / "v1" / "phase1_throughput_benchmark.json"


def autoregressive(rng, n, rho):
    """AR(1) of unit variance, in equilibrium."""
    e = rng.normal(size=n)
    for i in range(1, n):
        e[i] = rho * e[i - 1] + np.sqrt(1 - rho**2) * e[i]
    return e


def recorded():
    """Differences of log step times of two models in the same 20 rounds of a noisy host, 4 lengths, centred."""
    results = json.loads(H100.read_text())["results"]
    logs = {role: [np.log(m["step_times_ms"]) for m in result["measurements"]] for role, result in results.items()}
    pairs = [("baseline", "baseline_optimized"), ("baseline_optimized", "phase1"), ("phase1", "baseline")]
    differences = [logs[a][i] - logs[b][i] for a, b in pairs for i in range(4)]
    return [d - np.median(np.add.outer(d, d) / 2) for d in differences]


RECORDED = recorded()


def recorded_rounds(rng, n):
    """Blocks of 5 neighbouring rounds of one recorded pair of models, as the model of a pair that is slow in a round may be either."""
    d = RECORDED[rng.integers(len(RECORDED))] * rng.choice([-1, 1])
    return np.concatenate([d[start : start + 5] for start in rng.integers(d.size - 4, size=-(-n // 5))])[:n], np.zeros(n)


def own(rng, n):
    return 0.02 * rng.normal(size=(2, n))


def outlier(rng, n):
    return (rng.random((2, n)) < 0.05) * rng.exponential(0.5, size=(2, n))


def burst(rng, n):
    """A neighbour that comes and goes, and slows both by 15 %."""
    state, states = rng.random() < 1 / 3, []
    for _ in range(n):
        state = rng.random() < (0.7 if state else 0.15)
        states.append(state)
    return 0.15 * np.array(states)


NOISE = {
    "independent": own,
    "clock falls by 10 %": lambda rng, n: own(rng, n) + 0.1 * np.arange(n) / n,
    "shared AR(1) 0.8": lambda rng, n: own(rng, n) + 0.05 * autoregressive(rng, n, 0.8),
    "hiccups": lambda rng, n: own(rng, n) + outlier(rng, n),
    "skewed": lambda rng, n: rng.gamma(0.7, 0.02, size=(2, n)),
    "neighbour comes and goes": lambda rng, n: own(rng, n) + burst(rng, n),
    "recorded on a noisy host": recorded_rounds,
}
"""Models of noise that an interleaved comparison meets. What is shared by a round is the larger part in the recorded run: the
lag-1 autocorrelation of its paired differences is -0.07 on average, that of its single series 0.16."""

OWN_AR = {rho: lambda rng, n, rho=rho: 0.02 * np.stack([autoregressive(rng, n, rho) for _ in range(2)]) for rho in (0.3, 0.6)}
"""Noise of each model by itself that lasts over rounds: not seen so far, and what intervals of 20 rounds cannot fully know."""
