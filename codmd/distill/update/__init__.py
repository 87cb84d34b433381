"""The update rule: losses, rollouts, noise, optimizers, running averages."""
