import pickle

import torch
from torch import nn

from pipelines.remote.shared import packed, unpacked


def test_a_value_comes_back_with_its_tensors_which_are_not_in_the_pickle():
    network = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 300)).eval().requires_grad_(False)
    network[2].bias.requires_grad_(True)
    network[2].weight = network[0].weight
    half, turned = torch.ones(3, dtype=torch.bfloat16), torch.arange(6.0).view(2, 3).T
    value = {"network": network, "also": [network[0].weight, half, turned], "name": "x"}
    data, arrays = packed(value)
    assert len(data) < 10_000
    assert sum(array.nbytes for array in arrays) > 4 * 300 * 300
    assert any(array.base is not None for array in arrays)  # views, no copies
    data, arrays = pickle.loads(pickle.dumps((data, arrays)))
    for array in arrays:
        array.flags.writeable = False  # as they come from Ray
    found = unpacked((data, arrays))
    copy = found["network"]
    assert copy.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(copy.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in network.parameters()]
    assert copy[2].weight is copy[0].weight is found["also"][0]
    assert not copy.training
    assert torch.equal(found["also"][1], half)
    assert torch.equal(found["also"][2], turned)
    assert found["also"][2].stride() == turned.stride()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in copy.parameters())  # or kernels would add in another order
    copy[0].bias.fill_(7)
    assert (network[0].bias != 7).all()
