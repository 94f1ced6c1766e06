from dataclasses import replace

import pytest
import torch

from ddpm.conditioning import Conditioning
from ddpm.models.dit import DiTConfig
from ddpm.models.unet import UNetConfig

NETWORKS = {
    "unet": UNetConfig(channels=(8, 16), attention=(False, True), norm_groups=4, head_dim=8, text_dim=12),
    "dit": DiTConfig(width=16, depth=2, heads=2, text_dim=12),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", NETWORKS.values(), ids=NETWORKS)
def test_checkpointing_changes_memory_and_no_gradient(shape, dropout):
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) / 8 for name, weight in shape.build().state_dict().items()}
    x, t, text = torch.randn(4, 3, 8, 8), torch.arange(4.0), torch.randn(4, 5, 12)
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = replace(shape, dropout=dropout, checkpointing=checkpointing).build().train()
        network.load_state_dict(weights)
        torch.manual_seed(2)
        sizes = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = network(x, t, Conditioning(text=text, pooled=text[:, 0])).square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
    assert all(gradient.any() for name, gradient in gradients[0].items() if name != "null_text")
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)
