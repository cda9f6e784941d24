"""How often is each timestep trained? Densities of the laws in `vgjax/flow/time.py` under shift 1, 3 and 7.

python benchmarks/timesteps.py        writes benchmarks/results/timesteps.png
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from record import RESULTS

from vgjax.flow.path import sample_keys
from vgjax.flow.time import LogitNormal, Mode, Shift, Uniform

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

LAWS = {"uniform": Uniform(), "logit-normal(0, 1)": LogitNormal(), "mode(1.29)": Mode()}


def main() -> None:
    t = jnp.linspace(0.002, 0.998, 500)
    index = jnp.arange(40_000, dtype=jnp.uint32)
    figure, axes = plt.subplots(1, len(LAWS), figsize=(12, 3.4), sharey=True)
    for axis, (name, law) in zip(axes, LAWS.items(), strict=True):
        for factor, color in ((1.0, "tab:blue"), (3.0, "tab:orange"), (7.0, "tab:red")):
            shift = Shift(factor)
            samples = np.asarray(shift(law.sample(sample_keys(jax.random.key(0), index)), 1))
            axis.hist(samples, bins=60, range=(0, 1), density=True, alpha=0.25, color=color)
            axis.plot(t, shift.density(law, t), color=color, label=f"shift {factor:g}")
        axis.set(title=name, xlabel="t (0 noise, 1 data)", ylim=(0, 6))
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "timesteps.png", dpi=110)
    print(RESULTS / "timesteps.png")


if __name__ == "__main__":
    main()
