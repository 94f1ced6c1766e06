import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from ddpm.conditioning import Conditioning
from ddpm.models.dit import PatchAttention, rotated
from ddpm.models.jit import JiTConfig, RMSNorm, SwiGLU, rotary_positions
from tests.ddpm.on_patches import batch, make, small

PUBLISHED = {
    "B": ((768, 12, 12, 128, 4), 131, 25),
    "L": ((1024, 24, 16, 128, 8), 459, 88),
    "H": ((1280, 32, 16, 256, 10), 953, 182),
}
"""Width, depth, heads, bottleneck and first block with class tokens, then millions of parameters and billions of
multiplications of an image of 256 x 256 pixels in patches of 16 (Li & He 2025, tables 5 and 9)."""
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_networks_of_the_paper_have_its_numbers_of_parameters_and_operations(size):
    (width, depth, heads, bottleneck, tokens_from), millions, billions = PUBLISHED[size]
    with torch.device("meta"):
        network = JiTConfig(
            width=width,
            depth=depth,
            heads=heads,
            bottleneck=bottleneck,
            class_tokens_from=tokens_from,
            num_classes=1000,
        ).build()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 256, 256), torch.zeros(1), Conditioning(label=torch.zeros(1, dtype=torch.long)))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    assert round(counter.get_total_flops() / 2e9) == billions


def test_a_query_times_a_key_depends_on_the_offset_of_their_patches_alone():
    rotation = rotary_positions(rows=5, columns=7, channels=16, unrotated=0, device=CPU)
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).double()
    q, k = (rotated(x.expand(1, 1, 35, 16), rotation)[0, 0].view(5, 7, 16) for x in (query, key))
    products = torch.einsum("abc,dec->abde", q, k)
    for down in range(-4, 5):
        for across in range(-6, 7):
            same = [
                products[row, column, row + down, column + across]
                for row in range(max(0, -down), min(5, 5 - down))
                for column in range(max(0, -across), min(7, 7 - across))
            ]
            torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), rtol=0, atol=1e-5)
    assert products[0, 0].flatten().unique().numel() == 35


def test_positions_turn_pairs_of_channels_as_complex_numbers():
    """Half of the pairs turn by the row and half by the column, by 1 / 10000^(i / pairs) a patch."""
    rows, columns, channels = 3, 4, 24
    x = torch.randn(1, 2, 2 + rows * columns, channels).double()
    turned = rotated(x, rotary_positions(rows, columns, channels, unrotated=2, device=CPU))
    numbers = torch.complex(x[..., :12], x[..., 12:])
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    turn = torch.polar(torch.ones(()).double(), place.repeat_interleave(6, 1) / 10000 ** (torch.arange(12) % 6 / 6))
    expected = torch.cat([numbers[:, :, :2], numbers[:, :, 2:] * turn], dim=2)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[:, :, :2], x[:, :, :2])


def test_permuted_patches_with_their_positions_are_transformed_to_the_same_patches_permuted():
    network = make("jit", num_classes=3)
    x, emb = torch.randn(2, 12, 32), torch.randn(2, 32)
    order = torch.randperm(12)
    cos, sin = rotary_positions(3, 4, 8, 0, CPU)
    for block in network.blocks:
        out = block(x, emb, None, (cos, sin))
        torch.testing.assert_close(block(x[:, order], emb, None, (cos[order], sin[order])), out[:, order])
        assert not torch.allclose(block(x[:, order], emb, None, (cos, sin)), out[:, order], atol=1e-3)


def test_attention_is_that_of_normed_rotated_queries_and_keys():
    attention = PatchAttention(32, 4, RMSNorm)
    for norm in (attention.norm_q, attention.norm_k):
        nn.init.uniform_(norm.weight, 0.5, 2)
    x, rotation = torch.randn(2, 6, 32), rotary_positions(2, 3, 8, 0, CPU)
    q, k, v = F.linear(x, attention.to_qkv.weight, attention.to_qkv.bias).view(2, 6, 3, 4, 8).unbind(2)
    q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm_q.weight
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm_k.weight
    q, k = (rotated(part.transpose(1, 2), rotation) for part in (q, k))
    mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(attention(x, rotation), attention.to_out(mixed.transpose(1, 2).flatten(2)))
    large = 1000 * attention.to_qkv.weight[:64]
    with torch.no_grad():
        expected = attention(x, rotation)
        attention.to_qkv.weight[:64], attention.to_qkv.bias[:64] = large, 1000 * attention.to_qkv.bias[:64]
    torch.testing.assert_close(attention(x, rotation), expected, rtol=1e-3, atol=1e-4)


def test_a_hidden_channel_of_the_perceptron_is_gated_by_another():
    mlp, x = SwiGLU(8, 12), torch.randn(3, 8)
    gate, up = (x @ mlp.gate_up.weight[part].T + mlp.gate_up.bias[part] for part in (slice(12), slice(12, 24)))
    torch.testing.assert_close(mlp(x), mlp.down(gate * gate.sigmoid() * up))


def test_the_class_reaches_the_patches_by_its_tokens_beside_them():
    """Where the class neither scales nor shifts, its tokens make the difference, and from their first block on."""
    network, (x, t) = make("jit", num_classes=10), batch()
    for block in network.blocks:
        nn.init.zeros_(block.modulation.weight)
    nn.init.zeros_(network.modulation_out.weight)
    one, other = (network(x, t, Conditioning(label=torch.full((4,), label))) for label in (2, 7))
    assert not torch.allclose(one, other, atol=1e-4)
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[1], len(inputs[3][0]))))
    network(x, t)
    assert seen == [(16, 16), (19, 19)]


def test_a_network_without_a_condition_has_no_tokens_of_one():
    assert "class_tokens" not in make("jit").state_dict()
    assert "class_tokens" not in make("jit", num_classes=10, class_tokens=0).state_dict()
    network, (x, t) = make("jit", num_classes=10, class_tokens=0), batch()
    assert not torch.allclose(network(x, t), network(x, t, Conditioning(label=torch.arange(4))))


def test_dropout_is_in_the_middle_half_of_the_blocks():
    blocks = small("jit", depth=8, dropout=0.2).build().blocks
    assert [block.dropout.p for block in blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 40}, r"width = 40 / heads = 4 is not divisible by 4"),
        (
            {"class_tokens_from": 2},
            r"class_tokens_from = 2 is no block of depth = 2: write 0 to 1, or class_tokens = 0",
        ),
        ({"bottleneck": 0}, "bottleneck must be >= 1, got 0"),
        ({"heads": 5}, "width = 32 is not divisible by heads = 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small("jit", **changes)
