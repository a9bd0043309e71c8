"Attributions of any shape, for tests of what is computed from them"
import torch


def made(shape, kind, seed):
    "An attribution whose sums are exact in float32"
    g = torch.Generator().manual_seed(seed)
    if kind == 'ties': return torch.randint(0, 4, shape, generator=g) / 4
    if kind == 'sparse': return torch.randint(0, 2**12, shape, generator=g) * (torch.rand(shape, generator=g) < 0.2) / 2**6
    if kind == 'zero': return torch.zeros(shape)
    if kind == 'flat': return torch.full(shape, 0.5)
    if kind == 'distinct': return (torch.rand(shape, generator=g).flatten(1).argsort(1).view(shape) + 1) / 2**7  # in each image, no value twice
    return torch.randint(0, 2**14, shape, generator=g) / 2**7
