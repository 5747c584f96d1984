"""How near a step that renews PowerSGD's subspace comes to the best approximation, by its half-steps.

    python benchmarks/renewal.py        # in a minute

For random matrices, 256 x 384, with singular values of several kinds, prints the norm of the update over that of the
best approximation of the rank (1 would be as good): from a random Q with 2, 4, 6 and 8 half-steps, and from a warm
start with 2, on gradients that are the matrix plus noise of 0.3 times its norm. """

import numpy as np

from horovod_powersgd import PowerSGD, reference

ROWS, COLUMNS, SEEDS, STEPS = 256, 384, 8, 30
HALF_STEPS = 2, 4, 6, 8
NUMBERS = np.arange(ROWS)
SPECTRA = {
    "1 / i": 1 / (1 + NUMBERS),
    "1 / sqrt(i)": 1 / np.sqrt(1 + NUMBERS),
    "0.9 ** i": 0.9**NUMBERS,
    "noise": None,
}


def matrix(spectrum, seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((ROWS, COLUMNS))
    if spectrum is None:
        return noise
    u, _, vt = np.linalg.svd(noise, full_matrices=False)
    return (u * spectrum) @ vt


def quality(update, delta, rank):
    return np.linalg.norm(update) / np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[:rank])


def from_random(spectrum, rank, half_steps):
    config = PowerSGD(rank, num_iters_per_step=half_steps)
    found = []
    for seed in range(SEEDS):
        whole = matrix(spectrum, seed)
        update = reference.simulate([{str(seed): whole}], [reference.State()], config)[0][str(seed)]
        found.append(quality(update, whole, rank))
    return np.mean(found)


def from_warm_start(spectrum, rank):
    state, config, whole = reference.State(), PowerSGD(rank), matrix(spectrum, 0)
    found = []
    for step in range(STEPS):
        noise = np.random.default_rng([1, step]).standard_normal(whole.shape)
        gradient = whole + 0.3 * np.linalg.norm(whole) / np.linalg.norm(noise) * noise
        delta = gradient + state.memory.get("w", 0)
        found.append(quality(reference.simulate([{"w": gradient}], [state], config)[0]["w"], delta, rank))
    return np.mean(found[10:])


def main():
    columns = [*(f"random, {k}" for k in HALF_STEPS), "warm, 2"]
    print(f"{'singular values':<18}{'rank':>4}" + "".join(f"{column:>12}" for column in columns))
    for name, spectrum in SPECTRA.items():
        for rank in (1, 2, 4, 8):
            found = [from_random(spectrum, rank, k) for k in HALF_STEPS] + [from_warm_start(spectrum, rank)]
            print(f"{name:<18}{rank:>4}" + "".join(f"{value:>12.2f}" for value in found), flush=True)


if __name__ == "__main__":
    main()
