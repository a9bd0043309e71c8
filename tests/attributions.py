"Attributions of any shape, for tests of what is computed from them"
import torch


def made(shape, kind, seed):
    "Return an attribution whose sums are exact in float32"
    g = torch.Generator().manual_seed(seed)
    def integers(high): return torch.randint(0, high, shape, generator=g)
    if kind == 'ties': return integers(4) / 4
    if kind == 'sparse':
        return integers(2**12) * (torch.rand(shape, generator=g) < 0.2) / 2**6
    if kind == 'zero': return torch.zeros(shape)
    if kind == 'flat': return torch.full(shape, 0.5)
    if kind == 'distinct':  # in each image, no value twice
        order = torch.rand(shape, generator=g).flatten(1).argsort(1)
        return (order.view(shape) + 1) / 2**7
    return integers(2**14) / 2**7
