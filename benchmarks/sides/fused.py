"""The floor: batched tensors written by hand for one model, the tabular MLP 30-64-32-2, and nothing else. No framework, no accounting, no checks.

A chunk of sites that fits the cache goes through a whole round at once: one batched product a layer forward, backward and for the gradients, no
autograd. With privacy: Poisson batches, padded; norms of patients from factors (a linear layer's gradient is an outer product, whose norm is
the product of two); clipping as weights of the same product; noise of torch's generator.

S: sites of a chunk. B: rows of a padded batch. A bias is the last row of its layer's weights, and every input ends in a 1.
"""

import itertools
from pathlib import Path

import torch
from models import FEATURES, HIDDEN
from side import Setting, Train, opened, run

CHUNK = 64
WIDTHS = (FEATURES, *HIDDEN, 2)
SHAPES = [(wide + 1, narrow) for wide, narrow in itertools.pairwise(WIDTHS)]
SIZES = [rows * columns for rows, columns in SHAPES]


def to_rows(vector: torch.Tensor) -> torch.Tensor:
    """Weights and biases in torch's order -> layer by layer the matrix of inputs by outputs, its bias below."""
    parts = torch.split(vector, [size for rows, columns in SHAPES for size in ((rows - 1) * columns, columns)])
    layers = [torch.cat([weight.view(columns, -1).T, bias[None]]) for (_, columns), weight, bias in zip(SHAPES, parts[::2], parts[1::2], strict=True)]
    return torch.cat([layer.reshape(-1) for layer in layers])


def to_vector(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_rows`."""
    layers = [part.view(shape) for part, shape in zip(torch.split(rows, SIZES), SHAPES, strict=True)]
    return torch.cat([part for layer in layers for part in (layer[:-1].T.reshape(-1), layer[-1])])


def layers_of(flat: torch.Tensor) -> list[torch.Tensor]:
    """Views of `(S, D)`: each layer's `(S, inputs + 1, outputs)`."""
    return [part.view(len(flat), *shape) for part, shape in zip(torch.split(flat, SIZES, dim=1), SHAPES, strict=True)]


class Chunk:
    """Some sites' patients, and the round of all of them."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, setting: Setting) -> None:
        self.sites, self.patients = labels.shape
        self.rows = torch.cat([inputs, torch.ones(*labels.shape, 1)], dim=2).view(-1, FEATURES + 1)
        self.squares = self.rows.square().sum(dim=1)
        self.targets = labels.float().view(-1)
        self.setting = setting
        self.steps = -(-self.patients // setting.batch_size)

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Step by step: the rows of all sites' padded batches, `(S B,)`, and 1 where a row is a patient's, `(S, B)`."""
        if self.setting.private:
            chosen = torch.rand(self.steps * self.sites, self.patients) < self.setting.batch_size / self.patients
            which, patient = chosen.nonzero(as_tuple=True)
        else:
            order = torch.rand(self.sites, self.patients).argsort(dim=1)
            step = (torch.arange(self.patients) // self.setting.batch_size).expand_as(order)
            which, by_batch = (step * self.sites + torch.arange(self.sites)[:, None]).view(-1).sort(stable=True)
            patient = order.view(-1)[by_batch]
        counts = torch.bincount(which, minlength=self.steps * self.sites)
        place = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        rows = (torch.arange(len(counts)) % self.sites * self.patients)[:, None].repeat(1, int(counts.max()))
        present = torch.zeros(rows.shape)
        rows[which, place] += patient
        present[which, place] = 1.0
        longest = counts.view(self.steps, self.sites).amax(dim=1).tolist()
        steps = zip(rows.split(self.sites), present.split(self.sites), longest, strict=True)
        return [(own[:, :most].reshape(-1), there[:, :most].contiguous()) for own, there, most in steps]

    def train(self, received: torch.Tensor) -> torch.Tensor:
        """The sum of the sites' parameters after a round from `received`, `(D,)`."""
        setting = self.setting
        flat = received.expand(self.sites, -1).contiguous()
        release = torch.zeros_like(flat)
        weights, gradients = layers_of(flat), layers_of(release)
        for rows, present in self.batches():
            taken = self.rows.index_select(0, rows).view(*present.shape, -1)
            first, slope1 = activate(torch.bmm(taken, weights[0]))
            second, slope2 = activate(torch.bmm(first, weights[1]))
            apart = weights[2][..., 1:] - weights[2][..., :1]  # softmax over two classes is the sigmoid of what they differ by
            error3 = torch.bmm(second, apart).sigmoid_().squeeze(2).sub_(self.targets.index_select(0, rows).view(present.shape))
            error2 = slope2 * apart[:, :-1].mT * error3[..., None]
            error1 = torch.bmm(error2, weights[1][:, :-1].mT).mul_(slope1)
            if setting.private:
                squares = torch.linalg.vector_norm(error1, dim=2).square_().mul_(self.squares.index_select(0, rows).view(present.shape))
                squares.addcmul_(torch.linalg.vector_norm(error2, dim=2).square_(), HIDDEN[0] + 1 - slope1.sum(dim=2))
                squares.addcmul_(error3.square().mul_(2), HIDDEN[1] + 1 - slope2.sum(dim=2))
                share = squares.rsqrt_().mul_(setting.max_grad_norm).clamp_(max=1.0).mul_(present)
                release.normal_(std=setting.noise_multiplier * setting.max_grad_norm)
            else:
                share = present * (setting.batch_size / present.sum(dim=1, keepdim=True))
                release.zero_()
            gradients[0].add_(torch.bmm(taken.mT, error1.mul_(share[..., None])))
            gradients[1].add_(torch.bmm(first.mT, error2.mul_(share[..., None])))
            last = torch.bmm(second.mT, error3.mul_(share)[..., None])
            gradients[2].add_(torch.cat([-last, last], dim=2))
            flat.sub_(release, alpha=setting.learning_rate / setting.batch_size)
        return flat.sum(dim=0)


def activate(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tanh with a 1 after it, and its slope 1 - tanh^2. By tanh x = 2 sigmoid(2x) - 1, which torch computes in a sixth of the time."""
    half = sums.mul_(2).sigmoid_()
    outputs = torch.ones(*sums.shape[:2], sums.shape[2] + 1)
    torch.sub(half, 0.5, out=outputs[..., :-1]).mul_(2)
    return outputs, torch.addcmul(half, half, half, value=-1).mul_(4)


def make_train(folder: Path, sites: range) -> Train:
    """Rounds of these sites, chunk by chunk."""
    setting, patients = opened(folder)
    torch.set_grad_enabled(False)
    chunks = []
    for start in range(sites.start, sites.stop, CHUNK):
        part = slice(start, min(start + CHUNK, sites.stop))
        inputs, labels = (torch.from_numpy(values[part, : setting.train]) for values in (patients.inputs, patients.labels))
        chunks.append(Chunk(inputs, labels, setting))

    def train(received: torch.Tensor) -> torch.Tensor:
        rows = to_rows(received)
        return to_vector(torch.stack([chunk.train(rows) for chunk in chunks]).sum(dim=0))

    return train


if __name__ == "__main__":
    run("fused", make_train)
