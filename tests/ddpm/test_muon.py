"""Muon: orthogonal updates of hidden matrices, and AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from ddpm.models import NETWORKS
from ddpm.muon import Muon, hidden_matrices, orthogonalized


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(24, 24), (16, 60), (60, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_and_schulz_give_nearly_orthogonal_matrices_with_the_same_singular_vectors(shape, dtype):
    # Singular values from 0.05 to 1, in a known basis.
    rank = min(shape)
    left, right = torch.linalg.qr(random(shape[0], rank))[0], torch.linalg.qr(random(shape[1], rank, seed=1))[0]
    found = orthogonalized(left @ torch.linspace(0.05, 1, rank).diag() @ right.T, dtype)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.65
    assert values.max() < 1.25
    inside = left.T @ found @ right
    assert (inside - inside.diag().diag()).abs().max() < (0.05 if dtype is torch.bfloat16 else 1e-5)


def test_the_scale_of_a_gradient_does_not_matter_and_no_gradient_is_no_update():
    matrix = random(8, 20, dtype=torch.float64)
    found = orthogonalized(1e3 * matrix, torch.float64)
    torch.testing.assert_close(found, orthogonalized(matrix, torch.float64), rtol=1e-5, atol=1e-7)
    assert torch.equal(orthogonalized(torch.zeros(4, 6), torch.float32), torch.zeros(4, 6))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [6, 40])
def test_a_convolution_is_updated_as_the_matrix_by_which_it_multiplies_patches(memory_format, width):
    weight = random(width, 4, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(weight.clone(memory_format=memory_format))
    flat = nn.Parameter(weight.flatten(1).clone())
    settings = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9}
    one, other = Muon([conv], [], **settings), Muon([flat], [], **settings)
    for step in range(3):
        gradient = random(width, 4, 3, 3, dtype=torch.float64, seed=step)
        conv.grad, flat.grad = gradient.clone(memory_format=memory_format), gradient.flatten(1)
        one.step()
        other.step()
    torch.testing.assert_close(conv.detach().flatten(1), flat.detach(), rtol=1e-9, atol=1e-12)


def test_an_update_is_that_of_torch_up_to_the_precision_of_its_iteration():
    weight, mine = nn.Parameter(random(12, 30)), nn.Parameter(random(12, 30))
    torchs = torch.optim.Muon([weight], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    ours = Muon([mine], [], lr=0.1, weight_decay=0.1, momentum=0.9)
    for step in range(3):
        weight.grad, mine.grad = random(12, 30, seed=step), random(12, 30, seed=step)
        torchs.step()
        ours.step()
    torch.testing.assert_close(mine.detach(), weight.detach(), rtol=0, atol=4e-3)
    assert (mine.detach() - random(12, 30)).abs().mean() > 0.01


def test_parameters_that_are_no_hidden_matrices_are_those_of_adamw_bit_for_bit():
    bias, same = nn.Parameter(random(5)), nn.Parameter(random(5))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    mixed = Muon([nn.Parameter(random(3, 4))], [bias], **settings)
    adamw = torch.optim.AdamW([same], **settings, fused=True)
    for step in range(3):
        bias.grad, same.grad = random(5, seed=step), random(5, seed=step)
        for optimizer in (mixed, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)  # as a step sets it
            optimizer.step()
    assert torch.equal(bias, same)
    assert mixed.state[bias].keys() == adamw.state[same].keys()


def test_a_stored_state_continues_with_the_same_updates_of_both_parts():
    def steps(optimizer: Muon, parameters: list[nn.Parameter], first: int) -> None:
        for step in range(first, first + 3):
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=step)
            optimizer.step()

    once = [nn.Parameter(random(3, 4)), nn.Parameter(random(5))]
    optimizer = Muon(once[:1], once[1:], lr=0.1)
    steps(optimizer, once, 0)
    again = [nn.Parameter(parameter.detach().clone()) for parameter in once]
    resumed = Muon(again[:1], again[1:], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, once, 3)
    steps(resumed, again, 3)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert resumed.state[again[1]]["step"] == 6


@pytest.mark.parametrize(
    "kind, settings, edges",
    [
        ("unet", {"channels": (64,), "attention": (True,)}, ("conv_in", "conv_out")),
        ("dit", {"width": 32, "depth": 2, "heads": 2}, ("patch_embedding", "linear_out")),
        (
            "jit",
            {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "class_tokens_from": 1},
            ("patch_embedding.0", "linear_out"),
        ),
    ],
)
def test_first_and_last_layer_embeddings_norms_and_biases_are_no_hidden_matrices(kind, settings, edges):
    network = NETWORKS[kind](num_classes=10, text_dim=16, **settings).build()
    ids = {id(matrix) for matrix in hidden_matrices(network)}
    others = {name for name, parameter in network.named_parameters() if id(parameter) not in ids}
    assert {f"{edge}.weight" for edge in edges} | {"class_embedding.weight", "null_text"} <= others
    assert {name for name, p in network.named_parameters() if p.dim() < 2} <= others
    assert all(
        p.dim() < 2 or name.startswith((*edges, "class_emb", "class_tokens"))
        for name, p in network.named_parameters()
        if name in others
    )
