"""Trains a network of your own, with your own loss and data, in a loop of your own."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import dpsgd

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels, held_out = (
    torch.tensor(digits.target),
    torch.arange(len(digits.target)) % 5 == 0,
)
train_images, train_labels = images[~held_out], labels[~held_out]

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.GroupNorm(4, 16), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.GroupNorm(4, 32), nn.Flatten()),
    nn.Linear(32 * 4 * 4, 10),
)
dpsgd.check_model(model, image_shape=(1, 8, 8))  # nothing in it mixes examples
params = dpsgd.trainable_params(model)


def loss_fn(params, image, label):
    """Returns the loss of one example, whatever you like it to be."""
    logits = functional_call(model, params, (image[None],))
    return F.cross_entropy(logits, label[None], label_smoothing=0.1)


# Public numbers: declared, never counted from private data.
BATCH, NUM_EXAMPLES = 256, 1437
PLAN = {"sample_rate": BATCH / NUM_EXAMPLES, "num_steps": 60, "delta": 1e-4}
accountant = dpsgd.PRVAccountant()
noise = dpsgd.calibrate_noise_multiplier(
    target_epsilon=8.0, accountant=accountant, **PLAN
)
mechanism = dpsgd.DPSGDMechanism(
    noise_multiplier=noise, clipping_norm=1.0, expected_batch_size=BATCH, **PLAN
)
streams = dpsgd.RandomStreams.from_seed(None)  # from the operating system's entropy
sampler = dpsgd.PoissonSampler(
    num_rows=len(train_labels), sample_rate=mechanism.sample_rate, streams=streams
)
grad_fn = dpsgd.clipped_grad(loss_fn, clipping_norm=1.0, microbatch_size=64)

for step in range(mechanism.num_steps):
    draw = torch.from_numpy(sampler.draw(step))  # any size; an empty draw counts too
    grads = grad_fn(params, train_images[draw], train_labels[draw])
    update = dpsgd.noisy_grad(
        grads.clipped_sum,
        mechanism,
        l2_sensitivity=grad_fn.l2_sensitivity,
        noise_key=streams.noise_key(step),  # of this step, and of no other
    )
    for name, leaf in params.items():
        leaf -= 2.0 * update[name]

guesses = functional_call(model, params, (images[held_out],)).argmax(dim=1)
accuracy = (guesses == labels[held_out]).float().mean()
epsilon = dpsgd.PrivacyLedger(mechanism, accountant).epsilon_exactly(step + 1)
print(f"test accuracy {accuracy:.4f}, ({epsilon:.4f}, {mechanism.delta:g})-DP")
