"""Trains a network of your own, with your own loss and data, in a loop of your own."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import dpsgd

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
is_test = torch.arange(len(labels)) % 5 == 0
train_images, train_labels = images[~is_test], labels[~is_test]

NUM_EXAMPLES, BATCH, STEPS, DELTA = 1437, 256, 60, 1e-4  # public: declared, not counted

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


accountant = dpsgd.PRVAccountant()
mechanism = dpsgd.DPSGDMechanism(
    sample_rate=BATCH / NUM_EXAMPLES,
    num_steps=STEPS,
    noise_multiplier=dpsgd.calibrate_noise_multiplier(
        target_epsilon=8.0,
        sample_rate=BATCH / NUM_EXAMPLES,
        num_steps=STEPS,
        delta=DELTA,
        accountant=accountant,
    ),
    clipping_norm=1.0,
    expected_batch_size=BATCH,
    delta=DELTA,
)
streams = dpsgd.RandomStreams.from_seed(None)  # from the operating system's entropy
sampler = dpsgd.PoissonSampler(
    num_rows=len(train_labels), sample_rate=mechanism.sample_rate, streams=streams
)
grad_fn = dpsgd.clipped_grad(
    loss_fn, clipping_norm=mechanism.clipping_norm, microbatch_size=64
)
ledger = dpsgd.PrivacyLedger(mechanism, accountant)

for step in range(mechanism.num_steps):
    ledger.require(step + 1)
    draw = torch.from_numpy(sampler.draw(step))  # any size; an empty draw counts too
    grads = grad_fn(params, train_images[draw], train_labels[draw])
    noise_key = streams.noise_key(step)  # of this step, and of no other
    update = dpsgd.noisy_grad(
        grads.clipped_sum,
        mechanism,
        l2_sensitivity=grad_fn.l2_sensitivity,
        noise_key=noise_key,
    )
    for name, leaf in params.items():
        leaf -= 2.0 * update[name]

with torch.no_grad():
    guesses = functional_call(model, params, (images[is_test],)).argmax(dim=1)
accuracy = (guesses == labels[is_test]).float().mean().item()
epsilon = ledger.epsilon_exactly(mechanism.num_steps)
print(f"test accuracy {accuracy:.4f}, ({epsilon:.4f}, {DELTA:g})-DP")
